"""The Fisher factors against gradients row by row, and the counts and choices that follow from them."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruning import prunable_weights, sparsify
from pruning.calibrated import fisher_factors, loss_counts, prune_calibrated
from pruning.calibrated.fisher import FisherFactors
from pruning.calibrated.reconstruct import exact_obs, layerwise_obs, sparsegpt
from pruning.calibrated.targets import Matrix, find_inputs
from tests.tolerances import close
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig


class Net(nn.Module):
    """Two layers over rows; its loss is quadratic in what comes out."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def quadratic(model, batch):
    weight = torch.tensor([1.0, 10.0, 0.1])
    return (model(batch["x"]).square() * weight).sum()


def lm(feedforward, seed=0):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig.uniform(vocab_size=31, dim=16, num_layers=2, num_heads=2,
                                                 feedforward=feedforward))  # fmt: skip


def ids(batches=3, length=9):
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(31, (2, length), generator=draws) for _ in range(batches)]


def test_factors_are_sums_over_rows():
    torch.manual_seed(0)
    model, batches = Net(), [{"x": torch.randn(2, 3, 5)} for _ in range(2)]
    found = fisher_factors(model, find_inputs(model, prunable_weights(model)), batches, loss=quadratic)
    inputs, outputs = torch.zeros(4), torch.zeros(3)
    first = torch.zeros(4)
    for batch in batches:
        for row in batch["x"].flatten(0, 1):
            pre = model.first(row).detach().requires_grad_()
            hidden = pre.tanh()
            out = model.second(hidden).detach().requires_grad_()
            (out.square() * torch.tensor([1.0, 10.0, 0.1])).sum().backward()
            inputs += hidden.detach().square() / 12
            outputs += out.grad.square()
            (back,) = torch.autograd.grad(model.second(pre.tanh()), pre, out.grad)
            first += back.square()
    close(found.inputs["second.weight"], inputs)
    close(found.outputs["second.weight"], outputs)
    close(found.outputs["first.weight"], first)
    weight = model.second.weight.detach()
    close(found.scores("second.weight", weight), weight.square() * inputs * outputs[:, None])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_padding_has_no_part_and_one_row_of_an_expert_is_exact():
    """Of a stack with one row a batch, Σ_j (∂L/∂w)² / Σ_j x² is the row's own (∂L/∂y)²."""
    model = lm(MoEConfig(hidden=8, num_experts=3, k=1, renormalize=False))
    chosen = prunable_weights(model)
    inputs = find_inputs(model, chosen)
    batch = {"input_ids": torch.tensor([[5, 7]]), "attention_mask": torch.tensor([[1, 0]])}

    def loss(model, batch):
        return model(batch["input_ids"]).logits[:, 0].square().sum()

    found = fisher_factors(model, inputs, [batch], loss=loss)
    taken = [label for label in found.outputs if ".up[" in label and label.startswith("layers.1")
             and found.outputs[label].any()]  # fmt: skip
    assert len(taken) == 1
    matrix = next(one for use in inputs for part in use.weights.values() for one in part if one.label == taken[0])
    (gradient,) = torch.autograd.grad(loss(model, batch), matrix.parameter)
    x = gradient[matrix.place].abs().sum(1)
    # the gradient is an outer product x gᵀ: its rows are multiples of g
    squares = matrix.view(gradient).square()
    close(found.outputs[taken[0]] * found.inputs[taken[0]].sum(), squares.sum(1))
    assert x.count_nonzero() == 16


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 0.9), st.integers(0, 99))
def test_counts_add_up_within_their_bounds(sizes, sparsity, seed):
    draws = torch.Generator().manual_seed(seed)
    matrices = [Matrix(str(i), nn.Parameter(torch.randn(size, 3, generator=draws))) for i, size in enumerate(sizes)]
    factors = FisherFactors({m.name: torch.rand(3, generator=draws) for m in matrices},
                            {m.name: torch.rand(len(m.parameter), generator=draws) * 10**i
                             for i, m in enumerate(matrices)})  # fmt: skip
    counts = loss_counts(factors, matrices, sparsity)
    total = 3 * sum(sizes)
    assert abs(sum(counts.values()) - sparsity * total) <= 1
    for name, size in zip(counts, sizes, strict=True):
        assert (sparsity - 0.3) * 3 * size - 1 <= counts[name] <= min(0.95, sparsity + 0.3) * 3 * size + 1


def test_the_costlier_matrix_loses_less_and_zeros_go_first():
    a, b = (Matrix(name, nn.Parameter(torch.rand(20, 10) + 0.5)) for name in "ab")
    b.parameter.data[:2] = 0
    factors = FisherFactors(
        {"a": torch.ones(10), "b": torch.ones(10)}, {"a": torch.ones(20), "b": torch.full((20,), 50.0)}
    )
    counts = loss_counts(factors, [a, b], 0.5)
    assert counts == {"a": 160, "b": 40}


@pytest.mark.parametrize("prune", [sparsegpt, layerwise_obs, exact_obs])
def test_rows_that_cost_more_lose_less(prune):
    torch.manual_seed(0)
    weight, x = torch.randn(6, 8), torch.randn(40, 8)
    hessian = x.mT @ x / 20
    plain = prune(weight, hessian, 24)[1]
    close(prune(weight, hessian, 24, costs=torch.ones(6))[1], plain)
    kept = prune(weight, hessian, 24, costs=torch.tensor([1e6, 1.0, 1.0, 1.0, 1.0, 1e-6]))[1]
    assert kept[0].all() and not kept[5].any() and int((~kept).sum()) == 24


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "obs"])
@pytest.mark.parametrize("feedforward", [DenseConfig(24), MoEConfig(hidden=12, num_experts=3, k=2)])
def test_models_lose_what_is_asked_where_the_loss_feels_it_least(method, feedforward):
    model = lm(feedforward)
    before = copy.deepcopy(model)
    report = prune_calibrated(model, ids(), method=method, sparsity=0.5, allocation="loss")
    total = sum(w.numel() for w in prunable_weights(model).values())
    assert sum(one.zeros for one in report.matrices) == total // 2
    assert len({round(one.zeros / one.total, 3) for one in report.matrices}) > 1
    masks = sparsify(before, sparsity=0.5, method=method, calibration=ids(), allocation="loss")
    for name, kept in masks.kept.items():
        assert kept.equal(report.masks.kept[name])


def test_it_beats_uniform_where_one_layer_matters_little():
    """A last layer that is almost off can be emptied for free."""
    torch.manual_seed(0)
    start = lm(DenseConfig(24))
    with torch.no_grad():
        start.layers[1].feedforward.down.weight.mul_(1e-3)
        start.layers[1].attention.output.weight.mul_(1e-3)
    changes = {}
    for allocation in ("uniform", "loss"):
        model = copy.deepcopy(start)
        prune_calibrated(model, ids(), method="sparsegpt", sparsity=0.5, allocation=allocation)
        with torch.no_grad():
            changes[allocation] = sum(float((model(x).logits - start(x).logits).square().sum()) for x in ids())
    assert changes["loss"] < 0.7 * changes["uniform"]


@pytest.mark.parametrize("change, message", [
    ({"allocation": "los"}, "one of uniform, loss or a function of .*, got 'los'; sparsify knows"),
    ({"structure": "2:4", "allocation": "loss"}, "fixes every matrix's sparsity: allocation must be 'uniform'"),
    ({"sparsity": 0.5, "loss": quadratic}, "loss must be None unless allocation='loss'"),
    ({"sparsity": 0.97, "allocation": "loss"}, "sparsity must be at most 0.95 for allocation='loss', got 0.97"),
])  # fmt: skip
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        prune_calibrated(lm(DenseConfig(24)), ids(), **change)


def test_a_score_alone_has_no_loss_allocation():
    with pytest.raises(ValueError, match="'loss' goes with the methods admm, descent, exact_obs, obs, sparsegpt"):
        sparsify(lm(DenseConfig(24)), sparsity=0.5, method="magnitude", allocation="loss")


def test_the_backward_pass_takes_the_first_tokens_only():
    taken = []

    def loss(model, batch):
        taken.append(batch)
        return model(batch).logits.square().sum()

    prune_calibrated(lm(DenseConfig(24)), ids(), sparsity=0.5, allocation="loss", loss=loss, loss_tokens=19)
    assert len(taken) == 2 and taken[0].equal(ids()[0])


class One(nn.Module):
    """One layer over rows."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(16, 2, bias=False)

    def forward(self, x):
        return self.only(x)


def test_rows_that_the_loss_feels_little_go_first():
    """Of two outputs of one layer with equal weights the loss weighs one a ten-thousandth: that one loses more."""
    torch.manual_seed(0)
    model = One()
    with torch.no_grad():
        model.only.weight[1] = model.only.weight[0]

    def loss(net, batch):
        return (net(batch["x"]).square() * torch.tensor([1.0, 1e-2])).sum()

    batches = [{"x": torch.randn(64, 16)}]
    kept = sparsify(model, sparsity=0.5, method="sparsegpt", calibration=batches, allocation="loss", loss=loss)
    counts = kept.kept["only.weight"].sum(1).tolist()
    assert sum(counts) == 16 and counts[0] >= counts[1] + 4
