"""The lean mixture: a weighted sum of experts that saves x, the routing and the pre-activation, and nothing else.

Forward, for the rows of one expert: A = X·up, H = act(A), O = H·down; then y_t = Σ weight_n O_n. Saved: x [T, D] and
A [N, G·F]. The gathered rows X, the activation H and the expert outputs O are not: the backward pass gathers and
activates again, and takes the gradient of the weight from d_weight_n = ⟨dH_n, H_n⟩ with dH = dY·downᵀ unweighted
(SonicMoE, arXiv:2512.14080), which needs no O.

Both passes walk over the experts with buffers that stay in cache, one dense product for each expert, empty ones
skipped. They are custom operators: torch.compile keeps the graph whole around them. They read the group sizes on the
host, which on CUDA waits for the device once in each pass.
"""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe.dispatch import group_by_expert
from moe.nonlinearity import Activation, activate_into, differentiate_into

# rows of one expert that are worked on at once: bounds the buffers when all tokens meet in one expert
CHUNK_ROWS = 1024
# oneDNN 3.12 runs a half-precision product on one thread once its left operand reaches 1 MiB
HALF_OPERAND_BYTES = 1 << 20


def expert_mixture(
    x: Float[Tensor, "T D"],
    token: Int[Tensor, "N"],
    expert: Int[Tensor, "N"],
    weight: Float[Tensor, "N"],
    up: Float[Tensor, "E D A"],
    down: Float[Tensor, "E F D"],
    activation: Activation,
) -> Float[Tensor, "T D"]:
    """y_t = Σ_{n: token_n = t} weight_n · act(x_t · up_{expert_n}) · down_{expert_n}; tokens ascend.

    Computes in the dtype of x, or in autocast's, to which it converts the weights expert by expert; gradients come
    back in the dtype of each input. Differentiable once, in reverse mode.
    Raises: ValueError where x and the weights differ in dtype outside autocast.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != up.dtype or x.dtype != down.dtype:
        raise ValueError(f"x must have the dtype of the expert weights, {up.dtype}, outside autocast, got {x.dtype}")
    groups = group_by_expert(token, expert, up.shape[0])
    y, _ = mixture_forward(x, token, groups.order, groups.counts, weight, up, down, activation)
    return y


@torch.library.custom_op("moe::expert_mixture", mutates_args=())
def mixture_forward(
    x: Tensor, token: Tensor, order: Tensor, counts: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The mixture y [T, D] and the pre-activation A [N, G·F] in expert order."""
    sizes, source = counts.tolist(), token[order]
    pre, out = x.new_empty(len(order), up.shape[2]), x.new_empty(len(order), x.shape[1])
    most = min(max(sizes), CHUNK_ROWS)
    gathered, hidden = x.new_empty(most, x.shape[1]), x.new_empty(most, down.shape[1])
    for e, chunks in _chunks(sizes):
        up_e, down_e = up[e].to(x.dtype), down[e].to(x.dtype)
        for part in chunks:
            n = part.stop - part.start
            torch.index_select(x, 0, source[part], out=gathered[:n])
            _matmul(gathered[:n], up_e, out=pre[part])
            activate_into(pre[part], cast(Activation, activation), hidden[:n])
            _matmul(hidden[:n], down_e, out=out[part])
    return _combine(out, token, order, weight, x.shape[0]), pre


@torch.library.custom_op("moe::expert_mixture_backward", mutates_args=())
def mixture_backward(
    d_y: Tensor,
    x: Tensor,
    token: Tensor,
    order: Tensor,
    counts: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    pre: Tensor,
    activation: str,
    experts_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, up and down; the last two are empty unless asked for."""
    sizes, source, scale = counts.tolist(), token[order], weight[order].to(x.dtype)[:, None]
    d_rows, dot = x.new_empty(len(order), x.shape[1]), torch.empty_like(weight)
    d_up, d_down = (torch.empty_like(w) if experts_need_grad else w.new_empty(0) for w in (up, down))
    most = min(max(sizes), CHUNK_ROWS)
    gathered, h, d_h, d_a = (x.new_empty(most, s) for s in (x.shape[1], down.shape[1], down.shape[1], up.shape[2]))
    for e, chunks in _chunks(sizes):
        up_e, down_e = up[e].to(x.dtype).t(), down[e].to(x.dtype).t()
        for part in chunks:
            n = part.stop - part.start
            torch.index_select(d_y, 0, source[part], out=gathered[:n])
            _matmul(gathered[:n], down_e, out=d_h[:n])
            differentiate_into(pre[part], d_h[:n], cast(Activation, activation), h=h[:n], d_a=d_a[:n], dot=dot[part])
            _matmul(d_a[:n], up_e, out=d_rows[part])
            if experts_need_grad:
                # the combine weight scales d_y and x, D wide, rather than dA and H, which are wider
                _add_product(h[:n].t(), gathered[:n].mul_(scale[part]), out=d_down[e], first=part is chunks[0])
                torch.index_select(x, 0, source[part], out=gathered[:n])
                _add_product(gathered[:n].mul_(scale[part]).t(), d_a[:n], out=d_up[e], first=part is chunks[0])
        if experts_need_grad and not chunks:
            d_up[e].zero_()
            d_down[e].zero_()
    d_weight = torch.empty_like(weight)
    d_weight[order] = dot
    return _combine(d_rows, token, order, weight, x.shape[0]), d_weight, d_up, d_down


def _chunks(sizes: list[int]) -> Iterator[tuple[int, list[slice]]]:
    """Each expert with its rows in pieces of at most CHUNK_ROWS; no piece where the expert has no rows."""
    start = 0
    for e, size in enumerate(sizes):
        stop = start + size
        yield e, [slice(at, min(at + CHUNK_ROWS, stop)) for at in range(start, stop, CHUNK_ROWS)]
        start = stop


def _matmul(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out ← a · b, the rows of a in pieces where a single product would leave all threads but one idle."""
    pieces = 1
    if a.dtype in (torch.bfloat16, torch.float16) and a.device.type == "cpu":
        pieces = a.numel() * a.element_size() // HALF_OPERAND_BYTES + 1
    step = -(-a.shape[0] // pieces)
    for at in range(0, a.shape[0], step):
        torch.mm(a[at : at + step], b, out=out[at : at + step])


def _add_product(a: Tensor, b: Tensor, *, out: Tensor, first: bool) -> None:
    """out ← a · b if ``first``, else out ← out + a · b; a wider out (autocast) receives the converted product."""
    if out.dtype != a.dtype:
        product = a @ b
        out.copy_(product) if first else out.add_(product)
    elif first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def _combine(rows: Tensor, token: Tensor, order: Tensor, weight: Tensor, num_tokens: int) -> Tensor:
    """y_t = Σ weight_n · rows at n's place in expert order, over the assignments n of token t; zeros where none."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    bags = torch.searchsorted(token, torch.arange(num_tokens, device=token.device))
    return F.embedding_bag(place, rows, bags, mode="sum", per_sample_weights=weight.to(rows.dtype))


@mixture_forward.register_fake
def _(x, token, order, counts, weight, up, down, activation):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(order.shape[0], up.shape[2])


@mixture_backward.register_fake
def _(d_y, x, token, order, counts, weight, up, down, pre, activation, experts_need_grad):  # type: ignore[no-untyped-def]
    d_up, d_down = (torch.empty_like(w) if experts_need_grad else w.new_empty(0) for w in (up, down))
    return x.new_empty(x.shape), torch.empty_like(weight), d_up, d_down


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])
    ctx.activation = activation


def _backward(ctx, d_y, d_pre):  # type: ignore[no-untyped-def]
    x, token, order, counts, weight, up, down, pre = ctx.saved_tensors
    experts_need_grad = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
    d_x, d_weight, d_up, d_down = mixture_backward(
        d_y.contiguous(), x, token, order, counts, weight, up, down, pre, ctx.activation, experts_need_grad
    )
    up_grads = (d_up, d_down) if experts_need_grad else (None, None)
    return d_x, None, None, None, d_weight, *up_grads, None


mixture_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.moe.expert_mixture)
def _forward_flops(x, token, order, counts, weight, up, down, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * order[0] * (up[1] * up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.moe.expert_mixture_backward)
def _backward_flops(  # type: ignore[no-untyped-def]
    d_y, x, token, order, counts, weight, up, down, pre, activation, experts_need_grad, *args, **kwargs
) -> int:
    return (4 if experts_need_grad else 2) * order[0] * (up[1] * up[2] + down[1] * down[2])
