"""Total weight change: what training moved, which matters when a trained model is fine-tuned on something else."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.weights import prunable_weights

Kind = Literal["path", "distance"]


class WeightChange:
    """Follows the weights of a model through training and scores them by how they changed.

    "path": Σ over steps of abs(w · Δw), w before the step; "distance": abs(w − w₀), w₀ at the start. Larger = more
    important, in float32 or wider. A weight that goes out and comes back has a path and no distance.

    >>> change = WeightChange(model)
    >>> optimizer.step()
    >>> change.after_step()
    >>> masks = select_masks(change.scores(), sparsity=0.5)

    weights: parameter names; None is `prunable_weights`. Holds three copies of them."""

    def __init__(self, model: nn.Module, *, weights: Sequence[str] | None = None) -> None:
        self._weights = prunable_weights(model, weights)
        self._start = {name: _wide(weight) for name, weight in self._weights.items()}
        self._last = {name: value.clone() for name, value in self._start.items()}
        self._path = {name: torch.zeros_like(value) for name, value in self._start.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Add what the last optimiser step did."""
        for name, weight in self._weights.items():
            now = _wide(weight)
            self._path[name] += (self._last[name] * (now - self._last[name])).abs()
            self._last[name] = now

    def scores(self, kind: Kind = "path") -> dict[str, Float[Tensor, "..."]]:
        """Scores by parameter name. Raises: ValueError for another kind."""
        _check(kind)
        if kind == "path":
            return {name: path.clone() for name, path in self._path.items()}
        return {name: (self._last[name] - start).abs() for name, start in self._start.items()}

    def saliency(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The path of one of the model's weights, by identity: a saliency for `Sparsifier`.

        Raises: ValueError for a tensor that is not followed."""
        for name, followed in self._weights.items():
            if followed is weight:
                return self._path[name].clone()
        raise ValueError(
            f"weight must be one of the {len(self._weights)} followed, got another of {list(weight.shape)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What was summed so far, for a checkpoint."""
        return {"path": dict(self._path), "start": dict(self._start), "last": dict(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Raises: ValueError if it follows other weights."""
        for part in ("path", "start", "last"):
            odd = sorted(state[part].keys() ^ self._weights.keys())
            if odd:
                raise ValueError(f"{part} must be of the model's {len(self._weights)} weights, got {odd[0]!r} besides")
        self._path, self._start, self._last = (
            {name: value.clone() for name, value in state[part].items()} for part in ("path", "start", "last")
        )


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _check(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
