"""What each rank of test_distributed runs: python -m tests.training.distributed_ranks RANK WORLD FOLDER CASE…"""

import errno
import json
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pruning.diagnostics import FisherCurriculum, low_fisher_first
from pruning.sharding import gathered
from tests.tolerances import close
from tests.training import fisher_cases
from tests.training.distributed_cases import (
    COMPACT,
    COMPACT_FROM_ONE,
    COMPACT_OPTIONS,
    LAYOUTS,
    PRUNED,
    PRUNERS,
    SAVED,
    SAVED_STEP,
    STEPS,
    UNSENT,
    Layout,
    keep_gradients,
    make_trainer,
    resumed,
    sampled,
    without_clock,
)
from training import compress_gradients
from training.checkpoint import checkpoints
from training.distributed import Ranks, make_world
from training.distributed.export import whole_weights
from training.distributed.faults import LostRankError, one_clear_error
from training.finite import NonFiniteError
from training.sparse_doubling import doubled_all_reduce
from training.sparse_exchange import Sent, Traffic
from training.trainer import CHECKPOINTS, Trainer


def placed(layout: Layout, **options: Any) -> Ranks:
    """This process in a layout of all of them."""
    world = make_world(torch.device("cpu"), expert_parallel=layout.experts, tensor_parallel=layout.heads)
    return Ranks(world, shard=layout.shard, **options)


def runs(rank: int, world: int, folder: Path) -> None:
    """The runs of this world: its metrics, first gradients, evaluation, a sample and last weights."""
    for layout in LAYOUTS[world]:
        trainer = make_trainer(layout.run, folder / f"{layout}-out", parallel=placed(layout))
        gradients = keep_gradients(trainer)
        lines = [without_clock(trainer.train_step()) for _ in range(STEPS - 1)]
        held_out, sample = trainer.evaluate().loss, sampled(trainer)
        lines.append(without_clock(trainer.train_step()))
        tensors = whole_weights(trainer.model) | {f"gradient of {name}": g for name, g in gradients.items()}
        if rank == 0:
            record = {"lines": lines, "held_out": held_out, "sample": sample}
            (folder / f"{layout}.json").write_text(json.dumps(record))
            save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f"{layout}.safetensors")


def saves(rank: int, world: int, folder: Path) -> None:
    """The first steps of every run in SAVED, a checkpoint, and the rest; under FSDP2 in the background, where the
    first checkpoint is not written before the next step is over."""
    for layout in SAVED:
        parallel = placed(layout, background=layout.shard == "fsdp")
        trainer = make_trainer(layout.run, folder / str(layout), parallel=parallel, save_every=SAVED_STEP)
        if parallel.background is not None:
            hold_back(trainer, parallel.background)
        trainer.run()
        parallel.close()


def hold_back(trainer: Trainer, background: ThreadPoolExecutor) -> None:
    """Keep the writing thread busy until the step after the first checkpoint is over."""
    over, train_step = Event(), trainer.train_step
    background.submit(over.wait)

    def step() -> dict[str, Any]:
        line = train_step()
        if trainer.step > SAVED_STEP:
            over.set()
        return line

    trainer.train_step = step  # type: ignore[method-assign]


def resumes(rank: int, world: int, folder: Path) -> None:
    """Every run in SAVED goes on in the layouts of RESUMED; it ends with the metrics that it had."""
    for layout in SAVED:
        for other in resumed(layout, world):
            trainer = make_trainer(layout.run, folder / f"{layout}-to-{world}-{other}", parallel=placed(other))
            trainer.resume(folder / str(layout) / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
            trainer.run()


def holds(rank: int, world: int, folder: Path) -> None:
    """FSDP2 in micro-batches: between them a rank holds the gradients of its own shards and no others."""
    trainer = make_trainer("dense", folder / "held", parallel=placed(Layout("dense", shard="fsdp")), accumulation=3)
    seen, run_forward = [], trainer.parallel.forward

    def forward(model: Any, batch: Any, side: Any) -> Any:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        seen.append(sum(gradient.to_local().nbytes for gradient in gradients) + whole_gradients(model))
        return run_forward(model, batch, side)

    trainer.parallel.forward = forward
    trainer.train_step()
    weights = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    # a parameter whose rows do not divide has one row more on the first ranks
    share = sum(parameter.to_local().nbytes for parameter in trainer.model.parameters())
    assert seen == [0, share, share] and share < 0.6 * weights


def whole_gradients(model: Any) -> int:
    """Bytes of the gradients that FSDP2 holds unsharded."""
    groups = [g for m in model.modules() if isinstance(m, FSDPModule) for g in m._get_fsdp_state()._fsdp_param_groups]
    held = [parameter.unsharded_accumulated_grad for group in groups for parameter in group.fsdp_params]
    return sum(gradient.nbytes for gradient in held if gradient is not None)


def prunes(rank: int, world: int, folder: Path) -> None:
    """Every method of PRUNED; masks at the start and the end, and a checkpoint on the way."""
    for method, layout in PRUNED:
        out, pruner = folder / f"{method}-{layout}", PRUNERS[method]
        trainer = make_trainer(layout.run, out, parallel=placed(layout), sparsifiers=pruner, save_every=SAVED_STEP)
        first = {n: mask.clone() for n, mask in gathered(trainer.sparsifiers[0].masks().kept).items()}
        trainer.run()
        last = gathered(trainer.sparsifiers[0].masks().kept)
        weights = whole_weights(trainer.model)
        for name, mask in last.items():
            theirs = mask.clone()
            dist.broadcast(theirs, 0)
            assert theirs.equal(mask), "every rank has the same masks"
            assert not weights[name][~mask].any(), "zeros are held"
        again = make_trainer(layout.run, folder / f"{out.name}-again", parallel=placed(layout), sparsifiers=pruner)
        again.resume(out / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
        again.run()
        for name, mask in gathered(again.sparsifiers[0].masks().kept).items():
            assert mask.equal(last[name]), "masks, and what the method keeps besides, went through the checkpoint"
        if rank == 0:
            save_file({n: mask.contiguous() for n, mask in first.items()}, out / "first.safetensors")
            save_file({n: mask.contiguous() for n, mask in last.items()}, out / "last.safetensors")


def compresses(rank: int, world: int, folder: Path) -> None:
    """Unclipped. Dense at density 1; at 0.1 a run that resumes goes on as if it had not: what was not sent is kept."""
    for density in (1.0, 0.1):
        for name, expert_parallel in (("dense", 1), ("moe", 2)):
            grid = make_world(torch.device("cpu"), expert_parallel=expert_parallel)
            out = folder / f"topk-{density}-{name}"
            ranks = Ranks(grid, compression="topk", density=density)
            make_trainer(name, out, parallel=ranks, optim={"clip": math.inf}, save_every=SAVED_STEP).run()
            assert ranks.compressor is not None and ranks.compressor.traffic.steps == STEPS
            if density < 1:
                assert ranks.compressor.traffic.sent < ranks.compressor.traffic.dense / 2
                again = Ranks(grid, compression="topk", density=density)
                trainer = make_trainer(name, folder / f"again-{name}", parallel=again, optim={"clip": math.inf})
                trainer.resume(out / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
                assert again.compressor is not None and again.compressor.residuals
                trainer.run()
                assert again.compressor.residuals.keys() == ranks.compressor.residuals.keys()
                for key, left in ranks.compressor.residuals.items():
                    assert left.equal(again.compressor.residuals[key])


def clips_with_heads(rank: int, world: int, folder: Path) -> None:
    """Ranks that split heads add the same gradient: together they clip what is compressed as one process would."""
    limit, found = 0.05, []
    for compression in (None, "topk"):
        grid = make_world(torch.device("cpu"), tensor_parallel=2)
        ranks = Ranks(grid, compression=compression, density=1.0, clip=limit)
        trainer = make_trainer("heads", folder / f"clipped-{compression}", parallel=ranks, optim={"clip": limit})
        found.append(keep_gradients(trainer))
        trainer.train_step()
    plain, clipped = found
    compressed = [gradient for name, gradient in plain.items() if name not in ranks.own]
    scale = limit / torch.nn.utils.get_total_norm(compressed)
    assert scale < 0.5 and len(compressed) < len(plain)
    for name, gradient in plain.items():
        close(clipped[name], gradient if name in ranks.own else scale * gradient)


def keeps_unsent(rank: int, world: int, folder: Path) -> None:
    """Every method stopped and resumed ends as one that was not; what it had not sent, as it stopped."""
    for method in UNSENT:
        out, grid = folder / method, make_world(torch.device("cpu"))
        whole, stopped, again = (Ranks(grid, compression=method, density=0.1, momentum=0.5) for _ in range(3))
        make_trainer("dense", folder / f"{method}-whole", parallel=whole).run()
        make_trainer("dense", out, parallel=stopped, stop_at=SAVED_STEP).run()
        save_unsent(stopped, folder / f"{method}-{rank}-of-{world}.safetensors")
        trainer = make_trainer("dense", folder / f"{method}-again", parallel=again)
        trainer.resume(out / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
        trainer.run()
        assert again.compressor is not None and again.compressor.momentum == 0.5
        for kind in ("residuals", "velocities"):
            wanted, found = getattr(whole.compressor, kind), getattr(again.compressor, kind)
            assert wanted.keys() == found.keys()
            for name, left in wanted.items():
                close(found[name], left)


def shares_unsent(rank: int, world: int, folder: Path) -> None:
    """What other ranks had not sent when they stopped, as these take it over; they train to the end."""
    for method in UNSENT:
        ranks = Ranks(make_world(torch.device("cpu")), compression=method, density=0.1)
        trainer = make_trainer("dense", folder / f"{method}-on-{world}", parallel=ranks)
        trainer.resume(folder / method / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
        assert ranks.compressor is not None and ranks.compressor.step == SAVED_STEP
        save_unsent(ranks, folder / f"{method}-{rank}-of-{world}.safetensors")
        trainer.run()


def save_unsent(ranks: Ranks, file: Path) -> None:
    assert ranks.compressor is not None
    held = {"residuals": ranks.compressor.residuals, "velocities": ranks.compressor.velocities}
    save_file({f"{kind}/{n}": left.contiguous() for kind, store in held.items() for n, left in store.items()}, file)


def keeps_compact(rank: int, world: int, folder: Path) -> None:
    """RigL with moments of the weights that are there alone: saved, in the background too, resumed, run through; from
    the checkpoint of one process as well."""

    def goes_on(layout: Layout, saved: Path, out: str) -> None:
        trainer = make_trainer(layout.run, folder / out, parallel=placed(layout), **COMPACT_OPTIONS)
        trainer.resume(saved / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
        trainer.run()

    for layout, other in COMPACT.items():
        out = folder / f"compact-{layout}"
        parallel = placed(layout, background=True)
        trainer = make_trainer(layout.run, out, parallel=parallel, save_every=SAVED_STEP, **COMPACT_OPTIONS)
        trainer.run()
        parallel.close()
        held = torch.tensor(trainer.optimizers.main.moment_bytes())  # type: ignore[attr-defined]
        dist.all_reduce(held)
        if rank == 0:
            (out / "held.json").write_text(json.dumps(int(held)))
        goes_on(layout, out, f"{out.name}-again")
        if other is not None:
            goes_on(other, out, f"{out.name}-moved")
    for layout in COMPACT_FROM_ONE:
        goes_on(layout, folder / f"alone-{layout.run}", f"compact-{layout}-from-one")


def controls(rank: int, world: int, folder: Path) -> None:
    """A Fisher penalty and curriculum, resumed to the bit; rank 1 finds other traces than rank 0, which all follow."""

    def ranked(*args: Any, **options: Any) -> FisherCurriculum:
        found = low_fisher_first(*args, **options)
        return FisherCurriculum(found.order, found.traces if rank == 0 else -found.traces)

    for name, case in fisher_cases.CASES.items():
        with patch("training.fisher_control.low_fisher_first", ranked):
            out = folder / f"fisher-{name}"
            trainer = fisher_cases.trainer_of(case, out, parallel=placed(case.layout), save_every=SAVED_STEP)
            rows, gradients = fisher_cases.keep_rows(trainer), keep_gradients(trainer)
            trainer.run()
            again = fisher_cases.trainer_of(case, folder / f"{out.name}-again", parallel=placed(case.layout))
            again.resume(out / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
            again.run()
        last, resumed_to = whole_weights(trainer.model), whole_weights(again.model)
        for key, weight in last.items():
            theirs = weight.clone()
            dist.broadcast(theirs, 0)
            assert theirs.equal(weight) and resumed_to[key].equal(weight), key
        save_file({"rows": torch.stack(rows)}, out / f"rows-{rank}.safetensors")
        if rank == 0:
            tensors = last | {f"gradient of {key}": gradient for key, gradient in gradients.items()}
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / "last.safetensors")
    broken = fisher_cases.trainer_of(fisher_cases.CASES["dense"], folder / "broken", parallel=placed(Layout("dense")))
    found = torch.tensor(math.inf if rank == 1 else 1.0)
    with (
        patch("training.fisher_control.fisher_penalty", lambda *_, **__: found),
        pytest.raises(NonFiniteError, match="step 1: the Fisher penalty on rank 1 is inf; nothing was updated"),
    ):
        broken.train_step()


def doubles(rank: int, world: int, folder: Path) -> None:
    """Sums by recursive doubling are those of the dense vectors, with the same bits on every rank, and as many bytes as
    the rounds' unions of places say; the hook that waits for the end of the backward pass sums so, and is right."""
    for size, counts in ((1000, [10, 0, 30, 20]), (1000, [300, 10, 10, 10]), (7, [7, 1, 0, 2]), (50, [0] * 4)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            drawn = [torch.Generator().manual_seed(one) for one in range(world)]
            places = [torch.randperm(size, generator=g)[:n] for g, n in zip(drawn, counts, strict=True)]
            values = [torch.randn(n, generator=g).to(dtype) for g, n in zip(drawn, counts, strict=True)]
            traffic = Traffic()
            got = doubled_all_reduce(Sent(places[rank], values[rank], size), traffic=traffic)
            wanted = torch.zeros(size, dtype=torch.float64)
            for index, value in zip(places, values, strict=True):
                for i, v in zip(index.tolist(), value.tolist(), strict=True):
                    wanted[i] += v
            close(got, wanted)
            others = [torch.empty_like(got) for _ in range(world)]
            dist.all_gather(others, got)
            assert all(other.equal(got) for other in others)
            pair = {*places[rank].tolist(), *places[rank ^ 1].tolist()}
            width = dtype.itemsize
            rounds = [min(len(held) * (4 + width), size * width) for held in (places[rank], pair)]
            assert traffic.sent == sum(rounds) + 2 * 8, (size, dtype)
    for method in ("topk", "threshold", "adacomp", "dgc", "dropping"):
        found = []
        for clip, doubled in ((1e9, True), (1e9 if method == "dropping" else None, False)):
            torch.manual_seed(0)
            model = DistributedDataParallel(torch.nn.Linear(40, 30), bucket_cap_mb=1e-4)
            compressor = compress_gradients(model, method, density=0.05, threshold=0.1, bin_size=50, clip=clip)
            with patch("training.compression.doubles", lambda ranks, doubled=doubled: doubled):
                for step in range(3):
                    model.zero_grad()
                    rows = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + rank))
                    model(rows).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
            found[-1] += [compressor.residuals[name] for name in sorted(compressor.residuals)]
        for one, other in zip(*found, strict=True):
            close(one, other)


def fails(rank: int, world: int, folder: Path) -> None:
    """The last rank ends with an error that nobody foresaw; the others, who wait for it, say which."""
    last = world - 1
    error, said = (KeyError, "oops") if rank == last else (LostRankError, f"rank {last}: KeyError: 'oops'; start again")
    with pytest.raises(error, match=said), one_clear_error(timeout_s=1.0, advice=lambda: "start again"):
        if rank == last:
            raise KeyError("oops")
        dist.barrier()


def fails_behind(rank: int, world: int, folder: Path) -> None:
    """A disk that is full for one rank, which writes in the background: training goes on until the next checkpoint is
    due, and then ends on every rank; the checkpoint before stays."""
    parallel = placed(Layout("dense", shard="fsdp"), background=True)
    trainer = make_trainer("dense", folder / "behind", parallel=parallel, save_every=2)
    plain = FileSystem.create_stream

    def create_stream(self: FileSystem, path: Any, mode: str) -> Any:
        if rank == world - 1 and "00000004" in str(path) and "w" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, path, mode)

    with patch.object(FileSystem, "create_stream", create_stream), pytest.raises(OSError, match="step-00000002 is int"):
        trainer.run()
    assert trainer.step == STEPS
    assert [path.name for path in checkpoints(trainer.out / CHECKPOINTS)] == ["step-00000002"]
    parallel.close()


CASES = {
    "doubles": doubles,
    "fails": fails,
    "fails_behind": fails_behind,
    "holds": holds,
    "runs": runs,
    "saves": saves,
    "resumes": resumes,
    "prunes": prunes,
    "compresses": compresses,
    "clips_with_heads": clips_with_heads,
    "keeps_unsent": keeps_unsent,
    "shares_unsent": shares_unsent,
    "keeps_compact": keeps_compact,
    "controls": controls,
}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # what torch is about to change would end a run
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    for case in sys.argv[4:]:
        CASES[case](rank, world, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
