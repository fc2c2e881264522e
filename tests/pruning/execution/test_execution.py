"""Sparse products equal a loop's, the choice follows the clock, and dense comes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruning import Masks, sparsify
from pruning.execution import SparseLinear, choose, choose_execution, restore_dense
from tests.pruning.formats.test_codecs import sparse
from tests.pruning.toy import tokens, toy
from tests.tolerances import close
from tests.typecheck import unchecked
from transformer import MoEConfig, Transformer, TransformerConfig

EXECUTIONS = ["csr", "block 4x4", "block 3x5", "block 32x32", "block 1x1"]


def looped(x, weight, bias):
    """Σ_i x_i w_oi + b_o, one entry at a time over the outputs, in float64."""
    rows = x.double().reshape(-1, weight.shape[1])
    y = torch.zeros(len(rows), len(weight), dtype=torch.float64)
    for out, row in enumerate(weight.double()):
        y[:, out] = (rows * row).sum(1) + (0.0 if bias is None else bias[out].double())
    return y.reshape(*x.shape[:-1], len(weight))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    rows=st.sampled_from([(1,), (0,), (7,), (2, 3), ()]), execution=st.sampled_from(EXECUTIONS), biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_products_equal_a_loop(shape, density, rows, execution, biased, dtype):
    if execution == "csr" and dtype == torch.bfloat16:
        return
    weight, bias = sparse(*shape, density, dtype), torch.randn(shape[0]).to(dtype) if biased else None
    layer, x = SparseLinear(weight, bias, execution=execution), torch.randn(*rows, shape[1]).to(dtype)
    y = layer(x)
    assert y.shape == (*rows, shape[0]) and y.dtype == dtype
    close(y, looped(x, weight, bias), dtype)
    assert layer.dense_weight().equal(weight)


def test_blocks_hold_only_what_has_something_in_it():
    weight = torch.zeros(64, 96)
    weight[3, 40], weight[60, 95] = 1.0, 2.0
    layer = SparseLinear(weight, None, execution="block 32x32")
    assert layer.widths.tolist() == [32, 32] and layer.values.numel() == 2 * 32 * 32
    assert layer.inputs.tolist() == [*range(32, 64), *range(64, 96)]
    assert SparseLinear(weight, None, execution="csr").nbytes == 65 * 4 + 2 * 4 + 2 * 4


def test_strided_inputs_and_moves():
    weight, x = sparse(12, 8, 0.3), torch.randn(8, 5).mT
    for execution in EXECUTIONS:
        layer = SparseLinear(weight, torch.ones(12), execution=execution)
        close(layer(x), looped(x, weight, torch.ones(12)), torch.float32)
        if execution != "csr":
            close(layer.bfloat16()(x.bfloat16()), looped(x, weight, torch.ones(12)), torch.bfloat16)


@pytest.mark.parametrize("execution", ["dense", "2:4", "bitmask"])
def test_executions_that_are_none(execution):
    with pytest.raises(ValueError, match="execution must be 'csr' or 'block HxW', got"):
        SparseLinear(torch.ones(2, 2), None, execution=execution)


def test_wrong_width_and_half_precision_csr_are_refused():
    with pytest.raises(ValueError, match="execution='csr' works on float32 and float64, got torch.bfloat16"):
        SparseLinear(torch.ones(2, 2).bfloat16(), None, execution="csr")
    with unchecked(), pytest.raises(ValueError, match="x must have width in_features=2, got 3"):
        SparseLinear(torch.ones(2, 2), None, execution="csr")(torch.ones(1, 3))


def clocked(monkeypatch, seconds):
    """Instead of the clock: seconds(execution, out_features) of every product."""
    monkeypatch.setattr(
        choose, "_seconds", lambda run, x: seconds(getattr(run, "execution", "dense"), run.out_features, len(x))
    )


def test_what_is_faster_is_swapped_and_the_rest_stays(monkeypatch):
    model = toy((2, 1, 6))
    sparsify(model, sparsity=0.8)
    expected = model(tokens())
    # gate_up (12 outputs) is fast in CSR, down (8) as blocks at one size only, the rest nowhere
    table = {("csr", 12): 0.5, ("block 4x4", 12): 0.7}
    clocked(monkeypatch, lambda e, out, rows: table.get((e, out), 2.0 if e != "dense" else 1.0))
    report = choose_execution(model, batch=[1, 4], candidates=["csr", "block 4x4"], rounds=2)
    assert report.swapped == ("feedforward.0.gate_up.weight",)
    layer = model.feedforward[0].gate_up
    assert isinstance(layer, SparseLinear) and layer.execution == "csr" and type(model.feedforward[0].down) is nn.Linear
    close(model(tokens()), expected)
    text = str(report)
    assert "csr: 0.50 of the dense time" in text and "dense: the best, csr, takes 2.00 of the dense time" in text
    assert text.splitlines()[-1] == "1 of 6 run sparse" and "at 1, 4 rows" in text


def test_a_candidate_must_win_at_every_size_by_the_margin(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8))
    clocked(monkeypatch, lambda e, out, rows: {"csr": 0.1 if rows == 1 else 0.97, "dense": 1.0}[e])
    assert not choose_execution(model, batch=[1, 4], candidates=["csr"], rounds=1).swapped
    assert choose_execution(model, batch=[1, 4], candidates=["csr"], rounds=1, margin=0.02).swapped == ("0.weight",)


def test_dense_comes_back_with_every_value():
    model = toy((2, 1, 6))
    masks = sparsify(model, sparsity=0.7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        clocked(patch, lambda e, out, rows: 1.0 if e == "dense" else 0.1)
        report = choose_execution(model, candidates=["block 2x2"], rounds=1)
    assert len(report.swapped) == 6
    assert restore_dense(model) == [name.removesuffix(".weight") for name in report.swapped]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert Masks.of(model).zeros == masks.zeros and restore_dense(model) == []


def test_experts_and_shared_weights_stay_dense_and_say_so():
    config = TransformerConfig.uniform(vocab_size=16, dim=16, num_layers=1, num_heads=2, max_length=8,
                                       feedforward=MoEConfig(hidden=16, num_experts=2, k=1))  # fmt: skip
    report = choose_execution(Transformer(config), rounds=1)
    experts = [choice for choice in report.choices if ".experts." in choice.name]
    assert len(experts) == 2 and all(choice.why == "a stack of matrices is not covered" for choice in experts)
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    report = choose_execution(shared, rounds=1)
    assert [choice.why for choice in report.choices] == ["no Linear or Conv1D of its own"] and not report.swapped
    half = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    assert choose_execution(half, candidates=["csr"], rounds=1).choices[0].why.startswith("no execution works on")


def test_a_real_clock_measures_and_the_output_stays():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    sparsify(model, sparsity=0.99)
    x = torch.randn(1, 1024)
    expected = model(x)
    report = choose_execution(model, candidates=["csr"], rounds=9)
    assert report.choices[0].seconds.keys() == {"dense", "csr"} and report.choices[0].density == pytest.approx(
        0.01, 0.01
    )
    close(model(x), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 0}, "batch must be >= 1, got \\[0\\]"),
        ({"batch": []}, "batch must be >= 1, got \\[\\]"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"margin": 1.0}, "margin must be in \\[0, 1\\), got 1.0"),
        ({"candidates": ["dense"]}, "execution must be 'csr' or 'block HxW', got 'dense'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        choose_execution(nn.Sequential(nn.Linear(2, 2)), **options)
