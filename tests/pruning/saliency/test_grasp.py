"""GraSP on a quadratic where all is known, by removing weights one by one, and by finite differences on models."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from moe import MemoryValues
from pruning import prunable_weights
from pruning.saliency import grasp_scores, hessian_diagonal
from pruning.saliency.first_order import mean_gradients
from pruning.saliency.products import hessian_product
from tests.pruning.test_transformer import build, ids
from tests.pruning.toy import tokens, toy
from tests.tolerances import close
from transformer import PEERConfig, ProductKeyConfig, Transformer, TransformerConfig


class Point(nn.Module):
    """Nothing but a vector, as a matrix [1, n]."""

    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([values], dtype=torch.float64))


def quadratic(curvature, slope):
    """Σ over samples of ½ wᵀAw + x·w: g = Aw + mean(x)·1, H = A."""

    def loss(model, batch):
        w = model.weight[0]
        return len(batch) * (w @ curvature @ w) / 2 + batch.sum() * (slope * w).sum()

    return loss


class Once(torch.autograd.Function):
    """Σ w⁴, whose backward says that it cannot be differentiated."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.pow(4).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * 4 * ctx.saved_tensors[0] ** 3


A = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
SLOPE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
BATCHES = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)]


@pytest.mark.parametrize("product", ["exact", "difference"])
def test_the_score_by_hand(product):
    model = Point([1.0, -1.0, 2.0])
    # g = Aw + 1·slope = (1, -4, 3) + (1, -2, .5) = (2, -6, 3.5); Hg = (-2, -19.5, 9.5)
    expected = torch.tensor([[-2.0, 19.5, 19.0]], dtype=torch.float64)
    found = grasp_scores(model, {"weight": model.weight}, BATCHES, loss=quadratic(A, SLOPE), product=product)["weight"]
    close(found, expected, torch.float32 if product == "difference" else None)


def test_the_sign_by_removing_each_weight():
    """‖g‖² after removing w_i less ‖g‖² is −2·score_i, and the quadratic's own second-order term w_i²‖Ae_i‖²."""
    model = Point([0.1, -0.2, 0.15])
    loss, weights = quadratic(A, SLOPE), {"weight": model.weight}
    score = grasp_scores(model, weights, BATCHES, loss=loss)["weight"][0]

    def squared_norm(values):
        (g,) = torch.autograd.grad(sum(loss(Held(values), b) for b in BATCHES) / 3, values)
        return g.square().sum().item()

    class Held:
        def __init__(self, values):
            self.weight = values

    whole = squared_norm(model.weight.detach().clone().requires_grad_())
    for i in range(3):
        without = model.weight.detach().clone()
        without[0, i] = 0
        change = squared_norm(without.requires_grad_()) - whole
        second_order = (model.weight[0, i] ** 2 * A[:, i].square().sum()).item()
        assert change - second_order == pytest.approx(-2 * score[i].item(), abs=1e-9)
        assert (change > 0) == (score[i].item() < 0)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_product_of_a_transformer_is_the_difference_of_gradients(kind):
    model = build(kind, layers=1)
    batches, weights = [ids(2, 6), ids(1, 5, seed=3)], prunable_weights(model)
    generator = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(w.shape, generator=generator).to(w) for name, w in weights.items()}
    found = hessian_product(model, weights, batches, vectors)
    moved = {}
    for sign in (1, -1):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name in vectors:
                    parameter.add_(vectors[name], alpha=sign * 1e-4)
        moved[sign] = mean_gradients(other, prunable_weights(other), batches, None)
    for name in weights:
        expected = (moved[1][name] - moved[-1][name]) / 2e-4
        scale = expected.abs().max()
        assert (found[name] - expected).abs().max() < (0.05 if kind == "moe" else 1e-5) * scale


def test_gradients_and_modules_are_left_alone():
    model, batch = toy((2, 1, 3)).train(), tokens()
    grasp_scores(model, prunable_weights(model), [batch])
    assert model.training and all(p.grad is None for p in model.parameters())
    mixture = build("moe", layers=1)
    grasp_scores(mixture, prunable_weights(mixture), [ids()])
    assert "forward" not in vars(mixture.layers[0].feedforward.experts)


def test_a_model_that_is_differentiable_once_is_told_what_to_do():
    model = Point([1.0, -1.0, 2.0])
    weights, loss = {"weight": model.weight}, lambda model, batch: len(batch) * Once.apply(model.weight)
    with pytest.raises(ValueError, match="Point cannot be differentiated twice .* pass product='difference'"):
        grasp_scores(model, weights, BATCHES, loss=loss)
    found = grasp_scores(model, weights, BATCHES, loss=loss, product="difference")["weight"]
    # L = Σ w⁴: g = 4w³, H = 12 w²
    close(found, 48 * model.weight.detach() ** 6, torch.float32)


@pytest.mark.parametrize("product", ["grasp", "hutchinson"])
def test_a_part_that_is_differentiable_once_is_named_where_torch_takes_it_for_a_constant(product):
    """L = Σ w² + Σ w⁸ with w⁸ = (w²)⁴: torch alone would return the Hessian 2 + 56 w⁶ without its largest part."""
    model = Point([1.0, -1.0, 2.0])
    weights = {"weight": model.weight}

    def loss(model, batch):
        return len(batch) * (model.weight.square().sum() + Once.apply(model.weight.square()))

    with pytest.raises(ValueError, match="functions of the loss must be differentiable twice, got Once of "):
        if product == "grasp":
            grasp_scores(model, weights, BATCHES, loss=loss)
        else:
            hessian_diagonal(model, weights, BATCHES, estimator="hutchinson", loss=loss)


MEMORIES = {
    "product_key": ProductKeyConfig(8, 2, 3, 8),
    "gated": ProductKeyConfig(8, 2, 3, 8, gated=True),
    "peer": PEERConfig(8, 2, 3, 8),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", MEMORIES)
def test_the_product_of_a_memory_is_the_difference_of_gradients(kind, sparse):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "dim": 16, "num_layers": 1, "num_heads": 2, "max_length": 64}
    model = Transformer(TransformerConfig.uniform(feedforward=MEMORIES[kind], **sizes)).double()
    for table in (module for module in model.modules() if isinstance(module, MemoryValues)):
        table.sparse = sparse
    weights, batches = prunable_weights(model), [ids(2, 6)]
    vectors = {name: torch.randn_like(weight) for name, weight in weights.items()}
    found = hessian_product(model, weights, batches, vectors)
    expected = hessian_product(model, weights, batches, vectors, product="difference", step=1e-5)
    for name in weights:
        assert (found[name] - expected[name]).norm() < 1e-6 * expected[name].norm(), name
    assert not any("forward" in vars(module) or "dot" in vars(module) for module in model.modules())


def test_bad_options():
    model = Point([1.0])
    with pytest.raises(ValueError, match="one of exact, difference, got 'fast'"):
        grasp_scores(model, {"weight": model.weight}, BATCHES, loss=quadratic(A[:1, :1], SLOPE[:1]), product="fast")
