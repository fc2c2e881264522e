"""Every layer that a config file can name has a file in examples/configs, and the files compare like with like."""

import typing
from pathlib import Path

import pytest

from training.config import RunConfig, TrainConfig, load_config
from training.model_config import ModelConfig, model_config
from transformer import DepthConfig, MoEConfig, ProductKeyConfig
from transformer.accounting import flops_per_token

FOLDER = Path(__file__).parents[2] / "examples" / "configs"
CONFIGS = {path.stem: load_config(path) for path in sorted(FOLDER.glob("*.toml"))}
WORDS = ("router", "feedforward", "selection", "threshold_method", "drop_priority")
# numbers that are a method of their own when they are set
METHODS = ("jitter", "shared_hidden", "num_groups", "top_neurons", "attention_threshold", "memory_pool", "gated",
           "error_k", "dropout", "head_dropout", "drop_connect", "path_dropout", "layer_drop", "softcap",
           "attention_dropout", "alibi", "select_shared_qk", "activation_predictor_rank", "prefix_length")  # fmt: skip
SMALLER = {"stdlib-product-key", "stdlib-memory-plus", "stdlib-peer"}


def sections():
    """Each [model] section, and each of its layers that differs."""
    for config in CONFIGS.values():
        yield config.model
        yield from config.model.layer


def kinds():
    hints = typing.get_type_hints(ModelConfig)
    return [(word, value) for word in WORDS for value in typing.get_args(hints[word])]


@pytest.mark.parametrize(("word", "value"), kinds(), ids=str)
def test_every_kind_has_an_example(word, value):
    assert any(getattr(section, word, None) == value for section in sections())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_an_example(name):
    default = ModelConfig.__dataclass_fields__[name].default
    assert any(getattr(section, name, default) != default for section in sections())


def test_depth_and_upcycling_have_an_example():
    runs = CONFIGS.values()
    assert any(layer.depth_capacity for config in runs for layer in config.model.layer)
    assert any(config.upcycle.num_experts and config.init for config in runs)


def flops(config: RunConfig) -> float:
    return flops_per_token(model_config(config.model, vocab_size=4096, length=256), 256)


def feedforwards() -> list[str]:
    dense = CONFIGS["stdlib-dense"].model
    alike = [name for name, c in CONFIGS.items() if (c.model.pattern, c.model.selection) == (dense.pattern, "none")]
    return [name for name in alike if name.startswith("stdlib-") and CONFIGS[name].init is None and name not in SMALLER]


@pytest.mark.parametrize("name", feedforwards())
def test_every_kind_of_feedforward_costs_what_the_dense_one_does(name):
    assert flops(CONFIGS[name]) == pytest.approx(flops(CONFIGS["stdlib-dense"]), rel=0.01)


def test_what_the_comments_of_the_files_say_of_their_layers():
    layers = {name: model_config(c.model, vocab_size=4096, length=256).layers for name, c in CONFIGS.items()}
    assert layers["stdlib-batch-priority"][0].feedforward == MoEConfig(
        256, 8, k=2, capacity_factor=1.0, drop_priority="gate"
    )
    pools = {layer.feedforward.pool for layer in layers["stdlib-memory-plus"]
             if isinstance(layer.feedforward, ProductKeyConfig)}  # fmt: skip
    assert len(pools) == 1 and None not in pools, "Memory+ shares one table"
    scored = [(a.alibi, a.softcap, a.dropout) for a in (layer.attention for layer in layers["stdlib-alibi"])]
    assert scored == [(True, 50.0, 0.1)] * 3 + [(False, None, 0.1)]
    assert [layer.depth for layer in layers["stdlib-mod"]] == [None, DepthConfig(0.5), None, DepthConfig(0.5)]
    assert CONFIGS["stdlib-noisy-top-k"].train.importance > 0 and CONFIGS["stdlib-noisy-top-k"].train.load > 0
    assert CONFIGS["stdlib-sigmoid"].train.aux < TrainConfig.aux, "the bias balances"
