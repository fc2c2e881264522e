"""Padding on the left, before the text: harmless where layers see distances alone, not where they count positions."""

import torch
from jaxtyping import Bool
from torch import Tensor

from transformer.config import TransformerConfig


@torch.compiler.disable(reason="where padding lies decides how positions are counted")
def pads_left(mask: Bool[Tensor, "B L"] | None) -> bool:
    """Whether some sequence begins with padding, and holds more than that."""
    return mask is not None and mask.shape[1] > 0 and bool((~mask[:, 0] & mask.any(1)).any())


def require_own_positions(config: TransformerConfig, rows: int, cached: bool) -> None:
    """Raises: ValueError unless padding on the left can be read by a fresh cache that counts positions row by row."""
    if cached or torch.is_grad_enabled() or not config.causal:
        raise ValueError(
            "attention_mask must pad on the right where layers count positions, as sinks and selections do; padding "
            f"on the left is read without gradients (torch.no_grad()), or with cache=new_cache(unequal_rows={rows})"
        )
