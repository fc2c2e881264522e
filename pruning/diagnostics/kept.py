"""Masks that a diagnostic is given, held against the model that it looks at."""

import torch
from torch import Tensor, nn

from pruning.held import held_by
from pruning.masking import Masks, check_shapes


def kept_of(masks: Masks | None, model: nn.Module) -> dict[str, Tensor]:
    """Parameter name → bool tensor of its shape, True where a weight is there; {} without masks: all weights are there.

    A parameter without a mask is whole. Raises: ValueError for a mask of a parameter that the model does not have (a
    tied one goes by its first name), of another shape, and for one that is not boolean."""
    if masks is None:
        return {}
    own = dict(model.named_parameters())
    for name, mask in masks.kept.items():
        if name not in own:
            raise ValueError(f"masks must name parameters of the model, got {name!r}{held_by(own, name)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask of {name!r} must be boolean, got {mask.dtype}")
    check_shapes(masks.kept, own)
    return masks.kept
