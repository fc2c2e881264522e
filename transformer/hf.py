"""Models of Hugging Face transformers in and out: Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE, OLMoE and dots1.

Both sides turn the channel pairs (i, i + d/2) of a head, so that no weight needs another order.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_attn import Pattern
from transformer.config import TransformerConfig
from transformer.hf_config import FAMILIES, Family, family_named, read_config, write_config
from transformer.hf_patterns import with_pattern
from transformer.hf_tensors import WEIGHTS, Checkpoint, assemble, shortened, sources, write_tensor
from transformer.model import Transformer
from transformer.rope import frequencies

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CONFIG = "config.json"
_HEAD, _EMBEDDING, _FREQUENCIES = "lm_head.weight", "model.embed_tokens.weight", "rotary_emb.inv_freq"
_NORMS = ("input_layernorm", "post_attention_layernorm")
_OF_ATTENTION = ("input_layernorm", *(f"self_attn.{name}_proj" for name in "qkvo"))
_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def from_hugging_face(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    pattern: str | Pattern | Sequence[str | Pattern | None] | None = None,
    prefix_length: int = 0,
) -> Transformer:
    """The model of a folder with config.json and *.safetensors (one file, or several with an index), to evaluate.

    transformers need not be installed. dtype: type of the weights; None keeps each as it is stored. Experts may be
    stored one by one or stacked. A Llama whose layers this library pruned to unequal sizes is read by the sizes that
    pruning left in its config, though stock transformers cannot load it. Dropout and router noise, which count in
    training only, are not taken over.
    pattern: which keys a query sees instead, in every layer, or one for each (None keeps the layer's own), as text or
    as a Pattern:

    >>> from_hugging_face(folder, pattern="causal() & (sliding_window(256) | sinks(4))")

    prefix_length: first tokens that such a pattern may look ahead to (``prefix_lm(64)``), and that losses leave out.
    Raises FileNotFoundError for a missing file; ValueError for a damaged one, for an architecture or option without an
    equal here (named), and for tensors that are missing, left over or of another shape (listed).
    """
    folder = Path(folder)
    record = _read_record(folder / _CONFIG)
    config, family = read_config(record), family_named(record["model_type"])
    if pattern is not None or prefix_length:
        own = [None] * len(config.layers) if pattern is None else pattern
        config = with_pattern(config, own, prefix_length=prefix_length)
    with torch.device("meta"):
        model = Transformer(config)
    with Checkpoint(folder) as stored:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        plan = {name: sources(name, shape, family, stored.where) for name, shape in shapes.items()}
        _require_all_used(plan, stored, model)
        tensors = {}
        for name, parts in plan.items():
            tensor = assemble(name, shapes[name], list(parts), stored.read)
            # a balancing bias moves by steps that half precision loses
            wanted = torch.float32 if name.endswith("router.bias") else dtype
            tensors[name] = tensor if wanted is None else tensor.to(wanted)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True).eval()


def to_hugging_face(
    model: Transformer,
    folder: str | Path,
    *,
    family: str | None = None,
    token_ids: Mapping[str, int | list[int] | None] | None = None,
) -> Path:
    """Write config.json and model.safetensors so that transformers loads the same model; returns the folder.

    family: "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe" or "dots1"; None takes the first
    that fits.
    token_ids: the tokenizer's ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, which this model does not know;
    without an end token transformers generates to the full length.
    Weights keep their type; experts are stored one by one, as on the hub. The tokenizer is not written, dropout is
    left out.
    Raises ValueError that says where the family's models differ from this one: unequal layers, another pattern,
    activation or router; and for an id outside the vocabulary or of another name.
    """
    record = write_config(model.config, family=family) | _checked_ids(token_ids or {}, model.config.vocab_size)
    chosen = FAMILIES[record["model_type"]]
    record["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pending = {name: folder / f".{name}.{os.getpid()}" for name in (WEIGHTS, _CONFIG)}
    try:
        save_file(_their_tensors(model, chosen), pending[WEIGHTS], metadata={"format": "pt"})
        pending[_CONFIG].write_text(json.dumps(record, indent=2) + "\n")
        for name, path in pending.items():
            path.replace(folder / name)
    finally:
        for path in pending.values():
            path.unlink(missing_ok=True)
    return folder


def _checked_ids(ids: Mapping[str, int | list[int] | None], vocab_size: int) -> dict[str, int | list[int] | None]:
    for name, given in ids.items():
        if name not in TOKEN_IDS:
            raise ValueError(f"token_ids must name {', '.join(TOKEN_IDS)}, got {name!r}")
        for one in given if isinstance(given, list) else [] if given is None else [given]:
            if not 0 <= one < vocab_size:
                raise ValueError(f"token_ids: {name} must be in [0, vocab_size={vocab_size}), got {one}")
    return dict(ids)


def _their_tensors(model: Transformer, family: Family) -> dict[str, Tensor]:
    return {
        theirs: part
        for name, tensor in model.state_dict().items()
        for theirs, part in write_tensor(name, tensor.detach(), family)
    }


def _read_record(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a model folder of transformers holds it")
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); was the copy cut short?") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold a table, got {type(record).__name__}")
    return record


def _require_all_used(plan: dict[str, dict[str, list[int]]], stored: Checkpoint, model: Transformer) -> None:
    wanted = {name: shape for parts in plan.values() for name, shape in parts.items()}
    missing = sorted(wanted.keys() - stored.where.keys())
    unused = sorted(name for name in stored.where.keys() - wanted.keys() if not _is_repeated(name, stored, model))
    wrong = [
        f"{name} must be {shape}, got {stored.shape(name)}"
        for name, shape in wanted.items()
        if name in stored.where and stored.shape(name) != shape
    ]
    found = {"missing": missing, "unused": unused, "of another shape": wrong}
    if any(found.values()):
        lines = "; ".join(f"{what}: {shortened(names)}" for what, names in found.items() if names)
        raise ValueError(f"the tensors in {stored.folder} do not fit its {_CONFIG}: {lines}")


def _is_repeated(name: str, stored: Checkpoint, model: Transformer) -> bool:
    """Whether a tensor says again what the model has already, or belongs to a part that was pruned away.

    The tied head; rotary frequencies in old files; norms and empty matrices of a layer without that part.
    """
    if name == _HEAD and model.head is None and _EMBEDDING in stored.where:
        return torch.equal(stored.read(_HEAD), stored.read(_EMBEDDING))
    if name.endswith(_FREQUENCIES):
        return _are_frequencies(stored.read(name).double(), model.config)
    match = _OF_LAYER.fullmatch(name)
    if match is None or int(match[1]) >= len(model.config.layers):
        return False
    layer = model.config.layers[int(match[1])]
    gone = layer.attention if match[2] in _OF_ATTENTION else layer.feedforward
    return gone is None and (match[2] in _NORMS or 0 in stored.shape(name))


def _are_frequencies(found: Tensor, config: TransformerConfig) -> bool:
    """Whether these are the model's rotary frequencies, as they are or before scaling."""
    attention = config.layers[0].attention
    if attention is None or 2 * len(found) != attention.head_dim:
        return False
    candidates = (
        frequencies(attention.head_dim, theta=config.rope_theta, scaling=scaling).double()
        for scaling in (None, config.rope_scaling)
    )
    # half precision rounds them to 3 digits, and the smallest to less
    return any(torch.allclose(found, one, rtol=1e-2, atol=1e-6) for one in candidates)
