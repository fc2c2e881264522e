"""Sequences of unequal lengths as documents on one row: no padding is computed."""

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from sparse_attn.checking import check_least
from sparse_attn.patterns import Pattern, documents


def pack(sequences: Sequence[Shaped[Tensor, "_ *rest"]]) -> tuple[Shaped[Tensor, "1 total *rest"], Pattern]:
    """Sequences one behind the other as a batch of one, and the pattern that keeps them apart.

    For a causal model attend with ``causal() & pattern``; each gets what it would get alone. :func:`unpack` undoes it.
    Positions that are not relative (learned ones) are the caller's to restart.

    >>> row, apart = pack([torch.randn(100, 64), torch.randn(28, 64)])
    >>> row.shape, str(apart)
    (torch.Size([1, 128, 64]), 'documents(100, 28)')

    Raises: ValueError without sequences, for an empty one, or for shapes that differ in more than the length.
    """
    for sequence in sequences:
        if sequence.shape[1:] != sequences[0].shape[1:]:
            first, other = (list(one.shape[1:]) for one in (sequences[0], sequence))
            raise ValueError(f"sequences must have the shape of the first, {first}, behind their length, got {other}")
    lengths = [len(sequence) for sequence in sequences]
    return torch.cat(list(sequences))[None] if sequences else torch.empty(1, 0), documents(lengths)


def unpack(row: Shaped[Tensor, "1 total *rest"], lengths: Sequence[int]) -> tuple[Shaped[Tensor, "_ *rest"], ...]:
    """Views of the sequences that :func:`pack` joined. Raises: ValueError unless ``lengths`` are >= 0 and add up to the
    row."""
    for length in lengths:
        check_least("lengths", length, 0)
    if row.shape[0] != 1 or sum(lengths) != row.shape[1]:
        raise ValueError(f"row must be one row of sum(lengths)={sum(lengths)}, got {list(row.shape[:2])}")
    return row[0].split(list(lengths))
