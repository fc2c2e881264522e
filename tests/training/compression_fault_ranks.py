"""Compression where something is amiss, in the processes of compression_ranks: numbers that are not finite, parameters
that no rank used, another way to go on, and the bytes that really leave."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.tolerances import close
from tests.training.distributed_cases import make_trainer
from training import compress_gradients
from training.compression import METHODS
from training.distributed import Ranks, make_world
from training.finite import NonFiniteError
from training.unsent import return_unsent

OPTIONS = {"threshold": {"threshold": 0.05}, "adacomp": {"bin_size": 7}, "dgc": {"density": 0.1, "momentum": 0.5}}
EACH_ITS_BUCKET = 1e-6  # MB


class Net(nn.Module):
    """Three layers, the middle one of which may be passed by."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 2)

    def forward(self, x, skip=False):
        x = self.first(x).tanh()
        return self.last(x if skip else x + self.middle(x))


def data(step, rank):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + rank)).double()


def backward(model, step, rank, *, skip=False):
    model(data(step, rank), skip).square().sum().backward()


def sums(tensors):
    """Σ over ranks of each."""
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in sorted(found):
        dist.all_reduce(found[name])
    return found


def not_finite(rank, world):
    """NaN or infinity in one entry on the last rank: NaN on all ranks, and what they remember is untouched on each, so
    that leaving the step out is as if it had not been."""
    for method in METHODS:
        for value, clip, cap in ((math.nan, None, EACH_ITS_BUCKET), (math.inf, 0.5, 25), (-math.inf, None, 25)):
            options = {"clip": clip, **OPTIONS.get(method, {"density": 0.2})}
            model, twin = (DistributedDataParallel(Net().double(), bucket_cap_mb=cap) for _ in range(2))
            compressor, other = (
                compress_gradients(model, method, **options),
                compress_gradients(twin, method, **options),
            )
            for step in range(2):
                backward(model, step, rank)
                backward(twin, step, rank)
            held = copy.deepcopy((compressor.residuals, compressor.velocities))
            assert any(rest.any() for rest in held[0].values()), "nothing to lose"
            spoil = model.module.middle.weight.register_hook(
                lambda g, v=value: g.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(v).double())
                if rank == world - 1 else g
            )  # fmt: skip
            model.zero_grad()
            backward(model, 2, rank)
            spoil.remove()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            assert not norm.isfinite(), (method, value, rank)
            for now, before in zip((compressor.residuals, compressor.velocities), held, strict=True):
                assert now.keys() == before.keys()
                assert all(now[name].equal(before[name]) for name in before), (method, value)
            other.step += 1
            for one in (model, twin):
                one.zero_grad()
                backward(one, 3, rank)
            for a, b in zip(model.parameters(), twin.parameters(), strict=True):
                assert a.grad.isfinite().all() and a.grad.equal(b.grad)


def unused(rank, world):
    """Sent plus remembered is the sum of all gradients, whether all ranks, some or none use a layer, with micro-batches
    and gradients that are zeroed too; what none used gets nothing and keeps what it had."""
    for method in METHODS:
        options = {**OPTIONS.get(method, {"density": 0.1}), **({"momentum": 0.0} if method == "dgc" else {})}
        model = DistributedDataParallel(Net().double(), find_unused_parameters=True, bucket_cap_mb=1e-3)
        compressor = compress_gradients(model, method, **options)
        plain = copy.deepcopy(model.module)
        got = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
        for step, skips in enumerate(("none", "all", "one", "all", "micro", "all", "none", "all")):
            skip = skips == "all" or (skips == "one" and rank == 0)
            model.zero_grad(set_to_none=step % 2 == 1)
            if skips == "micro":
                with model.no_sync():
                    backward(model, 10 + step, rank)
                backward(plain, 10 + step, rank)
            backward(model, step, rank, skip=skip or skips == "micro")
            backward(plain, step, rank, skip=skip or skips == "micro")
            for name, p in model.module.named_parameters():
                assert skips != "all" or "middle" not in name or p.grad is None
                got[name] += 0 if p.grad is None else p.grad
        means = sums({name: p.grad / world for name, p in plain.named_parameters()})
        left = sums(compressor.residuals)
        for name, mean in means.items():
            close(got[name] + left[name].view_as(mean), mean)


def other_ways_to_go_on(rank, world):
    """Without compression what was not sent joins the next gradients; another method sends it; momentum is not lost."""
    for method in METHODS:
        model = DistributedDataParallel(Net().double())
        compressor = compress_gradients(model, method, **OPTIONS.get(method, {"density": 0.1}))
        for step in range(3):
            backward(model, step, rank)
        state = copy.deepcopy(compressor.state_dict())
        assert state["method"] == method
        unsent = sums(compressor.residuals)
        if method == "dgc":  # momentum 0.5: ½ + ¼ + … of u is still to come
            unsent = {name: total + sums({name: state["velocities"][name]})[name] for name, total in unsent.items()}
        dense, alone = (DistributedDataParallel(Net().double()) for _ in range(2))
        return_unsent(dense.module, state, ranks=world)
        for step in (4, 5):
            for one in (dense, alone):
                one.zero_grad()
                backward(one, step, rank)
            for name, p in dense.module.named_parameters():
                more = unsent[name].view_as(p) if step == 4 else 0
                close(p.grad, alone.module.get_parameter(name).grad + more)
        other = compress_gradients(DistributedDataParallel(Net().double()), "topk")
        if method == "dgc":
            with pytest.raises(ValueError, match="compression must be 'dgc', whose momentum .* got 'topk'"):
                other.load_state_dict(state)
        else:
            other.load_state_dict(state)
            assert all(rest.equal(other.residuals[name]) for name, rest in state["residuals"].items())


def bytes_that_leave(rank, world):
    """What the traffic counts is what the calls of torch.distributed put on the wire: (R − 1) of what is gathered,
    2·(R − 1)/R of what is reduced by a ring; but of the counts the formula has the whole (R − 1) ranks twice."""
    plain_reduce, plain_gather = dist.all_reduce, dist.all_gather
    for method in METHODS:
        model = DistributedDataParallel(Net().double(), bucket_cap_mb=EACH_ITS_BUCKET)
        compressor = compress_gradients(model, method, **{**OPTIONS.get(method, {"density": 0.1}), "threshold": 1.0})
        left = []

        def reduce(tensor, *args, left=left, **options):
            counts = tensor.dtype == torch.int64
            left.append(2 * (world - 1) * 8 if counts else 2 * tensor.nbytes * (world - 1) // world)
            return plain_reduce(tensor, *args, **options)

        def gather(into, tensor, *args, left=left, **options):
            left.append(tensor.nbytes * (world - 1))
            return plain_gather(into, tensor, *args, **options)

        dist.all_reduce, dist.all_gather = reduce, gather
        for step in range(2):
            backward(model, step, rank)
        dist.all_reduce, dist.all_gather = plain_reduce, plain_gather
        assert compressor.traffic.sent == sum(left), method
        counted = [number for number in left if number == 16 * (world - 1)]
        assert len(counted) >= (len(left) // 2 if method in ("threshold", "adacomp") else 0)


def stopped_trainer(rank, world, folder):
    """NaN in one rank's gradient, in none of its losses, stops the run on every rank under every method."""
    for method in ("threshold", "adacomp", "randomk"):
        ranks = Ranks(make_world(torch.device("cpu")), compression=method, density=0.05)
        trainer = make_trainer("dense", folder / f"stopped-{method}-{world}", parallel=ranks)
        trainer.train_step()
        weights = copy.deepcopy(trainer.model.state_dict())
        if rank == world - 1:
            query = trainer.model.get_parameter("layers.0.attention.query.weight")
            query.register_hook(lambda g: g.index_fill(0, torch.tensor([2]), math.nan))
        with pytest.raises(NonFiniteError, match=rf"rank {world - 1}: .*layers.0.attention.query.weight"):
            trainer.train_step()
        assert all(value.equal(weights[key]) for key, value in trainer.model.state_dict().items())
        for rest in ranks.compressor.residuals.values():
            assert rest.isfinite().all()


def saved_and_resumed(rank, world, folder):
    """Through a checkpoint: the same ranks go on to the same weights; one process adds what was not sent, once."""
    for method in ("dgc", "threshold", "adacomp"):
        options = {"compression": method, "density": 0.02, "warmup": 4}
        optim, out = {"betas": (0.0, 0.95)}, folder / f"saved-{method}-{world}"
        ranks = Ranks(make_world(torch.device("cpu")), **options)
        trainer = make_trainer("dense", out, parallel=ranks, optim=optim)
        trainer.train_step()
        saved = trainer.save()
        unsent = sums(ranks.compressor.residuals)
        for name, u in sums(ranks.compressor.velocities).items():
            unsent[name] += 9 * u  # 0.9 + 0.81 + …
        trainer.train_step()
        again = make_trainer("dense", out, parallel=Ranks(make_world(torch.device("cpu")), **options), optim=optim)
        again.resume(saved)
        again.train_step()
        for key, weight in trainer.model.state_dict().items():  # buckets, and so the order of sums, may differ
            close(again.model.state_dict()[key], weight)
        alone = make_trainer("dense", out, optim=optim)
        alone.resume(saved)
        batch, found = alone.batches.next().keyed(seed=0, step=1), []
        for _ in range(2):
            alone.model.zero_grad()
            alone._forward_backward(batch)
            found.append({name: p.grad.clone() for name, p in alone.model.named_parameters()})
        for name, first in found[0].items():
            close(first, found[1][name] + unsent[f"model.{name}"].view_as(first))
        in_shards(saved, out, unsent, method, world)


def in_shards(saved, out, unsent, method, world):
    """What replicas had not sent goes on under FSDP2: joins the next gradients, or is remembered; heads refuse it."""
    optim = {"betas": (0.0, 0.95)}

    def trainer(**settings):
        tensor = settings.pop("tensor_parallel", 1)
        ranks = Ranks(make_world(torch.device("cpu"), tensor_parallel=tensor), **settings)
        return make_trainer("dense", out, parallel=ranks, optim=optim)

    dense, sparse = trainer(shard="fsdp"), trainer(shard="fsdp", compression=method, density=0.02)
    for one in (dense, sparse):
        one.resume(saved)
    batch, found = dense.batches.next().keyed(seed=0, step=1), []
    for _ in range(2):
        dense.optimizers.zero_grad()
        dense._forward_backward(batch)
        found.append({name: p.grad.full_tensor() for name, p in dense.model.named_parameters()})
    for name, first in found[0].items():
        close(first, found[1][name] + unsent[f"model.{name}"].view_as(first))
    compressor = sparse.parallel.compressor
    held = sums(compressor.residuals)
    for name, u in sums(compressor.velocities).items():
        held[name] += 9 * u
    assert all(rest.equal(unsent[f"model.{name}"]) for name, rest in held.items()) and held
    if world == 2:
        split = trainer(tensor_parallel=2)
        with pytest.raises(ValueError, match="must be for a whole parameter or one of FSDP2, got one that ranks share"):
            split.resume(saved)


def run(rank, world, folder):
    for case in (not_finite, unused, other_ways_to_go_on, bytes_that_leave):
        case(rank, world)
    stopped_trainer(rank, world, folder)
    saved_and_resumed(rank, world, folder)
