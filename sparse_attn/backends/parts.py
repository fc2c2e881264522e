"""Masks taken apart into rows, columns and a rest, and the visits of which such parts may leave the blocks."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from sparse_attn.arrays import any_of

# Share of a block's columns, and of its rows, that single keys and queries may take.
MOST_COLUMNS, MOST_ROWS = 0.75, 0.125
# A row or column counts as one of its own from this share of its entries.
HEAVY = 0.25
# Blocks a mask's rest is worth at most, in rows of single pairs.
MOST_REST = 2


@dataclass(frozen=True, eq=False)
class Parts:
    """Masks taken apart: each visible pair is in exactly one of rows, columns and rest. thin: by parts is cheaper."""

    rows: Bool[np.ndarray, "E block block"]
    columns: Bool[np.ndarray, "E block block"]
    rest: Bool[np.ndarray, "E block block"]
    thin: Bool[np.ndarray, "E"]


@dataclass(frozen=True, eq=False)
class Extras:
    """Pairs that may leave the blocks: those of mask ``mask[v]`` of ``parts`` do for a visit that is ``taken``."""

    row: Int[np.ndarray, "V"]
    column: Int[np.ndarray, "V"]
    mask: Int[np.ndarray, "V"]
    taken: Bool[np.ndarray, "V"]
    parts: Parts

    def only(self, taken: Bool[np.ndarray, "V"]) -> "Extras":
        """Some of the visits."""
        return Extras(self.row[taken], self.column[taken], self.mask[taken], taken[taken], self.parts)


def take_apart(masks: Bool[np.ndarray, "E block block"]) -> Parts:
    """Rows first, where few of them see much, then columns that many of the other rows see, then what is left."""
    block = masks.shape[1]
    heavy = masks.sum(2, dtype=np.int32) >= HEAVY * block
    # Where most rows see much, they do so by columns.
    heavy &= (heavy.sum(1) <= MOST_ROWS * block)[:, None]
    rows = masks & heavy[:, :, None]
    left = masks & ~heavy[:, :, None]
    height = any_of(left, 2).sum(1)
    broad = left.sum(1, dtype=np.int32) >= np.maximum(HEAVY * height, 1)[:, None]
    columns = left & broad[:, None]
    rest = left & ~broad[:, None]
    thin = (any_of(columns, 1).sum(1) <= MOST_COLUMNS * block) & (rest.sum((1, 2)) <= MOST_REST * block)
    return Parts(rows, columns, rest, thin)
