"""Dropped weights, heads, paths and layers as fields of the config."""

import dataclasses

import pytest
import torch

from moe import Noise
from pruning import head_importance, prune_heads, prune_neurons
from tests.tolerances import close
from transformer import (
    AttentionConfig,
    DenseConfig,
    DepthConfig,
    LayerConfig,
    MoEConfig,
    Transformer,
    TransformerConfig,
)

DROPS = {
    "head": {"head_dropout": 0.5},
    "connect": {"drop_connect": 0.3},
    "path": {"path_dropout": 0.5},
    "layer": {"layer_drop": 0.5},
    "all": {"head_dropout": 0.2, "drop_connect": 0.2, "path_dropout": 0.2, "layer_drop": 0.3},
}


def model(*, feedforward=None, depth=None, layers=4, **drops):
    names = {field.name for field in dataclasses.fields(LayerConfig)}
    outer = {name: rate for name, rate in drops.items() if name in names}
    inner = {name: rate for name, rate in drops.items() if name not in names}
    dense = DenseConfig(12, drop_connect=drops.get("drop_connect", 0.0))
    layer = LayerConfig(AttentionConfig(4, 2, 4, **inner), feedforward or dense, depth, **outer)
    config = TransformerConfig(vocab_size=31, dim=16, layers=(layer,) * layers)
    return Transformer(config, generator=torch.Generator().manual_seed(0))


def ids(*shape):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(1))


def step(built, seed=3):
    torch.manual_seed(seed)
    out = built(ids(2, 9), labels=ids(2, 9))
    out.loss.backward()
    return [out.loss.detach(), *(p.grad for p in built.parameters())]


@pytest.mark.parametrize("kind", DROPS)
def test_evaluation_knows_nothing_of_it_and_training_draws(kind, tmp_path):
    built, plain = model(**DROPS[kind]), model()
    assert list(built.state_dict()) == list(plain.state_dict())
    close(built.eval()(ids(2, 9)).logits, plain.eval()(ids(2, 9)).logits)
    built.train()
    losses = {float(step(built, seed)[0]) for seed in range(6)}
    assert len(losses) > 1
    built.save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).config == built.config


@pytest.mark.parametrize("feedforward", [None, MoEConfig(12, 4)], ids=["dense", "moe"])
@pytest.mark.parametrize("depth", [None, DepthConfig(0.5)], ids=["all", "some"])
@pytest.mark.parametrize("kind", DROPS)
def test_checkpointing_draws_nothing_anew(kind, depth, feedforward):
    for seed in (3, 4):
        built, again = (model(feedforward=feedforward, depth=depth, **DROPS[kind]).train() for _ in range(2))
        again.gradient_checkpointing(True)
        for found, expected in zip(step(again, seed), step(built, seed), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                close(found, expected)


def test_a_path_is_dropped_for_a_whole_sample():
    built = model(layers=1, path_dropout=0.5).train()
    block, x = built.layers[0], torch.randn(64, 3, 16, generator=torch.Generator().manual_seed(5))
    block.feedforward = block.feedforward_norm = None
    angles = built._angles(torch.arange(3))[4]
    change = block(x, angles)[0] - x
    kept = change.flatten(1).any(1)
    assert 10 < kept.sum() < 54
    branch, _ = block.attention(block.attention_norm(x), angles)
    close(change[kept], 2 * branch[kept])


def test_the_two_branches_of_a_layer_are_dropped_apart():
    built, seen = model(layers=1, path_dropout=0.5).train(), []
    built.layers[0].path.register_forward_hook(lambda module, args, out: seen.append(out.flatten(1).any(1)))
    built.hidden_states(ids(64, 3), noise=Noise("7", 64))
    attention, feedforward = seen
    assert 10 < (attention & feedforward).sum() < 24 and 10 < (attention ^ feedforward).sum() < 54


def test_a_head_is_dropped_for_a_whole_sample():
    attention = model(layers=1, head_dropout=0.5).train().layers[0].attention
    seen = []
    attention.output.register_forward_pre_hook(lambda module, args: seen.append(args[0].unflatten(-1, (4, 4))))
    x = torch.randn(32, 3, 16, generator=torch.Generator().manual_seed(5))
    angles = model()._angles(torch.arange(3))[4]
    attention(x, angles)
    attention.eval()(x, angles)
    dropped, whole = seen
    kept = dropped.ne(0).any(-1).any(1)
    assert 32 < kept.sum() < 96
    close(dropped, 2 * whole * kept[:, None, :, None])


def test_dropped_weights_leave_names_hooks_and_pruning_as_they_are():
    built = model(layers=2, drop_connect=0.5).train()
    calls = []
    for name in ("query", "key", "value", "output"):
        module = getattr(built.layers[0].attention, name)
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        assert type(module) is torch.nn.Linear
    assert all(gradient is not None for gradient in step(built))
    assert calls == ["query", "key", "value", "output"]
    prune_heads(built, head_importance(built, [ids(2, 9)]), fraction=0.5)
    prune_neurons(built, fraction=0.5)
    assert sum(layer.feedforward.hidden for layer in built.config.layers) == 12
    assert {layer.feedforward.drop_connect for layer in built.config.layers} == {0.5}
    assert all(gradient is not None for gradient in step(built.train()))


def test_a_weight_is_dropped_for_all_rows_and_the_others_are_scaled():
    feedforward = model(layers=1, drop_connect=0.3).train().layers[0].feedforward
    x = torch.randn(5, 16)
    torch.manual_seed(0)
    found = feedforward(x)
    torch.manual_seed(0)
    up, gate, down = (
        torch.where(torch.rand(m.weight.shape) < 0.3, 0, m.weight / 0.7)
        for m in (feedforward.up, feedforward.gate, feedforward.down)
    )
    close(found, (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_a_skipped_layer_gives_the_records_of_no_token():
    built = model(feedforward=MoEConfig(12, 4), depth=DepthConfig(0.5), layer_drop=0.9).train()
    torch.manual_seed(0)
    out = built(ids(2, 9), labels=ids(2, 9))
    tokens = [routing.num_tokens for routing in out.routings]
    assert 0 in tokens
    for routing, depth in zip(out.routings, out.depths, strict=True):
        assert depth.selected.shape[1] == (9 if routing.num_tokens else 0)
        assert routing.loads().sum() == 2 * routing.num_tokens
        assert depth.aux_loss().isfinite()


@pytest.mark.parametrize("name", ["head_dropout", "drop_connect", "path_dropout", "layer_drop"])
def test_a_rate_is_below_one(name):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\), got 1.0"):
        model(**{name: 1.0})
