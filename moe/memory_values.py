"""Tables of which a token reads a few rows: weighted sums and dot products, with gradients for the rows read alone.

For slots [T, K] of a table [S, V], two maps that are each other's transpose:

    sum_rows: y_t = Σ_j weights_tj · table[slots_tj]        dot_rows: a_tj = ⟨x_t, table[slots_tj]⟩

No row is gathered into memory: each map is one pass over the rows. The table's gradient, Σ_{t,j: slots_tj = s}
weights_tj · d_y_t for each slot s that was read, is an embedding bag over the tokens of the sorted slots. It comes as
a sparse COO tensor of at most T·K rows: neither pass depends on S.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe.checks import at_least
from moe.once import differentiable_once
from moe.pages import advise_huge_pages
from moe.sampled import sampled_products, samples_in_place
from moe.transforms import transformed


class MemoryValues(nn.Module):
    """A table [num_slots, dim] of rows, drawn from the normal distribution of deviation dim^-1/2.

    Give one instance to several layers and they share one pool (Memory+, arXiv:2412.09764); two models never share.
    sparse: the gradient is a sparse tensor of the rows read, for :class:`training.rowwise_adam.RowwiseAdam` or
    torch.optim.SparseAdam; otherwise a dense one, for any optimiser, at a cost that grows with num_slots.
    Raises: ValueError for a size below 1.
    """

    def __init__(self, num_slots: int, dim: int, *, sparse: bool = True) -> None:
        super().__init__()
        for name, size in (("num_slots", num_slots), ("dim", dim)):
            at_least(name, size, 1)
        self.num_slots, self.dim, self.sparse = num_slots, dim, sparse
        self.weight = nn.Parameter(torch.empty(num_slots, dim))
        advise_huge_pages(self.weight.detach())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every row anew."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)

    def forward(self, slots: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]) -> Float[Tensor, "T V"]:
        """:func:`sum_rows` of this table."""
        return sum_rows(self.weight, slots, weights, sparse=self.sparse)

    def dot(self, slots: Int[Tensor, "T K"], x: Float[Tensor, "T V"]) -> Float[Tensor, "T K"]:
        """:func:`dot_rows` of this table."""
        return dot_rows(self.weight, slots, x, sparse=self.sparse)

    def extra_repr(self) -> str:
        return f"num_slots={self.num_slots}, dim={self.dim}, sparse={self.sparse}"


def sparse_tables(model: nn.Module) -> Iterator[nn.Parameter]:
    """The tables of a model whose gradients are sparse, each once: they need an optimiser of their own."""
    for module in model.modules():
        if isinstance(module, MemoryValues) and module.sparse:
            yield module.weight


@torch.compiler.disable
def sum_rows(
    table: Float[Tensor, "S V"], slots: Int[Tensor, "T K"], weights: Float[Tensor, "T K"], *, sparse: bool = True
) -> Float[Tensor, "T V"]:
    """y_t = Σ_j weights_tj · table[slots_tj], in the table's dtype. Differentiable once; torch.compile breaks here.

    Raises: IndexError or RuntimeError (torch's own) for a slot outside [0, S).

    >>> sum_rows(torch.eye(3), torch.tensor([[0, 2]]), torch.tensor([[0.5, 2.0]]))
    tensor([[0.5000, 0.0000, 2.0000]])
    """
    if transformed():
        return torch.einsum("tk,tkv->tv", weights.to(table.dtype), table[slots])
    return _SumRows.apply(table, slots.contiguous(), weights.to(table.dtype).contiguous(), sparse)


@torch.compiler.disable
def dot_rows(
    table: Float[Tensor, "S V"], slots: Int[Tensor, "T K"], x: Float[Tensor, "T V"], *, sparse: bool = True
) -> Float[Tensor, "T K"]:
    """a_tj = ⟨x_t, table[slots_tj]⟩, in the table's dtype. Differentiable once; torch.compile breaks here.

    Raises: IndexError for a slot outside [0, S).

    >>> dot_rows(torch.eye(3), torch.tensor([[0, 2]]), torch.tensor([[5.0, 6.0, 7.0]]))
    tensor([[5., 7.]])
    """
    if slots.numel() and slots.device.type == "cpu":
        least, most = (int(end) for end in slots.aminmax())
        if least < 0 or most >= len(table):
            raise IndexError(f"slots must be in [0, {len(table)}), got {least if least < 0 else most}")
    if transformed():
        return torch.einsum("tkv,tv->tk", table[slots], x.to(table.dtype))
    return _DotRows.apply(table, slots.contiguous(), x.to(table.dtype).contiguous(), sparse)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, slots: Tensor, weights: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(table, slots, weights)
        ctx.sparse = sparse
        return weighted_rows(table, slots, weights)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        table, slots, weights = ctx.saved_tensors
        d_y = d_y.contiguous()
        d_table = table_gradient(table, slots, weights, d_y, ctx.sparse) if ctx.needs_input_grad[0] else None
        return d_table, None, _dots(table, slots, d_y) if ctx.needs_input_grad[2] else None, None


class _DotRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, slots: Tensor, x: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(table, slots, x)
        ctx.sparse = sparse
        return _dots(table, slots, x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_a: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        table, slots, x = ctx.saved_tensors
        d_a = d_a.contiguous()
        d_table = table_gradient(table, slots, d_a, x, ctx.sparse) if ctx.needs_input_grad[0] else None
        return d_table, None, weighted_rows(table, slots, d_a) if ctx.needs_input_grad[2] else None, None


def weighted_rows(
    table: Float[Tensor, "S V"], slots: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]
) -> Float[Tensor, "T V"]:
    """Σ_j weights_tj · table[slots_tj], without a graph of its own."""
    if slots.numel() == 0:
        return table.new_zeros(slots.shape[0], table.shape[1])
    return F.embedding_bag(slots, table, per_sample_weights=weights, mode="sum")


def _dots(table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    tokens, choices = slots.shape
    if slots.numel() == 0:
        return table.new_zeros(tokens, choices)
    if samples_in_place(table) and choices <= len(table):  # torch refuses more entries than there are places
        ends = torch.arange(0, slots.numel() + 1, choices)
        return sampled_products(x, table, ends, slots.view(-1)).view(tokens, choices)
    starts = torch.arange(tokens, device=slots.device)
    bag = starts.repeat_interleave(choices)
    # the gradient of an embedding bag's weights is this dot product, row by row, without a gathered copy
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, table, slots.view(-1), starts * choices, bag, 0)
    return dots.view(tokens, choices)


def table_gradient(
    table: Tensor, slots: Int[Tensor, "T K"], weights: Float[Tensor, "T K"], rows: Float[Tensor, "T V"], sparse: bool
) -> Tensor:
    """Σ weights_tj · rows_t over the choices of each slot that was chosen, in the shape of table."""
    ordered, order = slots.view(-1).sort()
    chosen, counts = torch.unique_consecutive(ordered, return_counts=True)
    starts = counts.cumsum(0) - counts
    if slots.numel() == 0:
        sums = table.new_zeros(0, table.shape[1])
    else:
        token, scale = order // slots.shape[1], weights.view(-1)[order]
        sums = F.embedding_bag(token, rows, starts, per_sample_weights=scale, mode="sum")
    if sparse:
        return torch.sparse_coo_tensor(chosen[None], sums, table.shape, is_coalesced=True, check_invariants=False)
    return torch.zeros_like(table).index_copy_(0, chosen, sums)
