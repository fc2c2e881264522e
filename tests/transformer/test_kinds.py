"""Every feed-forward that a config can name: built, counted, trained, decoded; refused where it would look ahead."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe import BalancedAssignmentRouter, Thresholds
from tests.tolerances import close
from training.config import load_config
from training.model_config import LayerOverride, ModelConfig, model_config
from transformer import (
    DenseConfig,
    DepthConfig,
    MoEConfig,
    PEERConfig,
    ProductKeyConfig,
    SoftMoEConfig,
    ThresholdedConfig,
    Transformer,
    TransformerConfig,
)

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.toml"))
CAUSAL = {
    "top_k": MoEConfig(16, 4),
    "switch": MoEConfig(16, 4, k=1, router="switch", jitter=0.1),
    "biases": MoEConfig(16, 4, shared_hidden=6, activation="relu", expert_bias=True),
    "noisy_top_k": MoEConfig(16, 4, router="noisy_top_k"),
    "top_2": MoEConfig(16, 4, router="top_2"),
    "sigmoid": MoEConfig(16, 4, router="sigmoid", num_groups=2, route_scale=2.5),
    "hash": MoEConfig(16, 4, router="hash"),
    "hash_even": MoEConfig(16, 4, router="hash", hash_table="even"),
    "sinkhorn": MoEConfig(16, 4, router="sinkhorn", sinkhorn_iterations=3),
    "base": MoEConfig(16, 4, k=1, router="base"),
    "errors": DenseConfig(16, error_k=3),
    "errors_unified": DenseConfig(16, "gelu", error_k=3, error_unified=True),
    "thresholded": ThresholdedConfig(16, threshold=0.001),
    "cats": ThresholdedConfig(16, "swiglu", "cats", threshold=0.01),
    "drelu": ThresholdedConfig(16, "drelu", "cett"),
    "teal": ThresholdedConfig(16, "swiglu", "teal", thresholds=Thresholds(0.1, 0.2, 0.001)),
    "told": ThresholdedConfig(16, "reglu", predictor_rank=3),
    "product_key": ProductKeyConfig(8, heads=2, k=4, key_dim=8, gated=True),
    "product_key_wide": ProductKeyConfig(8, heads=2, k=4, key_dim=8, gated=True, value_dim=24),
    "peer": PEERConfig(8, heads=2, k=4, key_dim=8),
}
LEAKING = {
    "expert_choice": MoEConfig(16, 4, router="expert_choice", allow_future=True),
    "soft_moe": SoftMoEConfig(16, 4, allow_future=True, expert_bias=True),
}


def config(feedforward, **options):
    return TransformerConfig.uniform(
        vocab_size=31, dim=16, num_layers=2, num_heads=2, feedforward=feedforward, **options
    )


def model(feedforward, **options):
    return Transformer(config(feedforward, **options), generator=torch.Generator().manual_seed(0))


def ids(*shape):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CAUSAL | LEAKING)
def test_a_step_reaches_every_parameter_and_the_config_survives(kind, tmp_path):
    built = model((CAUSAL | LEAKING)[kind])
    built(ids(2, 9), labels=ids(2, 9)).loss.backward()
    assert [name for name, p in built.named_parameters() if p.requires_grad and p.grad is None] == []
    built.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == built.config
    close(again(ids(2, 9)).logits, built.eval()(ids(2, 9)).logits)


@pytest.mark.parametrize("kind", CAUSAL)
def test_cached_decoding_equals_the_full_forward(kind):
    built = model(CAUSAL[kind]).eval()
    with torch.no_grad():
        whole = built(ids(2, 9)).logits
        cache = built.new_cache()
        parts = [built(ids(2, 9)[:, at : at + 1], cache=cache).logits for at in range(9)]
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("kind", CAUSAL)
def test_checkpointing_draws_and_chooses_nothing_anew(kind):
    losses, gradients, biases = [], [], []
    for checkpointing in (False, True):
        built = model(CAUSAL[kind]).train()
        built.gradient_checkpointing(checkpointing)
        torch.manual_seed(3)
        loss = built(ids(2, 9), labels=ids(2, 9)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in built.parameters() if p.requires_grad])
        routers = [m for m in built.modules() if hasattr(m, "pending_loads")]
        biases.append([router.pending_loads() for router in routers])
    close(losses[1], losses[0])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        close(found, expected)
    assert all(found.equal(expected) for found, expected in zip(biases[1], biases[0], strict=True))


@pytest.mark.parametrize("kind", LEAKING)
def test_a_causal_model_refuses_what_sees_later_tokens(kind):
    refused = dataclasses.replace(LEAKING[kind], allow_future=False)
    with pytest.raises(ValueError, match="compares a token with later ones; set allow_future=True"):
        config(refused)
    assert config(refused, causal=False).layers[0].feedforward == refused


READS = {
    "product_key": 2 * 2 * 4 * 16,
    "product_key_wide": 2 * 2 * 4 * 24,
    "peer": 2 * 2 * 2 * 4 * 16,
}  # gathers, which torch's counter leaves out


@pytest.mark.parametrize("kind", CAUSAL | LEAKING)
def test_flops_are_those_that_torch_counts(kind):
    def counted(feedforward):
        built = model(feedforward).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            built(ids(2, 9))
        return counter.get_total_flops() / 18

    feedforward, base = (CAUSAL | LEAKING)[kind], DenseConfig(16)
    said = model(feedforward).flops_per_token(9) - model(base).flops_per_token(9)
    assert said == pytest.approx(counted(feedforward) - counted(base) + 2 * READS.get(kind, 0))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_examples_builds(path):
    run = load_config(path)
    built = model_config(run.model, vocab_size=64, length=run.data.length)
    assert Transformer(built)(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 64)


def feedforward_of(**options):
    section = ModelConfig(dim=16, heads=4, layers=1, **options)
    return model_config(section, vocab_size=31, length=8).layers[0].feedforward


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2", "reglu", "drelu", "relu"])
@pytest.mark.parametrize("method", ["hard", "cett", "teal"])
def test_a_model_section_reaches_every_activation_and_method(activation, method):
    found = feedforward_of(
        feedforward="thresholded", activation=activation, threshold_method=method, threshold=0.1, hidden=16
    )
    assert found == ThresholdedConfig(16, activation, method, 0.1)
    layer = model(found).layers[0].feedforward
    assert (layer.activation, layer.method, layer.thresholds.down) == (activation, method, 0.1)


def test_what_a_model_section_says_of_a_router_reaches_it():
    def router(**options):
        return model(feedforward_of(**options)).layers[0].feedforward.router

    assert type(router(router="base", k=1)) is BalancedAssignmentRouter
    assert router(router="sinkhorn", sinkhorn_iterations=3).iterations == 3
    tokens, x = torch.arange(50), torch.zeros(50, 16)
    first, second = (router(router="hash", hash_seed=seed)(x, token_ids=tokens).expert for seed in (0, 1))
    assert not first.equal(second)


def test_an_activation_that_is_left_out_is_the_kinds_own():
    kinds = ("moe", "dense", "thresholded", "peer")
    found = [feedforward_of(feedforward=kind).activation for kind in kinds]
    assert (
        found
        == ["swiglu", "swiglu", "relu2", "gelu"]
        == [kind.activation for kind in (MoEConfig(16, 4), DenseConfig(16), ThresholdedConfig(16), PEERConfig(16))]
    )
    with pytest.raises(ValueError, match=r"activation must be one of gelu, relu2, got 'swiglu'"):
        feedforward_of(feedforward="peer", activation="swiglu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedforward": "dense", "gated": True},
         r"model\.gated belongs to feedforward product_key, got gated=True with dense"),
        ({"feedforward": "peer", "threshold": 0.1},
         r"model\.threshold belongs to feedforward thresholded, got threshold=0\.1 with peer"),
        ({"feedforward": "product_key", "activation": "gelu"}, r"model\.activation belongs to .*with product_key"),
        ({"memory_k": 3}, r"model\.memory_k belongs to feedforward product_key or peer, got memory_k=3 with moe"),
        ({"feedforward": "soft_moe", "allow_future": True, "router": "hash"}, r"model\.router belongs to .*moe,"),
        ({"feedforward": "dense", "layer": (LayerOverride(at=0, feedforward="moe"),), "threshold": 0.1},
         r"with moe$"),
    ],
)  # fmt: skip
def test_an_option_of_a_feedforward_that_no_layer_has_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_config(ModelConfig(**{"dim": 16, "layers": 1} | options), vocab_size=31, length=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, r"threshold must be >= 0, got -0\.1"),
        ({"threshold": math.nan}, r"threshold must be >= 0, got nan"),
        ({"method": "cats"}, r"'cats' must have a gate \(swiglu, reglu, drelu\), got activation='relu2'"),
        ({"top_k": 3, "method": "cett"}, r"method must be 'hard' with top_k=3, got 'cett'"),
        ({"top_k": 9}, r"top_k must be in \[1, hidden=8\], got 9"),
    ],
)
def test_what_a_thresholded_feedforward_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ThresholdedConfig(8, **options)


def test_layers_of_a_model_section_differ_in_router_activation_and_thresholds():
    section = ModelConfig(
        layers=5, heads=4, dim=16, hidden=16, num_experts=4,
        layer=(
            LayerOverride(at=0, router="hash", k=1),
            LayerOverride(at=1, shared_hidden=8, capacity_factor=1.5, activation="gelu"),
            LayerOverride(at=2, feedforward="thresholded", activation="swiglu", threshold_method="cats", threshold=0.1),
            LayerOverride(at=3, feedforward="peer", num_keys=16, attention_threshold=0.2),
        ),
    )  # fmt: skip
    layers = model_config(section, vocab_size=31, length=8).layers
    assert layers[0].feedforward == MoEConfig(16, 4, k=1, router="hash")
    assert layers[1].feedforward == MoEConfig(16, 4, shared_hidden=8, capacity_factor=1.5, activation="gelu")
    assert layers[2].feedforward == ThresholdedConfig(16, "swiglu", "cats", 0.1)
    assert layers[3].feedforward == PEERConfig(16, 4, 16, 64) and layers[3].attention.thresholds.output == 0.2
    assert layers[4].feedforward == MoEConfig(16, 4) and layers[4].attention.thresholds is None
    with pytest.raises(
        ValueError, match=r"model\.layer\.router belongs to feedforward moe, got router='hash' in layer 0"
    ):
        model_config(
            dataclasses.replace(section, layer=(LayerOverride(at=0, feedforward="dense", router="hash"),)),
            vocab_size=31, length=8,
        )  # fmt: skip


def test_depth_dropouts_and_pools_of_a_model_section():
    section = ModelConfig(
        layers=4, heads=4, dim=16, feedforward="product_key", num_keys=8, memory_k=4, memory_pool="facts",
        path_dropout=0.2, layer_drop=0.1, head_dropout=0.3, drop_connect=0.4, depth_weighting="raw",
        layer=(LayerOverride(at=1, depth_capacity=0.25), LayerOverride(at=2, feedforward="dense")),
    )  # fmt: skip
    layers = model_config(section, vocab_size=31, length=8).layers
    assert [layer.depth for layer in layers] == [None, DepthConfig(0.25, "raw"), None, None]
    assert [layer.path_dropout for layer in layers] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert {layer.layer_drop for layer in layers} == {0.1}
    assert {(layer.attention.head_dropout, layer.attention.drop_connect) for layer in layers} == {(0.3, 0.4)}
    assert layers[2].feedforward.drop_connect == 0.4
    assert [getattr(layer.feedforward, "pool", None) for layer in layers] == ["facts", "facts", None, "facts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "sigmoid", "num_groups": 3}, "num_groups must divide num_experts=4, got 3"),
        ({"router": "sigmoid", "num_groups": 4, "k": 2}, "k must be at most the 1 experts of 1 groups, got 2"),
        ({"num_groups": 2}, "num_groups belongs to the sigmoid router, got num_groups=2 with 'top_k'"),
        ({"router": "top_2", "k": 1}, "k must be 2, got 1"),
        ({"router": "base", "k": 2}, "the base router sends a token to 1 experts: k must be 1, got 2"),
        ({"sinkhorn_iterations": 3}, "sinkhorn_iterations belongs to the sinkhorn router"),
        ({"router": "sinkhorn", "sinkhorn_iterations": 0}, "sinkhorn_iterations must be >= 1, got 0"),
        ({"router": "sigmoid", "bias_update": -1.0}, "bias_update must be a finite number >= 0, got -1.0"),
        ({"router": "sigmoid", "bias_update": math.nan}, "bias_update must be a finite number >= 0, got nan"),
        ({"router": "switch", "k": 1, "jitter": math.nan}, r"jitter must be in \[0, 1\), got nan"),
        ({"hash_seed": 3}, "hash_seed belongs to the hash router"),
        ({"capacity_factor": math.nan}, "capacity_factor must be a finite number > 0, or None, got nan"),
        ({"capacity_factor": math.inf}, "capacity_factor must be a finite number > 0, or None, got inf"),
        ({"drop_priority": "last"}, "drop_priority must be one of first_come, gate, choice, got 'last'"),
    ],
)
def test_what_routers_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"hidden": 8, "num_experts": 4, **options})
