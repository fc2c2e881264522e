"""Scores and a count → a mask with exactly that many zeros, whatever the ties."""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Structure = Callable[[Tensor, int], Tensor]


def removal_count(fraction: float, total: int) -> int:
    """⌊fraction · total⌋ on the ratio that is meant: 0.29 of 100 is 29, though 0.29 · 100 < 29 in floats.

    The ratio is the nearest one with a denominator of at most 10⁹, so that 1/3 of 27 is 9.

    Raises: ValueError if fraction is outside [0, 1)."""
    check_fraction("fraction", fraction)
    return math.floor(Fraction(fraction).limit_denominator(10**9) * total)


def check_fraction(name: str, value: float) -> None:
    """Raises: ValueError if value is outside [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def unstructured(scores: Float[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """False at the `count` lowest scores, exactly; of equal scores the earlier positions go first.

    >>> unstructured(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([False, False,  True,  True])

    Linear time (selection, not sorting). Raises: ValueError if count is outside [0, number of scores] or a score is
    NaN."""
    flat = scores.reshape(-1)
    if not 0 <= count <= flat.numel():
        raise ValueError(f"count must be in [0, {flat.numel()}], got {count}")
    keep = torch.ones_like(flat, dtype=torch.bool)
    if count:
        threshold = _threshold(flat, count)
        keep = flat > threshold
        ties = (flat == threshold).nonzero().squeeze(1)
        keep[ties[count - int((flat < threshold).sum()) :]] = True
    return keep.view(scores.shape)


def _threshold(flat: Float[Tensor, "n"], count: int) -> Float[Tensor, ""]:
    if torch.isnan(flat).any():
        raise ValueError(f"scores must not be NaN, got {int(torch.isnan(flat).sum())} of {flat.numel()}")
    # kthvalue is not implemented for half precision everywhere
    return flat.to(torch.promote_types(flat.dtype, torch.float32)).kthvalue(count).values.to(flat.dtype)


def n_of_m(n: int, m: int, *, dim: int = -1) -> Structure:
    """Keep the n largest of every m consecutive scores along `dim` (the input dimension); of equal scores the earlier
    go first. The count that the structure is called with must be the one it implies, (m − n)/m of the scores.

    Raises: ValueError unless 0 < n < m, m divides the dimension, and the count fits."""
    if not 0 < n < m:
        raise ValueError(f"n of m must satisfy 0 < n < m, got {n}:{m}")

    def structure(scores: Float[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
        if scores.shape[dim] % m:
            raise ValueError(f"{n}:{m} needs dimension {dim} divisible by {m}, got shape {list(scores.shape)}")
        implied = scores.numel() // m * (m - n)
        if count != implied:
            raise ValueError(f"{n}:{m} removes {implied} of {scores.numel()} weights, got count {count}")
        groups = scores.movedim(dim, -1).unflatten(-1, (-1, m))
        order = groups.argsort(dim=-1, stable=True)
        keep = torch.ones_like(groups, dtype=torch.bool).scatter(-1, order[..., : m - n], False)
        return keep.flatten(-2).movedim(-1, dim)

    return structure


def parse_structure(text: str) -> tuple[int, int]:
    """ "2:4" → (2, 4). Raises: ValueError for any other form."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"structure must be None or 'n:m' such as '2:4', got {text!r}")
    return int(parts[0]), int(parts[1])
