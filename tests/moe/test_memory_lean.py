"""What the layer keeps for the backward pass, and what it allocates on the way: counted, not estimated."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe import MoE, Routing, TopKRouter
from moe.grouped import CHUNK_ROWS, mixture_backward, mixture_forward
from tests.moe.cases import top_k_layer


def saved_elements(layer: MoE, x: torch.Tensor, routing: Routing) -> tuple[int, int]:
    """Floating and integer elements that the experts keep for the backward pass, parameters left out."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.experts(x, routing)
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    sizes = [(t.is_floating_point(), t.untyped_storage().nbytes() // t.itemsize) for p, t in kept.items()
             if p not in weights]  # fmt: skip
    return sum(n for real, n in sizes if real), sum(n for real, n in sizes if not real)


def one_expert(tokens: int, experts: int) -> Routing:
    """All tokens on expert 1."""
    expert = torch.ones(tokens, dtype=torch.int64)
    weight = torch.rand(tokens, requires_grad=True)
    scores = torch.zeros(tokens, experts)
    token = torch.arange(tokens)
    return Routing(token, expert, weight, scores, scores, experts, tokens, dropped=token.new_zeros(0, 2))


class Largest(TorchDispatchMode):
    """The largest storage that an operation inside the mode returned, in elements, those of ``given`` left out."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.elements, self.given = 0, {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return found


@pytest.mark.parametrize(
    ("tokens", "dim", "hidden", "experts", "k"),
    [(512, 32, 64, 4, 2), (512, 64, 16, 16, 8), (600, 48, 40, 2, 1), (1024, 16, 16, 64, 4), (300, 128, 8, 8, 8),
     (300, 32, 64, 64, 2), (256, 32, 16, 512, 1), (64, 32, 16, 512, 8), (1000, 16, 8, 512, 8)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", [False, True], ids=["", "tiles"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_kept_for_backward_is_x_the_pre_activation_and_the_routing(
    tokens, dim, hidden, experts, k, dtype, tiles, threads, monkeypatch
):
    monkeypatch.setattr("moe.grouped.has_tiles", lambda: tiles)
    torch.set_num_threads(threads)
    layer = top_k_layer(dim, hidden, experts, k, dtype=dtype)
    x = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    routing = layer.router(x)
    real, whole = saved_elements(layer, x, routing)
    filling = 1.1
    rows = tokens * k
    assert real <= filling * (tokens * dim + rows * 2 * hidden) + rows
    assert whole <= (2 + filling) * rows + 4 * 2 * experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_tokens_on_one_expert_keep_no_more(dtype):
    tokens, dim, hidden = 3000, 16, 24
    layer = top_k_layer(dim, hidden, 4, 2, dtype=dtype)
    x = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    real, _ = saved_elements(layer, x, one_expert(tokens, 4))
    assert real <= 1.1 * tokens * (dim + 2 * hidden) + tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_the_working_buffers_do_not_grow_with_the_tokens_of_one_expert(dtype, bias):
    """Beyond what is returned or of x's size, no allocation exceeds a chunk: nothing is padded to E times a load."""
    tokens, dim, hidden, experts = 4 * CHUNK_ROWS, 8, 40, 3
    layer = top_k_layer(dim, hidden, experts, 1, dtype=dtype, bias=bias)
    x, routing = torch.randn(tokens, dim, dtype=dtype), one_expert(tokens, experts)
    up, down, *biases = (parameter.detach() for parameter in layer.experts.parameters())
    weight = routing.weight.detach()
    with Largest() as forward:
        y, pre, *rest = mixture_forward._init_fn(x, routing.token, routing.expert, weight, up, down, "swiglu", *biases)
    assert pre.shape == (tokens, 2 * hidden) and forward.elements == pre.numel()
    with Largest(x, pre, up, down, y, weight) as backward:
        mixture_backward._init_fn(y, x, routing.token, weight, up, down, "swiglu", pre, *rest, True, *biases)
    # rows · D, and buffers of a chunk of the pre-activation
    assert backward.elements <= max(tokens * dim, CHUNK_ROWS * 2 * hidden)


def test_a_hundred_thousand_tokens():
    layer = MoE(4, 4, 8, TopKRouter(4, 8, k=2))
    x = torch.randn(100_000, 4, requires_grad=True)
    y, routing = layer(x)
    y.square().mean().backward()
    assert int(routing.loads().sum()) == 200_000
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_five_hundred_experts_of_which_most_are_empty(dtype):
    layer = MoE(8, 4, 512, TopKRouter(8, 512, k=2), bias=True).to(dtype)
    x = torch.randn(40, 8, dtype=dtype, requires_grad=True)
    y, routing = layer(x)
    y.float().square().mean().backward()
    empty = routing.loads() == 0
    assert empty.sum() > 400
    for gradient in (parameter.grad for parameter in layer.experts.parameters()):
        assert torch.isfinite(gradient).all() and not gradient[empty].any()
        assert gradient[~empty].flatten(1).any(1).all()
