"""Replicas of data parallel training keep one mask, whatever each of them saw: see replica_ranks.py."""

import pytest

from tests.training.spawning import spawn


@pytest.mark.parametrize("world", [2])
def test_every_saliency_prunes_replicas_alike(world, tmp_path):
    spawn("tests.pruning.replica_ranks", world, tmp_path)
