"""Padding taken out before a content-based method looks at it."""

from jaxtyping import Bool, Float
from torch import Tensor


def without_padding(x: Float[Tensor, "... N d"], real: Bool[Tensor, "B S"] | None) -> Float[Tensor, "... N d"]:
    """x [B, N, d] or [B, H, N, d] with zeros, and zero gradient, at padding: 0 · NaN in a masked place would be NaN.

    real: False for padding, of S positions whose last N are those of x; None: nothing is padding."""
    if real is None:
        return x
    rows = real[:, real.shape[1] - x.shape[-2] :].view(real.shape[0], *[1] * (x.dim() - 3), -1, 1)
    return x.masked_fill(~rows, 0)
