"""Options of [model] and [[model.layer]] that feed-forwards have: each reaches its layer, none is set in vain."""

import collections
import dataclasses
import math

import pytest

from training.config import RunConfig, from_dict
from training.model_config import LayerOverride, ModelConfig, model_config
from training.model_owners import OWNERS, SELECTION_OWNERS, SIZE_OWNERS
from training.run import make_trainer
from transformer.feedforward_config import ROUTER_OPTIONS

# what is chosen first, then the option and its value
MOE = {"feedforward": "moe", "num_experts": 4, "k": 1, "hidden": 16}
MEMORY = {"feedforward": "product_key", "num_keys": 8, "memory_k": 4}
OPTIONS = [
    (MOE | {"router": "switch"}, "jitter", 0.1),
    (MOE | {"router": "top_2", "k": 2}, "second_expert", "always"),
    (MOE | {"router": "top_k"}, "renormalize", False),
    (MOE | {"router": "sigmoid"}, "num_groups", 2),
    (MOE | {"router": "sigmoid", "num_groups": 2}, "top_groups", 2),
    (MOE | {"router": "sigmoid"}, "route_scale", 2.5),
    (MOE | {"router": "sigmoid"}, "bias_update", 0.1),
    (MOE | {"router": "sinkhorn"}, "sinkhorn_iterations", 3),
    (MOE | {"router": "sinkhorn"}, "sinkhorn_temperature", 0.5),
    (MOE | {"router": "base"}, "auction_rounds", 9),
    (MOE | {"router": "base"}, "auction_epsilon", 0.5),
    (MOE | {"router": "hash"}, "hash_table", "balanced"),
    (MOE | {"router": "hash"}, "hash_seed", 3),
    (MOE | {"capacity_factor": 1.5}, "drop_priority", "gate"),
    (MOE, "expert_bias", True),
    ({"feedforward": "soft_moe", "allow_future": True}, "expert_bias", True),
    ({"feedforward": "soft_moe", "allow_future": True}, "slots_per_expert", 3),
    (MEMORY, "memory_heads", 2),
    (MEMORY, "memory_k", 3),
    (MEMORY, "key_dim", 6),
    (MEMORY, "query_norm", "none"),
    (MEMORY, "gated", True),
    (MEMORY, "memory_pool", "facts"),
    (MEMORY | {"gated": True}, "value_dim", 24),
    ({"feedforward": "thresholded"}, "top_neurons", 5),
    ({"feedforward": "thresholded"}, "threshold_execution", "dense"),
    ({"feedforward": "thresholded"}, "activation_predictor_rank", 5),
    ({"feedforward": "dense"}, "error_k", 3),
    ({"feedforward": "dense", "error_k": 3}, "error_unified", True),
    ({"feedforward": "dense"}, "drop_connect", 0.1),
    ({}, "layer_drop", 0.2),
    ({"layer_drop": 0.2}, "layer_drop_rescale", True),
    ({"depth_capacity": 0.5}, "depth_weighting", "raw"),
]
NAMES = {"memory_heads": "heads", "memory_k": "k", "memory_pool": "pool", "top_neurons": "top_k",
         "threshold_execution": "execution", "activation_predictor_rank": "predictor_rank",
         "depth_weighting": "weighting"}  # fmt: skip
PLAIN = {"dim": 16, "layers": 2, "heads": 2}


def layers(**options):
    return model_config(ModelConfig(**PLAIN | options), vocab_size=31, length=8).layers


def value(layer, option):
    part = layer if option.startswith("layer_drop") else layer.depth if "depth" in option else layer.feedforward
    return getattr(part, NAMES.get(option, option))


@pytest.mark.parametrize(("chosen", "option", "wanted"), OPTIONS, ids=[option for _, option, _ in OPTIONS])
def test_an_option_reaches_every_layer_or_the_one_that_names_it(chosen, option, wanted):
    plain = value(layers(**chosen)[0], option)
    assert plain != wanted
    assert [value(layer, option) for layer in layers(**chosen | {option: wanted})] == [wanted, wanted]
    one = layers(**chosen, layer=(LayerOverride(at=1, **{option: wanted}),))
    assert [value(layer, option) for layer in one] == [plain, wanted]


def test_every_option_of_a_feedforward_can_differ_in_one_layer():
    of_a_layer = {field.name for field in dataclasses.fields(LayerOverride)} - {"at"}
    of_the_model = {field.name for field in dataclasses.fields(ModelConfig)}
    assert of_a_layer <= of_the_model
    assert {option for _, option, _ in OPTIONS} <= of_a_layer


def test_layers_of_several_routers_take_each_their_own_options():
    first, second = layers(
        **MOE | {"router": "switch"},
        jitter=0.1,
        layer=(LayerOverride(at=1, router="top_2", k=2, second_expert="always"),),
    )
    assert (first.feedforward.jitter, first.feedforward.second_expert) == (0.1, "random")
    assert (second.feedforward.jitter, second.feedforward.second_expert) == (0.0, "always")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jitter": 0.1}, r"model\.jitter belongs to router switch, got jitter=0\.1 with top_k"),
        ({"auction_rounds": 3, "layer": (LayerOverride(at=0, router="hash", k=1),)},
         r"model\.auction_rounds belongs to router base, got auction_rounds=3 with hash, top_k"),
        ({"router": "switch", "k": 1, "layer": (LayerOverride(at=1, router="base", jitter=0.1),)},
         r"model\.layer\.jitter belongs to router switch, got jitter=0\.1 in layer 1, whose router is base"),
        ({"feedforward": "dense", "hash_table": "even"}, r"model\.hash_table belongs to feedforward moe"),
        ({"layer": (LayerOverride(at=0, value_dim=8),)}, r"model\.layer\.value_dim belongs to feedforward product_key"),
        ({"activation_predictor_rank": 4},
         r"model\.activation_predictor_rank belongs to feedforward thresholded, got .*=4 with moe"),
        ({"layer": (LayerOverride(at=1, feedforward="dense", activation_predictor_rank=4),)},
         r"model\.layer\.activation_predictor_rank belongs to feedforward thresholded, got .* 1, which is dense"),
        ({"layer_drop_rescale": True}, r"model\.layer_drop_rescale needs a layer_drop, got none"),
        ({"layer": (LayerOverride(at=1, layer_drop_rescale=True),)}, r"needs a layer_drop, got none in layer 1"),
        ({"layer": (LayerOverride(at=1, depth_weighting="raw"),)}, r"needs a depth_capacity, got none in layer 1"),
        ({"layer": (LayerOverride(at=1, feedforward="dense", k=3),)},
         r"model\.layer\.k belongs to feedforward moe, got k=3 in layer 1, which is dense"),
        ({"layer": (LayerOverride(at=1, feedforward="dense", num_experts=3),)}, r"num_experts belongs to .*soft_moe"),
        ({"layer": (LayerOverride(at=0, feedforward="peer", hidden=3),)}, r"hidden belongs to .* which is peer"),
        ({"allow_future": True}, r"allow_future belongs to router expert_choice or .*soft_moe, got .*=True with top_k"),
        ({"feedforward": "dense", "allow_future": True}, r"model\.allow_future belongs to feedforward moe or soft_moe"),
        ({"layer": (LayerOverride(at=1, k=1), LayerOverride(at=1, hidden=8))},
         r"model\.layer\.at must name each layer once, got 1 twice"),
    ],
)  # fmt: skip
def test_what_is_set_in_vain_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layers(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MEMORY | {"memory_k": 9}, r"layer 0: memory_k must be in \[1, num_keys=8\], got 9"),
        (MEMORY | {"memory_heads": 0}, r"layer 0: memory_heads must be >= 1, got 0"),
        ({"feedforward": "thresholded", "hidden": 8, "top_neurons": 9}, r"top_neurons must be in \[1, hidden=8\], got"),
        ({"feedforward": "thresholded", "threshold_method": "teal", "activation_predictor_rank": 2},
         r"layer 0: threshold_method must be 'hard', 'cats' or 'cett' with a predictor, got 'teal'"),
        ({"feedforward": "thresholded", "threshold_method": "cats"}, r"threshold_method 'cats' must have a gate"),
        ({"layer": (LayerOverride(at=1, depth_capacity=1.5),)}, r"layer 1: depth_capacity must be in \(0, 1\], got"),
        ({"selection": "lsh", "select_buckets": 3}, r"select_buckets must be even, got 3"),
        ({"selection": "top_k", "select_k": 0}, r"select_k must be >= 1, got 0"),
        ({"layer": (LayerOverride(at=1, k=9),)}, r"layer 1: k must be in \[1, num_experts=8\], got 9"),
        ({"layer": (LayerOverride(at=1, attention_dropout=1.5),)}, r"layer 1: attention_dropout must be .*, got 1\.5"),
        ({"kv_heads": 3}, r"layer 0: kv_heads must divide heads=2, got 3"),
        ({"kv_heads": 1, "selection": "lsh", "select_shared_qk": True},
         r": kv_heads must be heads=2 with select_shared_qk, got 1"),
        ({"pattern": "per_head(causal())"}, r"for each of heads=2 query heads, got 1"),
        ({"heads": 16}, r": model\.heads must leave each head an even number of dim=16 channels, got 16: or set"),
        ({"depth_capacity": 0.5, "selection": "moba"}, r"selection must be 'none' in a layer with .*, got 'moba'"),
        ({"path_dropout": 2.0}, r"path_dropout must be in \[0, 1\), got 2\.0"),
        ({"selection": "sinkhorn", "select_block": 0}, r"layer 0: select_block must be >= 1, got 0"),
        ({"selection": "nsa", "select_stride": 0}, r"layer 0: select_stride must be >= 1, got 0"),
        ({"selection": "nsa", "select_stride": 64}, r"select_stride must be at most half of select_block=64 without"),
        ({"selection": "nsa", "select_compress": 24}, r"layer 0: select_stride must divide select_compress=24, got 16"),
        ({"selection": "nsa", "select_compress": 128}, r"select_compress must be <= select_block=64, got 128"),
        ({"selection": "moba", "select_compress": 32}, r"select_compress belongs to selection nsa"),
        ({"selection": "nsa", "select_stride": 12}, r"select_stride must divide select_block=64, got 12"),
        ({"selection": "nsa", "select_k": 2}, r"select_k must be >= select_initial \+ select_local = 3, got 2"),
        (MOE | {"router": "sigmoid", "route_scale": 0.0}, r"route_scale must be a finite number > 0, got 0\.0"),
        (MOE | {"router": "sigmoid", "bias_update": -0.5}, r"bias_update must be a finite number >= 0, got -0\.5"),
        ({"softcap": -1.0}, r"softcap must be a finite number >= 0, got -1\.0"),
    ],
)  # fmt: skip
def test_errors_speak_the_words_of_the_file(options, message):
    with pytest.raises(ValueError, match=message):
        layers(**options)


def owners():
    """(word, what makes its owner a layer's) for every word of [model] that is a number, for each of its owners."""
    for field in dataclasses.fields(ModelConfig):
        name, kinds = field.name, OWNERS | SIZE_OWNERS
        if field.type not in (int, float, int | None, float | None) or name.endswith("seed"):
            continue
        if name in ROUTER_OPTIONS:
            for router in ROUTER_OPTIONS[name]:
                yield name, {"router": router, "k": 1}
        elif name in SELECTION_OWNERS:
            for selection in SELECTION_OWNERS[name]:
                yield name, {"feedforward": "dense", "selection": selection}
        else:
            for kind in kinds.get(name, ["dense"]):
                yield name, {"feedforward": kind, "allow_future": kind == "soft_moe", "gated": name == "value_dim"}


@pytest.mark.parametrize(("name", "options"), list(owners()))
def test_a_number_out_of_range_is_refused_by_its_own_name(name, options):
    """Below zero, NaN where it may be: word and number as they stand in the file."""
    real = "float" in str(ModelConfig.__dataclass_fields__[name].type)
    for wrong in (-3.5, math.nan) if real else (-3,):
        with pytest.raises(ValueError, match=rf"(^|[ .]){name} must [^,]*.*got {wrong}"):
            layers(**options | {name: wrong})


@pytest.mark.parametrize(
    ("section", "name"), [("train", "importance"), ("train", "load"), ("train", "entropy"), ("optim", "router_lr")]
)
def test_what_only_routers_have_is_refused_without_one(section, name):
    words = {section: {name: 0.5}}
    for kind in ("dense", "product_key"):
        with pytest.raises(ValueError, match=rf"{section}\.{name} needs a layer with a router, got 0\.5 and no layer"):
            from_dict(RunConfig, {"model": {"feedforward": kind}, **words}, where="test")
    mixed = {"router": "noisy_top_k", "layer": [{"at": 0, "feedforward": "dense"}]}
    from_dict(RunConfig, {"model": mixed, **words}, where="test")


def test_a_rescaled_layer_drop_may_be_of_some_layers_alone():
    found = layers(layer_drop_rescale=True, layer=(LayerOverride(at=1, layer_drop=0.3),))
    assert [(layer.layer_drop, layer.layer_drop_rescale) for layer in found] == [(0.0, False), (0.3, True)]


def test_a_run_balances_its_hash_tables_over_the_training_text(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"the number is {number}\n" * 20)
    run = from_dict(RunConfig, {
        "out": str(tmp_path / "run"), "data": {"corpus": str(texts), "tokenizer": "bytes", "length": 16, "cache": None},
        "model": {**PLAIN, **MOE, "router": "hash", "hash_table": "balanced"}, "train": {"steps": 1, "batch": 2},
    }, where="test")  # fmt: skip
    trainer = make_trainer(run)
    counts = collections.Counter(trainer.data.train.tolist())
    carried, expected = [0] * 4, {}
    for token in sorted(range(257), key=lambda token: -counts[token]):
        lightest = min(range(4), key=lambda expert: (carried[expert], expert))
        expected[token], carried[lightest] = lightest, carried[lightest] + counts[token]
    for layer in trainer.model.layers:
        assert layer.feedforward.router.table[:, 0].tolist() == [expected[token] for token in range(257)]
    assert max(carried) < 1.5 * min(carried)
    trainer.model.train()
    assert math.isfinite(trainer.train_step()["loss"])
