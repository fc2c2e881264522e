"""A pool of threads that compute pieces side by side, each on its own core.

Pieces are small so that they stay in a core's cache. Splitting every operation on one over all cores, as torch does,
would wake and join the threads some forty times a piece, and wait each time for the slowest: with another process on
the machine that was measured to cost ten times the arithmetic. Here a thread takes whole heads and meets the others
once.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import torch


def side_by_side(tasks: list[Callable[[], None]]) -> None:
    """Run all tasks, one thread each, with the caller's inference mode and without a graph; raise what one raised.

    Each thread has an equal share of ``torch.get_num_threads()``, at least one, for its own operations.
    """
    if len(tasks) < 2:
        for task in tasks:
            task()
        return
    inference = torch.is_inference_mode_enabled()

    def run(task: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            task()

    pool = _pool(len(tasks), max(1, torch.get_num_threads() // len(tasks)))
    for future in [pool.submit(run, task) for task in tasks]:
        future.result()


@lru_cache(maxsize=4)
def _pool(workers: int, threads_each: int) -> ThreadPoolExecutor:
    # set_num_threads is the calling thread's own, but also what threads born later start from: put that back.
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "sparse_attn", initializer=torch.set_num_threads, initargs=(threads_each,))
    together = Barrier(workers)
    for future in [pool.submit(together.wait) for _ in range(workers)]:
        future.result()
    torch.set_num_threads(before)
    return pool


# Threads do not survive a fork: the child makes its own.
os.register_at_fork(after_in_child=_pool.cache_clear)
