"""The mixture for a few tokens, as in decoding: the time goes into reading the chosen experts' weights, once each.

Two forms: calls of torch's products, one for each chosen expert, and one expression of gathers and sums that a compiler
turns into loops over the chosen weights. The second is for experts that lie for it
(:func:`moe.prepare_for_decoding`): each hidden unit's input weights side by side in memory.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from moe.nonlinearity import Activation, activate

HALVES = (torch.bfloat16, torch.float16)
# up to so many tokens without a graph, sorting and gathering cost more than they save
FEW_TOKENS = 16
_library = torch.library.Library("moe", "FRAGMENT")
_library.define(
    "few_tokens(Tensor x, Tensor token, Tensor expert, Tensor weight, Tensor up, Tensor down, str activation,"
    " Tensor? up_bias=None, Tensor? down_bias=None) -> Tensor"
)


def few_without_graph(x: Float[Tensor, "T D"], *others: Tensor) -> bool:
    """Whether :func:`mix_few_tokens` is for x: at most 16 tokens, and no gradient asked of x or the others."""
    return x.shape[0] <= FEW_TOKENS and not (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others))
    )


def mix_few_tokens(
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
    """:func:`moe.grouped.expert_mixture` without a graph.

    Touches the chosen experts only, and copies none where x has the weights' dtype. Sums over experts in float32.
    compiled: by loops that torch.compile makes at the first call.
    """
    mix: Callable[..., Tensor]
    if torch.compiler.is_compiling():
        # where the weights do not lie for it, the compiler's loops stride through memory: calls are faster
        mix = fused_mixture if lies_for_decoding(up) else torch.ops.moe.few_tokens
    elif _get_current_dispatch_mode() is not None:
        # an operator of torch where somebody watches (FlopCounterMode), which costs a tenth of the time of one token
        mix = torch.ops.moe.few_tokens
    else:
        mix = _compiled_mixture() if compiled else _few_tokens
    return mix(x, token, expert, weight, up, down, activation, up_bias, down_bias)


def lies_for_decoding(up: Float[Tensor, "E D A"]) -> bool:
    """Whether the input weights of one hidden unit are neighbours in memory."""
    return up.stride(1) == 1


def fused_mixture(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The mixture as gathers and sums, for a compiler to fuse: run as it stands, it copies the chosen experts."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x if x.shape[0] == 1 else x[token]
    pre = _plus((rows[:, None].to(wide) * up.mT[expert].to(wide)).sum(-1), up_bias, expert)
    hidden = activate(pre, cast(Activation, activation))
    out = _plus((hidden[:, None] * down[expert].to(wide)).sum(-1), down_bias, expert) * weight[:, None].to(wide)
    if x.shape[0] == 1:
        return out.sum(0, keepdim=True).to(x.dtype)
    return torch.zeros(x.shape, dtype=wide, device=x.device).index_add(0, token, out).to(x.dtype)


@cache
def _compiled_mixture() -> Callable[..., Tensor]:
    return torch.compile(fused_mixture)


def _plus(rows: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return rows if bias is None else rows + bias[expert].to(rows.dtype)


def _few_tokens(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    experts = expert.tolist()
    if not experts:
        return torch.zeros_like(x)
    groups = [(which, row, row + 1) for row, which in enumerate(experts)]
    if len(set(experts)) < len(experts):
        order = sorted(range(len(experts)), key=experts.__getitem__)
        at = torch.tensor(order, device=x.device)
        token, expert, weight = token[at], expert[at], weight[at]
        groups = _groups([experts[place] for place in order])
    one = x.shape[0] == 1
    rows = x.expand(len(experts), -1) if one else x[token]
    hidden = activate(_plus(_products(rows, expert, up, groups), up_bias, expert), cast(Activation, activation))
    out = _plus(_products(hidden, expert, down.mT, groups), down_bias, expert)
    if weight.dtype != x.dtype:
        out, weight = _in_the_wider(out, weight)
    if one:
        return torch.mm(weight[None], out).to(x.dtype)
    y = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
    return y.index_add_(0, token, out * weight[:, None]).to(x.dtype)


def _in_the_wider(out: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, out.dtype)
    return out.to(dtype), weight.to(dtype)


def _groups(experts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of each run of equal experts."""
    starts = [at for at in range(len(experts)) if not at or experts[at] != experts[at - 1]]
    return [(experts[start], start, stop) for start, stop in pairwise([*starts, len(experts)])]


def _products(rows: Tensor, expert: Tensor, weights: Tensor, groups: list[tuple[int, int, int]]) -> Tensor:
    """rows[n] · weights[expert_n]; rows of one expert are neighbours."""
    if rows.dtype != weights.dtype:
        return torch.cat([torch.mm(rows[start:stop], weights[which].to(rows.dtype)) for which, start, stop in groups])
    half, alone = rows.dtype in HALVES, len(groups) == len(rows)
    if rows.device.type != "cpu" or (half and not (alone and weights.is_contiguous())):
        return torch.cat([torch.mm(rows[start:stop], weights[which]) for which, start, stop in groups])
    if half:
        return _weighted_rows(rows, expert, weights)
    # torch takes a product of few rows on one thread: here each gets its columns of the matrix
    blocks = math.gcd(weights.shape[2], torch.get_num_threads())
    if weights.stride(1) == 1:
        return _products_from_the_left(rows, weights.mT.unflatten(1, (blocks, -1)), groups)
    matrices = weights.unflatten(2, (blocks, -1)).transpose(1, 2)
    out = rows.new_empty(len(rows), blocks, 1, matrices.shape[3])
    if alone:
        for one, (which, *_), y in zip(rows[:, None, None].expand(-1, blocks, -1, -1), groups, out, strict=True):
            torch.bmm(one, matrices[which], out=y)
        return out.view(len(rows), -1)
    for which, start, stop in groups:
        parts = torch.bmm(rows[start:stop].expand(blocks, -1, -1), matrices[which])
        out[start:stop, :, 0] = parts.transpose(0, 1)
    return out.view(len(rows), -1)


def _products_from_the_left(
    rows: Float[Tensor, "N I"], matrices: Float[Tensor, "E B w I"], groups: list[tuple[int, int, int]]
) -> Float[Tensor, "N O"]:
    """The same where a matrix lies by outputs: as matrix times column, which reads it a third faster."""
    blocks, width = matrices.shape[1:3]
    out = rows.new_empty(len(rows), blocks, width)
    if len(groups) == len(rows):
        columns = rows[:, None, None].expand(-1, blocks, -1, -1).mT
        for column, (which, *_), y in zip(columns, groups, out[..., None], strict=True):
            torch.bmm(matrices[which], column, out=y)
        return out.view(len(rows), -1)
    for which, start, stop in groups:
        parts = torch.bmm(matrices[which], rows[start:stop].mT.expand(blocks, -1, -1))
        out[start:stop] = parts.permute(2, 0, 1)
    return out.view(len(rows), -1)


def _weighted_rows(rows: Tensor, expert: Tensor, weights: Tensor) -> Tensor:
    """rows[n] · weights[expert_n] as the sum of that matrix's rows weighted by the entries of rows[n], in blocks of
    columns, one for each thread: a half-precision product of one row takes longer."""
    (num_rows, dim), width = rows.shape, weights.shape[2]
    blocks = math.gcd(width, torch.get_num_threads())
    index = _block_rows(dim, blocks)[:, None] + (expert * (dim * blocks))[:, None]
    entries = rows.expand(blocks, -1, -1).reshape(-1, dim)
    table = weights.view(-1, width // blocks)
    sums = F.embedding_bag(index.view(-1, dim), table, mode="sum", per_sample_weights=entries)
    return sums.view(blocks, num_rows, -1).transpose(0, 1).reshape(num_rows, width)


@lru_cache(maxsize=16)
def _block_rows(rows: int, blocks: int) -> Tensor:
    """Where the rows of each column block lie in a matrix seen as a table of them, [blocks, rows]."""
    with torch.inference_mode(False):
        return torch.arange(rows * blocks).view(rows, blocks).mT.contiguous()


_library.impl("few_tokens", _few_tokens, "CompositeExplicitAutograd")


@torch.library.register_fake("moe::few_tokens")
def _like_the_tokens(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


@register_flop_formula(torch.ops.moe.few_tokens)
def _flops(x, token, expert, weight, up, down, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * token[0] * (up[1] * up[2] + down[1] * down[2])
