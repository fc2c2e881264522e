"""A model of int8 weights back from its compact file, into a fresh float model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from pruning.formats.files import load_compact, read_compact
from pruning.recovery.quantize import (
    Int8Linear,
    able_executions,
    check_measurement,
    matrix_of,
    measure,
    refuse_saving,
)
from pruning.weights import is_conv1d

Model = TypeVar("Model", bound=nn.Module)


def load_quantized(
    folder: str | Path,
    model: Model | Callable[[Path], Model],
    *,
    batch: int = 1,
    candidates: Sequence[str] = ("dequantise", "packed"),
    rounds: int = 5,
) -> Model:
    """Give a float `model` the int8 weights that `quantize_weights` made and `save_compact` wrote; or build it first.

    Each Linear or Conv1D whose weight the file holds as int8 with a scale becomes an `Int8Linear`, in place, all else
    is as `load_compact`; outputs are those of the model that was saved, bit for bit where the execution is the same.
    The execution of each layer is measured anew on this machine, as in `quantize_weights`.

    >>> quantize_weights(model)
    >>> save_compact(model, folder)
    >>> load_quantized(folder, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))

    Raises: as `load_compact`; ValueError if the file holds no int8 weights or the model has no Linear or Conv1D of that
    name, and as `quantize_weights` for the measurement. The model has not changed then."""
    folder = Path(folder)
    check_measurement(batch, candidates, rounds)
    tensors, _ = read_compact(folder)
    built = cast(Model, model) if isinstance(model, nn.Module) else model(folder)
    layers = {name: _layer(built, name) for name in _packed(folder, tensors)}
    able = able_executions({name: matrix_of(layer).shape[1] for name, layer in layers.items()}, candidates)
    shells = {name: _shell(layer) for name, layer in layers.items()}
    _place(built, shells)
    try:
        load_compact(folder, built)
    except ValueError:
        _place(built, layers)
        raise
    for name, shell in shells.items():
        seconds = measure(shell, able[name], batch, rounds)
        shell.execution = min(seconds, key=lambda candidate: seconds[candidate])
    refuse_saving(built)
    return built


def _packed(folder: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    stems = [name.removesuffix(".weight") for name, held in tensors.items() if held.dtype == torch.int8]
    found = [stem for stem in stems if f"{stem}.weight" in tensors and f"{stem}.scale" in tensors]
    if not found:
        raise ValueError(f"{folder} must hold int8 weights and their scales, got none: load_compact reads it")
    return found


def _layer(model: nn.Module, name: str) -> nn.Module:
    layer = dict(model.named_modules()).get(name)
    if layer is None or not (type(layer) is nn.Linear or is_conv1d(layer)):
        got = "none" if layer is None else type(layer).__name__
        raise ValueError(f"the model must have a Linear or Conv1D {name!r} for int8 weights, got {got}")
    return layer


def _shell(layer: nn.Module) -> Int8Linear:
    bias = dict(layer.named_parameters(recurse=False)).get("bias")
    return Int8Linear(torch.zeros_like(matrix_of(layer)), bias).train(layer.training)


def _place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)
