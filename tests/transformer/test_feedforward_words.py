"""Options of a feed-forward's record: each reaches its layer, changes what it says, and survives JSON."""

import dataclasses

import pytest
import torch

from moe import BalancedAssignmentRouter, HashRouter, SinkhornRouter
from tests.tolerances import close
from transformer import (
    LayerConfig,
    MoEConfig,
    ProductKeyConfig,
    ThresholdedConfig,
    Transformer,
    TransformerConfig,
)
from transformer.block import Block

VOCABULARY = 30


def config(feedforward):
    return TransformerConfig.uniform(vocab_size=VOCABULARY, dim=16, num_layers=1, num_heads=2, feedforward=feedforward)


def built(feedforward):
    model = Transformer(config(feedforward), generator=torch.Generator().manual_seed(0))
    return model.layers[0].feedforward


def states(rows=64):
    return torch.randn(1, rows, 16, generator=torch.Generator().manual_seed(1))


WORDS = {
    "second_expert": MoEConfig(16, 4, router="top_2", second_expert="always"),
    "sinkhorn": MoEConfig(16, 4, router="sinkhorn", sinkhorn_iterations=2, sinkhorn_temperature=0.05),
    "auction": MoEConfig(16, 4, k=1, router="base", auction_rounds=1, auction_epsilon=2.0),
    "even": MoEConfig(16, 4, k=1, router="hash", hash_table="even", hash_seed=3),
    "balanced": MoEConfig(16, 4, k=1, router="hash", hash_table="balanced"),
    "value_dim": ProductKeyConfig(8, heads=2, k=4, key_dim=8, gated=True, value_dim=24),
    "execution": ThresholdedConfig(16, threshold=0.1, execution="sparse"),
}


@pytest.mark.parametrize("word", WORDS)
def test_the_json_round_trip_keeps_it(word):
    whole = config(WORDS[word])
    assert TransformerConfig.from_dict(whole.to_dict()) == whole


@pytest.mark.parametrize("kind", [MoEConfig(16, 4, shared_hidden=6, expert_bias=True), MoEConfig(16, 4)])
def test_experts_have_biases_that_start_as_zeros_or_none(kind):
    layer = built(kind)
    biases = {name: value for name, value in layer.state_dict().items() if "bias" in name}
    assert len(biases) == (4 if kind.expert_bias else 0)
    assert not any(bias.any() for bias in biases.values())


def test_gshards_second_expert_is_used_always_or_at_random():
    def skipped(feedforward):
        return built(feedforward).train()(states())[1].skipped

    assert skipped(WORDS["second_expert"]) == 0 < skipped(MoEConfig(16, 4, router="top_2"))


@pytest.mark.parametrize(
    ("word", "default", "router"),
    [
        ("sinkhorn", MoEConfig(16, 4, router="sinkhorn", sinkhorn_iterations=2),
         SinkhornRouter(16, 4, k=2, iterations=2, temperature=0.05)),
        ("auction", MoEConfig(16, 4, k=1, router="base"), BalancedAssignmentRouter(16, 4, rounds=1, epsilon=2.0)),
    ],
)  # fmt: skip
def test_a_balancing_routers_numbers_reach_it_and_change_its_choice(word, default, router):
    layer, other = built(WORDS[word]), built(default)
    # unit logits, as the routers' own draw gives them
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(2)) / 4
    for one in (layer.router, other.router, router):
        one.weight.data = weight
    x = states(256)[0]
    chosen = layer.router.train()(x).expert
    assert chosen.equal(router.train()(x).expert)
    assert not chosen.equal(other.router.train()(x).expert)


def test_an_even_hash_table_spreads_the_vocabulary():
    layer = built(WORDS["even"])
    ids = torch.arange(VOCABULARY)
    loads = layer(torch.zeros(1, VOCABULARY, 16), token_ids=ids[None])[1].loads()
    assert sorted(loads.tolist()) == [7, 7, 8, 8]
    same = HashRouter(16, 4, vocab_size=VOCABULARY, seed=3)
    assert layer.router.table.equal(same.table)


def test_a_balanced_hash_table_waits_for_frequencies_and_is_saved(tmp_path):
    model = Transformer(config(WORDS["balanced"]))
    ids = torch.arange(VOCABULARY)[None]
    with pytest.raises(ValueError, match=r"must be made before routing: call balance\(frequencies\)"):
        model(ids)
    frequencies = 1000 // torch.arange(1, VOCABULARY + 1)
    model.layers[0].feedforward.router.balance(frequencies)
    table = model.layers[0].feedforward.router.table[:, 0]
    carried = [int(frequencies[table == expert].sum()) for expert in range(4)]
    # the most frequent id alone outweighs a quarter
    assert max(carried) == 1000 and max(carried[1:]) - min(carried[1:]) <= 1000 // 15
    again = Transformer.from_pretrained(model.save_pretrained(tmp_path))
    close(again(ids).logits, model.eval()(ids).logits)


def test_a_balanced_table_is_what_greedy_placing_gives():
    frequencies = torch.randint(1, 100, (VOCABULARY,), generator=torch.Generator().manual_seed(0))
    router = HashRouter(16, 4, vocab_size=VOCABULARY, frequencies="later")
    router.balance(frequencies)
    assert router.table.equal(HashRouter(16, 4, vocab_size=VOCABULARY, frequencies=frequencies).table)
    with pytest.raises(ValueError, match="must have a table to balance"):
        HashRouter(16, 4).balance(frequencies)
    with pytest.raises(ValueError, match="vocab_size must be given with frequencies='later'"):
        HashRouter(16, 4, frequencies="later")


def test_a_memorys_values_have_their_own_width():
    memory = built(WORDS["value_dim"])
    assert memory.values.weight.shape == (64, 24)
    assert (memory.gate.out_features, memory.output.in_features, memory.output.out_features) == (24, 24, 16)
    assert memory(states()).shape == (1, 64, 16)


def test_layers_that_share_a_pool_agree_on_its_width():
    base = config(dataclasses.replace(WORDS["value_dim"], pool="facts"))
    other = LayerConfig(None, dataclasses.replace(base.layers[0].feedforward, value_dim=32))
    with pytest.raises(ValueError, match="layer 1: value_dim must be 24 as in layer 0, which shares pool 'facts'"):
        dataclasses.replace(base, layers=(*base.layers, other))


def test_execution_decides_how_a_thresholded_layer_decodes():
    x = states(1)
    layers = {way: built(dataclasses.replace(WORDS["execution"], execution=way)).eval() for way in ("sparse", "dense")}
    with torch.no_grad():
        close(layers["sparse"](x), layers["dense"](x))
    assert layers["sparse"]._tables and not layers["dense"]._tables


def test_a_rescaled_layer_drop_keeps_the_mean_of_the_stream():
    layer = LayerConfig(None, MoEConfig(16, 4), layer_drop=0.75, layer_drop_rescale=True)
    torch.manual_seed(0)
    block, plain = Block(16, layer), Block(16, dataclasses.replace(layer, layer_drop_rescale=False))
    plain.load_state_dict(block.state_dict())
    x = states()
    whole = block.eval()(x, None)[0]
    outputs = {}
    for one in (block, plain):
        torch.manual_seed(0)
        found = [one.train()(x, None)[0] for _ in range(12)]
        outputs[one] = [y for y in found if not y.equal(x)]
        assert 0 < len(outputs[one]) < 12
    close(outputs[block][0], x + 4 * (whole - x))
    close(outputs[plain][0], whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_expert": "always"}, "second_expert belongs to the top_2 router"),
        ({"router": "top_2", "second_expert": "never"}, "second_expert must be one of random, always, got 'never'"),
        ({"sinkhorn_temperature": 2.0}, "sinkhorn_temperature belongs to the sinkhorn router"),
        (
            {"router": "sinkhorn", "sinkhorn_temperature": 0.0},
            "sinkhorn_temperature must be a finite number > 0, got 0",
        ),
        ({"auction_rounds": 3}, "auction_rounds belongs to the base router"),
        ({"router": "base", "k": 1, "auction_rounds": 0}, "auction_rounds must be >= 1, got 0"),
        ({"router": "base", "k": 1, "auction_epsilon": -1.0}, "auction_epsilon must be a finite number > 0, got -1.0"),
        ({"hash_table": "even"}, "hash_table belongs to the hash router"),
        ({"router": "hash", "hash_table": "odd"}, "hash_table must be one of none, even, balanced, got 'odd'"),
        (
            {"router": "hash", "hash_table": "balanced", "hash_seed": 1},
            "hash_seed must be 0 with hash_table='balanced'",
        ),
    ],
)
def test_what_a_mixture_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"hidden": 8, "num_experts": 4, **options})


def test_what_the_others_refuse():
    with pytest.raises(ValueError, match="value_dim needs gated=True"):
        ProductKeyConfig(8, k=4, value_dim=8)
    with pytest.raises(ValueError, match="execution must be one of auto, dense, sparse, got 'fast'"):
        ThresholdedConfig(8, execution="fast")
    with pytest.raises(ValueError, match="layer_drop_rescale needs a layer_drop > 0"):
        LayerConfig(None, None, layer_drop_rescale=True)
