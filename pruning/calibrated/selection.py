"""Which weights of one matrix go, by exact count: over all of it, or block of columns by block."""

from itertools import pairwise

from jaxtyping import Bool, Float
from torch import Tensor

from pruning.structure import n_of_m, unstructured

Groups = tuple[int, int] | None  # n of every m consecutive inputs stay; None: anywhere


def lowest(scores: Float[Tensor, "out in"], count: int, groups: Groups = None) -> Bool[Tensor, "out in"]:
    """True at the `count` lowest scores of the matrix, the earlier of equal ones first; with `groups`, at the m − n
    lowest of every m consecutive inputs."""
    if groups is None:
        return ~unstructured(scores, count)
    n, m = groups
    return ~n_of_m(n, m)(scores, scores.numel() // m * (m - n))


def block_counts(first: Bool[Tensor, "out in"], count: int, width: int) -> list[int]:
    """How many weights go from each block of `width` columns: Σ = count, as even as the blocks' sizes allow.

    first: weights that go before all others (zero already, or fed by a dead input); where they outnumber `count` it is
    shared out among them."""
    rows, columns = first.shape
    ends = [min(start + width, columns) for start in range(0, columns, width)]
    gone = first.sum(0).cumsum(0)
    gone_at = [0, *(int(gone[end - 1]) for end in ends)]
    rest_at = [0, *(rows * end - gone for end, gone in zip(ends, gone_at[1:], strict=True))]
    from_first, from_rest = min(count, gone_at[-1]), max(0, count - gone_at[-1])
    shares = [a + b for a, b in zip(_shared(from_first, gone_at), _shared(from_rest, rest_at), strict=True)]
    return [after - before for before, after in pairwise(shares)]


def _shared(count: int, sizes: list[int]) -> list[int]:
    """Of `count` so many fall to the first sizes[i] of all."""
    return [count * size // max(sizes[-1], 1) for size in sizes]
