"""The pieces of the folded backend by torch's own CPU attention kernel, one call for a tile of a piece.

The kernel reads keys by their strides, so a window over K is a batch of overlapping views. Its backward takes output
and log-sum-exp as arguments: given those of all tiles together, each tile's gradients are its exact share.
"""

import torch
from torch import Tensor

from sparse_attn.backends.pieces import Piece, Tile
from sparse_attn.backends.work import Work

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_forward(work: Work, q: Tensor, out: Tensor, lse: Tensor, piece: Piece) -> None:
    """Output and log-sum-exp of a piece, the tiles merged by their log-sum-exp."""
    rows = work.queries(piece, q).transpose(0, 1)
    value, total = None, None
    for tile in piece.tiles(work.groups):
        bias = work.laid_bias(tile)
        share, mass = _forward_kernel(rows, *_keys(work, tile), 0.0, False, attn_mask=bias, scale=work.scoring.scale)
        mass = mass[..., None]
        if bias is not None:  # the kernel gives such queries a log-sum-exp of 0
            mass = mass.masked_fill(bias.amax(-1, keepdim=True) == -torch.inf, -torch.inf)
        if value is None or total is None:
            value, total = share, mass
            continue
        higher = torch.logaddexp(total, mass)
        finite = higher.clamp(min=torch.finfo(higher.dtype).min)
        value = value.lerp_(share, (mass - finite).exp_())
        total = higher
    if value is not None and total is not None:
        work.store(piece, out, lse, value.transpose(0, 1), total.transpose(0, 1))


def flash_backward(
    work: Work,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    piece: Piece,
) -> None:
    """Gradients of a piece; ``lse`` is +inf where a query sees nothing."""
    rows, upstream, result, total = (work.queries(piece, x).transpose(0, 1) for x in (q, grad_out, out, lse))
    grad_rows = None
    for tile in piece.tiles(work.groups):
        part, grad_k, grad_v = _backward_kernel(
            upstream,
            rows,
            *_keys(work, tile),
            result,
            total[..., 0].contiguous(),
            0.0,
            False,
            attn_mask=work.laid_bias(tile),
            scale=work.scoring.scale,
        )
        tile.wide_add(grads[1], grad_k.transpose(0, 1))
        tile.wide_add(grads[2], grad_v.transpose(0, 1))
        grad_rows = part if grad_rows is None else grad_rows.add_(part)
    work.store_gradient(piece, grads[0], grad_rows.transpose(0, 1))


def _keys(work: Work, tile: Tile) -> tuple[Tensor, Tensor]:
    return tile.wide_keys(work.k).transpose(0, 1), tile.wide_keys(work.v).transpose(0, 1)
