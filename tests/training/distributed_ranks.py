"""What each rank of test_distributed runs: python -m tests.training.distributed_ranks RANK WORLD FOLDER CASE…"""

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pruning.sharding import gathered
from tests.training.distributed_cases import (
    LAYOUTS,
    PRUNED,
    PRUNERS,
    SAVED,
    SAVED_STEP,
    STEPS,
    Layout,
    keep_gradients,
    make_trainer,
    resumed,
    without_clock,
)
from training.distributed import Ranks, make_world
from training.distributed.export import whole_weights
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


def keeps_compact(rank: int, world: int, folder: Path) -> None:
    """RigL with moments of the weights that are there alone: saved, in the background too, resumed, run through."""
    options = {"sparsifiers": PRUNERS["rigl"], "optim": {"sparse_state": True}}
    plain = Layout("moe")
    parallel = placed(plain, background=True)
    make_trainer("moe", folder / "compact", parallel=parallel, save_every=SAVED_STEP, **options).run()
    parallel.close()
    again = make_trainer("moe", folder / "compact-again", parallel=placed(plain), **options)
    again.resume(folder / "compact" / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
    again.run()


CASES = {
    "runs": runs,
    "saves": saves,
    "resumes": resumes,
    "prunes": prunes,
    "compresses": compresses,
    "keeps_compact": keeps_compact,
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
