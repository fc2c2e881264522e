"""torch.compile keeps the layer in one graph, host reads of group sizes included; the router's jitter breaks it."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

# In its own interpreter: dynamo would trace the type checker that the import hook of conftest.py puts around functions.
# aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
PROGRAM = """
import torch
from moe import MoE, SigmoidRouter, SwitchRouter, TopKRouter, prepare_for_decoding, load_balancing_loss, router_z_loss

def compare(layer, **options):
    x = torch.randn(12, 8, requires_grad=True)
    def loss(x):
        y, routing = layer(x, **options)
        return y.square().sum() + load_balancing_loss(routing) + router_z_loss(routing)
    inputs = [x, *layer.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(torch.autograd.grad(compiled(x), inputs), torch.autograd.grad(loss(x), inputs)):
        torch.testing.assert_close(got, wanted)

torch.manual_seed(0)
layer = MoE(8, 12, 4, TopKRouter(8, 4, k=2), shared_hidden=4)
compare(layer)
compare(layer, padding_mask=torch.arange(12) < 9)
compare(layer, replay=layer(torch.randn(12, 8))[1].detach())
biased = MoE(8, 12, 4, TopKRouter(8, 4, k=2), activation="relu", bias=True)
compare(biased)
compare(MoE(8, 12, 4, SwitchRouter(8, 4, capacity_factor=0.75)))
sigmoid = MoE(8, 12, 4, SigmoidRouter(8, 4, k=2))
compare(sigmoid)
sigmoid.router.bias[1] = torch.nan
try:
    compare(sigmoid)
except RuntimeError as error:
    assert "the router's bias must be finite" in str(error), error
else:
    raise AssertionError("a bias of NaN routed tokens")

for prepared in (False, True):
    if prepared:
        prepare_for_decoding(layer), prepare_for_decoding(biased)
    with torch.no_grad():
        for tokens in (1, 3):
            x = torch.randn(tokens, 8)
            torch._dynamo.reset()
            y = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")(x)
            torch.testing.assert_close(y, layer(x)[0])
            y = torch.compile(lambda x: biased(x)[0], fullgraph=True, backend="aot_eager")(x)
            torch.testing.assert_close(y, biased(x)[0])
jittery = MoE(8, 12, 4, SwitchRouter(8, 4, jitter=0.1))
try:
    compare(jittery)
except torch._dynamo.exc.Unsupported:
    torch._dynamo.reset()
    torch.compile(lambda x: jittery(x)[0], backend="aot_eager")(torch.randn(12, 8)).sum().backward()
    print("jitter breaks the graph and runs")
"""


def run(program):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=root, check=False
    )


def test_one_graph_unless_the_router_draws_noise():
    result = run(PROGRAM)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "jitter breaks the graph and runs"


LOOPS = """
import torch
from moe import MoE, TopKRouter, prepare_for_decoding

torch.manual_seed(0)
torch.set_grad_enabled(False)
for activation, dtype in (("swiglu", torch.float32), ("gelu", torch.bfloat16)):
    bias = activation == "gelu"
    layer = MoE(24, 40, 6, TopKRouter(24, 6, k=2), activation=activation, bias=bias).to(dtype)
    inputs = [torch.randn(tokens, 24).to(dtype) for tokens in (1, 2, 5, 1)]
    wanted = [layer(x)[0] for x in inputs]
    prepare_for_decoding(layer, compiled=True)
    for x, y in zip(inputs, wanted):
        torch.testing.assert_close(layer(x)[0], y, rtol=1.3e-6, atol=1e-6 if dtype == torch.float32 else 4e-3)
    layer.experts.up[layer.route(inputs[0]).expert] += 1
    assert not torch.allclose(layer(inputs[0])[0], wanted[0])
print(torch._dynamo.utils.counters["stats"]["unique_graphs"], "graphs")
"""


@pytest.mark.skipif(which("g++") is None and which("clang++") is None, reason="needs a C++ compiler")
def test_the_loops_that_torch_compiles_give_the_same():
    result = run(LOOPS)
    assert result.returncode == 0, result.stderr[-2000:]
    graphs = int(result.stdout.split()[0])
    assert 2 <= graphs <= 6, "one for a token, one for several, of each dtype"
