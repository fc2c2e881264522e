"""A training run for the kill tests: ``python -m tests.training.killed_run OUT [resume|stall]``."""

import sys
import time
from pathlib import Path

import torch

from tests.training.models import small_trainer
from training.checkpoint import OPTIMIZER, latest_checkpoint
from training.durable import write_durably
from training.trainer import CHECKPOINTS

STEPS, STALLED_STEP = 60, 10


def stall_in_the_middle(path: Path, content: bytes) -> None:
    """Write half of a later checkpoint's optimiser state, then never return."""
    if path.name == OPTIMIZER and f"{STALLED_STEP:08d}" in path.parent.name:
        path.write_bytes(content[: len(content) // 2])
        print("stalled", flush=True)
        time.sleep(600)
    write_durably(path, content)


def main(out: Path, mode: str) -> None:
    torch.set_num_threads(1)
    write = stall_in_the_middle if mode == "stall" else write_durably
    trainer = small_trainer(out, train={"steps": STEPS, "eval_every": 20}, write=write)
    if mode == "resume":
        trainer.resume(latest_checkpoint(out / CHECKPOINTS))
    trainer.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
