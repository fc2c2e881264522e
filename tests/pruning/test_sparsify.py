"""Exact counts under ties, what stays dense, and zeros that stay zero while training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pruning import (
    Sparsifier,
    cubic,
    global_ranking,
    linear,
    magnitude,
    n_of_m,
    one_shot,
    prunable_weights,
    select_masks,
    sparsify,
    taylor,
    uniform,
    unstructured,
)
from pruning.allocation import guarded_ranking
from pruning.recovery import Int8Linear
from tests.pruning.toy import tokens, toy
from tests.tolerances import close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Mixed(nn.Module):
    """Embedding, tied head, router, a Linear used twice, stacked experts: what must and must not be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.router = nn.Linear(8, 3)
        self.experts = nn.Parameter(torch.randn(3, 8, 4))
        self.down = nn.Linear(4, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.tied = nn.Linear(8, 11, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.embedding(ids)).relu())
        mixture = torch.einsum("ble,eio->blio", self.router(x).softmax(-1), self.experts)
        x = x + self.down(torch.einsum("bli,blio->blo", x, mixture))
        return self.head(x) + self.tied(x)


@given(arrays.arrays("int8", arrays.array_shapes(max_dims=3, max_side=6), elements=st.integers(-2, 2)), st.data())
def test_exactly_count_go_in_order_of_score_then_position(values, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    scores = torch.from_numpy(values).to(dtype)
    count = data.draw(st.integers(0, scores.numel()))
    keep = unstructured(scores, count)
    order = sorted(range(scores.numel()), key=lambda i: (scores.flatten()[i].item(), i))
    assert (~keep).flatten().nonzero().flatten().tolist() == sorted(order[:count])
    assert keep.shape == scores.shape


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.data())
def test_n_of_m_keeps_the_n_largest_of_each_group(n, more, groups, first, data):
    m = n + more
    row = st.lists(st.integers(-2, 2), min_size=groups * m, max_size=groups * m)
    scores = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)), dtype=torch.float32)
    view = scores.mT.contiguous() if first else scores
    keep = n_of_m(n, m, dim=0 if first else -1)(view, scores.numel() // m * more)
    keep = keep.mT if first else keep
    for line, kept in zip(scores.tolist(), keep.tolist(), strict=True):
        for start in range(0, groups * m, m):
            order = sorted(range(start, start + m), key=lambda i: (line[i], i))
            assert [kept[i] for i in range(start, start + m)] == [i in order[more:] for i in range(start, start + m)]


@given(st.integers(0, 99), st.sampled_from(["global", "uniform"]), st.sampled_from(["magnitude", "random"]))
def test_the_number_of_non_zeros_is_exact_even_where_all_weights_tie(percent, allocation, method):
    model = Mixed()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    masks = sparsify(model, sparsity=percent / 100, allocation=allocation, method=method)
    weights = prunable_weights(model)
    parts = [part for w in weights.values() for part in (w if w.ndim == 3 else [w])]
    zeros = [int((part == 0).sum()) for part in parts]
    if allocation == "global":
        assert sum(zeros) == percent * sum(part.numel() for part in parts) // 100
    else:
        assert zeros == [percent * part.numel() // 100 for part in parts]
    assert masks.zeros == sum(zeros) and masks.total == sum(part.numel() for part in parts)


def test_what_stays_dense():
    assert list(prunable_weights(Mixed())) == ["experts", "first.weight", "down.weight"]
    model = Mixed()
    before = copy.deepcopy(model.state_dict())
    sparsify(model, sparsity=0.9, allocation="global")
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"experts", "first.weight", "second.weight", "down.weight"}


def test_positions_tables_and_convolutions_are_no_stacks_of_experts():
    model = nn.Module()
    model.positions, model.cls = nn.Parameter(torch.randn(1, 5, 4)), nn.Parameter(torch.randn(1, 1, 4))
    model.convolution, model.linear = nn.Conv1d(4, 4, 3), nn.Linear(4, 4)
    assert list(prunable_weights(model)) == ["linear.weight"]
    assert list(prunable_weights(model, ["positions"])) == ["positions"]


def test_weights_can_be_named_and_tied_names_count_once():
    model = Mixed()
    assert list(prunable_weights(model, ["second.weight", "head.weight", "first.weight"])) == [
        "second.weight",
        "head.weight",
    ]
    with pytest.raises(ValueError, match="got 'nothing'"):
        prunable_weights(model, ["nothing"])
    with pytest.raises(ValueError, match="2 or 3 dimensions, got \\[8\\] for 'first.bias'"):
        prunable_weights(model, ["first.bias"])
    with pytest.raises(ValueError, match="got none; pass weights="):
        prunable_weights(nn.LayerNorm(3))


def test_global_ranking_is_one_order_over_all_matrices():
    scores = {"a": torch.tensor([[1.0, 5.0]]), "b": torch.tensor([[2.0, 3.0], [1.0, 4.0]])}
    assert global_ranking(scores, 0.5) == {"a": 1, "b": 2}
    assert uniform(scores, 0.5) == {"a": 1, "b": 2}
    assert global_ranking(scores, 0.7) == {"a": 1, "b": 3}
    kept = select_masks(scores, sparsity=0.7, allocation=global_ranking).kept
    assert kept["a"].tolist() == [[False, True]] and kept["b"].tolist() == [[False, False], [False, True]]


def test_n_of_m_runs_over_the_inputs_of_linear_and_expert_weights():
    model = Mixed()
    masks = sparsify(model, structure="1:4")
    assert masks.sparsity == 0.75
    assert (model.first.weight.unflatten(1, (2, 4)) != 0).sum(-1).eq(1).all()
    assert (model.experts.unflatten(1, (2, 4)) != 0).sum(2).eq(1).all()
    thirds = nn.Sequential(nn.Linear(9, 5))
    sparsify(thirds, structure="2:3", sparsity=1 / 3)
    assert (thirds[0].weight.unflatten(1, (3, 3)) != 0).sum(-1).eq(2).all()


def test_pruning_on_keeps_what_is_zero():
    model = Mixed()
    first = sparsify(model, sparsity=0.4, method="random", generator=torch.Generator().manual_seed(3))
    second = sparsify(model, sparsity=0.7, method="random", generator=torch.Generator().manual_seed(4))
    for name in first.kept:
        assert not (second.kept[name] & ~first.kept[name]).any()
    assert second.zeros == sum(part.numel() * 7 // 10 for w in prunable_weights(model).values()
                               for part in (w if w.ndim == 3 else [w]))  # fmt: skip


def test_gradient_scores_are_the_weight_times_the_mean_gradient():
    model, ids = toy((2, 2, 3)).train(), tokens(4)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    masks = sparsify(copy.deepcopy(model), sparsity=0.5, method="gradient", calibration=[ids[:1], ids[1:]])
    loop = copy.deepcopy(model).eval()
    loop.zero_grad()
    for row in ids:
        (F.cross_entropy(loop(row[None])[0, :-1], row[1:]) / 4).backward()
    for name, mask in masks.kept.items():
        score = (dict(loop.named_parameters())[name] * dict(loop.named_parameters())[name].grad).abs()
        assert not (score[mask].min() < score[~mask].max())
    assert (model.head.weight.grad == 1).all() and model.training


@pytest.mark.parametrize("options, message", [
    ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
    ({"sparsity": -0.1}, r"\[0, 1\), got -0.1"),
    ({}, "sparsity must be in .* got None"),
    ({"sparsity": 0.5, "method": "magnitud"}, "wanda, woodfisher, got 'magnitud'; did you mean 'magnitude'"),
    ({"sparsity": 0.5, "method": "xyz"}, "got 'xyz'$"),
    ({"sparsity": 0.5, "method": "gradient"}, "needs calibration batches, got None"),
    ({"sparsity": 0.5, "allocation": "unifrom"}, "erk, global, lamp, loss, .*got 'unifrom'; did you mean 'uniform'"),
    ({"structure": "2-4"}, "'n:m' such as '2:4', .* got '2-4'"),
    ({"structure": "4:4"}, "0 < n < m, got 4:4"),
    ({"structure": "2:3"}, r"experts\[0\]: 2:3 needs dimension -1 divisible by 3, got shape \[4, 8\]"),
    ({"structure": "2:4", "sparsity": 0.6}, "means sparsity=0.5, got 0.6"),
    ({"structure": "2:4", "allocation": "global"}, "allocation must be 'uniform'"),
])  # fmt: skip
def test_bad_options_change_nothing(options, message):
    model = Mixed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsify(model, **options)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_quantised_weights_are_refused_by_name(method):
    batches = [torch.randint(0, 9, (2, 5))]
    packed = torch.ao.quantization.quantize_dynamic(Mixed(), {nn.Linear}, dtype=torch.qint8)
    eight, small = Mixed(), Mixed()
    name = next(name for name, module in eight.named_modules() if isinstance(module, nn.Linear))
    for model, dtype in ((eight, torch.int8), (small, torch.float8_e4m3fn)):
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    own = Mixed()
    own.set_submodule(name, Int8Linear(own.get_submodule(name).weight.detach(), None))
    for model in (packed, eight, small, own):
        with pytest.raises(ValueError, match=rf"{name}.weight must be in float16, .* got .*Linear.*: prune the model"):
            sparsify(model, sparsity=0.5, method=method, calibration=batches)
        with pytest.raises(ValueError, match=f"{name}.weight must be in float16"):
            Sparsifier(model, schedule=one_shot(0.5))


@settings(max_examples=10)
@given(st.integers(0, 95), st.sampled_from([uniform, guarded_ranking]), st.sampled_from([1, 3]))
def test_zeros_stay_zero_through_adamw_decay_momentum_and_accumulation(percent, allocation, accumulate):
    torch.manual_seed(0)
    model, ids = Mixed(), torch.randint(11, (4, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    sparsifier = Sparsifier(model, schedule=one_shot(percent / 100, step=2), allocation=allocation)
    for _ in range(6):
        for row in ids.chunk(accumulate):
            F.cross_entropy(model(row).flatten(0, 1), row.flatten()).backward()
        assert sparsifier.before_step(optimizer)
        optimizer.step()
        sparsifier.after_step(optimizer)
        optimizer.zero_grad()
        kept = sparsifier.masks().kept
        for name, weight in prunable_weights(model).items():
            assert ((weight == 0) == ~kept[name]).all()
    assert sparsifier.masks().zeros == select_masks(prunable_weights(model), sparsity=percent / 100,
                                                    allocation=allocation).zeros  # fmt: skip


@pytest.mark.parametrize("average_first", [False, True])
def test_running_averages_hold_the_zeros_too(average_first):
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = cubic(0.75, begin=2, end=6, every=2)
    sparsifier = Sparsifier(model, schedule=schedule, averages=[average.module])
    for _ in range(8):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        if average_first:
            average.update_parameters(model)
        sparsifier.after_step(optimizer)
        if not average_first:
            average.update_parameters(model)
        gone = ~sparsifier.masks().kept["weight"]
        assert (average.module.weight[gone] == 0).all()
    assert gone.sum() == 48 and (average.module.weight[~gone] != 0).all()
    fresh = nn.Linear(8, 8)
    Sparsifier(model, schedule=schedule, averages=[fresh]).load_state_dict(sparsifier.state_dict())
    assert ((fresh.weight == 0) == gone).all()


def train(model, sparsifier, optimizer, steps, seed):
    """Losses of `steps` steps on batches drawn by seed + step."""
    losses = []
    for step in range(steps):
        ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(seed + step))
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.after_step(optimizer)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("saliency", [magnitude, taylor])
def test_gradual_pruning_follows_the_schedule_and_resumes_exactly(saliency):
    torch.manual_seed(0)
    schedule = cubic(0.8, begin=1, end=9, every=2)
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, schedule=schedule, saliency=saliency)
    train(model, sparsifier, optimizer, 4, 0)
    assert sparsifier.step == 4 and sparsifier.sparsity == schedule(4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    earlier = sparsifier.masks()
    expected = train(model, sparsifier, optimizer, 6, 4)
    for name, mask in sparsifier.masks().kept.items():
        assert not (mask & ~earlier.kept[name]).any()
    assert sparsifier.sparsity == 0.8
    resumed = Mixed()
    again = torch.optim.AdamW(resumed.parameters(), lr=0.05)
    keeper = Sparsifier(resumed, schedule=schedule, saliency=saliency)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    keeper.load_state_dict(saved[2])
    assert train(resumed, keeper, again, 6, 4) == expected
    for name, mask in sparsifier.masks().kept.items():
        assert keeper.masks().kept[name].equal(mask)


def test_a_foreign_state_is_refused():
    sparsifier = Sparsifier(Mixed(), schedule=one_shot(0.5))
    state = sparsifier.state_dict()
    del state["masks"]["experts"]
    with pytest.raises(ValueError, match="difference in 'experts'"):
        sparsifier.load_state_dict(state)
    state["masks"]["experts"] = torch.ones(2, 8, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"shape \[3, 8, 4\], got \[2, 8, 4\]"):
        sparsifier.load_state_dict(state)


def test_taylor_without_a_gradient_says_so():
    with pytest.raises(ValueError, match="needs weight.grad, got None"):
        Sparsifier(Mixed(), schedule=one_shot(0.5), saliency=taylor)


def test_schedules_by_their_formulas():
    s = cubic(0.8, begin=10, end=50, every=10, initial=0.2)
    assert [s(t) for t in (0, 9)] == [0, 0] and s(10) == pytest.approx(0.2)
    for held in (20, 30, 40):
        expected = 0.8 - 0.6 * (1 - (held - 10) / 40) ** 3
        assert s(held) == s(held + 9) == pytest.approx(expected)
    assert s(50) == s(5000) == 0.8
    assert [linear(0.5, begin=0, end=5)(t) for t in range(6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert [one_shot(0.5, step=3)(t) for t in (2, 3, 4)] == [0, 0.5, 0.5]


@given(st.integers(0, 99), st.integers(0, 5), st.integers(1, 9), st.integers(1, 4))
def test_schedules_never_fall(percent, begin, length, every):
    for kind in (linear, cubic):
        schedule = kind(percent / 100, begin=begin, end=begin + length, every=every)
        values = [schedule(t) for t in range(begin + length + 3)]
        assert values == sorted(values) and values[-1] == percent / 100


@pytest.mark.parametrize("options, message", [
    ({"sparsity": 1.0, "begin": 0, "end": 2}, "sparsity"),
    ({"sparsity": 0.5, "begin": 2, "end": 2}, r"begin must be in \[0, end=2\), got 2"),
    ({"sparsity": 0.5, "begin": 0, "end": 2, "every": 0}, "every must be >= 1, got 0"),
    ({"sparsity": 0.5, "begin": 0, "end": 2, "initial": 0.6}, "initial must be in"),
])  # fmt: skip
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cubic(**options)


def test_counts_and_scores_are_checked():
    assert uniform({"a": torch.rand(3, 9)}, 1 / 3) == {"a": 9}
    with pytest.raises(ValueError, match="NaN, got 1 of 27"):
        unstructured(torch.where(torch.arange(27) == 5, torch.nan, torch.rand(27)), 3)
    with pytest.raises(ValueError, match=r"count must be in \[0, 27\], got 28"):
        unstructured(torch.rand(27), 28)


def test_selection_is_exact_in_double_precision():
    scores = {"a": torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64), "b": torch.tensor([[1.0 + 2e-12, 0.5]],
              dtype=torch.float64)}  # fmt: skip
    assert global_ranking(scores, 0.5) == {"a": 1, "b": 1}
    close(magnitude(torch.tensor([-2.0])), torch.tensor([2.0]))


def test_n_of_m_groups_the_inputs_of_every_expert_matrix():
    """Experts.up is [E, in, out], Experts.down [E, out, in]: two of every four inputs stay in both."""
    from moe import MoE, TopKRouter

    layer = MoE(8, 12, 3, TopKRouter(8, 3, k=1))
    sparsify(layer, structure="2:4", weights=["experts.up", "experts.down"])
    assert ((layer.experts.up != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()
    assert ((layer.experts.down != 0).unflatten(2, (-1, 4)).sum(3) == 2).all()
