"""What decoding keeps of the weights is made anew when they change, however they change."""

import copy

import pytest
import torch
from torch import nn

from moe import ThresholdedFeedForward
from moe.column_products import kept
from moe.thresholded_linear import ThresholdedLinear
from tests.tolerances import close

METHODS = ("teal", "cats", "cett")
OPTIMIZERS = {
    "AdamW, fused": lambda weights: torch.optim.AdamW(weights, lr=0.1, fused=True),
    "SGD, fused": lambda weights: torch.optim.SGD(weights, lr=0.1, fused=True),
    "Adagrad, fused": lambda weights: torch.optim.Adagrad(weights, lr=0.1, fused=True),
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.1),
}


def sparse(method: str) -> ThresholdedFeedForward:
    return ThresholdedFeedForward(16, 24, method=method, threshold=0.02, execution="sparse").eval()


def decoded(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_evaluation_mode_reaches_decoding(method, optimizer):
    layer, x = sparse(method), torch.randn(1, 16)
    before = decoded(layer, x)
    step = OPTIMIZERS[optimizer](layer.parameters())
    layer(x.clone().requires_grad_()).sum().backward()
    step.step()
    after = decoded(layer, x)
    assert not torch.allclose(after, before)
    close(after, decoded(copy.deepcopy(layer), x), torch.float32)


def test_a_linear_map_and_parts_of_one_weight_follow_a_fused_step():
    layer, x = ThresholdedLinear(8, 6, threshold=0.1, execution="sparse").eval(), torch.randn(1, 8)
    decoded(layer, x)
    whole = nn.Parameter(torch.randn(4, 3))
    store = {}
    assert kept(store, "half", whole[2:], torch.clone) is kept(store, "half", whole[2:], torch.clone)
    for weights in ([layer.weight], [whole]):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        torch.optim.SGD(weights, lr=0.5, fused=True).step()
    close(decoded(layer, x), decoded(copy.deepcopy(layer), x), torch.float32)
    torch.testing.assert_close(kept(store, "half", whole[2:], torch.clone), whole[2:].detach())


def test_another_models_step_keeps_the_tables():
    layer, x = sparse("teal"), torch.randn(1, 16)
    decoded(layer, x)
    tables = dict(layer._tables)
    other = nn.Linear(3, 3)
    other(torch.ones(3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1, fused=True).step()
    decoded(layer, x)
    assert tables and all(layer._tables[name] is table for name, table in tables.items())


@pytest.mark.parametrize("method", METHODS)
def test_weights_made_in_inference_mode_may_change_unseen(method):
    with torch.inference_mode():
        layer, x = sparse(method), torch.randn(1, 16)
        before = layer(x)
        layer.down.weight.mul_(-2)
        after = layer(x)
        assert not torch.allclose(after, before)
        close(after, copy.deepcopy(layer)(x), torch.float32)
