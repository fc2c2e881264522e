"""config.json of Hugging Face transformers, to and from :class:`TransformerConfig`."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparse_attn import parse_pattern
from transformer.config import TransformerConfig
from transformer.feedforward_config import DenseConfig, MoEConfig
from transformer.layer_config import AttentionConfig, LayerConfig
from transformer.rope import RopeScaling


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, by what sets it apart.

    defaults: what its config class assumes where config.json is silent. block: name of a layer's feed-forward part;
    expert: names of an expert's gate, up and down matrices. experts_key, hidden_key: where the number of experts and
    their width stand (empty: no experts). renormalize: True where the gates of the chosen k always sum to 1, None where
    norm_topk_prob says. window: whether sliding_window counts; mixed: whether it may count in some layers
    only. router: of its experts. equal_split: whether heads must divide the width. bias: whether queries, keys and
    values have one.
    """

    name: str
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qk_norm: str = "none"
    block: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    experts_key: str = ""
    hidden_key: str = "intermediate_size"
    renormalize: bool | None = None
    window: bool = False
    mixed: bool = False
    router: str = "top_k"
    explicit_head_dim: bool = True
    equal_split: bool = False
    bias: bool = False


_COMMON = {
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "num_key_value_heads": None,
    "head_dim": None, "hidden_act": "silu", "sliding_window": None, "use_sliding_window": True,
}  # fmt: skip
_QWEN = {"use_sliding_window": False, "sliding_window": 4096}
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", equal_split=True),
        Family(
            "mistral", "MistralForCausalLM", window=True, defaults={"sliding_window": 4096, "num_key_value_heads": 8}
        ),
        Family(
            "qwen2", "Qwen2ForCausalLM", bias=True, window=True, mixed=True,
            defaults={**_QWEN, "num_key_value_heads": 32, "max_window_layers": 28},
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM", qk_norm="head", window=True, mixed=True,
            defaults={**_QWEN, "head_dim": 128, "num_key_value_heads": 32, "max_window_layers": 28},
        ),
        Family(
            "mixtral", "MixtralForCausalLM", block="block_sparse_moe", expert=("w1", "w3", "w2"), window=True,
            experts_key="num_local_experts", renormalize=True,
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "num_experts_per_tok": 2},
        ),
        Family(
            "qwen3_moe", "Qwen3MoeForCausalLM", qk_norm="head", window=True,
            experts_key="num_experts", hidden_key="moe_intermediate_size",
            defaults={**_QWEN, "num_key_value_heads": 4, "num_experts_per_tok": 8, "norm_topk_prob": False},
        ),
        Family(
            "olmoe", "OlmoeForCausalLM", qk_norm="full", experts_key="num_experts", explicit_head_dim=False,
            defaults={"rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "norm_topk_prob": False},
        ),
        Family(
            "dots1", "Dots1ForCausalLM", qk_norm="head", window=True, mixed=True, router="sigmoid",
            experts_key="n_routed_experts", hidden_key="moe_intermediate_size",
            defaults={
                "sliding_window": 4096, "max_window_layers": 62, "num_key_value_heads": 32, "norm_topk_prob": False,
                "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
            },
        ),
    )
}  # fmt: skip
# what this library's layers do not have, and the values under which a model does without it
_ABSENT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False, None), "mlp_bias": (False, None), "clip_qkv": (None,),
    "quantization_config": (None,), "partial_rotary_factor": (1.0, None),
}  # fmt: skip
_UNEQUAL = {
    "deepseek_v2": "multi-head latent attention", "deepseek_v3": "multi-head latent attention",
    "qwen2_moe": "a shared expert with a gate of its own",
}  # fmt: skip
# keys of a kind of rope_scaling, and the fields of RopeScaling that they are here
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}  # fmt: skip
PRUNED = "pruned_layers"  # [heads, key-value heads, neurons] of each layer, which pruning leaves in the config
PRUNED_WIDTH = "pruned_width"  # the width, where the config's own class would refuse it
_TRAINING_ONLY = (
    "bias_update", "dropout", "head_dropout", "drop_connect", "path_dropout", "layer_drop", "error_k", "error_unified",
)  # fmt: skip
_WINDOWED = re.compile(r"causal\(\) & sliding_window\((\d+)\)|sliding_window\((\d+)\) & causal\(\)")


def family_named(name: object) -> Family:
    """The family of a model_type. Raises ValueError that lists the known ones."""
    if isinstance(name, str) and name in _UNEQUAL:
        raise ValueError(
            f"{name} has {_UNEQUAL[name]}, of which this library has no equal; read: {', '.join(FAMILIES)}"
        )
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def read_config(record: Mapping[str, Any]) -> TransformerConfig:
    """The model that a config.json of transformers describes.

    Not read, for they matter in training only: dropout rates, router noise, weights of side losses, initialisation.
    Raises ValueError naming the key for a model_type, option or size that this library has no equal of.
    """
    family = family_named(record.get("model_type"))
    record = {**_COMMON, **family.defaults, **record}
    for key, allowed in _ABSENT.items():
        if record.get(key) not in allowed:
            raise ValueError(f"{key} must be {allowed[0]!r} to be read from a {family.name} model, got {record[key]!r}")
    layers = tuple(_layer(record, family, index) for index in range(_size(record, "num_hidden_layers")))
    theta, scaling = _rope(record)
    return TransformerConfig(
        vocab_size=_size(record, "vocab_size"), layers=layers,
        dim=_size(record, "hidden_size" if record.get(PRUNED_WIDTH) is None else PRUNED_WIDTH),
        max_length=_size(record, "max_position_embeddings"), rope_theta=theta, rope_scaling=scaling,
        norm_eps=record["rms_norm_eps"], tied=record["tie_word_embeddings"],
    )  # fmt: skip


def _layer(record: Mapping[str, Any], family: Family, index: int) -> LayerConfig:
    if record.get(PRUNED) is None:
        return LayerConfig(_attention(record, family, index), _feedforward(record, family, index))
    heads, kv_heads, hidden = _pruned_sizes(record, family, index)
    own = {**record, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": hidden}
    return LayerConfig(
        _attention(own, family, index) if heads else None, _feedforward(own, family, index) if hidden else None
    )


def _pruned_sizes(record: Mapping[str, Any], family: Family, index: int) -> list[int]:
    sizes, count = record[PRUNED], _size(record, "num_hidden_layers")
    if family.name != "llama":
        raise ValueError(f"{PRUNED} must stand in a llama model's config, got a {family.name} model")
    if not isinstance(sizes, list) or len(sizes) != count or not all(_is_sizes(one) for one in sizes):
        raise ValueError(f"{PRUNED} must give heads, key-value heads and neurons of {count} layers, got {sizes!r}")
    _size(record, "head_dim")
    return sizes[index]


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(size) is int and size >= 0 for size in value)


def _attention(record: Mapping[str, Any], family: Family, index: int) -> AttentionConfig:
    dim, heads = _size(record, "hidden_size"), _size(record, "num_attention_heads")
    head_dim = record["head_dim"] if record["head_dim"] is not None else dim // heads
    if not family.explicit_head_dim and head_dim != dim / heads:
        raise ValueError(f"head_dim of {family.name} must be hidden_size / heads = {dim / heads}, got {head_dim}")
    kv_heads = heads if record["num_key_value_heads"] is None else _size(record, "num_key_value_heads")
    window = _window(record, family, index)
    pattern = "causal()" if window is None else f"causal() & sliding_window({window})"
    return AttentionConfig(heads, kv_heads, head_dim, pattern, qk_norm=family.qk_norm, bias=family.bias)


def _window(record: Mapping[str, Any], family: Family, index: int) -> int | None:
    # where a family's window has no such switch, transformers does not look at it
    switched = not family.window or "use_sliding_window" in family.defaults
    if record["sliding_window"] is None or (switched and not record["use_sliding_window"]):
        return None
    if not family.window:
        raise ValueError(f"sliding_window must be null in a {family.name} model, got {record['sliding_window']!r}")
    if family.mixed and not _is_windowed(record, index):
        return None
    kinds = record.get("layer_types")
    if not family.mixed and kinds is not None and set(kinds) != {"sliding_attention"}:
        raise ValueError(f"layer_types of {family.name} must all be sliding_attention, or absent, got {kinds!r}")
    return _size(record, "sliding_window")


def _is_windowed(record: Mapping[str, Any], index: int) -> bool:
    kinds = record.get("layer_types")
    if kinds is None:
        return index >= record["max_window_layers"]
    if len(kinds) != record["num_hidden_layers"] or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types must say full_attention or sliding_attention for each layer, got {kinds!r}")
    return kinds[index] == "sliding_attention"


def _feedforward(record: Mapping[str, Any], family: Family, index: int) -> DenseConfig | MoEConfig:
    if not family.experts_key or _is_dense(record, family, index):
        return DenseConfig(_size(record, "intermediate_size"))
    if family.router == "sigmoid":
        return _sigmoid_experts(record, family)
    counts = {key: record[key] for key in ("num_experts", "num_local_experts") if key in record}
    if len(set(counts.values())) > 1:
        raise ValueError(f"num_experts and num_local_experts must agree where both are given, got {counts}")
    renormalize = record["norm_topk_prob"] if family.renormalize is None else family.renormalize
    return MoEConfig(
        _size(record, family.hidden_key), _size(record, next(iter(counts), family.experts_key)),
        k=_size(record, "num_experts_per_tok"), renormalize=renormalize,
    )  # fmt: skip


def _sigmoid_experts(record: Mapping[str, Any], family: Family) -> MoEConfig:
    """DeepSeek-V3's routing. The step of its balancing bias matters in training only and stands in no config.json."""
    hidden = _size(record, family.hidden_key)
    return MoEConfig(
        hidden, _size(record, family.experts_key), k=_size(record, "num_experts_per_tok"), router="sigmoid",
        renormalize=record["norm_topk_prob"], num_groups=_size(record, "n_group"),
        top_groups=_size(record, "topk_group"), route_scale=record["routed_scaling_factor"],
        shared_hidden=hidden * _size(record, "n_shared_experts"),
    )  # fmt: skip


def _is_dense(record: Mapping[str, Any], family: Family, index: int) -> bool:
    """Qwen3-MoE keeps some layers dense, DeepSeek's descendants the first ones."""
    if family.router == "sigmoid":
        return index < record["first_k_dense_replace"]
    return index in (record.get("mlp_only_layers") or ()) or (index + 1) % (record.get("decoder_sparse_step") or 1) != 0


def _rope(record: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and the scaling; before version 5 of transformers theta stood apart."""
    rope = record.get("rope_parameters") or record.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_scaling must be {', '.join(_ROPE_KEYS)}, for all layers alike, got {dict(rope)}")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor must be 1.0, got {rope['partial_rotary_factor']!r}")
    theta = rope.get("rope_theta", record["rope_theta"])
    if not isinstance(theta, int | float):
        raise ValueError(f"rope_theta must be a number, got {theta!r}")
    if kind == "default":
        return float(theta), None
    rope = {"original_max_position_embeddings": record["max_position_embeddings"], **rope}
    missing = [key for key in _ROPE_KEYS[kind] if key not in rope]
    if missing:
        raise ValueError(f"rope_scaling of the type {kind!r} lacks {', '.join(missing)}")
    return float(theta), RopeScaling(kind, **{ours: rope[theirs] for theirs, ours in _ROPE_KEYS[kind].items()})


def _describe_rope(config: TransformerConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    kind = "default" if scaling is None else scaling.kind
    rope = {"rope_type": kind, "rope_theta": config.rope_theta}
    rope |= {theirs: getattr(scaling, ours) for theirs, ours in _ROPE_KEYS[kind].items()}
    # versions before 5 read rope_theta and rope_scaling
    earlier = {"rope_theta": config.rope_theta} | ({} if scaling is None else {"rope_scaling": rope})
    return {"rope_parameters": rope, **earlier}


def _size(record: Mapping[str, Any], key: str) -> int:
    if key not in record:
        raise ValueError(f"config.json lacks {key}")
    value = record[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be an integer >= 1, got {value!r}")
    return value


def write_config(config: TransformerConfig, *, family: str | None = None) -> dict[str, Any]:
    """The config.json that makes transformers build this model; None takes the first family that can.

    What is written is read again and must give the same config (apart from rates of dropping and the step of a
    balancing bias, which matter in training only).
    Raises ValueError that says where the family differs.
    """
    if family is not None:
        record, differences = _attempt(config, family_named(family))
        if differences:
            raise ValueError(f"a {family} model cannot be this one: {'; '.join(differences[:5])}")
        return record
    reasons = []
    for name in FAMILIES:
        record, differences = _attempt(config, FAMILIES[name])
        if not differences:
            return record
        reasons.append(f"{name}: {differences[0]}")
    raise ValueError(f"no family of transformers fits this model ({'; '.join(reasons)})")


def _attempt(config: TransformerConfig, family: Family) -> tuple[dict[str, Any], list[str]]:
    attention = [layer.attention for layer in config.layers if layer.attention]
    if not attention or not config.layers[0].feedforward:
        return {}, ["its first layer lacks attention or feed-forward"]
    if family.experts_key and not any(isinstance(layer.feedforward, MoEConfig) for layer in config.layers):
        return {}, ["no layer has experts"]
    record = _describe(config, attention[0], family)
    if family.equal_split and config.dim % attention[0].num_heads:
        return record, [f"num_heads must divide dim={config.dim}, got {attention[0].num_heads}"]
    if not config.causal:
        return record, ["it is an encoder (causal=False)"]
    try:
        read = read_config(record)
    except ValueError as error:
        return record, [str(error)]
    return record, _differences(_plain(config), _plain(read))


def _describe(config: TransformerConfig, attention: AttentionConfig, family: Family) -> dict[str, Any]:
    """The family's record of the first layer's sizes; whether the others fit shows when it is read again."""
    record: dict[str, Any] = {
        "architectures": [family.architecture], "model_type": family.name, "vocab_size": config.vocab_size,
        "hidden_size": config.dim, "num_hidden_layers": len(config.layers), "hidden_act": "silu",
        "num_attention_heads": attention.num_heads, "num_key_value_heads": attention.num_kv_heads,
        "max_position_embeddings": config.max_length, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied, **_describe_rope(config),
        # the ids of the family's own tokenizer, which this model need not share
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if family.explicit_head_dim:
        record["head_dim"] = attention.head_dim
    return {**record, **_describe_window(config, family), **_describe_feedforward(config, family)}


def _describe_window(config: TransformerConfig, family: Family) -> dict[str, Any]:
    if not family.window:
        return {}
    matches = [_WINDOWED.fullmatch(_normal(layer.attention)) if layer.attention else None for layer in config.layers]
    window = next((int(match[1] or match[2]) for match in matches if match), None)
    record: dict[str, Any] = {"sliding_window": window}
    if "use_sliding_window" in family.defaults:
        record["use_sliding_window"] = window is not None
    if family.mixed:
        record["layer_types"] = ["sliding_attention" if match else "full_attention" for match in matches]
    return record


def _describe_feedforward(config: TransformerConfig, family: Family) -> dict[str, Any]:
    feedforwards = [layer.feedforward for layer in config.layers]
    dense = next((f for f in feedforwards if isinstance(f, DenseConfig)), None)
    moe = next((f for f in feedforwards if isinstance(f, MoEConfig)), None)
    record: dict[str, Any] = {}
    if family.experts_key and moe:
        record |= {family.experts_key: moe.num_experts, "num_experts_per_tok": moe.k, family.hidden_key: moe.hidden}
        if family.renormalize is None:
            record["norm_topk_prob"] = moe.renormalize
    if family.router == "sigmoid" and moe:
        leading = next(index for index, f in enumerate(feedforwards) if isinstance(f, MoEConfig))
        record |= {
            "n_group": moe.num_groups, "topk_group": moe.top_groups, "routed_scaling_factor": moe.route_scale,
            "n_shared_experts": moe.shared_hidden // moe.hidden, "first_k_dense_replace": leading,
        }  # fmt: skip
    if family.name == "qwen3_moe":
        record["mlp_only_layers"] = [i for i, f in enumerate(feedforwards) if isinstance(f, DenseConfig)]
    if dense and "intermediate_size" not in record:
        record["intermediate_size"] = dense.hidden
    return {"intermediate_size": moe.hidden, **record} if moe else record


def _normal(attention: AttentionConfig) -> str:
    return str(parse_pattern(attention.pattern))


def _plain(config: TransformerConfig) -> dict[str, Any]:
    """Nested dicts of numbers, without what matters in training only, and with patterns in one spelling."""
    prefix = config.prefix_length if config.seen_prefix else 0  # of the loss alone
    record = dataclasses.replace(config, dropout=0.0, prefix_length=prefix).to_dict()
    record["layers"] = {str(index): layer for index, layer in enumerate(record["layers"])}
    for index, layer in enumerate(config.layers):
        written = record["layers"][str(index)]
        for part in (written, written["attention"] or {}, written["feedforward"] or {}):
            for name in _TRAINING_ONLY:
                part.pop(name, None)
        if layer.attention:
            match = _WINDOWED.fullmatch(_normal(layer.attention))
            windowed = f"causal() & sliding_window({match[1] or match[2]})" if match else _normal(layer.attention)
            written["attention"]["pattern"] = windowed
    return record


def _differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    if ours == theirs:
        return []
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [f"{where} is {ours!r} here and would be {theirs!r} there"]
    return [
        line
        for key in [*ours, *(key for key in theirs if key not in ours)]
        for line in _differences(ours.get(key), theirs.get(key), f"{where}.{key}" if where else key)
    ]
