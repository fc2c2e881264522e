"""Tensors by parameter that a step replaces together, or leaves as they were."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Remembered:
    """One tensor a parameter, zeros at first. A step writes the next one beside it; :meth:`settle` puts it in place.

    Both are kept, twice the memory of one, so that a step that came to nothing leaves no trace and none allocates.
    """

    def __init__(self) -> None:
        self.present: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}

    def of(self, name: str, like: Tensor) -> Tensor:
        """The present one, to read."""
        if name not in self.present:
            self.present[name] = torch.zeros_like(like)
        return self.present[name]

    def next(self, name: str, like: Tensor) -> Tensor:
        """The next one, to write; what it holds before is of no use."""
        if name not in self._next:
            self._next[name] = torch.empty_like(like)
        return self._next[name]

    def settle(self, names: Iterable[str]) -> None:
        """What was written for these parameters becomes the present."""
        for name in names:
            if name in self._next:
                self.present[name], self._next[name] = self._next[name], self.present[name]

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Remember these instead."""
        self.present, self._next = tensors, {}
