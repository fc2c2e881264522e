"""Methods that learn while they prune, in replicas and where ranks hold a part of the weights.

python -m tests.training.replica_cases RANK WORLD FOLDER METHOD@LAYOUT…
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pruning.sharding import gathered
from tests.training.distributed_cases import Layout, make_model, make_trainer
from tests.training.distributed_ranks import placed
from training.distributed.export import whole_weights
from training.sparsify_config import SparsifyConfig
from training.sparsity import make_sparsifiers, masks_at_start
from training.trainer import CHECKPOINTS, Trainer

LENGTH, SAVED = 9, 5
METHODS: dict[str, SparsifyConfig] = {
    "nest": SparsifyConfig(0.5, "nest", every=2),
    "movement": SparsifyConfig(0.5, "movement", every=2, end=6),
    "feedback": SparsifyConfig(0.5, "feedback", every=2, end=6),
    "dnw": SparsifyConfig(0.5, "dnw"),
    "iht": SparsifyConfig(0.5, "iht", every=3, scope="global"),
    "dsd": SparsifyConfig(0.5, "dsd", begin=2, end=6),
    "lc": SparsifyConfig(0.5, "lc", every=2, strength=0.1),
    "generalization": SparsifyConfig(0.5, "generalization", when="low"),
    "statistic": SparsifyConfig(0.5, "generalization", when="low", criterion="statistic", scope="global"),
    "lottery": SparsifyConfig(0.5, "lottery", begin=3, rounds=1),
    "early_bird": SparsifyConfig(0.5, "early_bird", every=1, end=6, distance="relative"),
    "hoyer_square": SparsifyConfig(0.5, "hoyer_square"),
    "polarized_units": SparsifyConfig(0.5, "polarized_units"),
    "soft_movement": SparsifyConfig(method="soft_movement", strength=300.0, gate_lr=100.0),
    "l0": SparsifyConfig(method="l0", strength=300.0, gate_lr=170.0),
    "l0_units": SparsifyConfig(method="l0_units", strength=1.0, gate_lr=300.0),
    "str": SparsifyConfig(method="str", strength=1.0),
    "variational": SparsifyConfig(method="variational", strength=300.0, gate_lr=100.0),
    "variational_units": SparsifyConfig(method="variational_units", strength=30.0, gate_lr=153.0),
    "proximal": SparsifyConfig(method="proximal", strength=1.0),
    "group_proximal": SparsifyConfig(method="group_proximal", strength=5.0),
    "synflow": SparsifyConfig(0.5, "synflow", shuffle=True),
    "robust_rewiring": SparsifyConfig(0.5, "robust_rewiring", attack=0.5),
}
REPLICAS, SHARDS, SPREAD, BOTH, HEADS = (
    Layout("dense"), Layout("dense", shard="fsdp"), Layout("moe", 2), Layout("moe", 2, "fsdp"),
    Layout("heads", shard="fsdp", heads=2),
)  # fmt: skip
# each where ranks hold a part of the weights, some in replicas
WHERE: dict[str, tuple[Layout, ...]] = {
    "nest": (HEADS,),
    "movement": (BOTH, REPLICAS),
    "feedback": (BOTH,),
    "dnw": (SHARDS,),
    "iht": (BOTH,),
    "dsd": (SHARDS,),
    "lc": (BOTH,),
    "generalization": (BOTH, REPLICAS),
    "statistic": (BOTH,),
    "lottery": (BOTH, REPLICAS),
    "early_bird": (HEADS,),
    "hoyer_square": (HEADS,),
    "polarized_units": (HEADS,),
    "soft_movement": (SHARDS,),
    "l0": (BOTH,),
    "l0_units": (BOTH, REPLICAS),
    "str": (BOTH,),
    "variational": (BOTH, SHARDS, REPLICAS),
    "variational_units": (HEADS,),
    "proximal": (SHARDS,),
    "group_proximal": (BOTH,),
    "synflow": (BOTH,),
    "robust_rewiring": (BOTH, SHARDS, REPLICAS),
}
CASES = [(method, layout) for method, layouts in WHERE.items() for layout in layouts]
# from shards and spread experts to whole weights: gates of weights, of matrices, of units; values to go back to; sums;
# signs
MOVED = {"movement": Layout("moe"), "str": Layout("moe"), "l0_units": SHARDS._replace(run="moe"), "lottery": SPREAD,
         "statistic": SPREAD, "robust_rewiring": SPREAD}  # fmt: skip


def trainer_of(method: str, run: str, out: Path, **options: Any) -> Trainer:
    """A short run with a method of [sparsify], evaluated on the way; micro-batches where there are no experts."""
    config = METHODS[method]
    options = {"steps": LENGTH, "eval_every": 3, "eval_batches": 1, "save_every": SAVED, "keep": 9} | options
    if run == "dense" and method != "robust_rewiring":  # an attack is as large as the rows of its pass say
        options["accumulation"] = 2
    return make_trainer(
        # eps: masks are to be the same, so AdamW must not make whole steps of rounding
        run, out, optim={"eps": 1e-3}, **options,
        sparsifiers=lambda model: make_sparsifiers(
            config, model, steps=LENGTH, masks=masks_at_start(config, make_model(run))
        ),
    )  # fmt: skip


def name_of(method: str, layout: Layout) -> str:
    """Of a case, and of its folder."""
    return f"{method}@{layout}"


def saved(out: Path) -> Path:
    """The checkpoint on the way."""
    return out / CHECKPOINTS / f"step-{SAVED:08d}"


def found(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, and masks as the method tells them, whole."""
    masks = gathered(trainer.sparsifiers[0].masks().kept)  # type: ignore[attr-defined]
    weights = {name: tensor for name, tensor in whole_weights(trainer.model).items() if tensor.is_floating_point()}
    return weights | {f"mask of {name}": mask for name, mask in masks.items()}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    for method, layout in CASES:
        out = folder / name_of(method, layout)
        if out.name not in sys.argv[4:]:
            continue
        saves = {"save_every": 100} if layout == REPLICAS else {}
        trainer = trainer_of(method, layout.run, out, parallel=placed(layout), **saves)
        trainer.run()
        ends = {"last": found(trainer)}
        if layout == BOTH and method in MOVED:
            moved = trainer_of(method, layout.run, folder / f"{out.name}-moved", parallel=placed(MOVED[method]))
            moved.resume(saved(out))
            moved.run()
            ends["moved"] = found(moved)
        for name, tensor in ends["last"].items():
            theirs = tensor.clone().to(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
            dist.broadcast(theirs, 0)
            assert theirs.equal(tensor.to(theirs.dtype)), f"{method}: every rank has the same {name}"
        for end, tensors in ends.items():
            if rank == 0:
                save_file({name: t.detach().contiguous() for name, t in tensors.items()}, out / f"{end}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
