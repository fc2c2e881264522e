"""Models that `prune` reads and writes: this library's folders, Hugging Face folders, and .gguf files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pruning import load_pruned, prunable_axes
from pruning.adapters import SUPPORTED
from training.prune_arguments import option
from training.prune_encoder import Encoder, copy_parts, pooling_of
from training.run import model_folder, read_record
from training.tokenizer import FILE_NAME, load_tokenizer
from transformer import Transformer

OWN = "sparse-transformers"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZERS = (FILE_NAME, "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
UNIT = {"layers": "layer", "experts": "expert", "expert_neurons": "expert_neuron", "heads": "head",
        "neurons": "neuron", "width": "width"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A folder with a model. file: its .gguf file, if it is one; architecture: the class of transformers, None for
    this library's own; encodes: whether it predicts no next token, but makes vectors of text."""

    folder: Path
    own: bool
    file: str | None = None
    architecture: str | None = None
    encodes: bool = False


@dataclass(frozen=True)
class Coder:
    """A model's tokenizer. separator: the id between documents, if it has one; token_bytes: bytes of text in each id
    [V], where they are exact; save: writes its files into a folder; encoder: of an encoder, how it embeds text."""

    encode: Callable[[Sequence[str]], list[np.ndarray]]
    vocab_size: int
    separator: int | None
    token_bytes: torch.Tensor | None
    save: Callable[[Path], None]
    encoder: Encoder | None = None


def find_source(path: Path) -> Source:
    """The model in a folder, unread.

    Raises: FileNotFoundError or ValueError for a folder without a model or its tokenizer, an architecture that
    transformers does not know, one that is neither a causal language model nor an encoder of text, and quantised
    weights."""
    if not path.is_dir():
        raise FileNotFoundError(f"MODEL must be a folder, {path} does not exist or is a file")
    packed = sorted(file.name for file in path.glob("*.gguf"))
    if packed and not (path / "config.json").is_file():
        if len(packed) > 1:
            raise ValueError(f"{path} must hold one .gguf file, got {', '.join(packed)}: give a folder with one")
        _transformers()
        return Source(path, own=False, file=packed[0])
    folder = model_folder(path)
    record = read_record(folder / "config.json")
    own = record.get("model_type") == OWN
    if not any((folder / name).is_file() for name in ((FILE_NAME,) if own else TOKENIZERS)):
        raise FileNotFoundError(f"no tokenizer in {folder}: copy the model's {FILE_NAME} into it")
    if own:
        return Source(folder, own, encodes=record.get("causal") is False)
    name, encodes = _architecture(folder, record)
    return Source(folder, own, architecture=name, encodes=encodes)


def _architecture(folder: Path, record: dict[str, Any]) -> tuple[str | None, bool]:
    """The class that the config names, and whether it is an encoder."""
    transformers = _transformers()
    kind, names = record.get("model_type"), record.get("architectures") or [None]
    known = f"whole units can be removed from {', '.join(SUPPORTED)}, weights from every causal language model there"
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{folder}: model_type must be '{OWN}' or one that transformers {transformers.__version__} "
                         f"knows, got {kind!r}; {known}")  # fmt: skip
    if "quantization_config" in record:
        raise ValueError(f"{folder} must hold plain weights, got quantised ones: prune the model before quantising it")
    found = getattr(transformers, names[0] or "", None)
    encodes = found is not None and not found.can_generate()
    if record.get("is_encoder_decoder") or (encodes and found.main_input_name != "input_ids"):
        raise ValueError(f"{folder}: prune measures next-token loss or the embeddings of text, and needs a causal "
                         f"language model or a text encoder, got {names[0]}: use pruning.sparsify and the like with "
                         "loss= from Python")  # fmt: skip
    if names[0] is not None and found is None:
        raise ValueError(f"{folder}: architectures must name a class of transformers, got {names[0]!r}; {known}")
    return names[0], encodes


def check_units(source: Source, units: Sequence[str]) -> None:
    """Raises: ValueError naming the supported architectures if units are to go from one that is not."""
    if units and source.architecture is not None and source.architecture not in SUPPORTED:
        raise ValueError(f"{option(units[0])} needs an architecture whose units are known, {', '.join(SUPPORTED)}, got "
                         f"{source.architecture}: prune its weights by --sparsity, or declare prunable_axes() on "
                         "the model in Python")  # fmt: skip


def check_model(model: nn.Module, units: Sequence[str]) -> None:
    """Raises: ValueError if the model has no units of a kind that is to go."""
    if not units:
        return
    kinds = sorted({axis.kind for axis in prunable_axes(model)})
    for unit in units:
        if UNIT[unit] not in kinds:
            raise ValueError(f"{option(unit)} needs a model that has them, {type(model).__name__} has units of "
                             f"kind {', '.join(kinds)}")  # fmt: skip


def load_model(source: Source, *, dtype: str, device: torch.device) -> nn.Module:
    """The model in evaluation mode. dtype: 'auto' leaves the weights as they are saved, 4-bit .gguf as float32."""
    asked = DTYPES.get(dtype)
    if source.own:
        return Transformer.from_pretrained(source.folder, dtype=asked).to(device).eval()
    transformers = _transformers()
    if source.file is not None:
        asked = asked or torch.float32
        plain = transformers.GgufConfig(dequantize=True)  # transformers may keep weights packed, which has no zeros
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder, gguf_file=source.file, dtype=asked, quantization_config=plain
        )
    elif _pruned_before(source.folder):
        model = load_pruned(source.folder, dtype=asked)
    else:
        kind = transformers.AutoModelForCausalLM
        if source.encodes:
            kind = getattr(transformers, str(source.architecture))
        model = kind.from_pretrained(source.folder, dtype=asked or "auto", local_files_only=True)
    return model.to(device).eval()


def _pruned_before(folder: Path) -> bool:
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return any(record.get(name) for name in ("pruned_layers", "pruned_width", "pruned_biases"))


def load_coder(source: Source) -> Coder:
    """The tokenizer saved with the model."""
    if source.own:
        tokenizer = load_tokenizer(source.folder)
        return Coder(tokenizer.encode_documents, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.token_bytes(),
                     tokenizer.save, Encoder() if source.encodes else None)  # fmt: skip
    options = {"gguf_file": source.file} if source.file is not None else {}
    peer = _transformers().AutoTokenizer.from_pretrained(source.folder, local_files_only=True, **options)

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        found = peer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in found]

    def save(folder: Path) -> None:
        peer.save_pretrained(folder)
        if source.encodes:
            copy_parts(source.folder, folder)

    encoder = Encoder(pooling_of(source.folder), *_frame(peer)) if source.encodes else None
    return Coder(encode, len(peer), peer.eos_token_id, None, save, encoder)


def _frame(peer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer of transformers puts before and after a text."""
    bare, whole = (peer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])


def check_vocabulary(model: Any, coder: Coder) -> None:
    """Raises: ValueError if the tokenizer has ids that the model does not know."""
    if coder.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer must have at most the model's {model.config.vocab_size} tokens, got "
                         f"{coder.vocab_size}: it belongs to another model")  # fmt: skip


def longest(model: Any) -> int | None:
    """Most tokens that the model takes; None if its config does not say."""
    own = isinstance(model, Transformer)
    return model.config.max_length if own else getattr(model.config, "max_position_embeddings", None)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Hugging Face folders need transformers: pip install 'sparse-transformers[hf]'") from error
    transformers.utils.logging.disable_progress_bar()  # the command has bars of its own
    return transformers
