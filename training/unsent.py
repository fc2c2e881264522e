"""What compression had not sent when a checkpoint was written, for a run that goes on otherwise."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def return_unsent(model: nn.Module, state: Mapping[str, Any] | None, *, ranks: int) -> None:
    """Add what a run with compression had not sent to the next gradients of ``model``, for a run without it.

    state: this rank's share of :meth:`training.GradientCompressor.state_dict`, whose names may begin with ``model.``;
    None: nothing to do. ranks: over how many the gradients are then averaged: each adds ranks · r. Of "dgc" it is
    ranks · (v + m / (1 − m) · u), all that would still be sent under momentum m. A parameter gets it once, with the
    next gradient that it has; what still waits for one is not in a checkpoint written before.
    Raises: ValueError for a parameter that this rank does not hold whole, or that is not trained.

    >>> return_unsent(model, state["compressor"], ranks=1)
    """
    if state is None:
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    residuals, velocities = (_stripped(state[kind]) for kind in ("residuals", "velocities"))
    check_unsent("residuals", residuals, trained)
    check_unsent("velocities", velocities, trained)
    rest = {name: state["momentum"] / (1 - state["momentum"]) * u for name, u in velocities.items()}
    for name, held in residuals.items():
        parameter = trained[name]
        _add_once(parameter, (ranks * (held + rest.get(name, 0.0))).to(parameter).view_as(parameter))


def check_unsent(kind: str, held: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raises: ValueError unless every tensor is of one of the parameters, of its size, which is whole on this rank."""
    for name in sorted(held):
        if name not in parameters:
            raise ValueError(f"{kind} must be of the model's parameters that are trained alike, got {name!r}")
        have = parameters[name]
        if isinstance(have, DTensor):
            raise ValueError(
                f"{kind} of {name!r}, which the checkpoint has, must be for a whole parameter, got one that ranks share"
                " out: resume in the layout that wrote it"
            )
        if have.numel() != held[name].numel():
            raise ValueError(f"{kind} of {name!r} must have {have.numel()} entries, got {held[name].numel()}")


def _stripped(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in held.items()}


def _add_once(parameter: Tensor, more: Tensor) -> None:
    def add(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient + more.to(gradient.dtype)

    handle = parameter.register_hook(add)
