"""What compression had not sent when a checkpoint was written, for a run that goes on otherwise."""

from collections.abc import Collection, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

PREFIX = "model."  # of a model that DistributedDataParallel wraps


def return_unsent(
    model: nn.Module, state: Mapping[str, Any] | None, *, ranks: int, split: Collection[str] = ()
) -> None:
    """Add what a run with compression had not sent to the next gradients of ``model``, for a run without it.

    state: this rank's share of :meth:`training.GradientCompressor.state_dict`, whose names may begin with ``model.``;
    None: nothing to do. ranks: over how many the gradients are then averaged: each adds ranks · r, and of a parameter
    that FSDP2 shards its part of the sum of all r, so that every rank has to call this. Of "dgc" it is
    ranks · (v + m / (1 − m) · u), all that would still be sent under momentum m. A parameter gets it once, with the
    next gradient that it has; what still waits for one is not in a checkpoint written before. split: names that ranks
    share out in another way.
    Raises: ValueError for one of ``split``, or a parameter that is not trained.

    >>> return_unsent(model, state["compressor"], ranks=1)
    """
    if state is None:
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    residuals, velocities = (_stripped(state[kind]) for kind in ("residuals", "velocities"))
    check_unsent("residuals", residuals, trained, split)
    check_unsent("velocities", velocities, trained, split)
    rest = {name: state["momentum"] / (1 - state["momentum"]) * u for name, u in velocities.items()}
    for name, held in sorted(residuals.items()):
        parameter = trained[name]
        unsent = (held + rest.get(name, 0.0)).to(parameter.device, parameter.dtype).view(parameter.shape)
        if isinstance(parameter, DTensor):
            _add_part_once(parameter, unsent)
        else:
            _add_once(parameter, ranks * unsent)


def check_unsent(
    kind: str, held: Mapping[str, Tensor], parameters: Mapping[str, Tensor], split: Collection[str] = ()
) -> None:
    """Raises: ValueError unless every tensor is of one of the parameters, of its size, and of none of ``split``."""
    for name in sorted(held):
        if name not in parameters:
            raise ValueError(f"{kind} must be of the model's parameters that are trained alike, got {name!r}")
        if name in split:
            raise ValueError(
                f"{kind} of {name!r}, which the checkpoint has, must be for a whole parameter or one of FSDP2, got one"
                " that ranks share out: resume in the layout that wrote it"
            )
        have = parameters[name]
        if have.numel() != held[name].numel():
            raise ValueError(f"{kind} of {name!r} must have {have.numel()} entries, got {held[name].numel()}")


def renamed(state: Mapping[str, Any], parameters: Collection[str]) -> dict[str, Any]:
    """A state of :class:`training.GradientCompressor` under the names that these parameters have in this layout."""
    names = {name.removeprefix(PREFIX): name for name in parameters}
    found = dict(state)
    for kind in ("residuals", "velocities"):
        found[kind] = {names.get(name, name): held for name, held in _stripped(state[kind]).items()}
    return found


def _stripped(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in held.items()}


def _add_once(parameter: Tensor, more: Tensor) -> None:
    def add(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient + more.to(gradient.dtype)

    handle = parameter.register_hook(add)


def _add_part_once(parameter: DTensor, unsent: Tensor) -> None:
    mesh = parameter.device_mesh
    dist.all_reduce(unsent, group=mesh.get_group())
    waiting = [distribute_tensor(unsent, mesh, parameter.placements, src_data_rank=None).to_local()]

    def add(sharded: Tensor) -> None:
        # stays: FSDP2 walks through the hooks while it calls them
        if waiting and isinstance(sharded.grad, DTensor):
            sharded.grad.to_local().add_(waiting.pop())

    parameter.register_post_accumulate_grad_hook(add)
