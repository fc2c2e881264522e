"""Names and layouts of the weights in a Hugging Face folder, and reading them from one or more safetensors files."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformer.hf_config import Family

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_INNER = {
    "attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
    "feedforward.gate": "mlp.gate_proj", "feedforward.up": "mlp.up_proj", "feedforward.down": "mlp.down_proj",
}  # fmt: skip
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def their_name(name: str, family: Family, *, block: str | None = None) -> str:
    """The tensor of transformers that holds our ``name``; for experts, also shared ones, its prefix.

    block: another name of the feed-forward part than the family's.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return f"{_OUTER[name.removesuffix('.weight')]}.weight"
    where, inner = f"model.layers.{match[1]}", match[2].removesuffix(".weight")
    projection = inner.removesuffix(".bias")
    if projection in _INNER and projection != inner:
        return f"{where}.{_INNER[projection]}.bias"
    if inner in _INNER:
        return f"{where}.{_INNER[inner]}.weight"
    rest = {"feedforward.router": "gate.weight", "feedforward.experts.up": "experts",
            "feedforward.experts.down": "experts", "feedforward.router.bias": "gate.e_score_correction_bias",
            "feedforward.shared.up": "shared_experts", "feedforward.shared.down": "shared_experts"}  # fmt: skip
    return f"{where}.{block or family.block}.{rest[inner]}"


def write_tensor(name: str, tensor: Tensor, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Our tensor as the tensors that transformers stores: an expert's matrices each by itself."""
    theirs = their_name(name, family)
    if not is_expert(name):
        yield theirs, tensor.contiguous()
        return
    gate, up, down = family.expert
    for index, one in enumerate(tensor):
        if name.endswith("down"):
            yield _of_expert(theirs, index, down), one.contiguous()
        else:
            first, second = one.chunk(2, dim=-1)
            yield _of_expert(theirs, index, gate), first.T.contiguous()
            yield _of_expert(theirs, index, up), second.T.contiguous()


def is_expert(name: str) -> bool:
    """Whether the tensor stacks the experts of a layer, or holds its shared one."""
    return name.endswith((".experts.up", ".experts.down", ".shared.up", ".shared.down"))


def _of_expert(prefix: str, index: int, part: str) -> str:
    return f"{prefix}.{part}.weight" if prefix.endswith("shared_experts") else f"{prefix}.{index}.{part}.weight"


def sources(name: str, shape: torch.Size, family: Family, available: Mapping[str, object]) -> dict[str, list[int]]:
    """The stored tensors, with their shapes, that make up our tensor ``name`` of ``shape``.

    Experts are stored one by one (as on the hub) or stacked (as transformers ≥ 5 holds them): gate_up_proj [E, 2F, D]
    and down_proj [E, D, F].
    """
    blocks = (family.block, "mlp")
    block = next((b for b in blocks if any_starts(available, their_name(name, family, block=b))), family.block)
    theirs = their_name(name, family, block=block)
    if not is_expert(name):
        return {theirs: list(shape)}
    experts, dim, width = shape
    if name.endswith("down"):
        if f"{theirs}.down_proj" in available:
            return {f"{theirs}.down_proj": [experts, dim, width]}
        return {_of_expert(theirs, index, family.expert[2]): [dim, width] for index in range(experts)}
    if f"{theirs}.gate_up_proj" in available:
        return {f"{theirs}.gate_up_proj": [experts, width, dim]}
    return {
        _of_expert(theirs, index, part): [width // 2, dim] for index in range(experts) for part in family.expert[:2]
    }


def any_starts(names: Mapping[str, object], prefix: str) -> bool:
    """Whether one of the names is, or lies under, ``prefix``."""
    return prefix in names or any(name.startswith(f"{prefix}.") for name in names)


def assemble(name: str, shape: torch.Size, parts: list[str], read: Callable[[str], Tensor]) -> Tensor:
    """Our tensor ``name`` of ``shape`` from the stored tensors that :func:`sources` lists."""
    if not is_expert(name):
        return read(parts[0])
    if len(parts) == 1 and read(parts[0]).dim() == 3:
        return read(parts[0]) if name.endswith("down") else read(parts[0]).mT.contiguous()
    first = read(parts[0])
    whole = torch.empty(shape, dtype=first.dtype)
    if name.endswith("down"):
        for index, part in enumerate(parts):
            whole[index] = read(part)
        return whole
    half = shape[2] // 2
    for index in range(shape[0]):
        whole[index, :, :half] = read(parts[2 * index]).T
        whole[index, :, half:] = read(parts[2 * index + 1]).T
    return whole


class Checkpoint:
    """The tensors of a folder's safetensors files, read one at a time; use it as a context.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one or an index that does not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, safe_open] = {}
        with ExitStack() as self._open:
            for file, promised in _files(folder).items():
                self._add(folder / file, promised)
            # all could be opened: they stay open past this block
            self._open = self._open.pop_all()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def shape(self, name: str) -> list[int]:
        """Sizes of a stored tensor, without reading it."""
        return list(self.where[name].get_slice(name).get_shape())

    def read(self, name: str) -> Float[Tensor, "..."]:
        """A stored tensor. Raises ValueError unless it holds floating-point numbers of 16 bits or more."""
        tensor = self.where[name].get_tensor(name)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} must be stored in float16, bfloat16, float32 or float64, got {tensor.dtype}")
        return tensor

    def _add(self, path: Path, promised: set[str] | None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {INDEX} names it")
        try:
            opened = self._open.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); copy it again") from error
        names = set(opened.keys())
        if promised is not None and names != promised:
            raise ValueError(f"{path} does not hold what {INDEX} says: {shortened(sorted(names ^ promised))}")
        self.where.update(dict.fromkeys(names, opened))


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Each weight file with the tensors that the index promises, None where there is no index."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: only safetensors files are read")
    index = json.loads((folder / INDEX).read_text()).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{folder / INDEX} must hold a weight_map from tensors to files")
    files: dict[str, set[str] | None] = {}
    for name, file in index.items():
        if Path(file).name != file:
            raise ValueError(f"{folder / INDEX} must name files of its own folder, got {file!r}")
        promised = files.setdefault(file, set())
        if promised is not None:
            promised.add(name)
    return files


def shortened(lines: list[str], limit: int = 8) -> str:
    """The first few, and how many more."""
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" if len(lines) > limit else "")
