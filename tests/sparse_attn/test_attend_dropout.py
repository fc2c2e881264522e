"""Dropout over many pairs, which torch's own CPU attention would keep a probability each for."""

import pytest
import torch

from sparse_attn import attend, causal, documents, explain_backend, full, sinks, sliding_window
from sparse_attn.backends import pieces, plan, work
from sparse_attn.backends.plan import make_plan


@pytest.mark.parametrize("pattern", [causal(), full(), causal() & sliding_window(2000), causal() & documents(1100, 40)])
def test_dropout_over_many_pairs_keeps_no_probability(pattern):
    q, k = torch.randn(1, 2, 1140, 4, requires_grad=True), torch.randn(1, 1, 1140, 4, requires_grad=True)
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = attend(q, k, k, pattern=pattern, dropout=0.5)
    assert max(kept) < 1140 * 100
    out.sum().backward()
    # of values of one, a dropped probability takes its share and a kept one twice as much
    ones = attend(q, k, torch.ones_like(k), pattern=pattern, dropout=0.5)
    assert abs(ones.mean().item() - 1) < 0.05 and not torch.allclose(ones, torch.ones_like(ones), atol=0.01)


def test_auto_tells_where_dropout_leaves_torchs_attention():
    assert explain_backend(causal(), 1023, dropout=True).pairs == "causal"
    assert explain_backend(causal(), 1024, dropout=True).backend == "folded"
    assert explain_backend(full(), 1024, dropout=True).backend == "folded"
    assert explain_backend(causal(), 1024).pairs == "causal"


@pytest.mark.parametrize("pattern", [full(), sliding_window(64) | sinks(400)], ids=str)
def test_no_two_blocks_of_pairs_drop_alike(pattern, monkeypatch):
    """Two draws of 256 are never equal: neither of the tiles of a piece, nor of a piece and one that is merged into it
    later, which here have tiles of one shape."""
    monkeypatch.setattr(pieces, "PIECE", 1)
    monkeypatch.setattr(work, "PIECE", 1)
    monkeypatch.setattr(plan, "SMALL", 0)  # no strips of what is gathered: late tiles have the shape of regular ones
    layout = pattern.layout(768, block=16)
    assert make_plan(layout).late and make_plan(layout).gathers
    q, values = torch.zeros(1, 1, 768, 4), torch.eye(768)[None, None]  # the output is the probabilities
    torch.manual_seed(0)
    kept = attend(q, q, values, layout=layout, dropout=0.5)[0, 0] > 0
    whole = layout.mask_index == -1
    blocks = kept.view(48, 16, 48, 16).transpose(1, 2)[layout.query_block[whole], layout.key_block[whole]]
    assert len(blocks.flatten(1).unique(dim=0)) == len(blocks) > 1000
