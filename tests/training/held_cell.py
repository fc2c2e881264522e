"""A study's worker that waits in mid-training until it is asked to stop: ``python -m tests.training.held_cell JOB``."""

import runpy
import time

from training.progress import Interruption
from training.trainer import Trainer

HELD_STEP = 60
look = Trainer._interrupted


def held(trainer: Trainer, interruption: Interruption) -> bool:
    """Look whether a signal came; at this step, until one has: however late it comes, steps are left."""
    while trainer.step == HELD_STEP and interruption.name is None:
        time.sleep(0.01)
    return look(trainer, interruption)


if __name__ == "__main__":
    Trainer._interrupted = held
    runpy.run_module("training.study", run_name="__main__")
