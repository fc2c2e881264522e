"""Lottery tickets: masks found by training, and where the weights are set back to; early, moved and stretched ones.

Nothing here trains: a ``train_fn`` does, and holds the masks that it is given.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pruning.allocation import Allocation, global_ranking
from pruning.masking import Masks
from pruning.saliency.data_free import magnitude
from pruning.sharding import as_wholes, gathered, sharded_as, spread_layouts
from pruning.sparsifier import select_masks
from pruning.structure import check_fraction
from pruning.weights import prunable_weights

# (model, masks, first step, last step or None for the end): trains in place, holding the masks; what it returns is kept
TrainFn = Callable[[nn.Module, Masks, int, int | None], Any]
# (model, masks, number of the epoch): trains one epoch in place
EpochFn = Callable[[nn.Module, Masks, int], Any]
Saliency = Callable[[Tensor], Tensor]
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Ticket:
    """A sparse subnetwork: masks, and the values (parameters and buffers) of ``step``, from which it is trained.

    sparsities: of the masks after each round. results: what train_fn returned in each round; not saved."""

    masks: Masks
    values: dict[str, Tensor]
    step: int
    sparsities: tuple[float, ...] = ()
    results: tuple[Any, ...] = field(default=(), compare=False)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the model to the values of ``step``, pruned.

        Raises: ValueError if a tensor is missing or has another shape; then nothing has changed."""
        own = tensors_to_rewind(model)
        for name, value in self.values.items():
            if name not in own or own[name].shape != value.shape:
                found = list(own[name].shape) if name in own else "none"
                raise ValueError(f"the model's {name!r} must have shape {list(value.shape)}, got {found}")
        for name, value in self.values.items():
            own[name].copy_(value)
        self.masks.apply(model)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all; returns the path."""
        path = Path(path)
        pending = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {f"mask:{name}": mask.contiguous() for name, mask in self.masks.kept.items()}
        tensors |= {f"value:{name}": value.contiguous() for name, value in self.values.items()}
        sparsities = " ".join(repr(s) for s in self.sparsities)
        try:
            save_file(tensors, pending, metadata={"step": str(self.step), "sparsities": sparsities})
            pending.replace(path)
        finally:
            pending.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Ticket":
        """Read what `save` wrote. Raises: FileNotFoundError; ValueError if the file is damaged or holds no ticket."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing: expected a ticket saved by Ticket.save")
        try:
            with safe_open(path, "pt") as file:
                about, names = file.metadata() or {}, list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); copy or save it again") from error
        if "step" not in about:
            raise ValueError(f"{path} must hold a ticket saved by Ticket.save, got tensors {sorted(tensors)[:3]}")
        masks, values = (
            {n.removeprefix(k): t for n, t in tensors.items() if n.startswith(k)} for k in ("mask:", "value:")
        )
        sparsities = tuple(float(number) for number in about["sparsities"].split())
        return cls(Masks.from_state_dict(masks), values, int(about["step"]), sparsities)


def find_ticket(
    model: nn.Module,
    train_fn: TrainFn,
    *,
    sparsity: float,
    rounds: int = 5,
    rewind: int = 0,
    saliency: Saliency = magnitude,
    allocation: Allocation = global_ranking,
    weights: Sequence[str] | None = None,
) -> Ticket:
    """Iterate train, prune, rewind: Frankle & Carbin 2019 (arXiv:1803.03635); rewinding to step k, Frankle et al. 2020
    (arXiv:1912.05671). The model is left as the ticket: rewound and pruned.

    Dense from step 0 to ``rewind`` (k), whose values W_k are kept; k = 0 keeps the initial ones. Then ``rounds`` times:
    train from step k to the end under the masks so far, prune, set the survivors back to W_k. After round r a share
    (1 − sparsity)^(r/rounds) of the weights stays: each round prunes the same share of what is left. What was pruned
    stays pruned. train_fn(model, masks, first, last) trains steps first … last − 1 (last None: to the end) in place,
    with a fresh optimiser and the schedule of those steps, and must hold the masks (`Masks.apply` after each step).
    Raises: ValueError if sparsity is outside [0, 1), rounds < 1 or rewind < 0, or train_fn let a pruned weight move.
    """
    check_fraction("sparsity", sparsity)
    for name, value, least in (("rounds", rounds, 1), ("rewind", rewind, 0)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    chosen = prunable_weights(model, weights)
    masks = Masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in chosen.items()})
    if rewind:
        train_fn(model, masks, 0, rewind)
    values = {name: tensor.detach().clone() for name, tensor in tensors_to_rewind(model).items()}
    sparsities, results = [], []
    for number in range(1, rounds + 1):
        results.append(train_fn(model, masks, rewind, None))
        _check_held(chosen, masks)
        share = 1 - (1 - sparsity) ** (number / rounds) if number < rounds else sparsity
        masks = _pruned(chosen, masks, share, saliency, allocation)
        sparsities.append(masks.sparsity)
        Ticket(masks, values, rewind).apply(model)
    return Ticket(masks, values, rewind, tuple(sparsities), tuple(results))


class EarlyBird:
    """Watches masks while a dense model trains: You et al. 2020 (arXiv:1909.11957).

    Each ``observe`` draws the mask of ``sparsity``; the ticket is found once the distance to each of the last
    ``window`` masks is under ``threshold``. The distance is the share of the weights in which two masks differ
    (normalised Hamming distance). Two masks of density d differ in at most 2 · min(d, 1 − d) of the weights, so that at
    95% sparsity the paper's 0.1 says nothing: relative=True divides by that largest distance.
    Raises: ValueError if sparsity is outside [0, 1), window < 1 or threshold ≤ 0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        window: int = 5,
        threshold: float = 0.1,
        relative: bool = False,
        saliency: Saliency = magnitude,
        allocation: Allocation = global_ranking,
        weights: Sequence[str] | None = None,
    ) -> None:
        check_fraction("sparsity", sparsity)
        if window < 1:
            raise ValueError(f"window must be >= 1, got {window}")
        if not threshold > 0:
            raise ValueError(f"threshold must be > 0, got {threshold}")
        self.sparsity, self.window, self.threshold, self.relative = sparsity, window, threshold, relative
        self.saliency, self.allocation = saliency, allocation
        self._weights, self._layouts = prunable_weights(model, weights), spread_layouts(model)
        self.last: list[Masks] = []
        self.distances: list[tuple[float, ...]] = []

    def observe(self) -> bool:
        """Draw the present mask; True once it is near each of the last ``window``."""
        scores = {name: self.saliency(weight) for name, weight in self.views().items()}
        masks = select_masks(scores, sparsity=self.sparsity, allocation=self.allocation)
        found = tuple(mask_distance(masks, other, relative=self.relative) for other in self.last)
        self.distances.append(found)
        self.last = [*self.last, masks][-self.window :]
        return len(found) == self.window and max(found) < self.threshold

    def views(self) -> dict[str, Tensor]:
        """The weights; of those that ranks hold in part a DTensor of the whole."""
        return as_wholes(self._weights, self._layouts)

    def masks(self) -> Masks:
        """The mask drawn last. Raises: ValueError before the first ``observe``."""
        if not self.last:
            raise ValueError("observe must be called before masks are there, got 0 calls")
        return self.last[-1]

    def state_dict(self) -> dict[str, Any]:
        """The last masks and all distances, for a checkpoint."""
        return {"last": [masks.state_dict() for masks in self.last], "distances": [list(row) for row in self.distances]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        views = self.views()
        self.last = [Masks.from_state_dict({name: sharded_as(mask.to(views[name].device), views[name])
                                            for name, mask in masks.items()}) for masks in state["last"]]  # fmt: skip
        self.distances = [tuple(row) for row in state["distances"]]


def draw_early_bird(
    model: nn.Module, train_epoch: EpochFn, *, epochs: int, bird: EarlyBird
) -> tuple[Masks, int | None]:
    """Train epoch by epoch, dense, until ``bird`` finds its ticket; its masks, and the number of epochs that it took,
    None if there was none within ``epochs``. The masks are not applied. Raises: ValueError if epochs < 1."""
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs}")
    dense = Masks({})
    for epoch in range(epochs):
        train_epoch(model, dense, epoch)
        if bird.observe():
            return bird.masks(), epoch + 1
    return bird.masks(), None


def mask_distance(one: Masks, two: Masks, *, relative: bool = False) -> float:
    """Share of the weights in which the masks differ; relative: of the most that masks of their densities can.

    Raises: ValueError if they are not masks of the same weights."""
    _same_weights(one, two)
    total = max(one.total, 1)
    other = gathered(two.kept)
    different = sum(int((mask != other[name]).sum()) for name, mask in gathered(one.kept).items()) / total
    if not relative:
        return different
    dense = [1 - masks.zeros / total for masks in (one, two)]
    largest = min(sum(dense), 2 - sum(dense))
    return different / largest if largest > 0 else 0.0


def transferred(masks: Masks, model: nn.Module) -> Masks:
    """Masks found on one model for another of the same shape, with other data or another seed, on its devices.

    Nothing is applied: train the other from its own values under them (Morcos et al. 2019, arXiv:1906.02773).
    Raises: ValueError if a weight is missing there or has another shape."""
    own = as_wholes(dict(model.named_parameters(remove_duplicate=False)), spread_layouts(model))
    for name, mask in masks.kept.items():
        if name not in own:
            raise ValueError(f"masks name parameter {name!r}, which the model does not have")
        if own[name].shape != mask.shape:
            raise ValueError(f"mask of {name!r} must have shape {list(own[name].shape)}, got {list(mask.shape)}")
    here = {name: mask.to(own[name].device).clone() for name, mask in masks.kept.items()}
    return Masks({name: sharded_as(mask, own[name].detach()) for name, mask in here.items()})


def stretched(
    masks: Masks,
    model: nn.Module,
    *,
    order: Literal["repeat", "cycle"] = "repeat",
    weights: Sequence[str] | None = None,
) -> Masks:
    """Masks of S layers for a model of T: elastic tickets, Chen et al. 2021 (arXiv:2103.16547).

    Layers are told by the first number in a name (``layers.3.feedforward.up.weight``). With order "repeat" layer t
    takes the masks of layer ⌊t · S / T⌋, so that each is repeated in its place (1 1 2 2), with "cycle" those of t mod S
    (1 2 1 2). T < S drops layers. Masks outside layers are taken as they are.
    Raises: ValueError for another order, masks without layers, a weight for which there is no mask, or one of another
    shape."""
    if order not in ("repeat", "cycle"):
        raise ValueError(f"order must be 'repeat' or 'cycle', got {order!r}")
    own = as_wholes(prunable_weights(model, weights), spread_layouts(model))
    source, target = _depth(masks.kept), _depth(own)
    if not source or not target:
        raise ValueError(f"masks and model must have numbered layers, got {source} and {target}")
    found: dict[str, Tensor] = {}
    for name, weight in own.items():
        layer = LAYER.search(name)
        at = None if layer is None else int(layer[1])
        taken = at if at is None else at * source // target if order == "repeat" else at % source
        other = name if layer is None else f"{name[: layer.start(1)]}{taken}{name[layer.end(1) :]}"
        if other not in masks.kept:
            raise ValueError(f"masks must have one of {other!r} for {name!r}, got none")
        if masks.kept[other].shape != weight.shape:
            shape = list(masks.kept[other].shape)
            raise ValueError(f"mask of {other!r} must have shape {list(weight.shape)} of {name!r}, got {shape}")
        found[name] = masks.kept[other].to(weight.device).clone()
    return Masks(found)


def _depth(names: Mapping[str, Any]) -> int:
    return max((int(layer[1]) + 1 for layer in map(LAYER.search, names) if layer), default=0)


def tensors_to_rewind(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, tied ones once."""
    own = dict(model.named_parameters())
    saved = model.state_dict(keep_vars=True)
    return own | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _pruned(
    weights: Mapping[str, nn.Parameter], masks: Masks, share: float, saliency: Saliency, allocation: Allocation
) -> Masks:
    scores = {n: saliency(w).masked_fill(~masks.kept[n], -torch.inf) for n, w in weights.items()}
    return select_masks(scores, sparsity=share, allocation=allocation)


def _check_held(weights: Mapping[str, nn.Parameter], masks: Masks) -> None:
    for name, weight in weights.items():
        moved = int((weight.detach()[~masks.kept[name]] != 0).sum())
        if moved:
            raise ValueError(f"train_fn must hold the masks: {moved} pruned weights of {name!r} are not 0")


def _same_weights(one: Masks, two: Masks) -> None:
    if one.kept.keys() != two.kept.keys():
        raise ValueError(
            f"masks must be of the same weights, got {sorted(one.kept.keys() ^ two.kept.keys())[0]!r} besides"
        )
    for name, mask in one.kept.items():
        if mask.shape != two.kept[name].shape:
            raise ValueError(f"mask of {name!r} must have shape {list(mask.shape)}, got {list(two.kept[name].shape)}")
