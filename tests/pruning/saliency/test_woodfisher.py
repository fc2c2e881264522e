"""WoodFisher's recursion against a dense inverse, its scores and updates against constrained minima."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruning import prunable_weights, sparsify
from pruning.saliency import inverse_fisher, woodfisher, woodfisher_scores, woodfisher_update
from tests.pruning.saliency.test_first_order import sample_gradients
from tests.pruning.test_transformer import build
from tests.pruning.test_transformer import ids as some_ids
from tests.pruning.toy import tokens, toy
from tests.tolerances import close


@pytest.mark.parametrize("block", [1, 5, 8, 200])
def test_the_recursion_is_the_inverse_of_the_damped_fisher_matrix(block):
    model, ids = toy((2, 1, 3)), tokens(6)
    weights, damping = prunable_weights(model), 1e-2
    found = inverse_fisher(model, weights, [ids[:4], {"input_ids": ids[4:]}], block=block, damping=damping)
    for name, gradients in sample_gradients(model, ids).items():
        rows = gradients.flatten(1)
        for at, start in enumerate(range(0, rows.shape[1], block)):
            part = rows[:, start : start + block]
            size = part.shape[1]
            fisher = damping * torch.eye(size, dtype=torch.float64) + part.mT @ part / 6
            close(found[name][at, :size, :size], torch.linalg.inv(fisher))
            assert not found[name][at, size:, :size].any()
        assert len(found[name]) == at + 1


def test_one_mean_gradient_is_another_matrix():
    model, ids = toy((2, 1, 3)), tokens(6)
    weights = prunable_weights(model)
    found = inverse_fisher(model, weights, [ids], block=200, damping=1e-2)["attention.0.k.weight"][0]
    mean = sample_gradients(model, ids)["attention.0.k.weight"].mean(0).flatten()
    wrong = torch.linalg.inv(1e-2 * torch.eye(len(mean), dtype=torch.float64) + torch.outer(mean, mean))
    size = len(mean)
    assert (found[:size, :size] - wrong).abs().max() > 0.1 * wrong.abs().max()


def quadratic_minimum(weight, hessian, gone):
    """argmin over w' with w'_gone = 0 of (w' − w)ᵀH(w' − w)/2, and its value, by solving for the free weights."""
    free = ~gone
    new = torch.zeros_like(weight)
    new[free] = weight[free] + torch.linalg.solve(hessian[free][:, free], hessian[free][:, gone] @ weight[gone])
    return new, (new - weight) @ hessian @ (new - weight) / 2


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(0, 1000))
def test_score_and_update_are_the_minimum_under_the_constraint(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    hessian = root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64)
    weight = torch.randn(1, size, dtype=torch.float64, generator=generator)
    inverse = {"w": torch.linalg.inv(hessian)[None]}
    scores = woodfisher_scores({"w": weight}, inverse)["w"][0]
    for i in range(size):
        gone = torch.arange(size) == i
        new, rise = quadratic_minimum(weight[0], hessian, gone)
        close(scores[i], rise)
        close(woodfisher_update(weight, ~gone[None], inverse["w"])[0], new)
        # −w_i/[H⁻¹]_ii · H⁻¹e_i
        single = weight[0] - weight[0, i] / inverse["w"][0, i, i] * inverse["w"][0, :, i]
        close(new, single)
    gone = torch.rand(size, generator=generator) < 0.5
    close(woodfisher_update(weight, ~gone[None], inverse["w"])[0], quadratic_minimum(weight[0], hessian, gone)[0])


def test_blocks_and_padding_do_not_mix():
    weight = torch.arange(1.0, 11.0, dtype=torch.float64).view(2, 5)
    parts = [torch.randn(4, 4, dtype=torch.float64) for _ in range(3)]
    inverse = torch.stack([p @ p.mT + torch.eye(4, dtype=torch.float64) for p in parts])
    kept = torch.tensor([[1, 0, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()
    new = woodfisher_update(weight, kept, inverse)
    flat, stays = weight.flatten(), kept.flatten()
    for at in range(3):
        part = slice(4 * at, min(4 * at + 4, 10))
        size = part.stop - part.start
        # a marginal of the inverse: the padded weights are free, and have no value
        hessian = torch.linalg.inv(inverse[at][:size, :size])
        close(new.flatten()[part], quadratic_minimum(flat[part], hessian, ~stays[part])[0])
    assert ((new == 0) == ~kept).all()


def test_the_update_lowers_the_loss_that_pruning_adds():
    """At equal masks, on the samples that the Fisher matrix is of, near a minimum of the loss."""
    torch.manual_seed(0)
    x = torch.randn(60, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(8, 1, bias=False)).double()
    y = model(x).detach() + 0.1 * torch.randn(60, 1, dtype=torch.float64)

    def loss(model, batch):
        return (model(batch["x"]) - batch["y"]).square().sum()

    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, y).solution.mT)
    weight = model[0].weight.detach().clone()
    batch = {"x": x, "y": y}
    masks = sparsify(model, sparsity=0.5, method="woodfisher", calibration=[batch], loss=loss)
    updated = loss(model, batch).item()
    assert masks.zeros == int((model[0].weight == 0).sum()) == 4
    with torch.no_grad():
        model[0].weight.copy_(weight * masks.kept["0.weight"])
    assert updated < 0.7 * loss(model, batch).item()


def test_stacked_experts_have_blocks_of_their_own_parameter():
    model = build("moe", layers=1)
    weights = prunable_weights(model)
    inverse = inverse_fisher(model, weights, [some_ids()], block=16)
    scores = woodfisher_scores(weights, inverse)
    assert all(scores[name].shape == weight.shape and torch.isfinite(scores[name]).all()
               for name, weight in weights.items())  # fmt: skip


@pytest.mark.parametrize("options, message", [
    ({"block": 0}, "block must be >= 1, got 0"),
    ({"damping": 0.0}, r"damping must be in \(0, inf\), got 0.0"),
])  # fmt: skip
def test_bad_options(options, message):
    model = toy((2, 1, 3))
    with pytest.raises(ValueError, match=message):
        inverse_fisher(model, prunable_weights(model), [tokens()], **options)


def test_blocks_that_do_not_fit_are_refused_before_work(monkeypatch):
    model, weights = toy((2, 1, 3)), prunable_weights(toy((2, 1, 3)))
    needed = sum(8 * 64**2 * -(-weight.numel() // 64) for weight in weights.values())
    monkeypatch.setattr(woodfisher, "free_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"blocks of 64 take .* GB for .* weights, and .* GB are free on cpu"):
        inverse_fisher(model, prunable_weights(model), [tokens()])
    monkeypatch.setattr(woodfisher, "free_memory", lambda device: needed)
    inverse_fisher(model, prunable_weights(model), [tokens()])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"must fit \[2, 3\]"):
        woodfisher_update(torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool), torch.eye(4).double()[None])
