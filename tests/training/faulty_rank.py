"""The command, with a fault of rank 1 in its first life: FAULT=kill python -m tests.training.faulty_rank train …"""

import dataclasses
import os
import signal
import sys

import torch

from training.cli import main
from training.distributed import Ranks

STEP = 8  # the one that fails
take_rows, run_forward = Ranks.rows, Ranks.forward
steps = 0


def rows(self, batch):
    """Die, or stop for ever, after this rank's rows are chosen and before it meets the others."""
    global steps
    steps += 1
    if steps == STEP and fault in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    return take_rows(self, batch)


def forward(self, model, batch, side):
    """A loss that is not a number."""
    output = run_forward(self, model, batch, side)
    return dataclasses.replace(output, loss=output.loss * torch.nan) if steps >= STEP and fault == "nan" else output


if __name__ == "__main__":
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    fault = os.environ.get("FAULT", "") if os.environ["RANK"] == "1" and first_life else ""
    Ranks.rows, Ranks.forward = rows, forward
    main([*sys.argv[1:], *(["--seed", "7"] if fault == "seed" else [])])
