"""Predictors that a model is made with: idle until they are trained, frozen, then told apart by loops."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.tolerances import close
from transformer import (
    AttentionConfig,
    DenseConfig,
    DepthConfig,
    LayerConfig,
    ThresholdedConfig,
    Transformer,
    TransformerConfig,
    own_foresight,
    train_own_predictors,
    with_thresholds,
)

KINDS = {
    "hard": ThresholdedConfig(24, "reglu", predictor_rank=5),
    "top_k": ThresholdedConfig(24, "relu2", top_k=6, predictor_rank=5),
    "cats": ThresholdedConfig(24, "swiglu", "cats", 0.05, predictor_rank=5),
    "cett": ThresholdedConfig(24, "swiglu", "cett", 0.002, predictor_rank=5),
}


def made(*feedforwards) -> Transformer:
    layers = tuple(LayerConfig(AttentionConfig(4, 2, 4), feedforward) for feedforward in feedforwards)
    config = TransformerConfig(vocab_size=31, dim=16, layers=layers, max_length=32)
    return Transformer(config, generator=torch.Generator().manual_seed(0))


def without_predictors(model: Transformer) -> Transformer:
    layers = tuple(
        dataclasses.replace(layer, feedforward=dataclasses.replace(layer.feedforward, predictor_rank=None))
        for layer in model.config.layers
    )
    plain = Transformer(dataclasses.replace(model.config, layers=layers))
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if "predictor" not in name})
    return plain.train(model.training)


def ids(*shape, seed=1):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_predictor_drops_nothing(kind, training):
    model = made(KINDS[kind], KINDS[kind]).train(training)
    assert all(layer.feedforward.predictor is not None for layer in model.layers)
    assert model(ids(2, 9)).logits.equal(without_predictors(model)(ids(2, 9)).logits)


def frozen(model: nn.Module) -> set[str]:
    return {name.partition("feedforward.")[2] for name, p in model.named_parameters() if not p.requires_grad}


def test_predictors_alone_are_frozen_wherever_the_model_comes_from(tmp_path):
    model = made(KINDS["hard"], DenseConfig(24))
    told = {"predictor.down.weight", "predictor.up.weight", "predictor.up.bias"}
    model.save_pretrained(tmp_path)
    more = with_thresholds(model, method="hard", top_k=4)
    trained = train_own_predictors(model, [ids(4, 16)], steps=1, recall=0.9)
    for one in (model, Transformer.from_pretrained(tmp_path), more, trained):
        assert frozen(one) == told


def neurons(layer, x: torch.Tensor) -> list[bool]:
    """Which neurons of one token the layer's rule keeps, by its formula."""
    up = [float(row @ x) for row in layer.up.weight]
    gate = [0.0] * len(up) if layer.gate is None else [float(row @ x) for row in layer.gate.weight]
    if layer.activation == "swiglu":
        opened = [g / (1 + 2.718281828459045**-g) for g in gate]
    else:
        opened = [max(g, 0.0) for g in gate]
    h = [max(u, 0.0) ** 2 if layer.gate is None else o * u for o, u in zip(opened, up, strict=True)]
    if layer.top_k is not None:
        least = sorted(map(abs, h))[-layer.top_k]
        return [value != 0 and abs(value) >= least for value in h]
    if layer.method == "cats":
        return [abs(o) > layer.thresholds.gate for o in opened]
    norms = layer.down.weight.norm(dim=0).tolist() if layer.method == "cett" else [1.0] * len(h)
    return [abs(value) * norm > layer.thresholds.down for value, norm in zip(h, norms, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_trained_predictors_tell_what_the_own_thresholds_keep(kind, tmp_path):
    model = made(KINDS[kind], KINDS[kind]).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = train_own_predictors(
        model, [ids(30, 32, seed=2)], recall=0.9, steps=150, generator=torch.Generator().manual_seed(3)
    )
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    for name, tensor in told.state_dict().items():
        assert tensor.equal(before[name]) != ("predictor" in name)
    fresh, seen = ids(2, 12, seed=4), []
    hooks = [layer.feedforward.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for layer in model.layers]
    model(fresh)
    for hook in hooks:
        hook.remove()
    found = wanted = computed = 0
    for layer, inputs in zip(told.layers, seen, strict=True):
        for x in inputs.flatten(0, 1):
            keeps = neurons(layer.feedforward, x)
            guess = (layer.feedforward.predictor(x) > layer.feedforward.predictor.threshold).tolist()
            wanted, computed = wanted + sum(keeps), computed + sum(guess)
            found += sum(a and b for a, b in zip(keeps, guess, strict=True))
    foresight = own_foresight(told, [fresh])
    assert (foresight.recall, foresight.predicted, foresight.active) == pytest.approx(
        (found / wanted, computed / 24 / 48, wanted / 24 / 48)
    )
    assert foresight.active < foresight.predicted < 1
    assert foresight.recall > 0.8 and (told(fresh).logits - model(fresh).logits).abs().max() > 1e-5
    told.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == told.config
    close(again(fresh).logits, told(fresh).logits)


def test_training_again_starts_from_every_neuron():
    """What a first predictor drops is not missing from what the second one learns."""
    model, batches = made(KINDS["hard"], KINDS["hard"]), [ids(8, 32, seed=2)]

    def train(start):
        return train_own_predictors(start, batches, recall=0.5, steps=5, generator=torch.Generator().manual_seed(3))

    once = train(model)
    twice = train(once)
    assert once.config == twice.config
    assert all(tensor.equal(twice.state_dict()[name]) for name, tensor in once.state_dict().items())


def test_a_model_without_predictors_is_refused():
    with pytest.raises(ValueError, match="model must have a layer with a predictor_rank, got none"):
        train_own_predictors(made(DenseConfig(24), ThresholdedConfig(24)), [ids(4, 16)])
    with pytest.raises(ValueError, match="model must have a layer with a predictor_rank, got none"):
        own_foresight(made(DenseConfig(24)), [ids(4, 16)])


def test_predictors_behind_a_layer_that_some_tokens_pass_learn_from_those_alone():
    layer = LayerConfig(AttentionConfig(4, 2, 4), KINDS["hard"], depth=DepthConfig(0.5))
    config = TransformerConfig(vocab_size=31, dim=16, layers=(layer,), max_length=32)
    model = Transformer(config, generator=torch.Generator().manual_seed(0)).eval()
    mask = (torch.arange(9) < torch.tensor([9, 2, 5, 7])[:, None]).long()
    padded = {"input_ids": ids(4, 9), "attention_mask": mask}
    alone = [ids(4, 9)[i : i + 1, : int(mask[i].sum())] for i in range(4)]
    found, want = (
        train_own_predictors(model, batches, steps=3, generator=torch.Generator().manual_seed(0)).state_dict()
        for batches in ([padded], alone)
    )
    told = [name for name in want if "feedforward.predictor" in name]
    assert told
    for name in told:
        close(found[name], want[name], torch.float32)
