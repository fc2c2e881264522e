"""A prune for the kill test: ``python -m tests.training.killed_prune BLOCKS ARGUMENTS…`` hangs after so many blocks."""

import sys
import time

import torch

from training.cli import main
from training.prune_partial import Partial


def hang_after(blocks: int) -> None:
    """From now on the process says so and hangs once this many blocks are kept."""
    write = Partial.write

    def kept_then_hanging(partial: Partial, index: int, matrices: object) -> None:
        write(partial, index, matrices)
        if index + 1 == blocks:
            print("kept", flush=True)
            time.sleep(600)

    Partial.write = kept_then_hanging


if __name__ == "__main__":
    torch.set_num_threads(1)
    hang_after(int(sys.argv[1]))
    main(["prune", *sys.argv[2:]])
