"""Memory in large pages, for tables that are read here and there."""

import ctypes
import mmap

from torch import Tensor

HUGE_PAGE = 1 << 21


def advise_huge_pages(tensor: Tensor) -> bool:
    """Ask Linux to back a new tensor, not yet written to, with pages of 2 MiB rather than 4 KiB.

    Rows read here and there then miss the processor's table of page addresses less often. Returns: True if the kernel
    took the advice; False off Linux, off the CPU, or for a tensor too small to hold such a page. Values never change.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return False
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if length <= 0:
        return False
    return bool(ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice) == 0)
