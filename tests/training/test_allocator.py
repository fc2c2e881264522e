"""The allocator setting takes effect: large temporaries stop faulting their pages in again."""

import platform
import subprocess
import sys

import pytest

FAULTS_OF_TWENTY_TENSORS = """
import resource, sys, torch
from training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):  # the heap grows until it holds what is live at once
    torch.zeros(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", FAULTS_OF_TWENTY_TENSORS, mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_tensors_are_reused_without_page_faults() -> None:
    assert faults("keep") * 10 < faults("leave")
