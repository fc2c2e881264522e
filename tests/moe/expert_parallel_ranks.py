"""What each rank of test_expert_parallel runs: python -m tests.moe.expert_parallel_ranks RANK WORLD FOLDER."""

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from moe import (
    ExpertChoiceRouter,
    HashRouter,
    MoE,
    NoisyTopKRouter,
    SigmoidRouter,
    SinkhornRouter,
    SwitchRouter,
    Top2Router,
    TopKRouter,
    gather_experts,
    shard_experts,
)
from tests.moe import expert_parallel_fault_ranks
from tests.tolerances import close
from transformer import MoEConfig, Transformer, TransformerConfig

D = 8
ROUTERS = {
    "top_k": lambda e: TopKRouter(D, e, k=3),
    "switch": lambda e: SwitchRouter(D, e, capacity_factor=1.0),
    "noisy": lambda e: NoisyTopKRouter(D, e, k=2).eval(),
    "sigmoid": lambda e: SigmoidRouter(D, e, k=2),
    "sinkhorn": lambda e: SinkhornRouter(D, e, k=2).eval(),
    "top_2": lambda e: Top2Router(D, e).eval(),
    "expert_choice": lambda e: ExpertChoiceRouter(D, e, capacity_factor=2),
    "hash": lambda e: HashRouter(D, e, k=2),
}


def reduced(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def layers(rank, world):
    """Every router, tokens unevenly over the ranks (rank 1 has none), experts that do not divide the ranks."""
    for name, make in ROUTERS.items():
        for experts, capacity, bias in ((5, None, False), (2, None, True), (5, 1.0, True)):
            if experts < 3 and name == "top_k":
                continue
            torch.manual_seed(0)
            whole = MoE(D, 6, experts, make(experts), capacity_factor=capacity, shared_hidden=3, bias=bias).double()
            ours = copy.deepcopy(whole)
            held = [f"experts.{name}" for name in ("up", "down", "up_bias", "down_bias")[: 4 if bias else 2]]
            assert shard_experts(ours, average=False) == held
            torch.manual_seed(rank + 1)
            tokens = [7, 0, 12][rank % 3]
            x = torch.randn(tokens, D, dtype=torch.float64)
            ids, d_y = torch.randint(50, (tokens,)), torch.randn(tokens, D, dtype=torch.float64)
            one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, routing = whole(one, token_ids=ids)
            z, _ = ours(two, token_ids=ids)
            close(z, y)
            (y * d_y).sum().backward()
            (z * d_y).sum().backward()
            close(two.grad, one.grad)
            for key, parameter in whole.named_parameters():
                got = ours.get_parameter(key).grad
                if key in held:
                    bounds = ours.experts.bounds
                    wanted = reduced(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
                    wanted = wanted[bounds[rank] : bounds[rank + 1]]
                    close(torch.zeros_like(wanted) if got is None else got, wanted)
                elif parameter.grad is not None:
                    close(got, parameter.grad)
            owner = [sum(b <= e for b in ours.experts.bounds[1:]) for e in routing.expert.tolist()]
            pairs = {(t, o) for t, o in zip(routing.token.tolist(), owner, strict=True) if o != rank}
            if (first := ours.experts.first) < ours.experts.bounds[rank + 1]:
                close(ours.experts.forward_one(first, x), whole.experts.forward_one(first, x))
            traffic = ours.experts.traffic
            assert traffic.rows == len(pairs), (name, traffic, len(pairs))
            assert traffic.row_bytes == (traffic.rows + traffic.returned) * D * 8
            assert reduced(torch.tensor(traffic.rows)) == reduced(torch.tensor(traffic.returned))


def skewed(rank, world):
    """All tokens of all ranks on one expert: its owner sends nothing, the others one row a token."""
    torch.manual_seed(0)
    layer = MoE(D, 6, 6, TopKRouter(D, 6, k=1, renormalize=False))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[4, 0] = 9.0
    whole = copy.deepcopy(layer)
    shard_experts(layer)
    x = torch.rand(50, D) + 0.1
    close(layer(x)[0], whole(x)[0])
    owner = next(r for r in range(world) if layer.experts.bounds[r] <= 4 < layer.experts.bounds[r + 1])
    assert layer.experts.traffic.rows == (0 if rank == owner else 50)
    assert layer.experts.traffic.returned == (50 * (world - 1) if rank == owner else 0)


def overlap(rank, world):
    """The shared expert runs while rows travel, forward and backward: rank 0 holds its rows back until the last rank
    has run its own, and its gradients until that has run backward. Nobody ends if any rank waits first."""
    torch.manual_seed(0)
    layer = MoE(D, 6, world, TopKRouter(D, world, k=1), shared_hidden=3)
    shard_experts(layer)
    store = dist.distributed_c10d._get_default_store()
    run, send, sends = layer.shared.forward_one, dist.all_to_all_single, []

    def forward_one(expert, rows):
        y = run(expert, rows)
        store.set("forward", "")
        return y

    def held_back(received, rows, *sizes, **options):
        if rows.dtype == torch.float32:  # rows, their weights, rows back; gradients of rows back, of rows, of weights
            sends.append(len(sends))
            if sends[-1] in (0, 4):
                store.wait(["forward" if sends[-1] == 0 else "backward"], timedelta(seconds=100))
        return send(received, rows, *sizes, **options)

    if rank == world - 1:
        layer.shared.forward_one = forward_one
        layer.shared.up.register_hook(lambda gradient: store.set("backward", ""))
    if rank == 0 and world > 1:
        dist.all_to_all_single = held_back
    y, _ = layer(torch.randn(5, D, requires_grad=True))
    y.square().sum().backward()
    dist.all_to_all_single = send
    assert len(sends) == (6 if rank == 0 and world > 1 else 0)


def half_precision(rank, world):
    torch.manual_seed(0)
    layer = MoE(D, 6, 5, TopKRouter(D, 5, k=2))
    whole = copy.deepcopy(layer)
    shard_experts(layer)
    x = torch.randn(9, D)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = whole(x)[0], layer(x)[0]
    close(two, one)
    assert layer.experts.traffic.row_bytes == (layer.experts.traffic.rows + layer.experts.traffic.returned) * D * 2


def models(rank, world):
    """A whole model with its data split over the ranks, one optimiser step, against one process with all of it."""
    torch.manual_seed(0)
    config = TransformerConfig.uniform(
        vocab_size=30,
        dim=D,
        num_layers=2,
        num_heads=2,
        max_length=16,
        feedforward=MoEConfig(6, 5, k=2, expert_bias=True),
    )
    whole = Transformer(config).double()
    ours = copy.deepcopy(whole)
    names = shard_experts(ours)
    ids = torch.randint(30, (2 * world, 7), generator=torch.Generator().manual_seed(1))
    whole(ids, labels=ids).loss.backward()
    ours.gradient_checkpointing(True)
    mine = ids[2 * rank : 2 * rank + 2]
    ours.train()(mine, labels=mine).loss.backward()
    for name, parameter in ours.named_parameters():
        if name not in names:
            parameter.grad = reduced(parameter.grad) / world
    for model in (whole, ours):
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    gather_experts(ours)
    for name, parameter in whole.named_parameters():
        close(ours.get_parameter(name), parameter)
    assert ours.state_dict().keys() == whole.state_dict().keys()


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for case in (layers, skewed, overlap, half_precision, models):
        case(rank, world)
    expert_parallel_fault_ranks.run(rank, world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
