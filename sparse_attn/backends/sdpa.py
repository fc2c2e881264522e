"""torch's scaled_dot_product_attention, for what is dense anyway and for a few queries over scattered positions."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sdpa_unmasked(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    *,
    scale: float,
    causal: bool,
    dropout: float = 0.0,
) -> Float[Tensor, "B H L d_v"]:
    """Every key, or keys j ≤ i. causal needs L == S: torch aligns the first query with the first key."""
    if causal and scale <= 0:  # torch scales what it has hidden too, and -inf times 0 or less hides nothing
        q, scale = q * scale, 1.0
    return scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )


def sdpa_masked(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    visible: Bool[Tensor, "#B 1 L S"],
    *,
    scale: float,
    bias: Float[Tensor, "#B H L S"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H L d_v"]:
    """A boolean mask over all L×S pairs, or a bias where visible. A query that sees nothing gives zeros, zero gradient.

    The query heads of one key head are laid out as further queries, so keys are never repeated.
    """
    batch, heads, length, width = q.shape
    groups = heads // k.shape[1]
    some = visible.any(-1, keepdim=True)
    # A row without a visible key would be 0/0: it sees everything here and is zeroed after.
    mask = (visible | ~some).repeat(1, 1, groups, 1)
    if bias is not None:
        by_key_head = bias.unflatten(1, (-1, groups)).flatten(2, 3)
        mask = by_key_head.expand(-1, -1, -1, mask.shape[3]).masked_fill(~mask, -torch.inf)
    folded = q.reshape(batch, k.shape[1], groups * length, width)
    out = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)
    return out.reshape(batch, heads, length, v.shape[-1]).masked_fill(~some, 0)
