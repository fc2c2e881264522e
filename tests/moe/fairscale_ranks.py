"""What each rank of test_fairscale_ranks runs: python -m tests.moe.fairscale_ranks RANK WORLD FOLDER."""

import sys

import torch
import torch.distributed as dist
from fairscale.nn import MOELayer
from torch import nn

from moe import TopKRouter
from moe.fairscale import FairscaleGate
from tests.tolerances import close

DIM, EXPERTS = 6, 4


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    gate = FairscaleGate(TopKRouter(DIM, EXPERTS, k=2))
    experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))
    for expert in experts:
        expert.expert = True
    held = EXPERTS // world
    layer = MOELayer(gate, experts[rank * held : (rank + 1) * held])
    torch.manual_seed(rank + 1)
    tokens = (4, 22)[rank]
    x = torch.randn(tokens, DIM)

    _, combine, dispatch = gate(x)
    most = gate.routing.loads().max()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    assert combine.shape == dispatch.shape == (tokens, EXPERTS, int(most)), "places as the fullest expert of any rank"
    assert rank or gate.routing.loads().max() < most, "this rank alone would have fewer"

    expected = torch.zeros_like(x)
    for token, expert, weight in zip(gate.routing.token, gate.routing.expert, gate.routing.weight, strict=True):
        expected[token] += weight * experts[int(expert)](x[token])
    close(layer(x.view(held, -1, DIM)).view_as(x), expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
