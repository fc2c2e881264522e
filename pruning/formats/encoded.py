"""The record that encoders return, and the names of formats."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

PLAIN = ("dense", "bitmask", "csr", "coo", "run_length")
FORMATS = (*PLAIN, "block 4x4", "block 16x16", "block 32x32", "2:4", "1:4", "4:8")


@dataclass(frozen=True)
class Encoded:
    """A matrix in another form: `parts` holds its tensors by role ("values", "columns", ...).

    format: one of :data:`PLAIN`, "block HxW" or "N:M"; shape and dtype are the matrix's."""

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    parts: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, exactly."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def parse_format(text: str) -> tuple[str, tuple[int, int]]:
    """ "block 4x8" → ("block", (4, 8)); "2:4" → ("n:m", (2, 4)); a plain name → (name, (0, 0)).

    Raises: ValueError for anything else, a block without area, and n:m without 0 < n < m <= 256."""
    if text in PLAIN:
        return text, (0, 0)
    block, pattern = re.fullmatch(r"block (\d+)x(\d+)", text), re.fullmatch(r"(\d+):(\d+)", text)
    if block and int(block[1]) and int(block[2]):
        return "block", (int(block[1]), int(block[2]))
    if pattern and 0 < int(pattern[1]) < int(pattern[2]) <= 256:
        return "n:m", (int(pattern[1]), int(pattern[2]))
    raise ValueError(
        f"format must be one of {', '.join(PLAIN)}, 'block HxW' or 'N:M' with 0 < N < M <= 256, got {text!r}"
    )
