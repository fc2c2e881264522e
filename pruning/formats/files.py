"""A model in one compact safetensors file: each matrix in its smallest format, tied weights once."""

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pruning.formats.choose import smallest
from pruning.formats.codecs import decode, encode
from pruning.formats.encoded import FORMATS, Encoded
from pruning.weights import inputs_last

FILE, CONFIG = "compact.safetensors", "config.json"
VERSION = "sparse-transformers compact 1"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TensorSize:
    """One tensor of a compact file: density is its share of entries that are not 0, bytes are of tensor data."""

    name: str
    shape: tuple[int, ...]
    format: str
    density: float
    dense_bytes: int
    bytes: int


@dataclass(frozen=True)
class CompactReport:
    """What `save_compact` wrote: a row for each tensor, and the bytes of the file on disk, header included."""

    tensors: tuple[TensorSize, ...]
    file_bytes: int

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors, dense, tied ones once."""
        return sum(row.dense_bytes for row in self.tensors)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.tensors], default=0)
        lines = [f"{'tensor':<{width}}  {'format':<12} density       dense     compact  ratio"]
        lines += [
            f"{row.name:<{width}}  {row.format:<12} {row.density:>7.2%} {row.dense_bytes:>11,} {row.bytes:>11,} "
            f"{row.bytes / max(row.dense_bytes, 1):>6.2f}"
            for row in self.tensors
        ]
        ratio = self.file_bytes / max(self.dense_bytes, 1)
        return "\n".join([*lines, f"{self.dense_bytes:,} bytes dense, {self.file_bytes:,} in the file ({ratio:.2f})"])


def save_compact(model: nn.Module, folder: str | Path, *, formats: Sequence[str] = FORMATS) -> CompactReport:
    """Write `compact.safetensors`, and the model's config beside it if it has one; returns the sizes.

    Every matrix, and every stack of experts as one, is stored in the format of `formats` that takes the fewest bytes
    (dense is always one of them), other tensors dense; a tensor under several names once. Both files are whole or not
    there. A zero's sign is not kept; all else is, bit for bit.
    Raises: ValueError as `smallest`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, aliases = _distinct(model)
    packed = {name: pack(name, tensor, ("dense", *formats)) for name, tensor in names.items()}
    described = {name: entry for name, (entry, _) in packed.items()}
    tensors = {f"{name}/{part}": tensor for name, (_, parts) in packed.items() for part, tensor in parts.items()}
    metadata = {"version": VERSION, "tensors": json.dumps(described), "aliases": json.dumps(aliases)}
    pending = folder / f".{FILE}.{os.getpid()}"
    try:
        save_file(tensors, pending, metadata=metadata)
        _save_config(model, folder)
        pending.replace(folder / FILE)
    finally:
        pending.unlink(missing_ok=True)
    rows = tuple(_size(name, names[name], *packed[name]) for name in names)
    return CompactReport(rows, (folder / FILE).stat().st_size)


def load_compact(folder: str | Path, model: Model | Callable[[Path], Model]) -> Model:
    """Give `model` the tensors that `save_compact` wrote; or build it first, from the folder.

    The parameters take the file's dtypes and keep their devices and ties. Nothing is unpickled, and nothing changes
    before everything has been read and compared.

    >>> load_compact(folder, lambda where: Transformer(TransformerConfig.load(where / "config.json")))
    >>> load_compact(folder, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))

    A model of int8 weights (`quantize_weights`) comes back through `pruning.recovery.load_quantized`.

    Raises: FileNotFoundError; ValueError if the file is damaged, is no compact file, or is that of another model."""
    folder = Path(folder)
    tensors, aliases = read_compact(folder)
    built = cast(Model, model) if isinstance(model, nn.Module) else model(folder)
    names, own = _distinct(built)
    # a tie that the file has and the model has not, or the other way round, is no matter of values
    given = tensors | {name: tensors[first].clone() for name, first in aliases.items() if first in tensors}
    expected = {name: tuple(tensor.shape) for name, tensor in names.items()}
    expected |= {name: expected[first] for name, first in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if expected != found:
        raise ValueError(f"{folder / FILE} does not fit the model: {_differences(expected, found)}{_hint(given)}")
    if any(not given[name].equal(given[first]) for name, first in own.items()):
        raise ValueError(f"{folder / FILE} does not fit the model, which ties tensors that differ in the file")
    for name, tensor in names.items():
        tensor.data = given[name].to(tensor.device)
    return built


def read_compact(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name → tensor, dense again, and the other names of tied tensors with the first.

    Raises: as `load_compact`."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a folder that save_compact wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); copy or save it again") from error
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path} must be {VERSION!r}, got {metadata.get('version')!r}")
    try:
        described, aliases = json.loads(metadata["tensors"]), json.loads(metadata["aliases"])
        return {name: unpack(name, entry, parts) for name, entry in described.items()}, aliases
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy or save it again") from error


def pack(
    name: str, tensor: Shaped[Tensor, "..."], formats: Sequence[str] = FORMATS
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A tensor's entry in the header, and its parts. Stacks of experts are laid out as one matrix [E · out, in]."""
    turned = tensor.ndim == 3 and not inputs_last(name)
    matrix = _matrix(tensor, turned)
    encoded = encode(matrix, smallest(matrix, formats=formats) if tensor.ndim > 1 else "dense")
    entry = {
        "format": encoded.format, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
        "turned": turned, "crc32": {part: _checksum(held) for part, held in encoded.parts.items()},
    }  # fmt: skip
    return entry, encoded.parts


def unpack(name: str, entry: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Shaped[Tensor, "..."]:
    """The tensor that `pack` took. Raises: ValueError, KeyError or TypeError if it is not what was packed."""
    own = {part: parts[f"{name}/{part}"] for part in entry["crc32"]}
    for part, held in own.items():
        if _checksum(held) != entry["crc32"][part]:
            raise ValueError(f"checksum of {part} of {name!r} does not match")
    shape, dtype = torch.Size(entry["shape"]), getattr(torch, entry["dtype"])
    laid = torch.Size([*shape[:-2], shape[-1], shape[-2]]) if entry["turned"] else shape
    encoded = Encoded(entry["format"], (laid[:-1].numel(), laid[-1] if laid else 1), dtype, own)
    tensor = decode(encoded).view(laid)
    return tensor.mT.contiguous() if entry["turned"] else tensor


def _matrix(tensor: Tensor, turned: bool) -> Shaped[Tensor, "rows columns"]:
    laid = (tensor.detach().mT if turned else tensor.detach()).contiguous()
    return laid.reshape(laid.shape[:-1].numel(), laid.shape[-1] if laid.ndim else 1)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor of the state under its first name, and the other names with the first."""
    names: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)], names[name] = name, tensor
    return names, aliases


def _save_config(model: nn.Module, folder: Path) -> None:
    """config.json of a model that has a config: this library's, or transformers'."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        return
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
        return
    pending = folder / f".{CONFIG}.{os.getpid()}"
    try:
        pending.write_text(json.dumps(to_dict(), indent=2) + "\n", encoding="utf-8")
        pending.replace(folder / CONFIG)
    finally:
        pending.unlink(missing_ok=True)


def _size(name: str, tensor: Tensor, entry: Mapping[str, Any], parts: Mapping[str, Tensor]) -> TensorSize:
    return TensorSize(
        name=name,
        shape=tuple(tensor.shape),
        format=entry["format"],
        density=int((tensor.detach() != 0).sum()) / max(tensor.numel(), 1),
        dense_bytes=tensor.numel() * tensor.element_size(),
        bytes=sum(part.numel() * part.element_size() for part in parts.values()),
    )


def _hint(given: Mapping[str, Tensor]) -> str:
    packed = any(tensor.dtype == torch.int8 for tensor in given.values())
    return "; its weights are int8: pruning.recovery.load_quantized reads them into a float model" if packed else ""


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any], limit: int = 5) -> str:
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    lines += [
        f"{name} must be {list(expected[name])}, got {list(found[name])}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    return "; ".join(sorted(lines)[:limit]) + (f" and {len(lines) - limit} more" if len(lines) > limit else "")
