"""Nested training state as one JSON value and a flat table of tensors; the random generators' state."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

TENSOR = "$tensor"


def split_tensors(value: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """(value with each tensor replaced by ``{"$tensor": name}``, {name: tensor}); tuples become lists.

    Raises: TypeError for a key that is not text or a value that JSON does not have.
    """
    if isinstance(value, Tensor):
        name = prefix or "value"
        # of a DTensor each process keeps its shard, where it is
        own = value if isinstance(value, DTensor) else value.cpu().contiguous()
        return {TENSOR: name}, {name: own.detach().clone()}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"state keys must be text, got {key!r} in {prefix or 'the state'}")
        items = {key: split_tensors(item, f"{prefix}.{key}".lstrip(".")) for key, item in value.items()}
        return {key: plain for key, (plain, _) in items.items()}, _merged(items.values())
    if isinstance(value, list | tuple):
        rows = [split_tensors(item, f"{prefix}.{index}".lstrip(".")) for index, item in enumerate(value)]
        return [plain for plain, _ in rows], _merged(rows)
    if value is None or isinstance(value, bool | int | float | str):
        return value, {}
    raise TypeError(f"state {prefix!r} must be a tensor, number, text, list or dict, got {type(value).__name__}")


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`split_tensors`."""
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: join_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [join_tensors(item, tensors) for item in value]
    return value


def random_state() -> dict[str, Any]:
    """The state of torch's (CPU and every GPU), Python's and NumPy's global generators."""
    numpy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": list(random.getstate()),
        "numpy": [numpy["bit_generator"], *_mt19937(numpy), numpy["has_gauss"], numpy["gauss"]],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))


def _mt19937(state: Any) -> tuple[Tensor, int]:
    return torch.from_numpy(state["state"]["key"].astype(np.int64)), int(state["state"]["pos"])


def _merged(parts: Any) -> dict[str, Tensor]:
    return {name: tensor for _, tensors in parts for name, tensor in tensors.items()}
