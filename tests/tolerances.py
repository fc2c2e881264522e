"""The one table of tolerances. Nothing outside this file, and no environment variable, loosens it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """|actual - expected| ≤ relative·|expected| + of_scale·max(|expected|max, FLOOR), elementwise.

    of_scale is a share of the tensor's largest entry, so that a tensor of small numbers is held as tightly as one of
    large numbers: sums of many terms err in proportion to the terms, not to what is left after they cancel.
    """

    relative: float
    of_scale: float


TABLE = {
    torch.float64: Tolerance(relative=1e-9, of_scale=1e-11),
    torch.float32: Tolerance(relative=1e-4, of_scale=2e-5),
    torch.float16: Tolerance(relative=4e-3, of_scale=4e-3),
    torch.bfloat16: Tolerance(relative=2e-2, of_scale=2e-2),
}
# Where the expected tensor is all but zero, rounding in the O(1) numbers that made it still shows.
FLOOR = 1e-2


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that two tensors of one shape agree within the table's row for ``dtype``.

    dtype: the precision the fast path computed in; by default the coarser of the two tensors' types, so that a
    float32 result may be compared with a float64 oracle. Integers and booleans must be equal.
    """
    row = dtype if dtype is not None else _coarser(actual.dtype, expected.dtype)
    if row not in TABLE:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    wide_actual, wide_expected = actual.detach().double(), expected.detach().double()
    finite = wide_expected[wide_expected.isfinite()]  # an infinity must be met, and allows the others nothing
    scale = max(finite.abs().max().item() if finite.numel() else 0.0, FLOOR)
    tolerance = TABLE[row]
    torch.testing.assert_close(
        wide_actual, wide_expected, rtol=tolerance.relative, atol=tolerance.of_scale * scale, check_device=False
    )


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    order = list(TABLE)
    if a not in TABLE or b not in TABLE:
        return a if a not in TABLE else b
    return order[max(order.index(a), order.index(b))]
