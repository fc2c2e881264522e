"""The lean mixture: a weighted sum of experts that saves x, the routing and the pre-activation, and nothing else.

Forward, for the rows of one expert: A = X·up + a, H = act(A), O = H·downᵀ + b, without biases a and b where there are
none; then y_t = Σ weight_n O_n. Saved: x [T, D] and A [N, G·F]. The gathered rows X, the activation H and the expert
outputs O are not: the backward pass gathers and activates again, and takes the gradient of the weight from d_weight_n
= ⟨dH_n, H_n⟩ + ⟨dY_n, b⟩ with dH = dY·down unweighted (SonicMoE, arXiv:2512.14080), which needs no O. Those of the
biases are da = Σ weight_n dA_n and db = Σ weight_n dY_n over the rows of their expert, 0 where it has none.

Kept for the backward pass, weights left out: D + K·(G·F + 1) floating-point elements a token (SwiGLU: D + K·(2F + 1)),
three integers an assignment and four a block. On CPU experts may share a product, their rows filled up to equal
numbers, in half precision to whole tile steps where there are enough, which adds at most a tenth to the G·F part. The
buffers of a pass hold CHUNK_ROWS rows of each expert that is worked on, however many tokens meet in one.

Both passes walk over blocks of experts with buffers that stay in cache, one product for each block, empty experts
skipped. They are custom operators: torch.compile keeps the graph whole around them. They read the group sizes on the
host, which on CUDA waits for the device once in each pass.
"""

from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe.decode import few_without_graph, mix_few_tokens
from moe.dispatch import Block, group_by_expert, plan_blocks
from moe.nonlinearity import Activation, activate_into, differentiate_into, sum_rows
from moe.transforms import plain_mixture, transformed

# rows of one expert that are worked on at once: bounds the buffers when all tokens meet in one expert
CHUNK_ROWS = 1024
# rows of one AMX tile step: products over half-precision rows are a fifth slower at other row counts
TILE_ROWS = 32
# without tiles, oneDNN prepares a half-precision product anew for each row count that it has not met lately
# (a fifth of the product's time), and some odd counts are slower for good: a few counts serve all
SHAPE_ROWS = 16
# filled rows are at most one for so many others
FILLING = 10
HALVES = (torch.bfloat16, torch.float16)
# multiply-adds of an expert's product below which calls cost more than filled rows: in half precision, and in float32
SMALL_HALF, SMALL_FLOAT = 2**28, 2**26


def expert_mixture(
    x: Float[Tensor, "T D"],
    token: Int[Tensor, "N"],
    expert: Int[Tensor, "N"],
    weight: Float[Tensor, "N"],
    up: Float[Tensor, "E D A"],
    down: Float[Tensor, "E D F"],
    activation: Activation,
    up_bias: Float[Tensor, "E A"] | None = None,
    down_bias: Float[Tensor, "E D"] | None = None,
    *,
    compiled: bool = False,
) -> Float[Tensor, "T D"]:
    """y_t = Σ_{n: token_n = t, expert_n = e} weight_n · (act(x_t · up_e + up_bias_e) · down_eᵀ + down_bias_e); tokens
    ascend. Both biases or none.

    Computes in the dtype of x, or in autocast's, to which it converts the weights expert by expert; gradients come
    back in the dtype of each input. In float16 what exceeds 65504 inside an expert reaches y as inf or NaN; compiled
    loops, which are float32 inside, overflow in y alone. Differentiable once, in reverse mode; under torch.func and in
    forward mode by plain operations. compiled: a few tokens without a graph pass by loops that torch.compile makes.
    Raises: ValueError where x and the weights differ in dtype outside autocast, for one bias without the other, and for
    biases of another shape.
    """
    if (up_bias is None) != (down_bias is None):
        raise ValueError(
            f"up_bias and down_bias must be given together, got {'down' if up_bias is None else 'up'}_bias"
        )
    held: tuple[Tensor, ...] = (up, down)
    if up_bias is not None and down_bias is not None:
        held += (up_bias, down_bias)
        for name, bias, shape in (("up_bias", up_bias, up.shape[::2]), ("down_bias", down_bias, down.shape[:2])):
            if bias.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, a row for each expert, got {list(bias.shape)}")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    elif any(x.dtype != tensor.dtype for tensor in held):
        raise ValueError(f"x must have the dtype of the expert weights, {up.dtype}, outside autocast, got {x.dtype}")
    if transformed():
        return plain_mixture(x, token, expert, weight, held, activation)
    if few_without_graph(x, weight, *held):
        return mix_few_tokens(
            x, token, expert, weight, up, down, activation, up_bias, down_bias, compiled=compiled
        )  # fmt: skip
    return mixture_forward(x, token, expert, weight, up, down, activation, up_bias, down_bias)[0]


@torch.library.custom_op("moe::expert_mixture", mutates_args=())
def mixture_forward(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mixture y [T, D], the pre-activation A [R, G·F], and what the backward pass needs to find its rows.

    source [R]: token of each row; place [N]: row of each assignment; plan [blocks, 4]: on the host.
    """
    blocks, source, place = _lay_out(token, expert, up, x.dtype)
    pre, out = x.new_empty(len(source), up.shape[2]), x.new_empty(len(source), x.shape[1])
    rooms = _rooms(blocks, x, x.shape[1], down.shape[2])
    for block, index, a, y in zip(blocks, *_parts(blocks, source, pre, out), strict=True):
        gathered, hidden = rooms[block.experts * block.rows]
        torch.index_select(x, 0, index, out=gathered)
        _product(gathered, _weights(up, block, x), block, out=a, bias=_biases(up_bias, block, x))
        activate_into(a, cast(Activation, activation), hidden)
        _product(hidden, _weights(down, block, x).mT, block, out=y, bias=_biases(down_bias, block, x))
    if x.dtype == torch.float16 and len(source) > len(token):
        # a filled row may overflow where no token of its expert does, and its weight of 0 times inf is NaN
        filled = torch.ones_like(source, dtype=torch.bool).index_fill_(0, place, False)
        pre.masked_fill_(filled[:, None], 0.0)
    plan = torch.tensor([(b.first, b.experts, b.rows, b.start) for b in blocks], dtype=torch.int64).reshape(-1, 4)
    return _combine(out, token, place, weight, x.shape[0]), pre, source, place, plan


@torch.library.custom_op("moe::expert_mixture_backward", mutates_args=())
def mixture_backward(
    d_y: Tensor,
    x: Tensor,
    token: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    pre: Tensor,
    source: Tensor,
    place: Tensor,
    plan: Tensor,
    experts_need_grad: bool,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, up, down and the two biases; the last four are empty unless asked for."""
    blocks = [Block(*row) for row in plan.tolist()]
    scale = x.new_zeros(len(source))
    scale[place] = weight.to(x.dtype)
    d_rows, dot = x.new_empty(len(source), x.shape[1]), weight.new_empty(len(source))
    gradients = _empty_gradients(up, down, up_bias, down_bias, wanted=experts_need_grad)
    rooms = _rooms(blocks, x, x.shape[1], down.shape[2], down.shape[2], up.shape[2])
    done = 0
    parts = _parts(blocks, source, pre, d_rows, dot, scale[:, None])
    for block, index, a, d_row, d_weight, factor in zip(blocks, *parts, strict=True):
        gathered, h, d_h, d_a = rooms[block.experts * block.rows]
        torch.index_select(d_y, 0, index, out=gathered)
        _product(gathered, _weights(down, block, x), block, out=d_h)
        differentiate_into(a, d_h, cast(Activation, activation), h=h, d_a=d_a, dot=d_weight)
        if down_bias is not None:
            _add_dot(gathered, _biases(down_bias, block, x), block, room=d_row, dot=d_weight)
        _product(d_a, _weights(up, block, x).mT, block, out=d_row)
        if experts_need_grad:
            _add_gradients(block, gathered, factor, h, d_a, x, index, gradients, done)
            done = block.first + block.experts
    for gradient in gradients:
        gradient[done:].zero_()
    return _combine(d_rows, token, place, weight, x.shape[0]), dot[place], *gradients


def _empty_gradients(*weights: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients of up, down and their biases; of no element for what is not there or not wanted."""
    up, *rest = (None if w is None else torch.empty_like(w) if wanted else w.new_empty(0) for w in weights)
    assert up is not None
    down, up_bias, down_bias = (up.new_empty(0) if gradient is None else gradient for gradient in rest)
    return up, down, up_bias, down_bias


def _add_gradients(
    block: Block,
    gathered: Tensor,
    factor: Tensor,
    h: Tensor,
    d_a: Tensor,
    x: Tensor,
    index: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    done: int,
) -> None:
    """The block's share of the experts' gradients, and zeros for the experts without rows from ``done`` to the block.

    gathered: d_y of each row, unweighted; it is overwritten."""
    d_up, d_down, d_up_bias, d_down_bias = gradients
    first = block.first >= done
    if len(d_up_bias):
        _outer(factor, d_a, block, out=d_up_bias[:, None], first=first)
        _outer(factor, gathered, block, out=d_down_bias[:, None], first=first)
    # the combine weight scales d_y and x, D wide, rather than dA and H, which are wider
    _outer(gathered.mul_(factor), h, block, out=d_down, first=first)
    torch.index_select(x, 0, index, out=gathered)
    _outer(gathered.mul_(factor), d_a, block, out=d_up, first=first, turn=True)
    if block.first > done:
        for gradient in gradients:
            gradient[done : block.first].zero_()


def _add_dot(d_y: Tensor, bias: Tensor | None, block: Block, *, room: Tensor, dot: Tensor) -> None:
    """dot ← dot + ⟨d_y, the bias of its expert⟩ row by row. room: memory as large as d_y, overwritten."""
    assert bias is not None
    shape = (block.experts, block.rows, -1)
    torch.mul(d_y.view(shape), bias.view(block.experts, 1, -1), out=room.view(shape))
    more = torch.empty_like(dot)
    sum_rows(room, more)
    dot.add_(more)


def _lay_out(token: Tensor, expert: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[list[Block], Tensor, Tensor]:
    """The blocks, the token of each row, and the row of each assignment."""
    num_experts = up.shape[0]
    groups = group_by_expert(token, expert, num_experts)
    sizes = groups.counts.tolist()
    blocks = _plan(sizes, *_sharing(len(token), up, dtype))
    starts = _expert_starts(blocks, num_experts)
    shift = torch.tensor(starts, device=token.device) - (groups.counts.cumsum(0) - groups.counts)
    sorted_place = torch.arange(len(token), device=token.device) + shift[expert[groups.order]]
    place = torch.empty_like(groups.order)
    place[groups.order] = sorted_place
    # filling repeats a routed token: another may hold NaN, which a weight of 0 would carry into the gradients
    source = token[:1].repeat(_rows(blocks))
    source[place] = token
    return blocks, source, place


def _plan(sizes: list[int], width: int, multiple: int, spare: int) -> list[Block]:
    """The blocks, with rows in smaller multiples where filling would add more than a part in FILLING."""
    blocks = plan_blocks(sizes, width=width, multiple=multiple, chunk=CHUNK_ROWS, spare=spare)
    if multiple > 1 and FILLING * _rows(blocks) > (FILLING + 1) * sum(sizes):
        return _plan(sizes, width, multiple // 2, spare)
    return blocks


def _rows(blocks: list[Block]) -> int:
    return sum(block.experts * block.rows for block in blocks)


def _sharing(rows: int, up: Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """How many experts share a batched product, of what its rows are a multiple, and which part filling may add.

    Each thread then has an expert's product to itself: in float32 that takes a tenth less time than all threads on one
    after the other. In half precision it does where products are small, and with AMX, as oneDNN runs most products of
    an expert's size on one thread there. Small products bear more filling, for fewer calls.
    """
    half = dtype in HALVES
    if up.device.type != "cpu":
        return 1, 1, 1
    small = rows * up[0].numel() < (SMALL_HALF if half else SMALL_FLOAT) * up.shape[0]
    if half and not small and not has_tiles():
        return 1, SHAPE_ROWS, 1
    threads = torch.get_num_threads()
    if half:
        return threads, TILE_ROWS if has_tiles() else SHAPE_ROWS, FILLING
    return threads, 1, FILLING if small else 2 * FILLING


@cache
def has_tiles() -> bool:
    """Whether the CPU multiplies half-precision matrices by AMX tiles."""
    return torch.cpu._is_amx_tile_supported()


def _expert_starts(blocks: list[Block], num_experts: int) -> list[int]:
    """First row of each expert; 0 for one without rows."""
    starts = [-1] * num_experts
    for block in blocks:
        for i in range(block.experts):
            if starts[block.first + i] < 0:
                starts[block.first + i] = block.start + i * block.rows
    return [max(start, 0) for start in starts]


def _parts(blocks: list[Block], *rows: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each block, of each tensor."""
    sizes = [block.experts * block.rows for block in blocks]
    return [x.split(sizes) if sizes else () for x in rows]


def _rooms(blocks: list[Block], like: Tensor, *widths: int) -> dict[int, list[Tensor]]:
    """For blocks of so many rows a buffer of each width, all of the same memory."""
    sizes = {block.experts * block.rows for block in blocks}
    buffers = [like.new_empty(max(sizes, default=0), width) for width in widths]
    return {rows: [buffer[:rows] for buffer in buffers] for rows in sizes}


def _weights(stacked: Tensor, block: Block, x: Tensor) -> Tensor:
    """Those of the block's experts: [D, A] or [D, F] of one, stacked of several."""
    alone = block.experts == 1
    mine = stacked[block.first] if alone else stacked[block.first : block.first + block.experts]
    return mine if mine.dtype == x.dtype else mine.to(x.dtype)


def _biases(stacked: Tensor | None, block: Block, x: Tensor) -> Tensor | None:
    """Those of the block's experts, to be added to every row: [1, A] or [1, D] of one, stacked of several."""
    return None if stacked is None else _weights(stacked, block, x).unsqueeze(-2)


def _product(rows: Tensor, weights: Tensor, block: Block, *, out: Tensor, bias: Tensor | None = None) -> None:
    """out ← rows · weights + bias, expert by expert."""
    if block.experts == 1:
        torch.mm(rows, weights, out=out) if bias is None else torch.addmm(bias, rows, weights, out=out)
    else:
        shape = (block.experts, block.rows, -1)
        rows, out = rows.view(shape), out.view(shape)
        torch.bmm(rows, weights, out=out) if bias is None else torch.baddbmm(bias, rows, weights, out=out)


def _outer(a: Tensor, b: Tensor, block: Block, *, out: Tensor, first: bool, turn: bool = False) -> None:
    """out ← aᵀ · b for each expert of the block, added unless ``first``; a wider out (autocast) gets it converted."""
    alone = block.experts == 1
    if alone:
        left, right, out = a.mT, b, out[block.first]
    else:
        shape = (block.experts, block.rows, -1)
        left, right, out = a.view(shape).mT, b.view(shape), out[block.first : block.first + block.experts]
    if turn and a.dtype in HALVES and not alone and has_tiles():
        left = left.contiguous()
    if out.dtype != a.dtype:
        out.copy_(left @ right) if first else out.add_(left @ right)
    elif first:
        (torch.mm if alone else torch.bmm)(left, right, out=out)
    else:
        (out.addmm_ if alone else out.baddbmm_)(left, right)


def _combine(rows: Tensor, token: Tensor, place: Tensor, weight: Tensor, num_tokens: int) -> Tensor:
    """y_t = Σ weight_n · rows[place_n] over the assignments n of token t; zeros where there are none."""
    bags = torch.searchsorted(token, torch.arange(num_tokens, device=token.device))
    return F.embedding_bag(place, rows, bags, mode="sum", per_sample_weights=weight.to(rows.dtype))


@mixture_forward.register_fake
def _(x, token, expert, weight, up, down, activation, up_bias=None, down_bias=None):  # type: ignore[no-untyped-def]
    rows, blocks = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    plan = torch.empty(blocks, 4, dtype=torch.int64)
    return (
        x.new_empty(x.shape),
        x.new_empty(rows, up.shape[2]),
        token.new_empty(rows),
        token.new_empty(token.shape),
        plan,
    )


@mixture_backward.register_fake
def _(d_y, x, token, weight, up, down, activation, pre, source, place, plan, wanted, up_bias=None, down_bias=None):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape),
        torch.empty_like(weight),
        *_empty_gradients(up, down, up_bias, down_bias, wanted=wanted),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, token, _, weight, up, down, ctx.activation, *biases = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, token, weight, up, down, *biases, *output[1:])


def _backward(ctx, d_y, *_):  # type: ignore[no-untyped-def]
    if d_y is None:
        return (None,) * 9
    x, token, weight, up, down, up_bias, down_bias, *rows = ctx.saved_tensors
    wanted = any(ctx.needs_input_grad[4:])
    # contiguous once here, rather than in every gather
    d_x, d_weight, d_up, d_down, d_up_bias, d_down_bias = mixture_backward(
        d_y.contiguous(), x, token, weight, up, down, ctx.activation, *rows, wanted, up_bias, down_bias
    )
    if not wanted:
        return d_x, None, None, d_weight, None, None, None, None, None
    biases = (None, None) if up_bias is None else (d_up_bias, d_down_bias)
    return d_x, None, None, d_weight, d_up, d_down, None, *biases


mixture_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.moe.expert_mixture)
def _forward_flops(x, token, expert, weight, up, down, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * token[0] * (up[1] * up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.moe.expert_mixture_backward)
def _backward_flops(d_y, x, token, weight, up, down, activation, pre, source, place, plan, wanted, *args, **kwargs):  # type: ignore[no-untyped-def]
    products = 4 if wanted else 2
    return products * token[0] * (up[1] * up[2] + down[1] * down[2])
