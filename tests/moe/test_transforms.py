"""Layers with a backward pass of their own, under torch.func and in forward mode, against finite differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from moe import PEER, MoE, ProductKeyMemory, SoftMoE, TopKRouter

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "swiglu": lambda: MoE(6, 5, 4, TopKRouter(6, 4, k=2)),
    "gelu, biases": lambda: MoE(6, 5, 4, TopKRouter(6, 4, k=2), activation="gelu", bias=True),
    "soft": lambda: SoftMoE(6, 5, 3, slots_per_expert=2),
    "product keys": lambda: ProductKeyMemory(6, num_keys=5, k=3, key_dim=4, heads=2),
    "peer": lambda: PEER(6, num_keys=5, k=3, key_dim=4, heads=2),
}
TOKENS = 40  # more than decoding's paths take


def function(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = LAYERS[name]().double()

    def run(x: Tensor) -> Tensor:
        found = layer(x[None] if name == "soft" else x)
        y = found[0] if isinstance(found, tuple) else found
        return y[0] if name == "soft" else y

    return layer, run


def points() -> tuple[Tensor, Tensor]:
    x, direction = torch.randn(2, TOKENS, 6, dtype=torch.float64)
    return x, direction


def slope(run: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    with torch.no_grad():
        return (run(x + 1e-6 * direction) - run(x - 1e-6 * direction)) / 2e-6


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode(name):
    _, run = function(name)
    x, direction = points()
    expected = slope(run, x, direction)
    torch.testing.assert_close(torch.func.jvp(run, (x,), (direction,))[1], expected, atol=1e-6, rtol=1e-5)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_torch_func(name):
    layer, run = function(name)
    x, direction = points()
    x.requires_grad_()
    (run(x) * direction).sum().backward()
    found = torch.func.grad(lambda x: (run(x) * direction).sum())(x.detach())
    torch.testing.assert_close(found, x.grad)
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        given = x.detach()[None] if name == "soft" else x.detach()
        y = torch.func.functional_call(layer, weights, given)
        y = y[0] if isinstance(y, tuple) else y
        return ((y[0] if name == "soft" else y) * direction).sum()

    for name_, gradient in torch.func.grad(loss)(weights).items():
        own = layer.get_parameter(name_).grad
        torch.testing.assert_close(gradient, own.to_dense() if own.is_sparse else own)


@pytest.mark.parametrize("name", ["swiglu", "gelu, biases", "soft"])
def test_second_derivatives(name):
    _, run = function(name)
    x, direction = points()
    gradient = torch.func.grad(lambda x: run(x).square().sum())
    found = torch.func.jvp(gradient, (x,), (direction,))[1]
    torch.testing.assert_close(found, slope(gradient, x, direction), atol=1e-5, rtol=1e-4)
