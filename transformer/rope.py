"""Rotary frequencies, and how they are stretched for texts longer than those of training."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import at_least, one_of
from transformer.checks import check_fields

KINDS = ("linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies f of the rotary positions are changed.

    kind "linear": f / factor, as if positions were divided by it (position interpolation, arXiv:2306.15595).
    kind "llama3" (Llama 3.1, arXiv:2407.21783): with n = original_length · f / 2π turns over the original length,
    f where n > high_freq_factor, f / factor where n < low_freq_factor, and between them (1 − s) · f / factor + s · f
    with s = (n − low_freq_factor) / (high_freq_factor − low_freq_factor).
    factor ≥ 1; the other three count for "llama3" alone.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("kind", self.kind, KINDS)
        at_least("original_length", self.original_length, 1)
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be a finite number >= 1, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"0 < low_freq_factor < high_freq_factor must hold, got {self.low_freq_factor}"
                f" and {self.high_freq_factor}"
            )


def frequencies(
    head_dim: int, *, theta: float, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> Float[Tensor, "P"]:
    """theta^(−2i/head_dim) for i in [0, head_dim/2), float32, changed as ``scaling`` says.

    Su et al. 2021, arXiv:2104.09864, eq. 15.
    """
    steps = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    plain = theta**-steps
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    turns = scaling.original_length * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / scaling.factor + share * plain
