"""What knows its backward pass alone refuses a second derivative, however it is asked for."""

import pytest
import torch

from moe import PEER, MePropLinear, MoE, ProductKeyMemory, TopKRouter

LAYERS = {
    "product keys": lambda: ProductKeyMemory(6, num_keys=4, heads=2, k=3, key_dim=4),
    "peer": lambda: PEER(6, num_keys=4, heads=2, k=3, key_dim=4),
    "meprop": lambda: MePropLinear(6, 6, k=2),
    "mixture": lambda: MoE(6, 8, 4, TopKRouter(6, 4, k=2)),
}


def loss(layer, x):
    out = layer(x)
    return (out[0] if isinstance(out, tuple) else out).square().sum()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("everything", [False, True])
def test_a_second_derivative_is_refused(name, everything):
    """torch's own mark lets ``autograd.grad`` of a named tensor through, as if the first derivative were a constant."""
    layer, x = LAYERS[name](), torch.randn(5, 6, requires_grad=True)
    (first,) = torch.autograd.grad(loss(layer, x), x, create_graph=True)
    assert first.requires_grad
    again = first.square().sum()
    with pytest.raises(RuntimeError, match="differentiable once|backward"):
        again.backward() if everything else torch.autograd.grad(again, x)


@pytest.mark.parametrize("name", ["product keys", "peer", "meprop"])
def test_a_graph_of_the_first_that_nobody_asks_is_no_matter(name):
    layer, x = LAYERS[name](), torch.randn(5, 6)
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    plain = torch.autograd.grad(loss(layer, x), weights)
    graphed = torch.autograd.grad(loss(layer, x), weights, create_graph=True)
    for a, b in zip(graphed, plain, strict=True):
        assert a.layout == b.layout and a.detach().to_dense().equal(b.to_dense())
