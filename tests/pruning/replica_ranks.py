"""What each rank of test_replicas runs: python -m tests.pruning.replica_ranks RANK WORLD FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pruning import Sparsifier
from pruning.criteria import CRITERIA
from pruning.saliency.first_order import taylor_scores
from pruning.schedules import one_shot
from pruning.weights import prunable_weights
from tests.training.models import small_model


def net():
    torch.manual_seed(0)
    return small_model(experts=0, layers=1).double()


def samples(rank):
    return [torch.randint(257, (2, 7), generator=torch.Generator().manual_seed(rank))]


def chosen(rank, saliency, **options):
    """Masks and weights of this rank after one step, at which half goes."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if CRITERIA[saliency].data:
        options["calibration"] = samples(rank)
    generator = torch.Generator().manual_seed(rank) if saliency == "random" else None
    pruner = Sparsifier(model, saliency=saliency, schedule=one_shot(0.5, step=1), generator=generator, **options)
    pruner.before_step(optimizer)
    pruner.after_step(optimizer)
    return pruner.masks(), model


def same_everywhere(tensors):
    for name, tensor in tensors.items():
        found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(found, tensor.contiguous())
        if not all(one.equal(tensor) for one in found):
            return name
    return None


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    for saliency in CRITERIA:
        masks, model = chosen(rank, saliency)
        assert same_everywhere({name: kept.byte() for name, kept in masks.kept.items()}) is None, saliency
        assert same_everywhere(dict(model.named_parameters())) is None, saliency
    masks, _ = chosen(rank, "magnitude", allocation="owl", calibration=samples(rank))
    assert same_everywhere({name: kept.byte() for name, kept in masks.kept.items()}) is None
    # scores that are means over samples: the ranks choose what one process chooses over all samples
    model = net()
    every = [torch.cat([batch for each in range(world) for batch in samples(each)])]
    scores = taylor_scores(model, prunable_weights(model), every)
    for name, kept in chosen(rank, "taylor")[0].kept.items():
        lowest = scores[name].flatten().argsort(stable=True)[: scores[name].numel() // 2]
        assert kept.flatten()[lowest].sum() == 0, name
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
