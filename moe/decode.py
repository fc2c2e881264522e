"""The mixture for a few tokens, as in decoding: the time goes into reading the chosen experts' weights, once each."""

import math
from functools import lru_cache
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe.nonlinearity import Activation, activate

# column blocks of a half-precision weight that are summed side by side, by one thread each
COLUMN_BLOCKS = 8
_library = torch.library.Library("moe", "FRAGMENT")
_library.define(
    "few_tokens(Tensor x, Tensor token, Tensor expert, Tensor weight, Tensor up, Tensor down, str activation) -> Tensor"
)


def mix_few_tokens(
    x: Float[Tensor, "T D"],
    token: Int[Tensor, "N"],
    expert: Int[Tensor, "N"],
    weight: Float[Tensor, "N"],
    up: Float[Tensor, "E D A"],
    down: Float[Tensor, "E D F"],
    activation: Activation,
) -> Float[Tensor, "T D"]:
    """y_t = Σ_{n: token_n = t} weight_n · act(x_t · up_{expert_n}) · down_{expert_n}ᵀ, without a graph.

    Touches the chosen experts only, and copies none where x has the weights' dtype: an expert with one row takes a
    matrix–vector product, one with several a matrix product. Sums over experts in float32.
    """
    y: Tensor = torch.ops.moe.few_tokens(x, token, expert, weight, up, down, activation)
    return y


def _few_tokens(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    experts = expert.tolist()
    order = sorted(range(len(experts)), key=experts.__getitem__)
    if order != [*range(len(order))]:
        at = torch.tensor(order, device=x.device)
        token, weight = token[at], weight[at]
    groups = _groups([experts[place] for place in order])
    one = x.shape[0] == 1
    hidden = activate(
        _products(x.expand(len(order), -1) if one else x[token], up, groups), cast(Activation, activation)
    )
    rows, weight = _products(hidden, down.mT, groups), weight.to(torch.promote_types(weight.dtype, x.dtype))
    if one:
        return (weight @ rows.to(weight.dtype)).to(x.dtype)[None]
    y = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
    return y.index_add_(0, token, rows.to(weight.dtype) * weight[:, None]).to(x.dtype)


def _groups(experts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of each run of equal experts."""
    starts = [at for at in range(len(experts)) if not at or experts[at] != experts[at - 1]]
    return [(experts[start], start, stop) for start, stop in pairwise([*starts, len(experts)])]


def _products(rows: Tensor, weights: Tensor, groups: list[tuple[int, int, int]]) -> Tensor:
    """rows[start:stop] · weights[expert] for each group."""
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    for expert, start, stop in groups:
        matrix = weights[expert].to(rows.dtype)
        if stop - start > 1:
            torch.mm(rows[start:stop], matrix, out=out[start:stop])
        elif _is_slow(matrix):
            out[start] = _weighted_rows(rows[start], matrix)
        else:
            torch.mv(matrix.mT, rows[start], out=out[start])
    return out


def _is_slow(matrix: Tensor) -> bool:
    """Whether torch's product of a row with this matrix reads it at a fraction of the memory's speed."""
    half = matrix.dtype in (torch.bfloat16, torch.float16)
    return half and matrix.device.type == "cpu" and matrix.is_contiguous()


def _weighted_rows(row: Tensor, matrix: Tensor) -> Tensor:
    """row · matrix as the sum of the matrix's rows weighted by the entries of row, in column blocks."""
    blocks = math.gcd(matrix.shape[1], COLUMN_BLOCKS)
    table = matrix.view(-1, matrix.shape[1] // blocks)
    index = _block_rows(matrix.shape[0], blocks)
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=row.expand(blocks, -1)).view(-1)


@lru_cache(maxsize=16)
def _block_rows(rows: int, blocks: int) -> Tensor:
    """Where the rows of each column block lie in the matrix seen as a table of them, [blocks, rows]."""
    with torch.inference_mode(False):
        return torch.arange(rows * blocks).view(rows, blocks).mT.contiguous()


_library.impl("few_tokens", _few_tokens, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.moe.few_tokens)
def _flops(x, token, expert, weight, up, down, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * token[0] * (up[1] * up[2] + down[1] * down[2])
