"""Processes for a probe's cells that never outlive what started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Up to ``count`` processes. Left whole, the block waits for what it submitted; left by an error or Ctrl-C, and
    where this process is killed, they end at once: cells have no checkpoints to save.

    Ctrl-C reaches this process alone."""
    # spawn: a forked torch that has used its threads hangs
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent, initargs=(watched,))
    try:
        yield pool
        pool.shutdown()
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        watched.close()


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, not even while they import; here it comes when the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(watched: Connection) -> None:
    """Called in a worker: it ends when the other end of the pipe closes, be its owner done, stopped or killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait, args=(watched,), daemon=True).start()


def _wait(watched: Connection) -> None:
    watched.poll(None)
    os._exit(1)
