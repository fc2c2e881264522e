import pytest

from tests.training.spawning import spawn

pytest.importorskip("fairscale.nn")


def test_ranks_with_unequal_tokens_lay_out_as_many_places(tmp_path):
    """And fairscale's layer with its experts on two ranks gives each token its experts: see fairscale_ranks.py."""
    spawn("tests.moe.fairscale_ranks", 2, tmp_path)
