"""torch.compile keeps the layer in one graph, host reads of group sizes included; the router's jitter breaks it."""

import os
import subprocess
import sys
from pathlib import Path

# In its own interpreter: dynamo would trace the type checker that the import hook of conftest.py puts around functions.
# aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
PROGRAM = """
import torch
from moe import MoE, SwitchRouter, TopKRouter, load_balancing_loss, router_z_loss

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
compare(MoE(8, 12, 4, SwitchRouter(8, 4, capacity_factor=0.75)))
jittery = MoE(8, 12, 4, SwitchRouter(8, 4, jitter=0.1))
try:
    compare(jittery)
except torch._dynamo.exc.Unsupported:
    torch._dynamo.reset()
    torch.compile(lambda x: jittery(x)[0], backend="aot_eager")(torch.randn(12, 8)).sum().backward()
    print("jitter breaks the graph and runs")
"""


def test_one_graph_unless_the_router_draws_noise():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=root, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "jitter breaks the graph and runs"
