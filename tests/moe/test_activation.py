"""Thresholded networks and the product that skips zeros, against loops over single numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe.activation import column_table, draw_sparse, products_at, sparse_matvec
from moe.calibration import calibrate_thresholds
from moe.column_products import DECODE_ROWS
from moe.sparsified import feedforward_sites, sparsify_activations
from moe.thresholded import ThresholdedFeedForward, Thresholds
from tests.tolerances import close
from tests.typecheck import unchecked

ACTIVATIONS = ("swiglu", "reglu", "drelu", "relu", "relu2", "gelu")


def loop_product(x, weight):
    """Σ_j x_ij w_oj, one multiplication at a time, leaving zeros of x out."""
    rows = []
    for row in x.double().tolist():
        rows.append([sum(v * w for v, w in zip(row, out, strict=True) if v != 0) for out in weight.double().tolist()])
    return torch.tensor(rows, dtype=torch.float64).view(x.shape[0], weight.shape[0])


SHAPES = [(1, 7, 6, 2), (1, 7, 5, 5), (3, 6, 4, 2), (3, 6, 4, 1), (0, 4, 3, 3), (4, 1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs", "blocks"), SHAPES)
def test_product_with_mostly_zero_rows(rows, inputs, outputs, blocks, dtype):
    weight = torch.randn(outputs, inputs, dtype=dtype)
    x = torch.randn(rows, inputs, dtype=dtype) * (torch.rand(rows, inputs) < 0.4)
    close(sparse_matvec(x, column_table(weight, blocks=blocks)), loop_product(x, weight), dtype)


def test_rows_without_entries_give_zeros_and_nan_is_seen():
    table = column_table(torch.randn(4, 3), blocks=2)
    assert sparse_matvec(torch.zeros(1, 3), table).tolist() == [[0.0] * 4]
    y = sparse_matvec(torch.tensor([[0.0, 0, 0], [0, math.nan, 0], [0, 0, 0]]), table)
    assert y.isnan().any(1).tolist() == [False, True, False]


def test_weights_that_meet_zeros_are_not_read():
    weight = torch.randn(6, 4)
    weight[:, 2] = math.nan
    assert sparse_matvec(torch.tensor([[1.0, 2.0, 0.0, 3.0]]), column_table(weight, blocks=2)).isfinite().all()
    assert products_at(torch.randn(1, 6), weight.T, torch.tensor([[True, True, False, True]])).isfinite().all()


def test_products_at_active_outputs_only():
    x, weight, active = torch.randn(3, 5), torch.randn(7, 5), torch.rand(3, 7) < 0.5
    expected = loop_product(x, weight) * active
    close(products_at(x, weight, active), expected, torch.float32)


def test_errors_of_the_product():
    table = column_table(torch.randn(4, 3), blocks=2)
    with unchecked():
        with pytest.raises(ValueError, match=r"width 3, the table's inputs, got 5"):
            sparse_matvec(torch.randn(1, 5), table)
        with pytest.raises(ValueError, match=r"type torch.float32, got torch.float64"):
            sparse_matvec(torch.randn(1, 3).double(), table)
        with pytest.raises(ValueError, match=r"gradient"):
            sparse_matvec(torch.randn(1, 3, requires_grad=True), table)
        with pytest.raises(ValueError, match=r"blocks must divide outputs=4, got 3"):
            column_table(torch.randn(4, 3), blocks=3)
        with pytest.raises(ValueError, match=r"rows and columns, got shape \[0, 3\]"):
            column_table(torch.randn(0, 3))


@given(rows=st.integers(0, 3), width=st.integers(1, 30), tenth=st.integers(0, 10))
def test_drawn_rows_have_exactly_the_density(rows, width, tenth):
    x = draw_sparse(rows, width, tenth / 10, torch.float32)
    assert (x != 0).sum(1).tolist() == [round(tenth / 10 * width)] * rows


def act(name, gate, up):
    """One neuron, from the papers' formulas, in float64."""
    silu = gate / (1 + torch.exp(-gate)) if gate is not None else None
    zero = up * 0
    if name == "swiglu":
        return silu, silu * up
    if name in ("reglu", "drelu"):
        opened = torch.maximum(gate, zero)
        return opened, opened * (up if name == "reglu" else torch.maximum(up, zero))
    if name == "gelu":
        return None, up * (1 + torch.erf(up / math.sqrt(2))) / 2
    return None, torch.maximum(up, zero) ** (2 if name == "relu2" else 1)


def oracle(x, gate, up, down, name, method, t, top_k=None):
    """Neuron by neuron, token by token."""
    out = []
    for row in x:
        x_gate = torch.stack([v if method != "teal" or abs(v) > t.gate else v * 0 for v in row])
        x_up = torch.stack([v if method != "teal" or abs(v) > t.up else v * 0 for v in row])
        pairs = []
        for i in range(up.shape[0]):
            pairs.append(act(name, None if gate is None else (x_gate * gate[i]).sum(), (x_up * up[i]).sum()))
        order = sorted(range(len(pairs)), key=lambda i: -abs(float(pairs[i][1].detach())))
        y = row * 0
        for i, (opened, h) in enumerate(pairs):
            size = {"cats": opened, "cett": h * down[:, i].detach().norm()}.get(method, h)
            kept = i in order[:top_k] if top_k else abs(float(size.detach())) > (t.gate if method == "cats" else t.down)
            if kept:
                y = y + h * down[:, i]
        out.append(y)
    return torch.stack(out)


def cases():
    for name in ACTIVATIONS:
        for method in ("hard", "cats", "teal", "cett", "top_k"):
            if not (method == "cats" and name in ("relu", "relu2", "gelu")):
                yield name, method


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "method"), list(cases()))
def test_outputs_gradients_and_the_decode_path(name, method, dtype):
    top_k, limits = (5, Thresholds()) if method == "top_k" else (None, Thresholds(0.2, 0.3, 0.1))
    options = {"activation": name, "method": "hard" if top_k else method, "threshold": limits, "top_k": top_k}
    layer = ThresholdedFeedForward(6, 11, **options, execution="sparse").to(dtype)
    x = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    d_y = torch.randn(3, 6, dtype=dtype)
    y = layer(x)
    actual = [y, *torch.autograd.grad(y, [x, *layer.parameters()], d_y)]
    wide = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    matrices = wide[1:] if len(wide) == 4 else [None, *wide[1:]]
    expected = oracle(wide[0], *matrices, name, options["method"], limits, top_k)
    # a matrix of which no entry is used has no gradient in the oracle
    gradients = torch.autograd.grad(expected, wide, d_y.double(), allow_unused=True, materialize_grads=True)
    for got, wanted in zip(actual, [expected, *gradients], strict=True):
        close(got, wanted, dtype)
    layer.eval()
    with torch.no_grad():
        for rows in (x, x[:1], x[1].detach()):
            assert layer._decodes(rows)
            close(layer(rows), expected.detach()[: len(rows)] if rows.dim() == 2 else expected.detach()[1], dtype)
        assert layer(x[:0]).shape == (0, 6)


class EverySecond(nn.Module):
    """Rules out the odd neurons of the first token and the even ones of the others."""

    def active(self, x):
        return (torch.arange(9) + torch.arange(x.shape[0])[:, None].clamp_max(1)) % 2 == 0


@pytest.mark.parametrize("name", ["swiglu", "drelu", "relu2"])
def test_neurons_ruled_out_by_a_predictor_are_neither_used_nor_read(name):
    gated = name != "relu2"
    parts = [nn.Linear(6, 9) if gated else None, nn.Linear(6, 9), nn.Linear(9, 6)]
    options = {"activation": name, "predictor": EverySecond(), "execution": "sparse"}
    layer = ThresholdedFeedForward.from_linear(*parts, **options).eval()
    x = torch.randn(3, 6)
    y = layer(x)
    h = torch.stack(
        [act(name, *pair)[1] for pair in zip(parts[0](x) if gated else [None] * 3, parts[1](x), strict=True)]
    )
    used = torch.tensor([[i % 2 == (0 if t == 0 else 1) for i in range(9)] for t in range(3)])
    close(y.detach(), (h * used @ parts[2].weight.T + parts[2].bias).detach())
    with torch.no_grad():
        close(layer(x), y.detach())
        for linear in parts[: 3 - 1]:
            if linear is not None:
                linear.weight[1::2] = math.nan
        assert layer(x[:1]).isfinite().all()


@pytest.mark.parametrize("method", ["hard", "cats", "teal", "cett"])
def test_biases_and_bf16_decode_as_dense(method):
    parts = [nn.Linear(6, 9).bfloat16(), nn.Linear(6, 9).bfloat16(), nn.Linear(9, 6).bfloat16()]
    made = [
        ThresholdedFeedForward.from_linear(*parts, method=method, threshold=0.05, execution=way).eval()
        for way in ("dense", "sparse")
    ]
    x = torch.randn(2, 1, 6).bfloat16()
    with torch.inference_mode():
        close(made[1](x), made[0](x))


def test_each_method_drops_another_neuron():
    """h = (1, 2, 3) before dropping; only the method's own quantity is small, and for another neuron in each."""
    gate, up, down = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    x = torch.tensor([[2.0, 2.0, 2.0]])
    with torch.no_grad():
        gate.weight.copy_(torch.diag(torch.tensor([2.0, 0.1, 1.5])))
        up.weight.copy_(torch.diag(torch.tensor([0.05, 8.0, 2.0])))
        down.weight.copy_(torch.diag(torch.tensor([10.0, 10.0, 0.01])))
    kept = {}
    for method in ("hard", "cats", "cett"):
        layer = ThresholdedFeedForward.from_linear(gate, up, down, method=method, threshold=0.5)
        kept[method] = (layer(x)[0] != 0).tolist()
    assert kept == {"hard": [False, True, True], "cats": [True, False, True], "cett": [True, True, False]}
    teal = ThresholdedFeedForward.from_linear(gate, up, down, method="teal", threshold=0.5)
    assert (teal(torch.tensor([[2.0, 2.0, 0.4]]))[0] != 0).tolist() == [False, True, False]
    top = ThresholdedFeedForward.from_linear(gate, up, down, top_k=1)
    assert (top(x)[0] != 0).tolist() == [False, False, True]


def test_top_k_is_exact_with_ties_and_a_threshold_drops_what_equals_it():
    layer = ThresholdedFeedForward(2, 8, activation="relu", top_k=3)
    h = torch.ones(4, 8)
    assert (layer.keep(h) != 0).sum(1).tolist() == [3] * 4
    layer = ThresholdedFeedForward(2, 8, activation="relu", threshold=1.0)
    assert (layer.keep(h) != 0).sum() == 0
    assert layer.keep(h * math.nan).isnan().all()


def test_decode_tables_follow_the_weights():
    layer = ThresholdedFeedForward(4, 6, method="teal", threshold=0.1, execution="sparse").eval()
    dense = ThresholdedFeedForward.from_linear(
        layer.gate, layer.up, layer.down, method="teal", threshold=0.1, execution="dense"
    ).eval()
    x = 4 * torch.randn(1, 4)
    with torch.no_grad():
        for change in (lambda: None, lambda: layer.down.weight.mul_(2), layer.double, layer.float):
            change()
            close(layer(x.to(layer.up.weight.dtype)), dense(x.to(layer.up.weight.dtype)))
        layer.up.weight = nn.Parameter(torch.randn(6, 4))
        close(layer(x), dense(x))
        assert layer(x).abs().min() > 0.01
        assert layer._tables
        layer.train()
        assert not layer._tables


def test_hooks_are_not_passed_over():
    layer = ThresholdedFeedForward(4, 6, execution="sparse").eval()
    layer.down.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0,))
    with torch.no_grad():
        assert layer(torch.randn(1, 4)).abs().sum() == 0


class Block(nn.Module):
    def __init__(self, act_fn=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down_proj = nn.Linear(6, 4, bias=False)
        self.act_fn = act_fn or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_models_are_sparsified_in_place_and_restored():
    model = nn.Sequential(Block(), nn.ModuleDict({"inner": Block(nn.ReLU())})["inner"], nn.Linear(4, 4))
    x = torch.randn(5, 4)
    before, names = model(x), list(model.state_dict())
    sparse = sparsify_activations(model, method="teal")
    assert list(sparse.layers) == ["0", "1"]
    close(model(x), before)
    sparse.layers["0"].thresholds = Thresholds(0.5, 0.5, 0.5)
    assert not torch.allclose(model(x), before)
    with pytest.raises(ValueError, match=r"sparsified already.*'0'"):
        feedforward_sites(model)
    sparse.restore()
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), before)
    relu = sparsify_activations(model, method="relu")
    assert [layer.activation for layer in relu.layers.values()] == ["reglu", "reglu"]
    relu.restore()


def test_errors_of_the_layers():
    with unchecked():
        for wrong, message in (
            ({"activation": "tanh"}, "activation must be one of swiglu"),
            ({"method": "dejavu"}, "method must be one of hard, cats, teal, cett, got 'dejavu'"),
            ({"execution": "fast"}, "execution must be one of"),
            ({"top_k": 0}, r"top_k must be in \[1, hidden=6\], got 0"),
            ({"top_k": 2, "method": "teal"}, "method must be 'hard' with top_k=2, got 'teal'"),
            ({"method": "cats", "activation": "relu"}, "'cats' must have a gate"),
            ({"method": "teal", "predictor": EverySecond()}, "with a predictor, got 'teal'"),
            ({"threshold": -1.0}, "threshold gate must be >= 0, got -1"),
            ({"threshold": math.nan}, "threshold gate must be >= 0, got nan"),
        ):
            with pytest.raises(ValueError, match=message):
                ThresholdedFeedForward(4, 6, **wrong)
        with pytest.raises(ValueError, match="hidden must be >= 1, got 0"):
            ThresholdedFeedForward(4, 0)
        with pytest.raises(ValueError, match="width dim=4, got 5"):
            ThresholdedFeedForward(4, 6)(torch.randn(2, 5))
        a, b, c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        with pytest.raises(ValueError, match=r"down.weight must have shape \(4, 6\), got \(6, 4\)"):
            ThresholdedFeedForward.from_linear(a, b, a)
        with pytest.raises(ValueError, match="gate must be given"):
            ThresholdedFeedForward.from_linear(None, b, c)
        with pytest.raises(ValueError, match="gate must be None"):
            ThresholdedFeedForward.from_linear(a, b, c, activation="relu")
        with pytest.raises(ValueError, match="got none"):
            sparsify_activations(nn.Linear(2, 2), method="teal")
        with pytest.raises(ValueError, match="activation must be silu or relu"):
            sparsify_activations(nn.Sequential(Block(nn.Tanh())), method="teal")
        with pytest.raises(ValueError, match="thresholds must name 0, got other"):
            sparsify_activations(nn.Sequential(Block()), method="teal", thresholds={"other": Thresholds()})


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=30, num_key_value_heads=1, **sizes)
    return transformers.LlamaForCausalLM(config)


def tiny_transformer():
    from transformer import DenseConfig, Transformer, TransformerConfig

    shape = {"vocab_size": 30, "dim": 16, "num_layers": 2, "num_heads": 2, "max_length": 32}
    return Transformer(TransformerConfig.uniform(**shape, feedforward=DenseConfig(40)))


@pytest.mark.parametrize("build", [tiny_llama, tiny_transformer])
@pytest.mark.parametrize("method", ["teal", "cats", "cett"])
def test_whole_models_decode_as_they_compute_densely(build, method):
    model = build().eval()
    ids = torch.randint(30, (3, 9))
    before = model(input_ids=ids).logits.detach()
    limits = calibrate_thresholds(model, [{"input_ids": ids}], method=method, sparsity=0.4)
    assert len(limits) == 2
    sparse = sparsify_activations(model, method=method, thresholds=limits, execution="sparse")
    dense = model(input_ids=ids[:1]).logits.detach()
    assert not torch.allclose(dense, before[:1])
    with torch.no_grad():
        for layer in sparse.layers.values():
            layer.execution = "dense"
        expected = model(input_ids=ids[:1, :4]).logits
        for layer in sparse.layers.values():
            layer.execution = "sparse"
        assert DECODE_ROWS >= 4
        close(model(input_ids=ids[:1, :4]).logits, expected)
        assert any(layer._tables for layer in sparse.layers.values())
    sparse.restore()
    assert torch.equal(model(input_ids=ids).logits.detach(), before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("active", [0, 1, 31, 32, 33, 97, 200])
def test_products_of_one_row_are_shared_among_threads(active, threads):
    torch.set_num_threads(threads)
    x, weight = torch.randn(1, 7, dtype=torch.float64), torch.randn(7, 200, dtype=torch.float64).T
    mask = torch.zeros(1, 200, dtype=torch.bool)
    mask[0, torch.randperm(200)[:active]] = True
    weight = weight.masked_fill(~mask.T, torch.nan)  # rows that are not wanted are not read
    wanted = [float(x[0] @ weight[i]) if mask[0, i] else 0.0 for i in range(200)]
    torch.testing.assert_close(products_at(x, weight, mask), torch.tensor([wanted], dtype=torch.float64))
    torch.testing.assert_close(products_at(x, weight.T.contiguous().T, mask), torch.tensor([wanted]).double())
