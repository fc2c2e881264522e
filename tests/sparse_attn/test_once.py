"""What knows its backward pass alone refuses a second derivative, however it is asked for."""

import pytest
import torch

from sparse_attn import attend, causal, sliding_window
from sparse_attn.selection import LSH, MoBA, TopKKeys
from tests.tolerances import close

WIDE = 8
METHODS = {
    "pattern": lambda q, k, v: attend(q, k, v, pattern=causal() & sliding_window(9)),
    "MoBA": lambda q, k, v: MoBA(block=16, top_k=2)(q, k, v).out,
    "TopKKeys": lambda q, k, v: TopKKeys(4)(q, k, v).out,
    "LSH": lambda q, k, v: LSH(WIDE, 2, num_buckets=4, chunk=8, shared_qk=False)(q, k, v).out,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("of", ["q", "k", "v"])
def test_a_second_derivative_is_refused(name, of):
    q, k, v = (torch.randn(1, 2, 700, WIDE, requires_grad=True) for _ in range(3))
    asked = {"q": q, "k": k, "v": v}[of]
    (first,) = torch.autograd.grad(METHODS[name](q, k, v).square().sum(), asked, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once: leave out create_graph=True"):
        torch.autograd.grad(first.square().sum(), q)


def test_a_graph_of_the_first_that_nobody_asks_is_no_matter():
    tensors = [torch.randn(1, 2, 700, WIDE, requires_grad=True) for _ in range(3)]
    for method in METHODS.values():
        plain, graphed = (
            torch.autograd.grad(method(*tensors).square().sum(), tensors, create_graph=graph) for graph in (False, True)
        )
        assert all(a.equal(b) for a, b in zip(plain, graphed, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_transforms_of_torch_func_are_refused(name):
    q, k, v = (torch.randn(1, 2, 700, WIDE) for _ in range(3))
    with pytest.raises(RuntimeError, match="cannot be transformed by torch.func: use torch.autograd, or attend"):
        torch.func.grad(lambda rows: METHODS[name](rows, k, v).sum())(q)


def test_the_reference_may_be_transformed_at_a_length_that_nobody_asked_before():
    q, k, v = (torch.randn(1, 2, 77, WIDE) for _ in range(3))
    pattern = causal() & sliding_window(13)
    with pytest.raises(RuntimeError, match="Folded cannot be transformed"):
        torch.func.vmap(lambda rows: attend(rows, k, v, pattern=pattern, backend="folded"))(q[None])
    (found,) = torch.func.vmap(lambda rows: attend(rows, k, v, pattern=pattern, backend="reference"))(q[None])
    close(found, attend(q, k, v, pattern=pattern))
