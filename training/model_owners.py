"""Which kinds of feed-forward or selection an option of [model] belongs to."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformer.feedforward_config import ROUTER_OPTIONS

if TYPE_CHECKING:
    from training.model_config import ModelConfig

MEMORIES = ("product_key", "peer")
OWNERS: dict[str, Sequence[str]] = {
    "activation": ("moe", "dense", "thresholded", "soft_moe", "peer"),
    **dict.fromkeys(
        (
            "router", "capacity_factor", "shared_hidden", "drop_priority", *ROUTER_OPTIONS,
        ), ("moe",)
    ),
    **dict.fromkeys(("allow_future", "expert_bias"), ("moe", "soft_moe")),
    "slots_per_expert": ("soft_moe",),
    **dict.fromkeys(("error_k", "error_unified"), ("dense",)),
    **dict.fromkeys(("num_keys", "memory_heads", "memory_k", "key_dim", "query_norm"), MEMORIES),
    **dict.fromkeys(("gated", "memory_pool", "value_dim"), ("product_key",)),
    **dict.fromkeys(
        (
            "threshold_method", "threshold", "top_neurons", "threshold_execution", "activation_predictor_rank",
        ), ("thresholded",)
    ),
}  # fmt: skip
# what [model] may state for kinds that no layer has, as the base of a comparison, and a layer's own table may not
SIZE_OWNERS: dict[str, Sequence[str]] = {
    "hidden": ("moe", "dense", "thresholded", "soft_moe"),
    "num_experts": ("moe", "soft_moe"),
    "k": ("moe",),
}
SELECTION_OWNERS: dict[str, Sequence[str]] = {
    "select_block": ("moba", "nsa", "lsh", "kmeans", "sinkhorn"),
    "select_k": ("moba", "top_k", "nsa", "dsa"),
    **dict.fromkeys(("select_window", "select_stride", "select_compress"), ("nsa",)),
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
        for name, owners in (OWNERS | SIZE_OWNERS).items():
            if getattr(override, name, None) is not None and kind not in owners:
                raise ValueError(
                    f"model.layer.{name} belongs to feedforward {' or '.join(owners)}, got {name}="
                    f"{getattr(override, name)!r} in layer {override.at}, which is {kind}"
                )
    _check_routers(model)
    _check_layer_drop(model)
    passing = model.depth_capacity is not None or any(layer.depth_capacity is not None for layer in model.layer)
    if model.depth_weighting != "sigmoid" and not passing:
        raise ValueError(f"model.depth_weighting needs a depth_capacity, got {model.depth_weighting!r} without one")


def owned_by_router(router: str) -> list[str]:
    """The options that this router has and not every one."""
    return [name for name, routers in ROUTER_OPTIONS.items() if router in routers]


def _check_routers(model: "ModelConfig") -> None:
    """Raises: ValueError for an option of a router that no mixture has, or in a layer of another."""
    changed = {layer.at: layer for layer in model.layer}
    layers = [changed.get(index) for index in range(model.layers)]
    mixtures = [layer for layer in layers if ((layer and layer.feedforward) or model.feedforward) == "moe"]
    routers = sorted({(layer and layer.router) or model.router for layer in mixtures})
    defaults = {field.name: field.default for field in dataclasses.fields(model)}
    kinds = _kinds(model, "feedforward")
    if model.allow_future and "expert_choice" not in routers and "soft_moe" not in kinds:
        raise ValueError(
            "model.allow_future belongs to router expert_choice or feedforward soft_moe, got allow_future=True with "
            f"{', '.join([*routers, *(kind for kind in kinds if kind != 'moe')])}"
        )
    for name, owners in ROUTER_OPTIONS.items():
        if getattr(model, name) != defaults[name] and not set(owners) & set(routers):
            raise ValueError(
                f"model.{name} belongs to router {' or '.join(owners)}, got {name}={getattr(model, name)!r} with "
                f"{', '.join(routers)}"
            )
        for layer in model.layer:
            router = layer.router or model.router
            if getattr(layer, name) is not None and router not in owners:
                raise ValueError(
                    f"model.layer.{name} belongs to router {' or '.join(owners)}, got {name}={getattr(layer, name)!r} "
                    f"in layer {layer.at}, whose router is {router}"
                )


def _check_layer_drop(model: "ModelConfig") -> None:
    """Raises: ValueError for a rescaling where no layer is dropped, or a weighting where every token passes."""
    if model.layer_drop_rescale and not (model.layer_drop or any(layer.layer_drop for layer in model.layer)):
        raise ValueError("model.layer_drop_rescale needs a layer_drop, got none")
    for layer in model.layer:
        rate = model.layer_drop if layer.layer_drop is None else layer.layer_drop
        if layer.layer_drop_rescale and not rate:
            raise ValueError(f"model.layer.layer_drop_rescale needs a layer_drop, got none in layer {layer.at}")
        if layer.depth_weighting is not None and layer.depth_capacity is None and model.depth_capacity is None:
            raise ValueError(f"model.layer.depth_weighting needs a depth_capacity, got none in layer {layer.at}")


def _kinds(model: "ModelConfig", word: str) -> list[str]:
    """What the layers have under ``word``."""
    own = getattr(model, word)
    changed = {override.at: getattr(override, word) or own for override in model.layer}
    return sorted({changed.get(index, own) for index in range(model.layers)})
