"""Every example config whose attention is sparse, at a tenth of its width: it builds and three steps lower its loss."""

import dataclasses
from pathlib import Path

import pytest
import torch

from training.config import load_config
from training.data import Batch
from training.model_config import LayerOverride, ModelConfig, model_config
from training.step import accumulate
from transformer import DSAConfig, KMeansConfig, LSHConfig, MoBAConfig, NSAConfig, SinkhornConfig, Transformer

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
NAMES = (
    "window", "bigbird", "strided", "global", "moba", "top-k-keys", "nsa", "dsa", "lsh", "kmeans", "sinkhorn-attention",
    "shared-qk", "alibi", "prefix-lm",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_three_steps(name):
    section = load_config(CONFIGS / f"stdlib-{name}.toml").model
    small = dataclasses.replace(section, dim=32, hidden=32, layers=4)
    config = model_config(small, vocab_size=16, length=96)
    kinds = [layer.attention.selection or layer.attention.pattern for layer in config.layers]
    assert (config.layers[0].attention.selection is None) == (section.selection == "none")
    assert kinds[0] != "causal()" and len(set(kinds)) == (1 if name in ("window", "prefix-lm") else 2)
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


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        ("nsa", {"initial": 2, "local": 3, "hidden": 9}, NSAConfig(32, 16, 64, 8, 2, 3, 128, 9)),
        ("nsa", {"compress": 16}, NSAConfig(16, 16, 64, 8, 1, 2, 128)),
        ("dsa", {"warm_up": True, "rope_dim": 6}, DSAConfig(8, 4, 32, True, 6, 500.0)),
        ("dsa", {}, DSAConfig(8, 4, 32)),
        ("lsh", {"shared_qk": True, "seed": 5}, LSHConfig(8, 2, 64, 5, True)),
        ("kmeans", {"shared_qk": True, "seed": 5, "decay": 0.5}, KMeansConfig(8, 64, 0.5, 5, True)),
        (
            "sinkhorn", {"iterations": 3, "temperature": 0.5, "gumbel": True, "seed": 5},
            SinkhornConfig(64, 2, 3, 0.5, True, 5),
        ),
    ],
)  # fmt: skip
def test_every_option_of_a_selection_has_a_word(kind, words, expected):
    options = {f"select_{name}": value for name, value in words.items()}
    model = ModelConfig(feedforward="dense", rope_theta=500.0, selection=kind, **options)
    assert model_config(model, vocab_size=16, length=96).layers[0].attention.selection == expected
    other = ModelConfig(feedforward="dense", selection="moba", **options)
    if options:
        with pytest.raises(ValueError, match=r"model.select_\w+ belongs to selection"):
            model_config(other, vocab_size=16, length=96)


def test_a_layer_may_leave_the_scores_alone():
    plain = LayerOverride(1, softcap=0.0, attention_dropout=0.0, alibi=False)
    capped = {"softcap": 3.0, "attention_dropout": 0.1, "alibi": True}
    layers = model_config(ModelConfig(layers=2, layer=(plain,), **capped), vocab_size=16, length=96).layers
    found = [(a.softcap, a.dropout, a.alibi) for a in (layer.attention for layer in layers)]
    assert found == [(3.0, 0.1, True), (None, 0.0, False)]
    chosen = LayerOverride(1, selection="moba")
    layers = model_config(ModelConfig(layers=2, layer=(chosen,), **capped), vocab_size=16, length=96).layers
    found = [(a.softcap, a.dropout, a.alibi, a.selection) for a in (layer.attention for layer in layers)]
    assert found == [(3.0, 0.1, True, None), (3.0, 0.1, True, MoBAConfig())]
