"""Training by many processes: one model, one batch, one loss, whatever their number."""

from training.distributed.ranks import Ranks
from training.distributed.world import Environment, World, joined, launcher, make_world, torchrun_environment

__all__ = ["Environment", "Ranks", "World", "joined", "launcher", "make_world", "torchrun_environment"]
