"""What each rank of test_distributed runs: python -m tests.training.distributed_ranks RANK WORLD FOLDER CASE…"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pruning.sharding import gathered
from tests.training.distributed_cases import (
    LAYOUTS,
    PRUNED,
    PRUNERS,
    RESUMED,
    SAVED,
    SAVED_STEP,
    STEPS,
    make_trainer,
    without_clock,
)
from training.distributed import Ranks, make_world
from training.distributed.export import whole_weights
from training.trainer import CHECKPOINTS


def runs(rank: int, world: int, folder: Path) -> None:
    """The runs of this world: its metrics, evaluation and last weights."""
    for name, expert_parallel, shard in LAYOUTS[world]:
        parallel = Ranks(make_world(torch.device("cpu"), expert_parallel=expert_parallel), shard=shard)
        key = f"{name}-{world}-{expert_parallel}-{shard}"
        trainer = make_trainer(name, folder / key, parallel=parallel)
        lines = [without_clock(trainer.train_step()) for _ in range(STEPS - 1)]
        held_out = trainer.evaluate().loss
        lines.append(without_clock(trainer.train_step()))
        weights = whole_weights(trainer.model)
        if rank == 0:
            (folder / f"{key}.json").write_text(json.dumps({"lines": lines, "held_out": held_out}))
            save_file({n: t.contiguous() for n, t in weights.items()}, folder / f"{key}.safetensors")


def saves(rank: int, world: int, folder: Path) -> None:
    """The first steps of every run in SAVED, a checkpoint, and the rest; the last checkpoint in the background."""
    for name, expert_parallel, shard in SAVED:
        grid = make_world(torch.device("cpu"), expert_parallel=expert_parallel)
        parallel = Ranks(grid, shard=shard, background=shard == "fsdp")
        trainer = make_trainer(name, folder / f"{name}-{shard}", parallel=parallel, save_every=SAVED_STEP)
        trainer.run()
        parallel.close()


def resumes(rank: int, world: int, folder: Path) -> None:
    """Every run in SAVED goes on in the layouts of RESUMED; it ends with the metrics that it had."""
    for name, _, shard in SAVED:
        for expert_parallel, other in RESUMED[world]:
            parallel = Ranks(make_world(torch.device("cpu"), expert_parallel=expert_parallel), shard=other)
            copy = folder / f"{name}-{shard}-{world}-{expert_parallel}-{other}"
            trainer = make_trainer(name, copy, parallel=parallel)
            trainer.resume(folder / f"{name}-{shard}" / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
            trainer.run()


def prunes(rank: int, world: int, folder: Path) -> None:
    """Every method of PRUNED on the dense model; masks at the start and the end, and a checkpoint on the way."""
    for method, shard in PRUNED:
        parallel = Ranks(make_world(torch.device("cpu")), shard=shard)
        out = folder / f"{method}-{shard}"
        trainer = make_trainer("dense", out, parallel=parallel, sparsifiers=PRUNERS[method], save_every=SAVED_STEP)
        first = {n: mask.clone() for n, mask in gathered(trainer.sparsifiers[0].masks().kept).items()}
        trainer.run()
        last = gathered(trainer.sparsifiers[0].masks().kept)
        weights = whole_weights(trainer.model)
        for name, mask in last.items():
            theirs = mask.clone()
            dist.broadcast(theirs, 0)
            assert theirs.equal(mask), "every rank has the same masks"
            assert not weights[name][~mask].any(), "zeros are held"
        if rank == 0:
            save_file({n: mask.contiguous() for n, mask in first.items()}, out / "first.safetensors")
            save_file({n: mask.contiguous() for n, mask in last.items()}, out / "last.safetensors")


def compresses(rank: int, world: int, folder: Path) -> None:
    """Dense at density 1; at 0.1 a run that resumes goes on as if it had not stopped: what was not sent is kept."""
    for density in (1.0, 0.1):
        for name, expert_parallel in (("dense", 1), ("moe", 2)):
            grid = make_world(torch.device("cpu"), expert_parallel=expert_parallel)
            out = folder / f"topk-{density}-{name}"
            ranks = Ranks(grid, compression="topk", density=density)
            make_trainer(name, out, parallel=ranks, save_every=SAVED_STEP).run()
            assert ranks.compressor is not None and ranks.compressor.traffic.steps == STEPS
            if density < 1:
                assert ranks.compressor.traffic.sent < ranks.compressor.traffic.dense / 2
                again = Ranks(grid, compression="topk", density=density)
                trainer = make_trainer(name, folder / f"again-{name}", parallel=again)
                trainer.resume(out / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
                assert again.compressor is not None and again.compressor.residuals
                trainer.run()
                assert again.compressor.residuals.keys() == ranks.compressor.residuals.keys()
                for key, left in ranks.compressor.residuals.items():
                    assert left.equal(again.compressor.residuals[key])


CASES = {"runs": runs, "saves": saves, "resumes": resumes, "prunes": prunes, "compresses": compresses}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    for case in sys.argv[4:]:
        CASES[case](rank, world, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
