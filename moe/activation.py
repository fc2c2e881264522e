"""Products with mostly-zero activations that read only the weights they need."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.pages import advise_huge_pages
from moe.sampled import sampled_products, samples_in_place

# parts for each thread, of products that are shared among the threads: one thread's late start then costs little
SHARES = 16


@dataclass(frozen=True)
class ColumnTable:
    """A linear map's weight [O, F], transposed and contiguous, in B blocks of O / B columns.

    pieces: row b·F + f is block b of input f. Blocks are summed by different threads. A second copy of the weight. The
    blocks lie one after the other because pieces of successive inputs that are a power of two of bytes apart would
    evict each other from the caches: the sums would take a fifth to a half longer.
    """

    pieces: Float[Tensor, "BF o"]
    inputs: int
    numbers: Int[Tensor, "B 1"]  # 0, 1, ... B - 1: made once, as a call costs as much as reading ten pieces

    @property
    def blocks(self) -> int:
        """B: pieces of each input."""
        return self.numbers.shape[0]

    @property
    def outputs(self) -> int:
        """O: columns of all pieces."""
        return self.blocks * self.pieces.shape[1]


@dataclass(frozen=True)
class Nonzeros:
    """What is left of x [n, F] without its zeros: row i holds values[offsets[i] : offsets[i + 1]] at those columns.

    offsets has no closing entry (as an embedding bag wants them). NaN is not zero, so it is kept.
    """

    columns: Int[Tensor, "N"]
    values: Float[Tensor, "N"]
    offsets: Int[Tensor, "n"]


def column_table(weight: Float[Tensor, "O F"], *, blocks: int | None = None) -> ColumnTable:
    """The transposed weight, copied, in ``blocks`` blocks of columns; by default the most that divide O, up to two for
    each of torch's threads: one thread's late start then costs half a share.

    Raises: ValueError for a weight without rows or columns, or blocks that do not divide O.
    """
    outputs, inputs = weight.shape
    if 0 in weight.shape:
        raise ValueError(f"weight must have rows and columns, got shape {list(weight.shape)}")
    most = 2 * torch.get_num_threads() if torch.get_num_threads() > 1 else 1
    count = next(b for b in range(most, 0, -1) if outputs % b == 0) if blocks is None else blocks
    if not 1 <= count <= outputs or outputs % count:
        raise ValueError(f"blocks must divide outputs={outputs}, got {count}")
    pieces = weight.new_empty(count * inputs, outputs // count)
    advise_huge_pages(pieces)
    pieces.view(count, inputs, -1).copy_(rearrange(weight.detach(), "(b o) f -> b f o", b=count))
    return ColumnTable(pieces, inputs, torch.arange(count, device=weight.device)[:, None])


def nonzeros(x: Float[Tensor, "n F"]) -> Nonzeros:
    """The entries of x that are not zero, row by row."""
    if x.shape[0] == 1:
        columns = x[0].nonzero().squeeze(1)
        return Nonzeros(columns, x[0].index_select(0, columns), columns.new_zeros(1))
    rows, columns = x.nonzero(as_tuple=True)
    counts = rows.bincount(minlength=x.shape[0])
    return Nonzeros(columns, x[rows, columns], counts.cumsum(0) - counts)


def sparse_matvec(x: Float[Tensor, "n F"] | Nonzeros, table: ColumnTable) -> Float[Tensor, "n O"]:
    """y_i = Σ_{j: x_ij ≠ 0} x_ij · table_j: reads the table's rows at the non-zero entries, and no other.

    One embedding bag with a bag for each piece of each row of x; torch gives each thread its share of the bags.
    No gradient flows: this is for decoding.
    Raises: ValueError for an x of another width or type than the table, or one that wants a gradient.

    >>> weight = torch.randn(6, 4)
    >>> torch.allclose(sparse_matvec(torch.tensor([[0.0, 2.0, 0.0, 0.0]]), column_table(weight)), 2 * weight[:, 1])
    True
    """
    if isinstance(x, Tensor):
        _check_input(x, table)
        x = nonzeros(x.detach())
    count, total = table.blocks, x.columns.shape[0]
    if count == 1:  # one thread: the columns are the pieces
        return torch.embedding_bag(table.pieces, x.columns, x.offsets, False, 0, False, x.values)[0]
    # torch's function itself: the checks of torch.nn.functional take as long as a tenth of the sparsest sums
    bags = torch.embedding_bag(
        table.pieces, torch.add(x.columns, table.numbers, alpha=table.inputs).view(-1),
        torch.add(x.offsets, table.numbers, alpha=total).view(-1), False, 0, False, x.values.repeat(count),
    )[0]  # fmt: skip
    return bags.view(1, -1) if bags.shape[0] == count else rearrange(bags, "(b n) o -> n (b o)", b=count)


def _check_input(x: Tensor, table: ColumnTable) -> None:
    if x.shape[-1] != table.inputs:
        raise ValueError(f"x must have width {table.inputs}, the table's inputs, got {x.shape[-1]}")
    if x.dtype != table.pieces.dtype:
        raise ValueError(f"x must have the table's type {table.pieces.dtype}, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("sparse_matvec must not be asked for a gradient, got x with requires_grad=True: use no_grad")


def products_at(
    x: Float[Tensor, "n D"], weight: Float[Tensor, "F D"], active: Bool[Tensor, "n F"]
) -> Float[Tensor, "n F"]:
    """y_if = ⟨x_i, weight_f⟩ where active, else 0: reads the weight's rows of active outputs only.

    In place, one dot product for each. Of several rows, by the kernel of the gradient that an embedding bag's weights
    have: rows of the same f follow each other, so that x [n, D] shares what was read. Other types than float32 and
    float64 are gathered first.
    """
    if x.shape[0] == 1 and samples_in_place(weight):
        return _products_of_one(x, weight, active)
    if x.dtype in (torch.float32, torch.float64):
        return _products_in_place(x, weight, active)
    y = x.new_zeros(active.shape)
    for i in range(x.shape[0]):
        kept = active[i].nonzero().squeeze(1)
        y[i].index_copy_(0, kept, weight.index_select(0, kept) @ x[i])
    return y


def _products_of_one(x: Tensor, weight: Tensor, active: Bool[Tensor, "1 F"]) -> Float[Tensor, "1 F"]:
    wanted = active[0].nonzero().squeeze(1)
    y, count = x.new_zeros(active.shape), wanted.shape[0]
    if count:
        each = -(-count // (SHARES * torch.get_num_threads()))
        ends = torch.arange(0, count + each, each).clamp_(max=count)  # copies of x, to be shared among the threads
        products = sampled_products(x.expand(len(ends) - 1, -1), weight.contiguous(), ends, wanted)
        y.index_copy_(1, wanted, products[None])
    return y


def _products_in_place(x: Tensor, weight: Tensor, active: Bool[Tensor, "n F"]) -> Float[Tensor, "n F"]:
    count = max(x.shape[0], 1)
    wanted = active.T.reshape(-1).nonzero().squeeze(1)
    y = x.new_zeros(active.numel())
    if wanted.shape[0] > 0:
        outputs, unread, rows = wanted // count, wanted.new_zeros(1), wanted % count
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x.contiguous(), weight.contiguous(), outputs, unread, rows, 0
        )
        y.index_copy_(0, wanted, products)
    return y.view(-1, count).T if x.shape[0] else y.view(active.shape)


def draw_sparse(rows: int, width: int, density: float, dtype: torch.dtype) -> Float[Tensor, "n F"]:
    """Normal noise with round(density · width) non-zero entries in each row, at places drawn afresh.

    A generator of its own: measuring leaves torch's random state as it was.
    """
    generator = torch.Generator()
    generator.seed()
    scores = torch.rand(rows, width, generator=generator)
    places = scores.topk(round(density * width), dim=1).indices
    values = torch.randn(places.shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.zeros(rows, width, dtype=dtype).scatter_(1, places, values)
