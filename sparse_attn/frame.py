"""Where the blocks of a layout lie."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Frame:
    """Lengths, size of the blocks, and positions of the first query and key. R rows of blocks, C columns."""

    q_len: int
    kv_len: int
    block: int
    offset: int
    key_offset: int

    @property
    def rows(self) -> int:
        """Query blocks."""
        return -(-self.q_len // self.block)

    @property
    def columns(self) -> int:
        """Key blocks."""
        return -(-self.kv_len // self.block)

    @property
    def queries(self) -> Int[np.ndarray, "R"]:
        """Position of the first query of each row."""
        return np.arange(self.rows) * self.block + self.offset

    @property
    def keys(self) -> Int[np.ndarray, "C"]:
        """Position of the first key of each column."""
        return np.arange(self.columns) * self.block + self.key_offset

    @property
    def distances(self) -> Int[np.ndarray, "RC"]:
        """First query - first key on each diagonal, from the last column of the first row on."""
        apart = np.arange(1 - self.columns, max(self.rows, 1 - self.columns))
        return apart * self.block + (self.offset - self.key_offset)

    def heights(self, row: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        """Queries of these rows."""
        return np.minimum(self.q_len - row * self.block, self.block)

    def widths(self, column: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        """Keys of these columns."""
        return np.minimum(self.kv_len - column * self.block, self.block)
