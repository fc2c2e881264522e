"""Replicas that choose alike: what ranks of data parallel training found apart, made one."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def replicated() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def averaged(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores by name, the mean over the ranks; DTensors, which the mesh holds once, as they are.

    Each rank must call with the same names in the same order. Scores that are means over samples become those of all
    ranks' samples, where each rank has equally many."""
    if not replicated():
        return dict(scores)
    found = {}
    for name, score in scores.items():
        if not isinstance(score, DTensor):
            score = score.clone()
            dist.all_reduce(score)
            score /= dist.get_world_size()
        found[name] = score
    return found


def of_first(value: float, *, device: torch.device) -> float:
    """Rank 0's number on every rank: what ranks compute alike may differ in the last digits, and so may a choice.

    device: one between which the ranks' backend carries tensors."""
    if not replicated():
        return value
    told = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return float(told)


@torch.no_grad()
def follow_first(tensors: Iterable[Tensor]) -> None:
    """Give every rank's tensors, in place, the values of rank 0's; DTensors and a single process's stay."""
    if not replicated():
        return
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach().contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)
