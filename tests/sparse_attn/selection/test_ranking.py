import math

import pytest
import torch

from sparse_attn.selection import NSA
from sparse_attn.selection.dsa import best_tokens
from sparse_attn.selection.moba import moba
from sparse_attn.selection.ranking import best_columns, coarse
from tests.tolerances import close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_highest_win_and_of_equal_ones_the_later(dtype):
    draws = torch.Generator().manual_seed(0)
    scores = torch.randint(-4, 5, (2, 30, 12), generator=draws).to(dtype)
    for value, row in ((math.inf, 3), (-math.inf, 4), (math.nan, 5), (-0.0, 6)):
        scores[0, row, 2:9] = value
    scores[1, 0] = -math.inf
    chosen = best_columns(scores, 5)
    for row, columns in zip(scores.flatten(0, 1).tolist(), chosen.flatten(0, 1).tolist(), strict=True):
        keys = [(math.inf if math.isnan(x) else x, column) for column, x in enumerate(row) if x > -math.inf or x != x]
        assert sorted(columns) == sorted([column for _, column in sorted(keys)[-5:]] + [-1] * max(5 - len(keys), 0))
    assert torch.equal(best_columns(scores, 20).sort(-1).values[1, 1], torch.arange(12))


def test_zeros_of_both_signs_are_equal():
    scores = torch.tensor([[0.0, -0.0], [-0.0, 0.0], [-0.0, -1e-9]])
    assert best_columns(scores, 1).flatten().tolist() == [1, 1, 0]
    assert best_tokens(scores[None], 1).flatten().tolist() == [1, 1, 0]


def test_rounding_decides_nothing_and_what_is_apart_stays_apart():
    draws = torch.Generator().manual_seed(1)
    scores = torch.randint(1, 9, (200, 40), generator=draws).double() / 4
    noise = 1e-7 * torch.rand(200, 40, dtype=torch.float64, generator=draws)
    for near in (scores * (1 + noise), (scores * (1 - noise)).float(), -(-scores * (1 + noise))):
        assert torch.equal(best_columns(near, 6), best_columns(scores, 6))
        assert torch.equal(best_tokens(near[None], 6), best_tokens(scores[None], 6))
    values = torch.tensor([1.0, 1 + 2**-14, -3.0, -3 + 2**-13])
    assert coarse(values).unique().numel() == 4


def test_blocks_of_equal_means_are_those_of_the_whole_for_the_last_query():
    """Equal keys in another order: the sums of the blocks round differently, and so do products of other shapes."""
    draws = torch.Generator().manual_seed(2)
    keys, q = torch.randn(1, 1, 3, 8, generator=draws), torch.randn(1, 2, 96, 8, generator=draws)
    k = keys[:, :, torch.arange(96) % 3].double().repeat(1, 2, 1, 1)
    q = q.double()
    whole = moba(q, k, block=6, top_k=4).blocks.sort(-1).values
    for t in range(30, 96):
        alone = moba(q[:, :, t : t + 1], k[:, :, : t + 1], block=6, top_k=4).blocks.sort(-1).values
        assert torch.equal(alone[:, :, 0], whole[:, :, t])


def test_a_saturated_softmax_chooses_the_same_blocks_when_it_decodes():
    torch.manual_seed(0)
    module = NSA(8, 2, 1, 16, compress=8, stride=4, block=8, top_n=4).eval()
    q, k, v, hidden = torch.randn(1, 2, 320, 16) * 30, *torch.randn(2, 1, 1, 320, 16), torch.randn(1, 320, 8)
    with torch.no_grad():
        for weight in module.compress_key.parameters():
            weight.mul_(4)
        whole = module(q, k, v, hidden=hidden).out
        for t in range(120, 320):
            one = module(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], hidden=hidden[:, t : t + 1]).out
            close(one, whole[:, :, t : t + 1])
