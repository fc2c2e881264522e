"""Methods that need whole matrices, in replicas: python -m tests.training.replica_cases RANK WORLD FOLDER METHOD…"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.training.distributed_cases import SAVED_STEP, Layout, make_trainer
from tests.training.distributed_ranks import placed
from training.sparsify_config import SparsifyConfig
from training.sparsity import make_sparsifiers
from training.trainer import Trainer

LENGTH = 9
METHODS: dict[str, SparsifyConfig] = {
    "nest": SparsifyConfig(0.5, "nest", every=2),
    "movement": SparsifyConfig(0.5, "movement", every=2, end=6),
    "feedback": SparsifyConfig(0.5, "feedback", every=2, end=6),
    "dnw": SparsifyConfig(0.5, "dnw"),
    "iht": SparsifyConfig(0.5, "iht", every=3),
    "dsd": SparsifyConfig(0.5, "dsd", begin=2, end=6),
    "lc": SparsifyConfig(0.5, "lc", every=2),
    "generalization": SparsifyConfig(0.5, "generalization", when="low"),
    "lottery": SparsifyConfig(0.5, "lottery", rounds=2),
    "early_bird": SparsifyConfig(0.5, "early_bird", every=1, end=6),
    "hoyer_square": SparsifyConfig(0.5, "hoyer_square"),
    "polarized_units": SparsifyConfig(0.5, "polarized_units"),
    "soft_movement": SparsifyConfig(method="soft_movement", strength=300.0),
    "l0": SparsifyConfig(method="l0", strength=300.0),
    "l0_units": SparsifyConfig(method="l0_units", strength=30.0),
    "str": SparsifyConfig(method="str", strength=1.0),
    "variational_units": SparsifyConfig(method="variational_units", strength=30.0),
    "group_proximal": SparsifyConfig(method="group_proximal", strength=1.0),
}


def trainer_of(method: str, out: Path, **options: Any) -> Trainer:
    """A short run with a method of [sparsify], evaluated on the way."""
    config = METHODS[method]
    options |= {"steps": LENGTH, "eval_every": 3, "save_every": SAVED_STEP, "keep": 9}
    return make_trainer("dense", out, sparsifiers=lambda m: make_sparsifiers(config, m, steps=LENGTH), **options)


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    for method in sys.argv[4:]:
        trainer = trainer_of(method, folder / method, parallel=placed(Layout("dense")))
        trainer.run()
        for name, parameter in trainer.model.named_parameters():
            theirs = parameter.detach().clone()
            dist.broadcast(theirs, 0)
            assert theirs.equal(parameter), f"{method}: every rank has the same {name}"
        if rank == 0:
            weights = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters()}
            save_file(weights, folder / method / "last.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
