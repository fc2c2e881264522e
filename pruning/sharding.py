"""Weights that torch.distributed shards (DTensor, as FSDP2 leaves them): whole values in, the same shards out.

Scores are compared whole on every rank, so a choice is the one process's own, ties included. It costs a gather of the
scores, as large as the unsharded weights, whenever masks are chosen, and nothing in the steps between.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with every DTensor whole; a collective over the mesh of each, in order."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def sharded_as(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank holds whole, laid out as ``like`` is, without communication; itself for a plain one."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
