"""Weights that ranks hold in part: DTensors, as FSDP2 and tensor parallel leave them, and runs of spread experts.

Scores are compared whole on every rank, so a choice is the one process's own, ties included. It costs a gather of the
scores, as large as the unsharded weights, whenever masks are chosen, and nothing in the steps between.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# this rank's part of a stack → a DTensor of the whole that shares its memory
Layout = Callable[[Tensor], Tensor]


def spread_layouts(model: nn.Module) -> dict[str, Layout]:
    """Parameter name → layout, of the plain parameters that are this rank's part of a stack: those of modules with a
    method ``as_whole`` (:class:`moe.ShardedExperts`)."""
    return {
        f"{prefix}.{name}".lstrip("."): module.as_whole
        for prefix, module in model.named_modules(remove_duplicate=False)
        if callable(getattr(module, "as_whole", None))
        for name, _ in module.named_parameters(recurse=False)
    }


def as_wholes(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """The same with every part that has a layout as a DTensor of the whole."""
    return {name: layouts[name](tensor) if name in layouts else tensor for name, tensor in tensors.items()}


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with every DTensor whole; a collective over the mesh of each, in order."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


@contextmanager
def whole(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors :func:`gathered`, to be changed in place: on leaving, the shards take what has become of them."""
    held = gathered(tensors)
    yield held
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            put(tensor, held[name])


def put(tensor: Tensor, values: Tensor) -> None:
    """Copy ``values``, which every rank holds whole, or in the layout of ``tensor``, into this rank's part of it."""
    own_part(tensor).copy_(own_part(sharded_as(values, tensor)))


def sharded_as(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank holds whole, laid out as ``like`` is, without communication; itself for a plain one."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_parts_of(parts: Mapping[str, Tensor], likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of this process's part of ``likes`` as the wholes, laid out as those are and sharing memory."""
    return {name: _laid_out(part, likes[name]) for name, part in parts.items()}


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def met_by(whole: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that broadcasts to ``like`` (as many dimensions, each 1 or its size), what meets this process's part
    of it; a view, through which gradients pass."""
    if not isinstance(like, DTensor):
        return whole
    sizes, starts = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dim, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        whole = whole if whole.shape[dim] == 1 else whole.narrow(dim, start, size)
    return whole


def summed_over(share: Tensor, like: Tensor) -> Tensor:
    """Σ, in place, over the parts of ``like`` of what each rank's own adds; every rank of its mesh calls it."""
    if isinstance(like, DTensor):
        for dim, placement in enumerate(like.placements):
            if placement.is_shard():
                dist.all_reduce(share, group=like.device_mesh.get_group(dim))
    return share
