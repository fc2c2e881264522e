import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe import MoE, TopKRouter, shard_experts
from moe.expert_parallel import shares
from tests.training.spawning import spawn


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_are_one_process(world, tmp_path):
    """Outputs, all gradients, rows on the wire and the next optimiser step: see expert_parallel_ranks.py."""
    spawn("tests.moe.expert_parallel_ranks", world, tmp_path)


@given(st.integers(1, 600), st.integers(1, 64))
def test_shares_are_consecutive_runs_that_differ_by_one(experts, ranks):
    bounds = shares(experts, ranks)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == experts and len(sizes) == ranks
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_without_a_process_group_it_says_what_to_call():
    with pytest.raises(RuntimeError, match="init_process_group"):
        shard_experts(MoE(4, 4, 2, TopKRouter(4, 2, k=1)))
    with pytest.raises(RuntimeError, match="torchrun"):
        shard_experts(nn.Linear(2, 2))
