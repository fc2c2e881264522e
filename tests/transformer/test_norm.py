import pytest
import torch

from tests.tolerances import close
from transformer.norm import RMSNorm


@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (3, 6), (2, 5, 7), (300, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_formula_with_every_gradient(shape, dtype):
    norm = RMSNorm(shape[-1], eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad = torch.randn(shape, dtype=dtype)
    y = norm(x)
    y.backward(grad)
    wide = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    expected.backward(grad.double())
    close(y, expected, dtype=dtype)
    close(x.grad, wide.grad, dtype=dtype)
    close(norm.weight.grad, weight.grad, dtype=dtype)


def test_strided_and_expanded_gradients():
    norm = RMSNorm(4).double()
    x = torch.randn(4, 6, dtype=torch.float64).T.requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,)) and torch.autograd.gradgradcheck(norm, (x,))
    norm(x).sum().backward()


def test_half_precision_keeps_its_type():
    norm = RMSNorm(64)
    x = torch.randn(5, 64)
    y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    close(y, norm(x), dtype=torch.bfloat16)
