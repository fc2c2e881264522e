"""Preferential attachment: new connections go where there are many, so that hubs form."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.allocation import Allocation
from pruning.dynamic.base import DynamicSparsity, highest, lowest_active


@final
class PreferentialAttachment(DynamicSparsity):
    """Drop the active weights of least magnitude; grow, from 0, between neurons that are well connected already.

    A free place (output i, input j) of a matrix is drawn with a chance in proportion to (k_i + offset)(k_j + offset),
    where k counts the connections that are left after the drop; as many are drawn as were dropped, without
    replacement, the degrees being those before the first draw. This is the attachment between present nodes of
    Barabási et al. 2002 (arXiv:cond-mat/0104162), which Hou & Kwok 2018 (arXiv:1805.01891) find between the neurons of
    pruned networks. offset > 0 lets a neuron without connections get one. Drop, share and schedule are SET's, fresh
    state for all that grows included.
    Raises: as :class:`DynamicSparsity`; ValueError unless offset > 0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        allocation: Allocation | None = None,
        every: int = 100,
        stop: int | None = None,
        fraction: float = 0.3,
        offset: float = 1.0,
        weights: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            model, sparsity=sparsity, allocation=allocation, every=every, stop=stop, fraction=fraction,
            weights=weights, generator=generator,
        )  # fmt: skip
        if not offset > 0:
            raise ValueError(f"offset must be > 0, got {offset}")
        self.offset = offset

    def update(self, optimizer: Optimizer) -> dict[str, Bool[Tensor, "out in"]]:
        """Drop and grow the same number in each matrix; all that grows begins afresh."""
        afresh = {}
        for name, (weight, _, mask) in self.parts().items():
            count = min(int(self.drop_share() * int(mask.sum())), int((~mask).sum()))
            kept = lowest_active(weight, mask, count)
            keys = attachment(kept, offset=self.offset).log() + _gumbel(self._uniform(weight))
            grown = highest(keys, ~kept, count)
            weight.masked_fill_(~kept, 0)
            mask.copy_(kept | grown)
            afresh[name] = grown
        return afresh


def attachment(mask: Tensor, *, offset: float = 1.0) -> Float[Tensor, "out in"]:
    """(k_i + offset)(k_j + offset) of every place of a mask [out, in]; k_i, k_j: connections of output i, input j.

    >>> attachment(torch.tensor([[True, True], [False, False]]))
    tensor([[6., 6.],
            [2., 2.]])
    """
    degrees = mask.float()
    return (degrees.sum(1, keepdim=True) + offset) * (degrees.sum(0, keepdim=True) + offset)


def _gumbel(uniform: Tensor) -> Tensor:
    """The largest of log-chances plus this noise are a draw without replacement (Gumbel top-k, arXiv:1903.06059)."""
    return -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()
