"""Sanity checks of masks found before training: shuffled inside their layers, and put on fresh weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pruning.masking import Masks
from pruning.weights import matrices


def shuffle_masks(masks: Masks, *, generator: torch.Generator) -> Masks:
    """Every matrix keeps as many weights as before, in places drawn anew; each expert apart.

    Frankle et al. 2021 (arXiv:2009.08576), section 5: a method whose masks train as well when they are shuffled has
    found how many weights each layer needs, and not which. Draws on the CPU."""
    kept = {name: mask.clone() for name, mask in masks.kept.items()}
    for mask in matrices(kept).values():
        flat = mask.flatten()
        order = torch.randperm(flat.numel(), generator=generator).to(flat.device)
        mask.copy_(flat[order].view(mask.shape))
    return Masks(kept)


@torch.no_grad()
def reinitialise(model: nn.Module, build: Callable[[], nn.Module], masks: Masks) -> None:
    """The masked weights of `model` get the values of a fresh `build()`, in place, and 0 where the masks say so.

    The second check of Frankle et al. 2021 (arXiv:2009.08576): a mask that depends on the weights that it was found
    with loses here. All other parameters stay. build() must draw other weights than the model started from.
    Raises: ValueError if the fresh model lacks a masked weight or has another shape of it."""
    fresh: dict[str, Tensor] = dict(build().named_parameters(remove_duplicate=False))
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.kept.items():
        if name not in fresh or fresh[name].shape != mask.shape:
            found = list(fresh[name].shape) if name in fresh else None
            raise ValueError(f"build() must give {name!r} of shape {list(mask.shape)}, got {found}")
    for name in masks.kept:
        own[name].copy_(fresh[name])
    masks.apply(model)
