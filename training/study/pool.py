"""Jobs in parallel processes, each with its share of the cores and several jobs one after another."""

import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from training.study.cell import RECORD

ERRORS = "errors.txt"
SECONDS_TO_SAVE = 60.0
POLL = 0.05
TOGETHER = 8


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def completed(jobs: Sequence[Path], *, at_once: int, threads: int) -> Generator[Path, None, None]:
    """Run jobs (see :mod:`training.study.cell`), ``at_once`` at a time; yields each one's folder as it ends.

    A job whose record is there already is not run. A process runs up to TOGETHER of them, as it takes seconds to
    start. When the iterator is closed or interrupted, running jobs are asked to save and stop, and waited for.
    Raises: RuntimeError with a job's last words if it fails.
    """
    done = [job.parent for job in jobs if (job.parent / RECORD).is_file()]
    waiting = [job for job in jobs if job.parent not in done]
    yield from done
    running = dict[subprocess.Popen[bytes], tuple[Path, list[Path]]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                count = min(TOGETHER, -(-len(waiting) // at_once))
                taken, waiting = waiting[:count], waiting[count:]
                running[_start(taken, threads=threads)] = taken[0].parent, taken
            for process, (first, left) in list(running.items()):
                ended = process.poll()  # before the records are looked at: a process that ended has left them all
                while left and (left[0].parent / RECORD).is_file():
                    yield left.pop(0).parent
                if ended is None:
                    continue
                del running[process]
                if left:
                    raise RuntimeError(f"{left[0].parent.name} ended with {ended}: {_last_words(first)}")
            time.sleep(POLL)
    finally:
        _stop(list(running))


def _start(jobs: Sequence[Path], *, threads: int) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with (jobs[0].parent / ERRORS).open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "training.study", *map(str, jobs)],
            stdin=subprocess.PIPE,  # never written to: it closes when this process dies
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops them once
        )


def _stop(processes: list["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_SAVE
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(folder: Path) -> str:
    lines = (folder / ERRORS).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"no message in {folder / ERRORS}"
