"""Low-rank adapters on pruned weights, trained as they will be merged: the zeros stay zeros."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pruning.masking import Masks
from pruning.weights import prunable_weights


class MaskedLowRank(nn.Module):
    """W → (W + α/r · B A) ⊙ M, with B [..., rows, r] = 0 at first and A [..., r, columns] ~ N(0, 1/r), M the mask.

    LoRA (Hu et al. 2021, arXiv:2106.09685), masked in the forward pass as after merging, so that merging changes no
    output. A stack of matrices [E, rows, columns] has an adapter for each."""

    mask: Bool[Tensor, "*stack rows columns"]

    def __init__(
        self,
        weight: Float[Tensor, "*stack rows columns"],
        mask: Bool[Tensor, "*stack rows columns"],
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(f"rank must be in [1, {min(rows, columns)}] for a weight {[rows, columns]}, got {rank}")
        self.scale, self.trained = alpha / rank, weight.requires_grad
        drawn = torch.randn(*stack, rank, columns, generator=generator) * rank**-0.5
        self.a = nn.Parameter(drawn.to(weight))
        self.b = nn.Parameter(weight.new_zeros(*stack, rows, rank))
        self.register_buffer("mask", mask.to(weight.device).clone())

    def forward(self, weight: Float[Tensor, "*stack rows columns"]) -> Float[Tensor, "*stack rows columns"]:
        """The weight that the layer multiplies by."""
        return (weight + self.scale * (self.b @ self.a)).masked_fill(~self.mask, 0)


def add_adapters(
    model: nn.Module,
    masks: Masks | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    weights: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Give every pruned weight a `MaskedLowRank`, in place, and return the adapters' parameters, for an optimiser.

    The adapted weights are frozen; all else stays as it is. Outputs do not change, for B is 0. masks: None takes the
    zeros that the weights have (`Masks.of`). weights: names; None is all that the masks name. alpha: None is the rank.
    Experts are adapted one by one. While adapted, a weight's name is `…parametrizations.weight.original`: save and
    prune again after `merge_adapters`.

    >>> adapters = add_adapters(model, masks, rank=8)
    >>> optimizer = torch.optim.AdamW(adapters, lr=1e-3)
    >>> ...
    >>> masks = merge_adapters(model)

    Raises: ValueError for a rank outside [1, the smaller side], unknown names, a tied weight, one that has an adapter
    already, and masks that do not fit; the model has not changed then."""
    held = Masks.of(model) if masks is None else masks
    names = list(held.kept if weights is None else weights)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        _check(parameters, held, name)
    made = {
        name: MaskedLowRank(
            parameters[name], held.kept[name], rank=rank, alpha=rank if alpha is None else alpha, generator=generator
        )
        for name in names
    }
    Masks({name: held.kept[name] for name in names}).apply(model)
    for name, adapter in made.items():
        owner, _, attribute = name.rpartition(".")
        parameters[name].requires_grad_(False)
        parametrize.register_parametrization(model.get_submodule(owner), attribute, adapter)
    return [parameter for adapter in made.values() for parameter in (adapter.a, adapter.b)]


def _check(parameters: dict[str, nn.Parameter], masks: Masks, name: str) -> None:
    if name not in parameters or name not in masks.kept:
        adapted = name.replace(".weight", ".parametrizations.weight.original") in parameters
        raise ValueError(f"weights must be parameters that the masks name, got {name!r}" + ", adapted" * adapted)
    if parameters[name].shape != masks.kept[name].shape:
        shapes = f"{list(parameters[name].shape)}, got {list(masks.kept[name].shape)}"
        raise ValueError(f"mask of {name!r} must have shape {shapes}")
    shared = [other for other, parameter in parameters.items() if parameter is parameters[name]]
    if len(shared) > 1:
        raise ValueError(f"{name!r} must not be tied, for an adapter changes one use alone, got {', '.join(shared)}")


@torch.no_grad()
def merge_adapters(model: nn.Module) -> Masks:
    """Make every adapted weight (W + α/r · B A) ⊙ M, in place, without its adapter; returns the masks.

    Outputs stay as they are, bit for bit, and so do the zeros. requires_grad is again what it was before
    `add_adapters`; the optimiser's parameters are gone.
    Raises: ValueError if nothing is adapted, or a weight has other parametrisations too."""
    found = [
        (f"{where}.{attribute}" if where else attribute, module, attribute, chain)
        for where, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for attribute, chain in module.parametrizations.items()
        if any(isinstance(link, MaskedLowRank) for link in chain)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} must have adapters, got none: call add_adapters first")
    for name, _, _, chain in found:
        if len(chain) != 1:
            raise ValueError(f"{name!r} must have its adapter alone, got {len(chain)} parametrisations")
    kept = {}
    for name, module, attribute, chain in found:
        adapter = chain[0]
        kept[name] = adapter.mask
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        getattr(module, attribute).requires_grad_(adapter.trained)
    order = [name for name in prunable_weights(model) if name in kept]
    return Masks({name: kept[name] for name in [*order, *(name for name in kept if name not in order)]})
