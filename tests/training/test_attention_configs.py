"""Every example config whose attention is sparse, at a tenth of its width: it builds and three steps lower its loss."""

import dataclasses
from pathlib import Path

import pytest
import torch

from training.config import load_config
from training.data import Batch
from training.model_config import model_config
from training.step import accumulate
from transformer import Transformer

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
NAMES = (
    "window", "bigbird", "strided", "global", "moba", "top-k-keys", "nsa", "dsa", "lsh", "kmeans", "sinkhorn-attention",
    "shared-qk", "alibi",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_three_steps(name):
    section = load_config(CONFIGS / f"stdlib-{name}.toml").model
    small = dataclasses.replace(section, dim=32, hidden=32, layers=4)
    config = model_config(small, vocab_size=16, length=96)
    kinds = [layer.attention.selection or layer.attention.pattern for layer in config.layers]
    assert (config.layers[0].attention.selection is None) == (section.selection == "none")
    assert kinds[0] != "causal()" and len(set(kinds)) == (1 if name == "window" else 2)
    model = Transformer(config, generator=torch.Generator().manual_seed(0)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = torch.randint(16, (2, 97), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        output = accumulate(model, Batch(ids[:, :-1], ids[:, 1:]))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[2] < losses[0]
    assert output.side.keys() == {"dsa": {"indexer_kl"}, "kmeans": {"kmeans_commitment"}}.get(name, set())
