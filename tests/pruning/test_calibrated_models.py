"""Calibrated pruning of whole models: block by block, experts by their own rows, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning import prunable_weights, sparsify
from pruning.calibrated import CALIBRATED, DampingRaised, layer_hessian, prune, prune_calibrated, sparsegpt, wanda_mask
from pruning.calibrated.blocks import record_calls
from pruning.calibrated.capture import Moments
from tests.pruning.toy import tokens, toy
from tests.tolerances import close
from tests.training.models import small_model

BATCHES = [torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def language_model(*, experts=0, dtype=torch.float64, layers=2):
    torch.manual_seed(0)
    model = small_model(experts=experts, layers=layers).to(dtype).eval()
    for parameter in prunable_weights(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs_of(model, name, batches):
    """What a Linear of the model gets, by a hook of the test's own."""
    rows = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: rows.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_each_block_sees_what_the_pruned_blocks_before_it_put_out(method):
    dense, model = language_model(), language_model()
    report = prune_calibrated(model, BATCHES, method=method, sparsity=0.5, block=8, dtype=torch.float64)
    assert report.sequential and report.masks.sparsity == 0.5
    # layers.1 as calibrated: its own weights dense, layers.0 pruned
    half = copy.deepcopy(dense)
    half.layers[0].load_state_dict(model.layers[0].state_dict())
    for start, names in ((dense, ["layers.0.attention.query", "layers.0.feedforward.down"]),
                         (half, ["layers.1.attention.value", "layers.1.feedforward.down"])):  # fmt: skip
        for name in names:
            x, weight = inputs_of(start, name, BATCHES), dense.get_submodule(name).weight.detach()
            count = weight.numel() // 2
            if method == "wanda":
                expected = weight * wanda_mask(weight, x.square().sum(0), count)
            else:
                expected = sparsegpt(weight, layer_hessian(x.mT @ x, len(x)), count, block=8)[0]
            close(model.get_submodule(name).weight, expected)


ANY_SHARE = [method for method in CALIBRATED if method != "descent"]


@pytest.mark.parametrize("method", ANY_SHARE)
@pytest.mark.parametrize("experts", [0, 4])
def test_counts_are_exact_matrix_by_matrix_and_the_model_holds_its_masks(method, experts):
    model = language_model(experts=experts, dtype=torch.float32)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    report = prune_calibrated(model, BATCHES, method=method, sparsity=0.3)
    for matrix in report.matrices:
        assert matrix.zeros == matrix.total * 3 // 10 and matrix.rows > 0
    for name, weight in prunable_weights(model).items():
        assert ((weight == 0) == ~report.masks.kept[name]).all()
        dense.pop(name)
    assert all(model.state_dict()[name].equal(value) for name, value in dense.items())
    assert "weights are zero (29." in str(report)


@pytest.mark.parametrize("method", ANY_SHARE)
def test_nothing_asked_changes_no_bit_of_a_bf16_model(method):
    model = language_model(experts=3, dtype=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    assert prune_calibrated(model, BATCHES, method=method, sparsity=0.0).masks.zeros == 0
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_bf16_weights_are_pruned_in_float32_arithmetic():
    half, wide = language_model(dtype=torch.bfloat16), language_model(dtype=torch.bfloat16).float()
    masks = sparsify(half, sparsity=0.5, method="sparsegpt", calibration=BATCHES)
    sparsify(wide, sparsity=0.5, method="sparsegpt", calibration=BATCHES)
    assert half.layers[0].attention.query.weight.dtype == torch.bfloat16 and masks.sparsity == 0.5
    name = "layers.0.attention.query.weight"
    both = half.get_parameter(name).ne(0) & wide.get_parameter(name).ne(0)
    assert both.sum() > 0.45 * both.numel()
    close(half.get_parameter(name)[both], wide.get_parameter(name)[both], torch.bfloat16)


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "descent"])
def test_under_autocast_sums_and_solvers_stay_in_float32(method, monkeypatch):
    model, seen = language_model(dtype=torch.float32), []

    def watched(gram, rows):
        seen.append((gram.dtype, torch.is_autocast_enabled("cpu"), gram))
        return layer_hessian(gram, rows)

    monkeypatch.setattr(prune, "layer_hessian", watched)
    with torch.autocast("cpu", torch.bfloat16):
        prune_calibrated(copy.deepcopy(model), BATCHES, method=method, structure="2:4")
    assert {part[:2] for part in seen} == {(torch.float32, False)}
    # small terms outlive the sum over many batches: 256 equal batches count 256 times as one does
    once, grams = seen[0][2], len(seen)
    with torch.autocast("cpu", torch.bfloat16):
        prune_calibrated(copy.deepcopy(model), BATCHES * 100, method=method, structure="2:4")
    close(seen[grams][2] / 100, once, torch.float32)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "obs", "magnitude", "admm", "descent"])
def test_n_of_m_runs_over_inputs_of_linears_and_experts(method):
    model = language_model(experts=3, dtype=torch.float32)
    report = prune_calibrated(model, BATCHES, method=method, structure="2:4")
    assert report.masks.sparsity == 0.5
    kept = report.masks.kept["layers.0.attention.query.weight"]
    assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    up, down = (report.masks.kept[f"layers.1.feedforward.experts.{name}"] for name in ("up", "down"))
    assert (up.unflatten(1, (-1, 4)).sum(2) == 2).all() and (down.unflatten(2, (-1, 4)).sum(-1) == 2).all()


def test_experts_are_calibrated_on_the_rows_that_the_router_gave_them():
    dense = language_model(experts=4, layers=1)
    model = copy.deepcopy(dense)
    report = prune_calibrated(model, BATCHES, method="sparsegpt", sparsity=0.5, dtype=torch.float64, block=8)
    moe, seen = dense.layers[0].feedforward, []
    handle = moe.register_forward_hook(lambda module, args, output: seen.append((args[0].reshape(-1, 16), output[1])))
    with torch.no_grad():
        for batch in BATCHES:
            dense(batch)
    handle.remove()
    for expert in range(4):
        x = torch.stack([rows[t] for rows, routing in seen
                         for t, e in zip(routing.token, routing.expert, strict=True) if e == expert])  # fmt: skip
        pre = x @ moe.experts.up[expert]
        hidden = F.silu(pre[:, :16]) * pre[:, 16:]
        for name, given, stored in (("up", x, moe.experts.up[expert].mT), ("down", hidden, moe.experts.down[expert])):
            hessian = layer_hessian((given.mT @ given).detach(), len(given))
            expected = sparsegpt(stored.detach(), hessian, stored.numel() // 2, block=8)[0]
            now = getattr(model.layers[0].feedforward.experts, name)[expert]
            close(now.mT if name == "up" else now, expected)
            line = next(m for m in report.matrices if m.name == f"layers.0.feedforward.experts.{name}[{expert}]")
            assert line.rows == len(given)


def test_an_expert_without_rows_goes_by_magnitude_and_is_listed():
    model = language_model(experts=4, layers=1)
    with torch.no_grad():
        model.layers[0].feedforward.router.weight.zero_()
    before = model.layers[0].feedforward.experts.up.detach().clone()
    with pytest.warns(UserWarning, match=r"no calibration row reached .*experts.up\[\d\].*: pruned by magnitude"):
        report = prune_calibrated(model, BATCHES, method="sparsegpt", sparsity=0.5)
    names = [f"layers.0.feedforward.experts.{name}[{e}]" for name in ("up", "down") for e in range(4)]
    assert len(report.unseen) == 4 and set(report.unseen) < set(names)
    for e in (e for e in range(4) if names[e] in report.unseen):
        kept = report.masks.kept["layers.0.feedforward.experts.up"][e]
        assert before[e].abs()[kept].min() >= before[e].abs()[~kept].max()
        assert int((~kept).sum()) == kept.numel() // 2
        assert model.layers[0].feedforward.experts.up[e][kept].equal(before[e][kept])


def test_padding_does_not_count():
    model, other = language_model(), language_model()
    ids = BATCHES[0].clone()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 10:] = False
    first = prune_calibrated(model, [{"input_ids": ids, "attention_mask": mask}], method="sparsegpt", sparsity=0.5)
    ids[1, 10:] = 7
    prune_calibrated(other, [{"input_ids": ids, "attention_mask": mask}], method="sparsegpt", sparsity=0.5)
    assert {matrix.rows for matrix in first.matrices} == {26}
    for name, weight in prunable_weights(model).items():
        close(weight, other.get_parameter(name), torch.float32)


class Unchained(nn.Module):
    """Two lists of modules in turn, a Linear outside them, and one never called."""

    def __init__(self):
        super().__init__()
        self.stem, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x.tanh())
        return x


def test_what_is_no_chain_of_blocks_is_calibrated_on_dense_inputs_with_a_warning():
    model, ids = toy((2, 2, 8), (2, 1, 8)), tokens()
    dense = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="'attention' do not feed one another once each"):
        report = prune_calibrated(model, [ids], method="wanda", sparsity=0.5, dtype=torch.float64)
    assert not report.sequential
    for name in ("feedforward.1.down", "attention.1.k"):
        x, weight = inputs_of(dense, name, [ids]), dense.get_submodule(name).weight
        assert report.masks.kept[f"{name}.weight"].equal(wanda_mask(weight, x.square().sum(0), weight.numel() // 2))


def test_a_weight_that_is_never_multiplied_is_named():
    model = Unchained()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="must reach unused.weight, got no row"):
        prune_calibrated(model, [torch.randn(4, 6)], method="wanda", sparsity=0.5)
    names = ["stem.weight", "blocks.0.weight"]
    with pytest.warns(UserWarning):
        assert prune_calibrated(model, [torch.randn(4, 6)], method="wanda", sparsity=0.5, weights=names).masks.zeros


class Shared(nn.Module):
    """Blocks that share one Linear, and a head after them that is pruned too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2))
        self.layers[1][2].weight = self.layers[0][2].weight
        self.pooler = nn.Linear(6, 6)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.pooler(x)


def test_shared_and_outer_weights_come_last_on_the_pruned_model():
    torch.manual_seed(1)
    model, x = Shared().double(), torch.randn(40, 6, dtype=torch.float64)
    dense = copy.deepcopy(model)
    report = prune_calibrated(model, [x], method="sparsegpt", sparsity=0.5, dtype=torch.float64)
    assert [matrix.name for matrix in report.matrices] == [
        "layers.0.0.weight", "layers.1.0.weight", "layers.0.2.weight", "pooler.weight"]  # fmt: skip
    assert model.layers[0][2].weight is model.layers[1][2].weight
    half = copy.deepcopy(dense)
    for index in range(2):
        half.layers[index][0].weight = model.layers[index][0].weight
    rows = torch.cat([inputs_of(half, f"layers.{index}.2", [x]) for index in range(2)])
    weight = dense.layers[0][2].weight.detach()
    close(model.layers[0][2].weight, sparsegpt(weight, layer_hessian(rows.mT @ rows, 80), 18)[0])


def test_refit_lowers_every_layer_error():
    plain = prune_calibrated(language_model(layers=1), BATCHES, method="sparsegpt", sparsity=0.6)
    better = prune_calibrated(language_model(layers=1), BATCHES, method="sparsegpt", sparsity=0.6, refit=True)
    for before, after in zip(plain.matrices, better.matrices, strict=True):
        assert after.error < before.error
    assert prune_calibrated(language_model(), BATCHES, method="magnitude", sparsity=0.5, refit=True).matrices[0].error


class Conv1D(nn.Module):
    """As in transformers' GPT-2: y = x·W + b with W [in, out]."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_conv1d_is_transposed_and_other_modules_are_refused_by_name():
    model, x = nn.Sequential(Conv1D()), torch.randn(30, 6)
    weight = model[0].weight.detach().mT.clone()
    report = prune_calibrated(model, [x], method="wanda", sparsity=0.5, weights=["0.weight"])
    assert report.masks.kept["0.weight"].mT.equal(wanda_mask(weight, x.square().sum(0), 12))
    odd = nn.Sequential(nn.Bilinear(2, 2, 2))
    with pytest.raises(ValueError, match=r"multiplies by \['weight'\]: supported are Linear, Conv1D, moe.Experts"):
        prune_calibrated(odd, [x], method="wanda", sparsity=0.5, weights=["0.weight"])


@pytest.mark.parametrize("options, message", [
    ({"sparsity": 1.0}, r"\[0, 1\), got 1.0"),
    ({}, "sparsity must be in .* got None"),
    ({"sparsity": 0.5, "calibration": None}, "method='wanda' needs calibration batches, got None"),
    ({"sparsity": 0.5, "calibration": []}, "at least one batch, got none"),
    ({"sparsity": 0.5, "calibration": BATCHES[0]}, "an iterable of batches, got one Tensor"),
    ({"sparsity": 0.5, "calibration": [BATCHES[0], BATCHES[0][:, :0]]}, r"one sample of one token, got shape \[2, 0\]"),
    ({"sparsity": 0.5, "calibration": [{"input_ids": BATCHES[0], "attention_mask": BATCHES[0] * 0}]}, "in batch 0 of"),
    ({"sparsity": 0.5, "allocation": lambda scores, share: {}}, r"attention.query.weight a count in \[0, 256\]"),
    ({"sparsity": 0.5, "loss": lambda model, batch: 0}, "takes no loss"),
    ({"structure": "2:5"}, r"attention.query.weight: 2:5 needs its inputs divisible by 5, got 16"),
    ({"structure": "2:4", "sparsity": 0.6}, "means sparsity=0.5, got 0.6"),
    ({"structure": "4:4"}, "0 < n < m, got 4:4"),
    ({"structure": "1:3", "method": "sparsegpt"}, "block must be a multiple of m=3 in 1:3, got 128"),
    ({"structure": "2:4", "method": "exact_obs"}, "structure must be None, got '2:4'"),
    ({"sparsity": 0.5, "method": "descent"}, "structure must be 'n:m', got None"),
])  # fmt: skip
def test_bad_options_change_nothing(options, message):
    model = language_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsify(model, **({"method": "wanda", "calibration": BATCHES} | options))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_more_bad_options():
    model = language_model()
    for options, message in [({"method": "nothing"}, "method must be one of admm, descent, exact_obs.* got 'nothing'"),
                             ({"damping": -0.1}, "damping must be in"), ({"block": 0}, "block must be >= 1, got 0"),
                             ({"dtype": torch.float16}, "float32 or torch.float64, got torch.float16")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prune_calibrated(model, BATCHES, sparsity=0.5, **options)


def test_inputs_that_are_not_finite_are_refused_by_layer():
    model = language_model()
    with torch.no_grad():
        model.layers[1].attention_norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"^layers.1.attention.query.weight: calibration inputs must be finite"):
        prune_calibrated(model, BATCHES, sparsity=0.5)


class Scaled(nn.Module):
    """x · scale: a block that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(1)), 0

    def forward(self, x, scale, *, flag=None):
        self.calls += 1
        return x * scale


class TwoScales(nn.Module):
    """Blocks 0, 1 and 4 get one scale of the batch, blocks 2 and 3 another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled() for _ in range(5))

    def forward(self, x):
        scales = x.mean() + torch.arange(2)
        low, high = scales[:1], scales[1:]
        for block, scale in zip(self.layers, (low, low, high, high, low), strict=True):
            x = block(x, scale, flag=None)
        return x


def test_later_batches_run_no_further_than_new_arguments_reach():
    model, batches = TwoScales(), [torch.randn(2, 3) for _ in range(3)]
    blocks = list(model.layers)
    recorded = record_calls(model, blocks, batches)
    assert recorded.chained and [block.calls for block in blocks] == [
        3,
        3,
        1,
        1,
        1,
    ]  # a call that is only recorded does not run
    for at, batch in enumerate(batches):
        assert torch.equal(recorded.states[at], batch)
        scales = [float(recorded.calls[index][at].arguments[0]) for index in range(5)]
        low = float(batch.mean())
        assert scales == pytest.approx([low, low, low + 1, low + 1, low])


def test_raised_damping_is_told_with_the_layer():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    batches = [torch.ones(2, 4)]  # four copies of one input
    with pytest.warns(DampingRaised, match=r"0\.weight: the Hessian is not positive definite with damping 0 "):
        report = prune_calibrated(model, batches, method="sparsegpt", sparsity=0.5, damping=0.0)
    assert [one.damping for one in report.matrices] == [0.01]
    assert "damping raised to 0.01" in str(report)


def test_products_of_inputs_are_not_rounded_under_autocast():
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    for diagonal in (False, True):
        moments = Moments(diagonal=diagonal)
        with torch.autocast("cpu", torch.bfloat16):
            moments.add("a", x)
        exact = x.double().mT @ x.double()
        close(moments.sums["a"], (exact.diagonal() if diagonal else exact).float())
