"""Masks: which weights stay, held by parameter name, re-applied, saved and loaded."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pruning.formats.bits import pack_flags, unpack_flags
from pruning.held import held_by
from pruning.sharding import as_wholes, gathered, own_part, sharded_as, spread_layouts
from pruning.weights import TABLE, matrices, prunable_weights

SHAPES = "shapes"  # of the packed masks, in the file's metadata; files without it hold one byte a weight


@dataclass(frozen=True)
class Masks:
    """Parameter name (as in `model.named_parameters()`) → bool tensor of its shape: True stays, False is held at 0."""

    kept: dict[str, Bool[Tensor, "..."]]

    @classmethod
    def of(cls, model: nn.Module) -> "Masks":
        """The zeros that the model's prunable weights have now: a pruned model tells its own masks."""
        weights = as_wholes(prunable_weights(model), spread_layouts(model))
        return cls({name: weight.detach() != 0 for name, weight in weights.items()})

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of `model` to 0, in place; also where they were NaN.

        Raises: ValueError if a parameter is missing or has another shape; then nothing has changed."""
        parameters = as_wholes(dict(model.named_parameters(remove_duplicate=False)), spread_layouts(model))
        for name in self.kept:
            if name not in parameters:
                why = held_by(parameters, name)
                raise ValueError(f"masks name parameter {name!r}, which the model does not have{why}")
        check_shapes(self.kept, parameters)
        for name, mask in self.kept.items():
            parameter = parameters[name]
            own = own_part(sharded_as(mask.to(parameter.device), parameter))
            own_part(parameter).masked_fill_(~own, 0)

    @property
    def zeros(self) -> int:
        """Number of weights held at 0."""
        return sum(int((~mask).sum()) for mask in gathered(self.kept).values())

    @property
    def total(self) -> int:
        """Number of weights covered, kept ones included."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def sparsity(self) -> float:
        """Share of zeros over all covered weights."""
        return self.zeros / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.zeros:,} of {self.total:,} weights are zero ({self.sparsity:.2%})"]
        lines += [
            f"  {name} {list(m.shape)}: {int((~m).sum()) / max(m.numel(), 1):.2%}"
            for name, m in gathered(self.kept).items()
        ]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Tensor]:
        """The masks by parameter name, for a checkpoint."""
        return dict(self.kept)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "Masks":
        """What `state_dict` gave. Raises: ValueError for a tensor that is not boolean."""
        for name, mask in state.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"mask of {name!r} must be boolean, got {mask.dtype}")
        return cls(dict(state))

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file (one bit a weight), whole or not at all; returns the path."""
        path = Path(path)
        pending = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            whole = gathered(self.kept)
            shapes = json.dumps({name: list(mask.shape) for name, mask in whole.items()})
            save_file({name: pack_flags(mask.flatten()) for name, mask in whole.items()}, pending, {SHAPES: shapes})
            pending.replace(path)
        finally:
            pending.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Masks":
        """Read what `save` wrote. Raises: FileNotFoundError; ValueError if the file is damaged or holds no masks."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing: expected masks saved by Masks.save")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                shapes = json.loads((file.metadata() or {}).get(SHAPES, "{}"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); copy or save it again") from error
        unpacked = {name: unpack_flags(tensors[name], math.prod(shape)).view(shape) for name, shape in shapes.items()}
        return cls.from_state_dict({**tensors, **unpacked})


def clear_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the gradients of absent weights to 0: what is not there must not count in the norm by which training clips.

    masks: by parameter name, of shards where the parameters are. Raises: ValueError for a gradient of rows."""
    for name, mask in masks.items():
        gradient = model.get_parameter(name).grad
        if gradient is not None and gradient.is_sparse:
            raise ValueError(f"weights that are pruned in training must have dense gradients, got {name!r}, {TABLE}")
        if gradient is not None:
            own_part(gradient).masked_fill_(~own_part(mask), 0)


def check_kept(masks: Mapping[str, Tensor], sparsity: float) -> None:
    """Raises: ValueError naming a matrix of which nothing is left."""
    for name, mask in matrices(gathered(masks)).items():
        if mask.numel() and not mask.any():
            raise ValueError(
                f"a sparsity of {sparsity:g} leaves nothing of {name!r} {list(mask.shape)}: lower it, or pass"
                " allocation=min_density(...) around the present one"
            )


def check_same(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raises: ValueError unless there is a mask of the shape of each weight, and no other."""
    if masks.keys() != weights.keys():
        odd = sorted(masks.keys() ^ weights.keys())
        raise ValueError(f"masks must be those of the model's {len(weights)} weights, got {odd[0]!r} besides")
    check_shapes(masks, weights)


def check_shapes(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raises: ValueError for a mask that has not the shape of the parameter of its name."""
    for name, mask in masks.items():
        if parameters[name].shape != mask.shape:
            raise ValueError(f"mask of {name!r} must have shape {list(parameters[name].shape)}, got {list(mask.shape)}")
