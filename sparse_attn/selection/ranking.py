"""The highest scores, chosen alike by a forward pass and by decoding, whose products round differently."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# low bits of float32 that no choice goes by: scores within 2^-16 of each other are equal, but for rare edges
IDLE = 8


def coarse(scores: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
    """Scores as float32 rounded to 24 - IDLE bits, NaN as +∞, so that most that differ by rounding alone are equal."""
    bits = scores.to(torch.float32).nan_to_num(torch.inf, torch.inf, -torch.inf).view(torch.int32)
    return ((bits + (1 << IDLE >> 1)) & -(1 << IDLE)).view(torch.float32)


def best_columns(scores: Float[Tensor, "*rows C"], count: int) -> Int[Tensor, "*rows n"]:
    """The ``count`` columns of highest :func:`coarse` score, in any order; -1 for a score of -∞, n = min(count, C).

    Of equal scores the later columns win: ``topk`` alone would break ties by the shape of the tensor.
    """
    bits = (coarse(scores) + 0.0).view(torch.int32)  # + 0.0: -0 and 0 are equal
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    column = torch.arange(scores.shape[-1], device=scores.device)
    chosen = (rank.long() * (1 << 31) + column).topk(min(count, scores.shape[-1]), dim=-1, sorted=False).values
    hidden = chosen >> 31 == LEAST
    return (chosen & ((1 << 31) - 1)).masked_fill_(hidden, -1)


# the rank of -∞, whose bits are 0xFF800000
LEAST = (0xFF800000 - (1 << 32)) ^ 0x7FFFFFFF
