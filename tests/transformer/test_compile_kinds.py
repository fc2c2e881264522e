"""What torch.compile makes of each layer choice in training: one graph, or a break that is named here.

A break costs its graph's fusion, not the result: without ``fullgraph=True`` the kinds that break run all the same.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In its own interpreter: dynamo would trace the type checker that the import hook of conftest.py puts around functions.
PROGRAM = """
import sys
import torch
from torch._dynamo.exc import Unsupported, UserError
from moe import AttentionThresholds
from transformer import (AttentionConfig, DenseConfig, DepthConfig, LayerConfig, MoEConfig, PEERConfig,
    ProductKeyConfig, SinkhornConfig, SoftMoEConfig, ThresholdedConfig, Transformer, TransformerConfig)

DENSE, ATTENTION = DenseConfig(10), AttentionConfig(4, 2, 4)

def mixture(router, **options):
    return LayerConfig(ATTENTION, MoEConfig(10, 4, router=router, **options))

ONE_GRAPH = {
    "depth": LayerConfig(ATTENTION, DENSE, DepthConfig(0.5)),
    "depth of experts": LayerConfig(ATTENTION, MoEConfig(10, 4), DepthConfig(0.5)),
    "path dropout": LayerConfig(ATTENTION, DENSE, path_dropout=0.1),
    "dropped heads and weights": LayerConfig(
        AttentionConfig(4, 2, 4, head_dropout=0.1, drop_connect=0.1), DenseConfig(10, drop_connect=0.1)
    ),
    "relu2": LayerConfig(ATTENTION, DenseConfig(10, "relu2")),
    "thresholded": LayerConfig(ATTENTION, ThresholdedConfig(16, threshold=0.001)),
    "thresholds of attention": LayerConfig(
        AttentionConfig(4, 2, 4, thresholds=AttentionThresholds(0.1, 0.1, 0.1, 0.1)), DENSE
    ),
    "sigmoid": mixture("sigmoid"),
    "sinkhorn": mixture("sinkhorn"),
    "expert choice": mixture("expert_choice", allow_future=True),
}
# what dynamo names: a host-side draw, a generator, a check of ids, a check of scores, a function it must not enter
BREAKS = {
    "layer drop": (LayerConfig(ATTENTION, DENSE, layer_drop=0.1), "self.layer_drop.skips("),
    "switch with jitter": (mixture("switch", k=1, jitter=0.1), "opaque object"),
    "noisy top-k": (mixture("noisy_top_k"), "opaque object"),
    "top-2": (mixture("top_2"), "opaque object"),
    "hash": (mixture("hash"), "_checked_ids"),
    "soft": (LayerConfig(ATTENTION, SoftMoEConfig(10, 4, allow_future=True)), "Data-dependent branching"),
    "product key": (LayerConfig(ATTENTION, ProductKeyConfig(8, heads=2, k=4, key_dim=8)), "sum_rows"),
    "peer": (LayerConfig(ATTENTION, PEERConfig(8, heads=2, k=4, key_dim=8)), "dot_rows"),
}
IDS = torch.randint(13, (2, 8), generator=torch.Generator().manual_seed(0))

def built(layer):
    torch._dynamo.reset()
    config = TransformerConfig(vocab_size=13, dim=16, layers=(layer,))
    return Transformer(config, generator=torch.Generator().manual_seed(0))

half = sys.argv[1]
for name, layer in ONE_GRAPH.items() if half == "whole" else ():
    model = built(layer)
    draws = torch.get_rng_state()
    plain = model(IDS, labels=IDS).loss
    torch.set_rng_state(draws)
    traced = torch.compile(model, fullgraph=True, backend="eager")(IDS, labels=IDS).loss
    torch.testing.assert_close(traced, plain, msg=name)

for name, (layer, reason) in BREAKS.items() if half == "broken" else ():
    model = built(layer)
    try:
        torch.compile(model, fullgraph=True, backend="eager")(IDS, labels=IDS)
    except (Unsupported, UserError) as error:
        assert reason in str(error), (name, str(error))
    else:
        raise AssertionError(f"{name} compiles to one graph now: move it to ONE_GRAPH")

# padding on the left is seen in a compiled model, too; sorted blocks have no break of their own that would show it
if half == "whole":
    LEFT = torch.arange(8) >= torch.tensor([[3], [0]])
    model = built(LayerConfig(AttentionConfig(4, 2, 4, selection=SinkhornConfig(2, 512)), DENSE)).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, attention_mask=LEFT).logits[0, 3:], model(IDS[:1, 3:]).logits[0])
    try:
        compiled(IDS, attention_mask=LEFT, labels=IDS)
    except ValueError as error:
        assert "attention_mask must pad on the right" in str(error)
    else:
        raise AssertionError("padding on the left was taken with gradients")
print("as listed")
"""


@pytest.mark.parametrize("half", ["whole", "broken"])
def test_each_layer_choice_is_one_graph_or_breaks_where_it_is_said(half):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, half], capture_output=True, text=True, env=environment, cwd=root, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "as listed"
