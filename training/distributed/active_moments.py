"""Moments of the weights that are there (:class:`pruning.dynamic.SparseAdamW`) in checkpoints that any layout reads.

In memory they are rows: ``mean`` and ``square`` [n], and ``index`` [n] where a mask says which weights are there,
places in what this process holds. A parameter that is whole is written so. One that ranks share out is written in its
own shape, each rank its part: ``mean`` and ``square``, 0 where no weight is, and ``active``, which says where one is.
While it writes or reads, a rank then holds 9 bytes for each weight of its part (two float32 numbers, a truth value).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pruning.dynamic.sparse_adamw import spread_out
from pruning.sharding import Layout, as_parts_of, as_wholes, own_part, sharded_as

MOMENTS = ("mean", "square")
Slots = dict[str, Tensor]


def in_shape(tensors: Mapping[str, Tensor], model: nn.Module, layouts: Mapping[str, Layout]) -> Slots:
    """The optimiser's tensors as ``slot:parameter name``, with the rows of parameters that ranks share out in their
    parameter's shape: this rank's part, a DTensor where the parameter is one. layouts: of the parts of stacks."""
    found: Slots = {}
    for name, slots in _by_parameter(tensors).items():
        parameter = model.get_parameter(name)
        if "mean" in slots and (isinstance(parameter, DTensor) or name in layouts):
            wide = _spread(slots, own_part(parameter).shape)
            slots = {"step": slots["step"]} | as_parts_of(wide, dict.fromkeys(wide, parameter))
        found |= {f"{slot}:{name}": tensor for slot, tensor in slots.items()}
    return found


def in_rows(tensors: Mapping[str, Tensor], model: nn.Module, layouts: Mapping[str, Layout]) -> Slots:
    """The inverse, whatever layout the tensors are from: of a whole parameter's rows each rank takes those of its part,
    with places in that."""
    found: Slots = {}
    for name, slots in _by_parameter(tensors).items():
        if "mean" in slots:
            parameter = model.get_parameter(name)
            like = as_wholes({name: parameter.detach()}, layouts)[name]
            if slots["mean"].ndim != parameter.ndim and isinstance(like, DTensor):
                wide = _spread(slots, like.shape)
                slots = {"step": slots["step"]} | {slot: sharded_as(tensor, like) for slot, tensor in wide.items()}
            slots = _rows(slots)
        found |= {f"{slot}:{name}": tensor for slot, tensor in slots.items()}
    return found


def _spread(slots: Mapping[str, Tensor], shape: torch.Size) -> Slots:
    """The moments in this shape, and which weights are there."""
    index = slots.get("index")
    found = {slot: spread_out(slots[slot], index, shape.numel()).view(shape) for slot in MOMENTS}
    if index is not None:
        found["active"] = spread_out(torch.ones_like(index, dtype=torch.bool), index, shape.numel()).view(shape)
    return found


def _rows(slots: Mapping[str, Tensor]) -> Slots:
    """Of this process's part; rows as they are."""
    found = {slot: own_part(tensor).reshape(-1) if tensor.ndim else tensor for slot, tensor in slots.items()}
    if "active" in found:
        index = found.pop("active").nonzero().squeeze(1)
        found |= {slot: found[slot][index] for slot in MOMENTS} | {"index": index.to(torch.int32)}
    return found


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, Slots]:
    found: dict[str, Slots] = {}
    for key, tensor in tensors.items():
        slot, _, name = key.partition(":")
        found.setdefault(name, {})[slot] = tensor
    return found
