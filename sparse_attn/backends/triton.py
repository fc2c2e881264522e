"""Block-sparse attention by Triton kernels, forward and backward: for NVIDIA GPUs, or interpreted for their tests."""

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sparse_attn.layout import BlockLayout
from sparse_attn.once import applied, differentiable_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The tensor cores' smallest operand.
LEAST = 16


def triton_attend(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    layout: BlockLayout,
    *,
    scale: float,
    key_mask: Bool[Tensor, "B S"] | None = None,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H L"]]:
    """Attention over the visited blocks of ``layout``, and the float32 log-sum-exp of each query's visible scores.

    Keeps q, k, v, the output and the log-sum-exp. Key heads are read in place by all their query heads. Half precision
    is multiplied as it is and summed in float32; float32 is multiplied by three TF32 products, which is close to
    float32, or by one where ``torch.set_float32_matmul_precision`` allows it. Gradients need no atomics, so they repeat
    bit for bit.
    Raises: ValueError without a GPU, for float64 and for dropout; ImportError without triton.
    """
    kernels = _kernels()
    if q.device.type != "cuda" and not kernels.interpreted():
        raise ValueError(f"backend='triton' needs CUDA tensors (or TRITON_INTERPRET=1), got {q.device}")
    if q.dtype not in DTYPES:
        raise ValueError(f"backend='triton' computes float32, bfloat16 and float16, got {q.dtype}")
    if q.dtype == torch.bfloat16 and kernels.interpreted():
        raise ValueError("Triton's interpreter multiplies the bits of bfloat16 as integers: give it float16 or float32")
    if dropout:
        raise ValueError(f"backend='triton' has no dropout: dropout must be 0, got {dropout}")
    with torch.autocast(q.device.type, enabled=False):
        return applied(_Triton, q, k, v, key_mask, layout, scale)


@dataclass(frozen=True)
class Tiles:
    """What one program works on: ``rows`` queries by ``columns`` keys, with so many warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


def choose_tiles(block: int, q_len: int, kv_len: int, width: int, dtype: torch.dtype) -> Tiles:
    """Tiles no wider than a block, a sequence, or what shared memory and registers hold at head size ``width``."""
    wide = _power_of_two(width) * dtype.itemsize
    most = 64 if wide <= 256 else 32 if wide <= 512 else LEAST
    rows, columns = (min(_power_of_two(min(block, length)), most) for length in (q_len, kv_len))
    # with 4 warps the key gradients of the largest tiles do not fit the registers
    return Tiles(rows, columns, warps=8 if wide >= 256 and rows * columns == 64 * 64 else 4, stages=2)


@dataclass(frozen=True, eq=False)
class Table:
    """Line r (a query block, or a key block when turned round) visits ``other[starts[r]:starts[r + 1]]``.

    Those before ``halves[r]`` are full blocks, which need no mask.
    """

    starts: Int[Tensor, "R_plus_1"]
    halves: Int[Tensor, "R"]
    other: Int[Tensor, "N"]
    mask_index: Int[Tensor, "N"]
    masks: UInt8[Tensor, "U block block"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As the kernels take them."""
        return self.starts, self.halves, self.other, self.mask_index, self.masks


@lru_cache(maxsize=64)
def make_tables(layout: BlockLayout, device: torch.device) -> tuple[Table, Table]:
    """The layout by query block and by key block, on the device. Cached, so that a layout travels there once."""
    row, column, mask = layout.query_block, layout.key_block, layout.mask_index
    masks = layout.masks.view(torch.uint8).to(device)
    rows, columns = layout.num_query_blocks, -(-layout.kv_len // layout.block)
    return _table(row, column, mask, rows, masks), _table(column, row, mask, columns, masks)


def _table(
    line: Int[Tensor, "N"],
    other: Int[Tensor, "N"],
    mask: Int[Tensor, "N"],
    lines: int,
    masks: UInt8[Tensor, "U block block"],
) -> Table:
    order = torch.argsort(line * 2 + (mask >= 0), stable=True)
    count = torch.bincount(line, minlength=lines)
    starts = torch.cat([count.new_zeros(1), count.cumsum(0)])
    halves = starts[:-1] + torch.bincount(line[mask < 0], minlength=lines)
    starts, halves, other, mask = (x.to(masks.device, torch.int32) for x in (starts, halves, other[order], mask[order]))
    return Table(starts, halves, other, mask, masks)


class _Call:
    """What forward and backward share: the tables, the sizes and the compile-time settings of one call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, layout: BlockLayout, scale: float):
        self.kernels, self.layout, self.scale = _kernels(), layout, scale
        self.by_query, self.by_key = make_tables(layout, q.device)
        self.padding = self.by_query.masks if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.batch, self.heads, self.kv_heads = q.shape[0], q.shape[1], k.shape[1]
        self.tiles = choose_tiles(layout.block, q.shape[2], k.shape[2], max(q.shape[3], v.shape[3]), q.dtype)
        exact = torch.get_float32_matmul_precision() == "highest"
        self.settings = {
            "BLOCK": layout.block,
            "ROWS": self.tiles.rows,
            "COLUMNS": self.tiles.columns,
            "HEAD": q.shape[3],
            "VALUE": v.shape[3],
            "HEAD_TILE": _power_of_two(q.shape[3]),
            "VALUE_TILE": _power_of_two(v.shape[3]),
            "PADDED": key_mask is not None,
            "PRECISION": "tf32x3" if exact else "tf32",
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
        }

    def launch(
        self, kernel: Any, tensors: tuple[Tensor, ...], table: Table, strided: tuple[Tensor, ...], heads: int, tile: int
    ) -> None:
        """One program for each tile of each line of the table, for each of ``heads`` heads of each sequence."""
        tiles = table.halves.numel() * -(-self.layout.block // tile)
        programs = tiles * self.batch * heads
        if not programs:
            return
        strides = [x.stride(axis) for x in strided for axis in range(3)]
        sizes = (self.heads, self.heads // self.kv_heads, tiles, self.layout.q_len, self.layout.kv_len, self.scale)
        with torch.cuda.device_of(tensors[0]):
            kernel[(programs,)](*tensors, *table.tensors, *strides, *sizes, **self.settings)


class _Triton(torch.autograd.Function):
    """dS = P ∘ (dP - delta), delta_i = Σ out_i · dout_i - dlse_i, with P recomputed from q, k and the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, layout: BlockLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_whole_rows(x) for x in (q, k, v))
        call = _Call(q, k, v, key_mask, layout, scale)
        out, lse = _like(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)
        tensors = (q, k, v, call.padding, out, lse)
        call.launch(call.kernels.forward_kernel, tensors, call.by_query, (q, k, v, out), call.heads, call.tiles.rows)
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_mask, out, lse = ctx.saved_tensors
        call = _Call(q, k, v, key_mask, ctx.layout, ctx.scale)
        up, grad_lse, delta = _whole_rows(grad_out), grad_lse.contiguous(), torch.empty_like(lse)
        grad_q, grad_k, grad_v = (_like(x, x.shape[-1]) for x in (q, k, v))
        call.launch(
            call.kernels.grad_q_kernel,
            (q, k, v, call.padding, out, up, lse, grad_lse, delta, grad_q),
            call.by_query,
            (q, k, v, out, up, grad_q),
            call.heads,
            call.tiles.rows,
        )
        call.launch(
            call.kernels.grad_kv_kernel,
            (q, k, v, call.padding, up, lse, delta, grad_k, grad_v),
            call.by_key,
            (q, k, v, up, grad_k, grad_v),
            call.kv_heads,
            call.tiles.columns,
        )
        return grad_q, grad_k, grad_v, None, None, None


def _kernels() -> ModuleType:
    try:
        from sparse_attn.backends import triton_kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError("backend='triton' needs triton: pip install 'sparse-transformers[triton]'") from error
    return triton_kernels


def _power_of_two(size: int) -> int:
    """The least power of two that holds ``size``, and no less than the tensor cores take."""
    return max(LEAST, 1 << (size - 1).bit_length())


def _whole_rows(x: Tensor) -> Tensor:
    """x with the numbers of a row side by side, which the kernels read."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Float[Tensor, "B H L d"], width: int) -> Float[Tensor, "B H L w"]:
    """Uninitialised; heads inside the length where x has them so, so that merging the heads is a view."""
    if x.transpose(1, 2).is_contiguous():
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], width).transpose(1, 2)
    return x.new_empty(*x.shape[:-1], width)
