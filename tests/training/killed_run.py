"""A training run for the kill tests: ``python -m tests.training.killed_run OUT [go|resume|STALLED_STEP]``."""

import sys
import time
from functools import partial
from pathlib import Path

import torch

from tests.training.models import small_trainer
from training.checkpoint import OPTIMIZER, latest_checkpoint
from training.durable import write_durably
from training.trainer import CHECKPOINTS

STEPS = 60


def stall_in_the_middle(path: Path, content: bytes, *, step: int) -> None:
    """Write half of the optimiser state of this step's checkpoint, then never return."""
    if path.name == OPTIMIZER and f"{step:08d}" in path.parent.name:
        path.write_bytes(content[: len(content) // 2])
        print("stalled", flush=True)
        time.sleep(600)
    write_durably(path, content)


def main(out: Path, mode: str) -> None:
    torch.set_num_threads(1)
    write = partial(stall_in_the_middle, step=int(mode)) if mode.isdigit() else write_durably
    trainer = small_trainer(out, train={"steps": STEPS, "eval_every": 20}, write=write)
    if mode == "resume":
        trainer.resume(latest_checkpoint(out / CHECKPOINTS))
    trainer.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
