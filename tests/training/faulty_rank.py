"""The command, with faults of rank 1, or of FAULTY: FAULT=kill python -m tests.training.faulty_rank train …

die: it dies in mid-step in its first life, in mid-checkpoint in its second. kill: as that, and it is slow in one step.
stop, halt: it hangs in a step, in its first checkpoint. nan: its loss is not a number. full: its disk has no room for
the second checkpoint. behind: it dies while it writes that one in the background.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from training.cli import main
from training.distributed import Ranks, checkpoint

SLOW, STEP = 3, 8  # the step that takes long, and the one that fails
SECOND = ".writing-00000010"  # where the second checkpoint is written
take_rows, run_forward, name_part = Ranks.rows, Ranks.forward, checkpoint.own_file
steps = 0


def rows(self, batch):
    """Sleep, die, or stop for ever, after this rank's rows are chosen and before it meets the others."""
    global steps
    steps += 1
    if steps == SLOW and fault == "kill":
        time.sleep(3)
    if steps == STEP and life == 0 and fault in ("die", "kill", "stop"):
        os.kill(os.getpid(), signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
    return take_rows(self, batch)


def own_file(rank):
    """Die, or stop for ever, when the tensors of this rank are on the disk, and the rest is not."""
    if life == 1 and fault in ("die", "kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "halt":
        os.kill(os.getpid(), signal.SIGSTOP)
    return name_part(rank)


@contextlib.contextmanager
def create_stream(self, path, mode):
    """Die, or find a full disk, where the tensors of the second checkpoint are written."""
    second = fault in ("full", "behind") and SECOND in str(path) and "w" in mode
    if second and fault == "behind":
        assert threading.current_thread() is not threading.main_thread()
        os.kill(os.getpid(), signal.SIGKILL)
    with open("/dev/full", "wb", buffering=0) if second else open(path, mode) as stream:
        yield stream


def forward(self, model, batch, side):
    """A loss that is not a number."""
    output = run_forward(self, model, batch, side)
    return dataclasses.replace(output, loss=output.loss * torch.nan) if steps >= STEP and fault == "nan" else output


if __name__ == "__main__":
    life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    fault = os.environ["FAULT"] if os.environ["RANK"] == os.environ.get("FAULTY", "1") else ""
    Ranks.rows, Ranks.forward, checkpoint.own_file = rows, forward, own_file
    FileSystem.create_stream = create_stream
    main(sys.argv[1:])
