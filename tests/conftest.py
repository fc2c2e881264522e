"""Every test runs with checked shapes and types, one thread, fixed seeds and no network."""

import os
from pathlib import Path

# Before torch is imported: two workers on two cores must not start four threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On AMD processors MKL's products else differ in their last bits with where their factors lie in memory. Strict: not by
# that, at two thirds of the time of COMPATIBLE.
if Path("/proc/cpuinfo").is_file() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text():
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
# Before triton is imported: its kernels run interpreted, on the CPU. TRITON_INTERPRET=0 tests them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

import tests.typecheck

PACKAGES = ("moe", "sparse_attn", "pruning", "transformer", "training")

# Installed at import, before any test module imports a package.
tests.typecheck.install(PACKAGES)
torch.set_num_threads(1)
# A shell starts what it puts in the background with Ctrl-C ignored, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> Iterator[None]:
    """A test's numbers depend on nothing that ran before it, and it leaves torch's defaults as they were."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes or load trained models go first: they take longest, and were one of them last, one of
    two workers would wait for the other."""
    starts = ("subprocess", "spawn", "launched")
    long = {
        item.path
        for item in items
        if item.get_closest_marker("trained") or any(hasattr(getattr(item, "module", None), name) for name in starts)
    }
    items.sort(key=lambda item: item.path not in long)
