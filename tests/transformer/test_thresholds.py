"""Thresholds that stand in a config: the same function as sparsify_activations makes, decoded, trained, saved."""

import dataclasses
import json

import pytest
import torch

from moe import (
    AttentionThresholds,
    ThresholdedLinear,
    Thresholds,
    active_neurons,
    calibrate_teal,
    calibrate_thresholds,
    sparsify_activations,
    train_predictor,
)
from moe.calibration import feedforward_inputs
from moe.sparsified import feedforward_sites
from tests.tolerances import close
from training.model_config import ModelConfig, model_config
from transformer import (
    AttentionConfig,
    DenseConfig,
    LayerConfig,
    MoEConfig,
    ThresholdedConfig,
    Transformer,
    TransformerConfig,
    to_hugging_face,
    with_thresholds,
)

LIMITS = AttentionThresholds(query=0.4, key=0.5, value=0.6, output=0.01)


def dense(feedforward=None):
    config = TransformerConfig.uniform(
        vocab_size=31, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=32,
        feedforward=feedforward or DenseConfig(24),
    )  # fmt: skip
    return Transformer(config, generator=torch.Generator().manual_seed(0)).eval()


def ids(*shape):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(1))


def batches():
    return [{"input_ids": ids(2, 9)}, {"input_ids": ids(3, 7)}]


def teal(model):
    found = calibrate_teal(model, batches(), sparsity=0.4)
    return {"method": "teal", "thresholds": found.feedforward, "attention": found.attention}


def predicted(model):
    limits = calibrate_thresholds(model, batches(), method="cett", sparsity=0.6)
    inputs, predictors = feedforward_inputs(model, batches()), {}
    for name, site in feedforward_sites(model).items():
        active = active_neurons(site, inputs[name], method="cett", thresholds=limits[name])
        predictors[name] = train_predictor(inputs[name], active, rank=3, steps=5, batch=8)
    return {"method": "cett", "thresholds": limits, "predictors": predictors}


OPTIONS = {
    "teal": teal,
    "cats": lambda model: {
        "method": "cats",
        "thresholds": calibrate_thresholds(model, batches(), method="cats", sparsity=0.5),
    },
    "cett": lambda model: {
        "method": "cett",
        "thresholds": calibrate_thresholds(model, batches(), method="cett", error=0.3),
    },
    "top_k": lambda model: {"method": "hard", "top_k": 5},
    "relu": lambda model: {"method": "relu", "thresholds": dict.fromkeys(feedforward_sites(model), Thresholds())},
    "predictor": predicted,
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_model_is_what_sparsifying_makes_and_is_saved_with_its_thresholds(kind, tmp_path):
    model = dense()
    before, options = model(ids(2, 9)).logits.detach(), OPTIONS[kind](model)
    made = with_thresholds(model, **options)
    assert isinstance(made.layers[0].feedforward.gate, torch.nn.Linear) and not made.training
    standing = sparsify_activations(model, **options)
    expected = model(ids(2, 9)).logits
    standing.restore()
    assert (expected - before).abs().max() > 1e-4
    close(made(ids(2, 9)).logits, expected)
    assert model(ids(2, 9)).logits.equal(before)
    assert {p.data_ptr() for p in made.parameters()}.isdisjoint({p.data_ptr() for p in model.parameters()})
    made.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == made.config
    assert again(ids(2, 9)).logits.equal(made(ids(2, 9)).logits)
    with pytest.raises(ValueError, match=r"feedforward is .* here|ThresholdedConfig|thresholds|lacks"):
        to_hugging_face(made, tmp_path / "theirs")


def attended(feedforward, **options):
    attention = AttentionConfig(4, 2, 4, thresholds=LIMITS, **options)
    layers = (LayerConfig(attention, feedforward),) * 2
    config = TransformerConfig(vocab_size=31, dim=16, layers=layers, max_length=32)
    return Transformer(config, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("feedforward", [DenseConfig(24), MoEConfig(8, 4)])
def test_attention_with_thresholds_decodes_trains_and_survives(feedforward):
    model = attended(feedforward).eval()
    config = model.config
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    parts = ("query", "key", "value", "output")
    limits = [getattr(model.layers[1].attention, part).threshold for part in parts]
    assert limits == list(dataclasses.astuple(LIMITS))
    with torch.no_grad():
        whole = model(ids(2, 9)).logits
        cache = model.new_cache()
        steps = [model(ids(2, 9)[:, at : at + 1], cache=cache).logits for at in range(9)]
    close(torch.cat(steps, 1), whole)
    linears = [module for module in model.modules() if isinstance(module, ThresholdedLinear)]
    assert len(linears) == 8 and all(linear.races for linear in linears), "each measures its own calls"
    plain = Transformer(
        dataclasses.replace(
            config,
            layers=tuple(
                dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, thresholds=None))
                for layer in config.layers
            ),
        )
    )
    plain.load_state_dict(model.state_dict())
    assert (plain.eval()(ids(2, 9)).logits - whole).abs().max() > 1e-4
    model.train()(ids(2, 9), labels=ids(2, 9)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_words_of_a_config_file_reach_the_layers():
    section = ModelConfig(
        dim=16, heads=4, layers=2, feedforward="thresholded", activation="swiglu", hidden=24, threshold_method="teal",
        threshold=0.2, attention_threshold=0.3,
    )  # fmt: skip
    for layer in model_config(section, vocab_size=31, length=8).layers:
        assert layer.attention.thresholds == AttentionThresholds(0.3, 0.3, 0.3, 0.3)
        assert layer.feedforward == ThresholdedConfig(24, "swiglu", "teal", 0.2)
    none = model_config(ModelConfig(dim=16, heads=4), vocab_size=31, length=8)
    assert none.layers[0].attention.thresholds is None
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"model.attention_threshold must be >= 0, got {wrong}"):
            model_config(dataclasses.replace(section, attention_threshold=wrong), vocab_size=31, length=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hard"}, "thresholds, top_k or attention must be given"),
        ({"method": "hard", "top_k": 3, "thresholds": {"layers.0.feedforward": Thresholds()}}, "must be None with top"),
        (
            {"method": "teal", "thresholds": {"layers.2.feedforward": Thresholds()}},
            "thresholds must name layers.0.feed",
        ),
        ({"method": "cats", "attention": {"layers.0.attention": LIMITS}}, "method must be 'teal' with thresholds for"),
        ({"method": "teal", "attention": {"layers.0.mlp": LIMITS}}, "attention must name layers.0.attention"),
        ({"method": "hard", "top_k": 25}, r"top_k must be in \[1, hidden=24\], got 25"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        with_thresholds(dense(), **options)


def test_configs_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match=r"thresholds must stand alone, got threshold=0\.1 and top_k=None"):
        ThresholdedConfig(8, threshold=0.1, thresholds=Thresholds())
    with pytest.raises(ValueError, match="method must be 'hard', 'cats' or 'cett' with a predictor, got 'teal'"):
        ThresholdedConfig(8, method="teal", predictor_rank=2)
    with pytest.raises(ValueError, match="predictor_rank must be >= 1, got 0"):
        ThresholdedConfig(8, predictor_rank=0)
    record = attended(DenseConfig(24)).config.to_dict()
    record["layers"][0]["attention"]["thresholds"]["querry"] = 1.0
    with pytest.raises(
        ValueError, match=r"unknown key 'querry' in layers\[0\].attention.thresholds; did you mean 'query'"
    ):
        TransformerConfig.from_dict(record)
