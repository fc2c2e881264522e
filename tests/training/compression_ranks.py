"""What each rank of test_compression runs: python -m tests.training.compression_ranks RANK WORLD FOLDER."""

import copy
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.tolerances import close
from tests.training import compression_fault_ranks, sharded_compression_ranks
from tests.training.distributed_cases import make_trainer
from training import compress_gradients
from training.distributed import Ranks, make_world
from training.distributed.export import whole_weights
from training.step import forward

METHODS = {
    "topk": {"density": 0.2},
    "threshold": {"threshold": 0.05},
    "dropping": {"density": 0.2},
    "adacomp": {"bin_size": 7},
    "dgc": {"density": 0.1, "momentum": 0.5, "warmup": 5},
    "randomk": {"density": 0.2},
}


# bytes of a step: of the parameters of 54, 9, 18 and 2 entries 11 + 2 + 4 + 1 go, each with an int32, or values alone
SENT = {"topk": lambda world: 18 * 12 * (world - 1), "randomk": lambda world: 2 * 18 * 8 * (world - 1) // world}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)).double()


def data(step, rank):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + rank)).double()


def local(model, step, rank):
    model.zero_grad()
    model(data(step, rank)).square().sum().backward()
    return {name: p.grad.clone().flatten() for name, p in model.named_parameters()}


def select(method, a, g, name, drawn):
    """Entries that one rank sends of one parameter, one at a time: {index: value}. drawn: places of "randomk"."""
    count = max(1, math.ceil(METHODS[method].get("density", 1) * len(a)))
    if method == "randomk":
        return {i: float(a[i]) for i in drawn[name]}
    if method == "threshold":
        return {i: float(v) for i, v in enumerate(a) if abs(v) >= 0.05}
    if method == "adacomp":
        starts = range(0, len(a), 7)
        tops = [max(abs(float(v)) for v in a[s : s + 7]) for s in starts]
        scale = sum(tops) / len(tops)
        return {
            i: math.copysign(scale, float(a[i]))
            for s, top in zip(starts, tops, strict=True)
            for i in range(s, min(s + 7, len(a)))
            if abs(float(a[i] + g[i])) >= top > 0
        }
    order = sorted(range(len(a)), key=lambda i: -abs(float(a[i])))
    return {i: float(a[i]) for i in order[:count]}


def by_hand(method, world, steps, drawn):
    """The reduced gradients of each step, from loops over ranks, parameters and entries. drawn: see select."""
    model = net()
    names = [name for name, _ in model.named_parameters()]
    rest = [{n: torch.zeros(p.numel()).double() for n, p in model.named_parameters()} for _ in range(world)]
    speed = copy.deepcopy(rest)
    for step in range(steps):
        total = {n: torch.zeros(p.numel()).double() for n, p in model.named_parameters()}
        for rank in range(world):
            gradients = {n: g / world for n, g in local(model, step, rank).items()}
            if method == "dropping":
                flat = [(n, i) for n in names for i in range(len(gradients[n]))]
                a = {(n, i): float(rest[rank][n][i] + gradients[n][i]) for n, i in flat}
                chosen = sorted(flat, key=lambda place: -abs(a[place]))[: math.ceil(0.2 * len(flat))]
                for n, i in flat:
                    rest[rank][n][i] = 0.0 if (n, i) in chosen else a[n, i]
                for n, i in chosen:
                    total[n][i] += a[n, i]
                continue
            for n, g in gradients.items():
                if method == "dgc":
                    speed[rank][n] = 0.5 * speed[rank][n] + g
                    rest[rank][n] = rest[rank][n] + speed[rank][n]
                    share = [0.25, 0.1, 0.1, 0.1, 0.1, 0.1][step]
                    order = sorted(range(len(g)), key=lambda i, v=rest[rank][n]: -abs(float(v[i])))
                    for i in order[: max(1, math.ceil(share * len(g)))]:
                        total[n][i] += rest[rank][n][i]
                        rest[rank][n][i] = speed[rank][n][i] = 0.0
                    continue
                a = rest[rank][n] + g
                for i, value in select(method, a, g, n, drawn).items():
                    total[n][i] += value
                    a[i] -= value
                rest[rank][n] = a
        yield total
        with torch.no_grad():
            for n, p in model.named_parameters():
                p -= 0.1 * total[n].view_as(p)


def watched(compressor, drawn=None):
    """The places that "randomk" draws, by parameter; under "all" those of all steps for the largest parameter."""
    found, choose = {"all": []} if drawn is None else drawn, compressor._choose

    def note(name, total):
        index = choose(name, total)
        found[name] = index.tolist()
        assert len(set(found[name])) == len(found[name])
        if name == "0.weight":
            found["all"].append(found[name])
        return index

    compressor._choose = note
    return found


def methods(rank, world):
    for method, options in METHODS.items():
        model = DistributedDataParallel(net())
        compressor = compress_gradients(model, method, **options)
        drawn = watched(compressor)
        expected, traffic = by_hand(method, world, 6, drawn), compressor.traffic
        for step in range(6):
            if step == 3:  # another process goes on from what a checkpoint holds
                state = copy.deepcopy(compressor.state_dict())
                again = DistributedDataParallel(net())
                again.module.load_state_dict(model.module.state_dict())
                model, compressor = again, compress_gradients(again, method, **options)
                compressor.load_state_dict(state)
                compressor.traffic = traffic
                drawn |= watched(compressor, drawn)
            model.zero_grad()
            model(data(step, rank)).square().sum().backward()
            wanted = next(expected)
            for name, p in model.module.named_parameters():
                other = p.grad.clone()
                dist.broadcast(other, 0)
                assert p.grad.equal(other), "every rank holds the same gradient"
                close(p.grad.flatten(), wanted[name])
            with torch.no_grad():
                for p in model.module.parameters():
                    p -= 0.1 * p.grad
        assert traffic.steps == compressor.step == 6
        if method == "randomk":
            assert len({tuple(places) for places in drawn["all"]}) == 6, "other places each step"
        assert compressor.traffic.sent <= compressor.traffic.dense == 6 * (2 * 83 * 8 * (world - 1) // world)
        if method in SENT:
            assert compressor.traffic.sent == 6 * SENT[method](world)


def nothing_is_lost(rank, world):
    """Sent plus remembered is the sum of all gradients; with density 1 it is plain data parallel."""
    for method in ("topk", "randomk"):
        model = DistributedDataParallel(net())
        compressor = compress_gradients(model, method, density=0.15)
        sums = {name: torch.zeros_like(p) for name, p in model.module.named_parameters()}
        means = copy.deepcopy(sums)
        for step in range(4):
            for other in range(world):
                for name, g in local(model.module, step, other).items():
                    means[name] += g.view_as(means[name]) / world
            model.zero_grad()
            model(data(step, rank)).square().sum().backward()
            for name, p in model.module.named_parameters():
                sums[name] += p.grad
        for name, total in sums.items():
            held = compressor.residuals[name].clone()
            dist.all_reduce(held)
            close(total + held.view_as(total), means[name])
    plain, sparse = DistributedDataParallel(net()), DistributedDataParallel(net())
    compress_gradients(sparse, "topk", density=1.0)
    for model in (plain, sparse):
        model(data(0, rank)).square().sum().backward()
    for one, two in zip(plain.parameters(), sparse.parameters(), strict=True):
        close(two.grad, one.grad)


def clipping(rank, world):
    model = DistributedDataParallel(net())
    compress_gradients(model, "dgc", density=1.0, momentum=0.0, clip=0.3)
    (1000 * model(data(0, rank)).square().sum()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norm <= 0.3 * math.sqrt(world) + 1e-9


def clipped_by_hand(rank, world):
    """Gradients (3, 4, 0) of rank 0 and (0, 0, ½) of the others, each at most 1 long: (0.6, 0.8, 0) and (0, 0, ½).

    Of three entries one is sent: 0.8, then 2 · 0.6, then 2 · 0.8, and each time ½ of every other rank. What is clipped
    away is forgotten, what is not sent is remembered; the sum is clipped by nobody.
    """
    model = DistributedDataParallel(nn.Linear(3, 1, bias=False).double())
    compressor = compress_gradients(model, "topk", density=1 / 3, clip=math.sqrt(world))
    gradient = torch.tensor([[3.0, 4, 0] if rank == 0 else [0, 0, 0.5]]).double() * world  # divided by the hook
    others = 0.5 * (world - 1)
    for sent, rest in (
        ([0, 0.8, others], [0.6, 0, 0]),
        ([1.2, 0, others], [0, 0.8, 0]),
        ([0, 1.6, others], [0.6, 0, 0]),
    ):
        model.zero_grad()
        model(gradient).sum().backward()
        close(model.module.weight.grad, torch.tensor([sent], dtype=torch.float64))
        held = torch.tensor(rest if rank == 0 else [0, 0, 0], dtype=torch.float64)
        close(compressor.residuals["weight"], held)


def by_loops(trainer, world, density, clip):
    """Let a trainer of one process take the gradients that ``world`` ranks would reduce by top-k, from loops."""
    rest = [{n: torch.zeros_like(p) for n, p in trainer.model.named_parameters()} for _ in range(world)]

    def forward_backward(batch, **_):
        rows, total = len(batch.inputs) // world, {}
        for rank in range(world):
            trainer.model.zero_grad()
            output = forward(trainer.model, batch.rows(rank * rows, (rank + 1) * rows), side=trainer.side)
            output.loss.backward()
            gradients = {n: p.grad / world for n, p in trainer.model.named_parameters()}
            compressed = {n: g for n, g in gradients.items() if "experts" not in n}
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in compressed.values()))
            for n, g in gradients.items():
                if n in compressed:
                    a = rest[rank][n] + g * min(1.0, clip / math.sqrt(world) / norm)
                    sizes = a.abs().flatten().tolist()
                    places = sorted(range(a.numel()), key=lambda i, sizes=sizes: -sizes[i])
                    g = torch.zeros_like(a)
                    for i in places[: math.ceil(density * a.numel())]:
                        g.view(-1)[i] = a.view(-1)[i]
                    rest[rank][n] = a - g
                total[n] = total.get(n, 0) + g
        experts = [g for n, g in total.items() if "experts" in n]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in experts))
        for g in experts:
            g.mul_(min(1.0, clip / (norm + 1e-6)))
        for n, p in trainer.model.named_parameters():
            p.grad = total[n]
        return output

    trainer._forward_backward = forward_backward
    trainer.parallel.clip = lambda parameters, norm, *, limit: None


@contextmanager
def told():
    """The types of what is reduced."""
    types, plain = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *rest, **options: (types.append(tensor.dtype), plain(tensor, *rest, **options))[1]
    try:
        yield types
    finally:
        dist.all_reduce = plain


def trainers(rank, world, folder):
    """The trainer's steps under compression clip each rank's gradient before it is added to the residual, and nothing
    that was reduced; the gradients of spread experts, which are not compressed, are clipped by their own norm."""
    plain = {"aux": 0.0, "aux_scope": "micro_batch", "accumulation": 1}
    for name, experts in (("dense", 1), ("moe", world)):
        limits = {"clip": 0.2}  # a fifth to a twelfth of the norms
        alone = make_trainer(name, folder / f"{name}-{rank}-of-{world}", optim=limits, **plain)
        by_loops(alone, world, 0.3, 0.2)
        for _ in range(3):
            alone.train_step()
        wanted = alone.model.state_dict()
        for shard in ("none", "fsdp"):
            grid = make_world(torch.device("cpu"), expert_parallel=experts)
            ranks = Ranks(grid, shard=shard, compression="topk", density=0.3, **limits)
            trainer = make_trainer(name, folder / f"{name}-{shard}-{world}", parallel=ranks, optim=limits, **plain)
            with told() as exchanged:
                for _ in range(3):
                    trainer.train_step()
            assert torch.uint8 not in exchanged, "which gradients are there is asked only where layers may be skipped"
            for key, weight in whole_weights(trainer.model).items():
                close(weight, wanted[key])


def many_buckets(rank, world):
    """Each parameter in a bucket of its own, or all in one: the same gradients, and with ``clip`` one norm."""
    for options in (
        {"method": "topk", "density": 0.2},
        {"method": "dgc", "density": 0.2, "clip": 0.05},
        {"method": "dropping", "density": 0.2},  # whose threshold is one
    ):
        one, several = DistributedDataParallel(net()), DistributedDataParallel(net(), bucket_cap_mb=1e-6)
        compress_gradients(one, **options)
        compressor = compress_gradients(several, **options)
        seen, reduce = [], compressor.reduce
        compressor.reduce = lambda bucket, *, last, reduce=reduce, seen=seen: (
            seen.append(last), reduce(bucket, last=last))[1]  # fmt: skip
        for step in range(3):
            for model in (one, several):
                model.zero_grad()
                model(data(step, rank)).square().sum().backward()
            for a, b in zip(one.parameters(), several.parameters(), strict=True):
                close(b.grad, a.grad)
        assert seen.count(True) == 3 < len(seen)


def forgetting(rank, world):
    """Without error feedback each step sends the largest of its own gradient."""
    for method in ("topk", "dropping", "dgc"):
        model = DistributedDataParallel(net())
        compress_gradients(model, method, density=0.2, momentum=0.0, error_feedback=False)
        for step in range(2):
            total = {n: torch.zeros(p.numel()).double() for n, p in model.module.named_parameters()}
            for other in range(world):
                gradients = {n: g / world for n, g in local(model.module, step, other).items()}
                limits = [sorted(g.abs().tolist())[-math.ceil(0.2 * len(g))] for g in gradients.values()]
                if method == "dropping":
                    flat = sorted(abs(float(v)) for g in gradients.values() for v in g)
                    limits = [flat[-math.ceil(0.2 * len(flat))]] * 4
                for (n, g), limit in zip(gradients.items(), limits, strict=True):
                    kept = [float(v) if abs(float(v)) >= limit else 0.0 for v in g]
                    total[n] += torch.tensor(kept, dtype=torch.float64)
            model.zero_grad()
            model(data(step, rank)).square().sum().backward()
            for name, p in model.module.named_parameters():
                close(p.grad.flatten(), total[name])


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    for case in (methods, nothing_is_lost, clipping, clipped_by_hand, many_buckets, forgetting):
        case(rank, world)
    sharded_compression_ranks.run(rank, world, folder, net, data, METHODS, by_hand, watched)
    trainers(rank, world, folder)
    compression_fault_ranks.run(rank, world, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
