"""What each rank of test_distributed runs: python -m tests.training.distributed_ranks RANK WORLD FOLDER CASE…"""

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

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
    without_clock,
)
from training.distributed import Ranks, make_world
from training.distributed.export import whole_weights
from training.distributed.faults import LostRankError, one_clear_error
from training.finite import NonFiniteError
from training.trainer import CHECKPOINTS


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
        held_out, sample = trainer.evaluate().loss, trainer.sample()
        lines.append(without_clock(trainer.train_step()))
        tensors = whole_weights(trainer.model) | {f"gradient of {name}": g for name, g in gradients.items()}
        if rank == 0:
            record = {"lines": lines, "held_out": held_out, "sample": sample}
            (folder / f"{layout}.json").write_text(json.dumps(record))
            save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f"{layout}.safetensors")


def saves(rank: int, world: int, folder: Path) -> None:
    """The first steps of every run in SAVED, a checkpoint, and the rest; the last checkpoint in the background."""
    for layout in SAVED:
        parallel = placed(layout, background=layout.shard == "fsdp")
        make_trainer(layout.run, folder / str(layout), parallel=parallel, save_every=SAVED_STEP).run()
        parallel.close()


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


def keeps_unsent(rank: int, world: int, folder: Path) -> None:
    """Every method stopped and resumed ends as one that was not; what it had not sent, as it stopped."""
    for method in UNSENT:
        out, grid = folder / method, make_world(torch.device("cpu"))
        whole, stopped, again = (Ranks(grid, compression=method, density=0.1) for _ in range(3))
        make_trainer("dense", folder / f"{method}-whole", parallel=whole).run()
        make_trainer("dense", out, parallel=stopped, stop_at=SAVED_STEP).run()
        save_unsent(stopped, folder / f"{method}-{rank}-of-{world}.safetensors")
        trainer = make_trainer("dense", folder / f"{method}-again", parallel=again)
        trainer.resume(out / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
        trainer.run()
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


def fails(rank: int, world: int, folder: Path) -> None:
    """The last rank ends with an error that nobody foresaw; the others, who wait for it, say which."""
    last = world - 1
    error, said = (KeyError, "oops") if rank == last else (LostRankError, f"rank {last}: KeyError: 'oops'; start again")
    with pytest.raises(error, match=said), one_clear_error(timeout_s=1.0, advice=lambda: "start again"):
        if rank == last:
            raise KeyError("oops")
        dist.barrier()


CASES = {
    "fails": fails,
    "holds": holds,
    "runs": runs,
    "saves": saves,
    "resumes": resumes,
    "prunes": prunes,
    "compresses": compresses,
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
