"""Which kinds of feed-forward or selection an option of [model] belongs to."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.model_config import ModelConfig

MEMORIES = ("product_key", "peer")
OWNERS: dict[str, Sequence[str]] = {
    "activation": ("moe", "dense", "thresholded", "soft_moe", "peer"),
    **dict.fromkeys(
        (
            "router", "renormalize", "capacity_factor", "shared_hidden", "jitter", "num_groups", "top_groups",
            "route_scale", "bias_update", "sinkhorn_iterations", "hash_seed", "drop_priority",
        ), ("moe",)
    ),
    "allow_future": ("moe", "soft_moe"),
    "slots_per_expert": ("soft_moe",),
    **dict.fromkeys(("error_k", "error_unified"), ("dense",)),
    **dict.fromkeys(("num_keys", "memory_heads", "memory_k", "key_dim", "query_norm"), MEMORIES),
    **dict.fromkeys(("gated", "memory_pool"), ("product_key",)),
    **dict.fromkeys(("threshold_method", "threshold", "top_neurons"), ("thresholded",)),
}  # fmt: skip
SELECTION_OWNERS: dict[str, Sequence[str]] = {
    "select_block": ("moba", "nsa", "lsh", "kmeans", "sinkhorn"),
    "select_k": ("moba", "top_k", "nsa", "dsa"),
    **dict.fromkeys(("select_window", "select_stride"), ("nsa",)),
    **dict.fromkeys(("select_heads", "select_dim"), ("dsa",)),
    "select_buckets": ("lsh", "kmeans"),
    "select_rounds": ("lsh",),
    "select_shared_qk": ("lsh", "kmeans"),
    **dict.fromkeys(("select_initial", "select_local", "select_hidden"), ("nsa",)),
    **dict.fromkeys(("select_rope_dim", "select_warm_up"), ("dsa",)),
    "select_decay": ("kmeans",),
    **dict.fromkeys(("select_iterations", "select_temperature", "select_gumbel"), ("sinkhorn",)),
    "select_seed": ("lsh", "kmeans", "sinkhorn"),
}


def check_owners(model: "ModelConfig") -> None:
    """Raises: ValueError for an option of a kind that no layer has, or in a layer of another kind."""
    for word, owned in (("feedforward", OWNERS), ("selection", SELECTION_OWNERS)):
        kinds = _kinds(model, word)
        for field in dataclasses.fields(model):
            owners, value = owned.get(field.name, kinds), getattr(model, field.name)
            if value != field.default and not set(owners) & set(kinds):
                raise ValueError(
                    f"model.{field.name} belongs to {word} {' or '.join(owners)}, got {field.name}={value!r} with "
                    f"{', '.join(kinds)}"
                )
    for override in model.layer:
        kind = override.feedforward or model.feedforward
        for name, owners in OWNERS.items():
            if getattr(override, name, None) is not None and kind not in owners:
                raise ValueError(
                    f"model.layer.{name} belongs to feedforward {' or '.join(owners)}, got {name}="
                    f"{getattr(override, name)!r} in layer {override.at}, which is {kind}"
                )
    passing = model.depth_capacity is not None or any(layer.depth_capacity is not None for layer in model.layer)
    if model.depth_weighting != "sigmoid" and not passing:
        raise ValueError(f"model.depth_weighting needs a depth_capacity, got {model.depth_weighting!r} without one")


def _kinds(model: "ModelConfig", word: str) -> list[str]:
    """What the layers have under ``word``."""
    own = getattr(model, word)
    changed = {override.at: getattr(override, word) or own for override in model.layer}
    return sorted({changed.get(index, own) for index in range(model.layers)})
