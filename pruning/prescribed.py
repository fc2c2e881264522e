"""Masks that are there before the first step and stay: found before training, shuffled, or taken from another model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from pruning.batches import Batch, Loss
from pruning.lottery import LAYER, stretched, transferred
from pruning.masking import Masks, check_kept, check_same, clear_gradients
from pruning.resuming import check_named, named
from pruning.sanity import reinitialise, shuffle_masks
from pruning.sparsifier import sparsify
from pruning.weights import growable_weights

BEFORE_TRAINING = ("snip", "grasp", "synflow", "random")


@final
class Prescribed:
    """Training under masks that are given: absent weights, and their gradients before training clips, are held at 0.

    >>> method = Prescribed(model, masks_before_training(model, method="synflow", sparsity=0.9))
    >>> if method.before_step(optimizer):
    ...     optimizer.step()
    >>> method.after_step(optimizer)

    Raises: ValueError for masks of weights that the model does not have, that have another shape, are frozen or shared
    by two layers, and for a matrix of which nothing is left.
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        self._masks = transferred(masks, model)
        growable_weights(model, list(masks.kept))
        check_kept(self._masks.kept, masks.sparsity)
        self.model = model
        self._masks.apply(model)

    def before_step(self, optimizer: Optimizer) -> bool:
        """Clear the gradients of absent weights, which would count where training clips. True: step."""
        clear_gradients(self.model, self._masks.kept)
        return True

    def after_step(self, optimizer: Optimizer) -> None:
        """Hold the zeros, also through decay and momentum."""
        self._masks.apply(self.model)

    def masks(self) -> Masks:
        """Those given."""
        return self._masks

    def state_dict(self) -> dict[str, Any]:
        """Name and masks, for a checkpoint."""
        return named(self) | {"masks": self._masks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises: ValueError if it is another method's, or its masks are of other weights or hold another number of zeros:
        then they are not those that this run was asked for."""
        check_named(state, self, unnamed=("masks",))
        check_same(state["masks"], self._masks.kept)
        masks = Masks.from_state_dict(state["masks"])
        if masks.zeros != self._masks.zeros:
            raise ValueError(f"masks must have {masks.zeros} zeros, as in the state, got {self._masks.zeros}: "
                             "go on with the method, sparsity and mask of before")  # fmt: skip
        self._masks = transferred(masks, self.model)
        self._masks.apply(self.model)


def masks_before_training(
    model: nn.Module,
    *,
    method: str,
    sparsity: float,
    calibration: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    shuffle: bool = False,
    build: Callable[[], nn.Module] | None = None,
    generator: torch.Generator | None = None,
) -> Masks:
    """Masks by "snip", "grasp", "synflow" or "random" as :func:`pruning.sparsify` finds them; put on the model.

    shuffle, build: the sanity checks of Frankle et al. 2021 (arXiv:2009.08576). shuffle: each matrix keeps as many
    weights, in places drawn by ``generator``; weights that come back have the values that they had. build() gives a
    model of other initial values, which the masked weights then take (:func:`pruning.sanity.reinitialise`).
    Raises: ValueError for another method; as `sparsify` and `reinitialise`."""
    if method not in BEFORE_TRAINING:
        raise ValueError(f"method must be one of {', '.join(BEFORE_TRAINING)}, got {method!r}")
    values = {name: weight.detach().clone() for name, weight in growable_weights(model, None).items()}
    drawn = torch.Generator().manual_seed(0) if generator is None else generator
    masks = sparsify(model, method=method, sparsity=sparsity, calibration=calibration, loss=loss,
                     generator=drawn if method == "random" else None)  # fmt: skip
    if shuffle:
        masks = shuffle_masks(masks, generator=drawn)
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
    masks.apply(model)
    if build is not None:
        reinitialise(model, build, masks)
    return masks


def masks_from(source: Masks, model: nn.Module) -> Masks:
    """Masks of another model for this one: as they are where it has as many layers (:func:`pruning.transferred`), else
    each layer's repeated in its place (:func:`pruning.stretched`). Raises: ValueError as those."""
    layers = [{LAYER.search(n)[1] for n in names if LAYER.search(n)}  # type: ignore[index]
              for names in (source.kept, growable_weights(model, None))]  # fmt: skip
    return transferred(source, model) if layers[0] == layers[1] else stretched(source, model)
