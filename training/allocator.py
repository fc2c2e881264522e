"""How the C allocator treats the large blocks that tensors free."""

import ctypes
import platform

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_HEAP_BLOCK = 1 << 30
NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc reuse the memory of freed tensors, for the whole process, from now on.

    glibc serves blocks above 32 MiB by mmap and gives them back on free, so every large temporary tensor of a training
    step faults its pages in again. Blocks up to 1 GiB then stay in the heap and the heap is not trimmed: resident
    memory stays at its peak, and steps with large temporaries spend their time in arithmetic.

    Returns: True if both settings took; False where the C library is not glibc (nothing is changed there).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))
