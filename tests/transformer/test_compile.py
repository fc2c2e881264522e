"""torch.compile takes the whole model, dense or with experts, as one graph under ``fullgraph=True``.

Without it the data-dependent buffers of the experts break the graph once a layer (torch names the operator,
``moe.expert_mixture``), and a windowed pattern breaks it where its layout is built.
"""

import os
import subprocess
import sys
from pathlib import Path

# In its own interpreter: dynamo would trace the type checker that the import hook of conftest.py puts around functions.
PROGRAM = """
from dataclasses import replace
import torch
from moe import Noise
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig

def compare(fullgraph, words={}, **options):
    config = TransformerConfig.uniform(vocab_size=13, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, **options)
    layer = replace(config.layers[0], attention=replace(config.layers[0].attention, **words))
    model = Transformer(replace(config, layers=(layer,) * 2))
    ids = torch.randint(13, (2, 24))
    torch._dynamo.reset()
    results = []
    if "dropout" in words:
        noise = Noise("a step", sequences=2)
        plain = model.hidden_states(ids, noise=noise)[0]
        for block in model.layers:
            block.compile(backend="aot_eager")
        torch.testing.assert_close(model.hidden_states(ids, noise=noise)[0], plain)
        return
    for run in (model, torch.compile(model, fullgraph=fullgraph, backend="aot_eager")):
        loss = run(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)

torch.manual_seed(0)
compare(True, feedforward=DenseConfig(10))
compare(True, feedforward=MoEConfig(10, 4))
compare(False, feedforward=MoEConfig(10, 4), pattern="causal() & sliding_window(5)")
compare(False, {"softcap": 2.0, "alibi": True}, feedforward=DenseConfig(10))
compare(False, {"softcap": 2.0, "alibi": True, "dropout": 0.3}, feedforward=DenseConfig(10))
print("equal")
"""


def test_the_compiled_model_has_the_same_loss_and_gradients():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=root, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "equal"
