"""The second forward of activation checkpointing computes what the first did, and counts for nothing."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe import PEER, ProductKeyMemory
from tests.tolerances import close
from transformer import PEERConfig, ProductKeyConfig, Transformer, TransformerConfig

ROOT = Path(__file__).parents[2]
SIZES = {"num_keys": 4, "heads": 2, "k": 2, "key_dim": 4, "query_norm": "batch"}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "build", [lambda: ProductKeyMemory(6, **SIZES), lambda: ProductKeyMemory(6, gated=True, **SIZES),
              lambda: PEER(6, **SIZES)], ids=["memory", "memory+", "peer"],
)  # fmt: skip
def test_the_batch_norm_of_queries_sees_a_batch_once(build, use_reentrant):
    once = build().double()
    again = copy.deepcopy(once)
    for step in range(2):
        x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
        two = x.detach().clone().requires_grad_()
        y, z = once(x), checkpoint(again, two, use_reentrant=use_reentrant)
        close(z, y)
        y.square().sum().backward()
        z.square().sum().backward()
        close(two.grad, x.grad)
        norm = again.keys.norm
        assert norm.num_batches_tracked == step + 1
        assert norm.running_mean.equal(once.keys.norm.running_mean)
        assert norm.running_var.equal(once.keys.norm.running_var)
    for name, parameter in once.named_parameters():
        close(again.get_parameter(name).grad.to_dense(), parameter.grad.to_dense())
    close(again.eval()(x), once.eval()(x))


@pytest.mark.parametrize("kind", [ProductKeyConfig, PEERConfig])
def test_and_in_a_model(kind):
    config = TransformerConfig.uniform(
        vocab_size=30, dim=8, num_layers=2, num_heads=2, max_length=16, feedforward=kind(**SIZES)
    )
    once = Transformer(config)
    again = copy.deepcopy(once)
    again.gradient_checkpointing(True)
    ids = torch.randint(30, (2, 7))
    for model in (once, again):
        model.train()(ids, labels=ids).loss.backward()
    wanted, found = dict(once.named_buffers()), dict(again.named_buffers())
    assert wanted.keys() == found.keys() and any("num_batches_tracked" in name for name in wanted)
    assert all(found[name].equal(buffer) for name, buffer in wanted.items())


# In its own interpreter: dynamo would trace the type checker that the import hook of conftest.py puts around functions.
COMPILED = """
import copy
from contextlib import nullcontext
import torch
from torch.utils.checkpoint import checkpoint
from moe import ProductKeyMemory
from moe.recomputation import recomputing
from transformer import MoEConfig, PEERConfig, ProductKeyConfig, Transformer, TransformerConfig

SIZES = {"num_keys": 4, "heads": 2, "k": 2, "key_dim": 4, "query_norm": "batch"}
for feedforward in (ProductKeyConfig(**SIZES), PEERConfig(**SIZES), MoEConfig(8, 4, router="sigmoid", bias_update=0.1)):
    once = Transformer(TransformerConfig.uniform(
        vocab_size=30, dim=8, num_layers=1, num_heads=2, max_length=16, feedforward=feedforward))
    again = copy.deepcopy(once)
    again.gradient_checkpointing(True)
    for layer in again.layers:
        layer.compile(backend="eager")
    ids = torch.randint(30, (2, 7))
    for _ in range(2):
        for model in (once, again):
            model.zero_grad()
            model.train()(ids, labels=ids).loss.backward()
            for layer in model.layers:
                if isinstance(feedforward, MoEConfig):
                    layer.feedforward.router.after_step()
    for (name, wanted), found in zip(once.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)
        assert "num_batches" not in name or wanted == 2, (name, wanted)
    for wanted, found in zip(once.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found.grad.to_dense(), wanted.grad.to_dense())

once = ProductKeyMemory(6, **SIZES)
again = copy.deepcopy(once)
again.compile(backend="eager")
x = torch.randn(7, 6)
once(x)
checkpoint(again, x, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing())).sum().backward()
assert again.keys.norm.num_batches_tracked == 1
torch.testing.assert_close(again.keys.norm.running_var, once.keys.norm.running_var)
"""


def test_and_in_layers_compiled_inside_the_checkpoint():
    """As a run with train.compile and train.checkpointing has them, and a checkpoint of one's own that says so."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
