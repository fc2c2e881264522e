"""Cells in a process of their own: ``python -m training.study JOB.json …`` trains each and leaves its record."""

import os
import signal
import sys
import threading
from pathlib import Path

from training.study.cell import run_cell


def end_with_parent() -> None:
    """Stop, saving a checkpoint, when the pipe from the parent closes: a killed study leaves no process behind."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(next((status for job in sys.argv[1:] if (status := run_cell(Path(job)))), 0))
