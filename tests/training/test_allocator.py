"""The allocator setting takes effect: large temporaries stop faulting their pages in again."""

import platform
import subprocess
import sys

import pytest

# in a process of its own, whose allocator it sets; 36 MiB: above 32, where glibc's own threshold stops growing
FAULTS_OF_FIVE_TENSORS = """
import resource, torch
from training.allocator import keep_freed_memory
def faults():
    for _ in range(3):  # the heap grows until it holds what is live at once
        torch.zeros(9 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(9 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
left = faults()
assert keep_freed_memory()
print(left, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_tensors_are_reused_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS_OF_FIVE_TENSORS], check=True, capture_output=True, text=True)
    left, kept = map(int, done.stdout.split())
    assert kept * 10 < left
