"""A model as a folder: config.json and model.safetensors."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from transformer.config import TransformerConfig

Model = TypeVar("Model", bound=nn.Module)
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(model: nn.Module, config: TransformerConfig, folder: Path) -> Path:
    """Write both files under temporary names, then rename: a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    pending = {name: folder / f".{name}.{os.getpid()}" for name in (WEIGHTS, CONFIG)}
    try:
        tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, pending[WEIGHTS], metadata={"format": "pt"})
        config.save(pending[CONFIG])
        for name, path in pending.items():
            path.replace(folder / name)
    finally:
        for path in pending.values():
            path.unlink(missing_ok=True)
    return folder


def from_pretrained(
    build: Callable[[TransformerConfig], Model], folder: Path, *, dtype: torch.dtype | None = None
) -> Model:
    """Build the model that config.json describes and give it the weights, refusing any that lack or are left over."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: a model folder holds {CONFIG} and {WEIGHTS}")
    config = TransformerConfig.load(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or cut short ({error}); copy or save it again") from error
    with torch.device("meta"):
        model = build(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {_differences(expected, found)}")
    # parameters alone: indices stay whole numbers, and a router's balancing bias stays float32
    cast = {name for name, _ in model.named_parameters()} if dtype is not None else set()
    model.load_state_dict({n: t.to(dtype) if n in cast else t for n, t in tensors.items()}, assign=True)
    return model.eval()


def shared_once(model: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """A hook on ``state_dict``: a parameter that several modules share is listed under its first name alone."""
    for name in aliases(model):
        state.pop(prefix + name, None)


def shared_everywhere(
    model: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
) -> None:
    """A hook on ``load_state_dict``: what :func:`shared_once` left out is found under every name again."""
    for name, first in aliases(model).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


def aliases(model: nn.Module) -> dict[str, str]:
    """The other names of parameters that several modules share, each with the first name."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: kept for name, p in named if (kept := first.setdefault(id(p), name)) != name}


def _differences(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], limit: int = 5) -> str:
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    lines += [
        f"{name} must be {list(expected[name])}, got {list(found[name])}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    return "; ".join(sorted(lines)[:limit]) + (f" and {len(lines) - limit} more" if len(lines) > limit else "")
