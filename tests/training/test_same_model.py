"""A checkpoint of a model with the same weights' shapes and another function is refused; noise may change."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from training.same_model import MAY_CHANGE, check_same_model
from transformer import (
    AttentionConfig,
    DenseConfig,
    DSAConfig,
    LayerConfig,
    MoEConfig,
    ThresholdedConfig,
    Transformer,
    TransformerConfig,
)

ATTENTION, EXPERTS = AttentionConfig(2, 2, 8), MoEConfig(hidden=8, num_experts=4, k=2)


def config(
    attention: AttentionConfig = ATTENTION, experts: Any = EXPERTS, layer: dict[str, Any] | None = None, **own: Any
) -> TransformerConfig:
    return TransformerConfig(32, 16, (LayerConfig(attention, experts, **(layer or {})),), **({"max_length": 16} | own))


def saved(folder: Path, **changes: Any) -> Path:
    config(**changes).save(folder / "config.json")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": AttentionConfig(4, 4, 4)}, "layers.0.attention.num_heads is 2 there and 4 in this run"),
        (
            {"attention": dataclasses.replace(ATTENTION, pattern="causal() & sliding_window(3)")},
            "attention.pattern is 'causal",
        ),
        ({"attention": dataclasses.replace(ATTENTION, softcap=2.0)}, "attention.softcap is None there and 2.0"),
        ({"attention": dataclasses.replace(ATTENTION, alibi=True)}, "attention.alibi is False there and True"),
        ({"experts": dataclasses.replace(EXPERTS, k=1)}, "layers.0.feedforward.k is 2 there and 1"),
        ({"experts": dataclasses.replace(EXPERTS, router="sigmoid")}, "router is 'top_k' there and 'sigmoid'"),
        ({"experts": dataclasses.replace(EXPERTS, renormalize=False)}, "renormalize is True there and False"),
        ({"experts": dataclasses.replace(EXPERTS, capacity_factor=1.0)}, "capacity_factor is None there and 1.0"),
        ({"experts": DenseConfig(8)}, "layers.0.feedforward"),
        ({"experts": None}, "layers.0.feedforward"),
        ({"rope_theta": 500.0}, "rope_theta is 10000.0 there and 500.0"),
        ({"causal": False}, "causal is True there and False"),
    ],
)
def test_another_function_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"is of another model: .*{message}.*, or start a new --out"):
        check_same_model(saved(tmp_path), Transformer(config(**changes)))


def test_what_is_of_training_alone_may_change(tmp_path: Path) -> None:
    noisy = dataclasses.replace(ATTENTION, head_dropout=0.1, drop_connect=0.1, dropout=0.1)
    model = Transformer(config(noisy, layer={"path_dropout": 0.1, "layer_drop": 0.1}, dropout=0.1, max_length=32))
    check_same_model(saved(tmp_path), model)
    jitter = MoEConfig(hidden=8, num_experts=4, k=1, router="switch", jitter=0.1)
    check_same_model(
        saved(tmp_path, experts=dataclasses.replace(jitter, jitter=0.3)), Transformer(config(experts=jitter))
    )


def test_a_warm_up_is_another_model_as_its_optimiser_has_the_indexers_alone(tmp_path: Path) -> None:
    warming = dataclasses.replace(ATTENTION, selection=DSAConfig(4, warm_up=True))
    sparse = Transformer(config(dataclasses.replace(ATTENTION, selection=DSAConfig(4))))
    with pytest.raises(ValueError, match=r"selection.warm_up is True there and False .*\(with --init .* to go on"):
        check_same_model(saved(tmp_path, attention=warming), sparse)


def test_every_setting_that_may_change_is_one() -> None:
    records = (TransformerConfig, LayerConfig, AttentionConfig, DSAConfig, DenseConfig, MoEConfig, ThresholdedConfig)
    known = {field.name for record in records for field in dataclasses.fields(record)}
    assert known >= MAY_CHANGE
