"""Mixture-of-Depths as a layer choice: against a loop over tokens, cached, replayed, counted."""

import dataclasses
from itertools import combinations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.depth import MixtureOfDepths
from sparse_attn import parse_pattern
from tests.tolerances import close
from transformer import (
    AttentionConfig,
    DenseConfig,
    DepthConfig,
    LayerConfig,
    MoEConfig,
    ProductKeyConfig,
    Transformer,
    TransformerConfig,
    generate,
)
from transformer.accounting import visible_pairs_among

WINDOW = "causal() & (sliding_window(4) | sinks(1))"
PATTERNS = ["causal()", WINDOW]
FEEDFORWARDS = {
    "dense": DenseConfig(12),
    "moe": MoEConfig(12, 4),
    "hash": MoEConfig(12, 4, router="hash"),
    "memory": ProductKeyConfig(8, heads=2, k=4, key_dim=8),
}


def model(*, pattern="causal()", feedforward="dense", capacity=0.5, weighting="sigmoid", layers=3, **options):
    """Every second layer lets only some tokens pass, as in the paper."""
    layer = LayerConfig(AttentionConfig(4, 2, 4, pattern), FEEDFORWARDS[feedforward])
    depth = dataclasses.replace(layer, depth=DepthConfig(capacity, weighting))
    config = TransformerConfig(
        vocab_size=31, dim=16, layers=tuple(depth if i % 2 == 0 else layer for i in range(layers)), **options
    )
    built = Transformer(config, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(2)
    for name, parameter in built.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "predictor" in name else 0.3, generator=draws)
    return built


def ids(*shape, seed=1):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(built, tokens):
    cache = built.new_cache()
    parts = [built(tokens[:, at : at + 1], cache=cache).logits for at in range(tokens.shape[1])]
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("feedforward", FEEDFORWARDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_decoding_equals_the_full_forward(pattern, feedforward):
    built, tokens = model(pattern=pattern, feedforward=feedforward).eval(), ids(3, 14)
    with torch.no_grad():
        whole = built(tokens)
        assert 0.1 < whole.depths[0].share() < 0.9
        logits, cache = one_by_one(built, tokens)
        close(logits, whole.logits)
        assert cache.layers[0].held == whole.depths[0].selected.sum(1).tolist()
        chunked = built.new_cache()
        parts = [built(part, cache=chunked).logits for part in tokens.split([5, 1, 6, 2], 1)]
        close(torch.cat(parts, 1), whole.logits)


@pytest.mark.parametrize("pattern", ["causal() & sliding_window(6)", "causal() & (sliding_window(6) | sinks(1))"])
def test_long_decoding_through_a_window_keeps_the_keys_that_a_chunk_still_sees(pattern):
    """Past the cache's slack, where keys are dropped; other tokens pass in each sequence."""
    built, tokens = model(pattern=pattern, max_length=256).eval(), ids(3, 230)
    with torch.no_grad():
        whole = built(tokens)
        passed = whole.depths[0].selected.sum(1)
        assert passed.unique().numel() > 1
        cache = built.new_cache()
        chunks = [90, 7, *[1] * 30, 3, 64, *[1] * 5, 31]
        close(torch.cat([built(part, cache=cache).logits for part in tokens.split(chunks, 1)], 1), whole.logits)
    assert max(cache.layers[0].held) < passed.min()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_left_padding_changes_nothing_for_the_real_tokens(pattern):
    built = model(pattern=pattern if pattern == "causal()" else "causal() & sliding_window(4)").eval()
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    with torch.no_grad():
        padded = built(tokens, attention_mask=mask)
        alone = built(tokens[1:, 4:])
    close(padded.logits[1:, 4:], alone.logits)
    assert not padded.depths[0].selected[1, :4].any()
    long = generate(built, tokens, max_new_tokens=4, attention_mask=mask)
    assert long[1:, 9:].equal(generate(built, tokens[1:, 4:], max_new_tokens=4)[:, 5:])


def run_by_tokens(block, x, selected, pattern, gate):
    """The block as loops over sequences and tokens: what passes attends to what passed, at its own position."""
    out = x
    for b in range(x.shape[0]):
        places = selected[b].nonzero().flatten().tolist()
        rows = x[b, places]
        normed = block.attention_norm(rows)
        mixed = torch.stack([attend_one(block.attention, normed, places, i, pattern) for i in range(len(places))])
        after = rows + mixed @ block.attention.output.weight.T
        inner, f = block.feedforward_norm(after), block.feedforward
        gates = torch.nn.functional.silu(inner @ f.gate.weight.T)
        after = after + (gates * (inner @ f.up.weight.T)) @ f.down.weight.T
        change = gate(rows @ block.depth.weight[0])[:, None] * (after - rows)
        out = out.index_put((torch.tensor(b), torch.tensor(places)), change, accumulate=True)
    return out


def attend_one(attention, normed, places, i, pattern):
    d, group, heads = attention.head_dim, attention.num_heads // attention.num_kv_heads, []
    seen = [j for j, place in enumerate(places) if visible(pattern, places[i], place)]
    for h in range(attention.num_heads):
        own, shared = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        query = turned(attention.query.weight[own] @ normed[i], places[i])
        keys = torch.stack([turned(attention.key.weight[shared] @ normed[j], places[j]) for j in seen])
        values = torch.stack([attention.value.weight[shared] @ normed[j] for j in seen])
        heads.append((keys @ query / d**0.5).softmax(0) @ values)
    return torch.cat(heads)


def turned(vector, place):
    half = len(vector) // 2
    angle = place * 10000.0 ** (-torch.arange(half) / half)
    first, second = vector[:half], vector[half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


def visible(pattern, query, key):
    return key <= query and (pattern == "causal()" or query - key < 4 or key < 1)


@pytest.mark.parametrize("weighting", ["sigmoid", "raw"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_training_block_equals_a_loop_over_tokens(pattern, weighting):
    built, tokens = model(pattern=pattern, weighting=weighting, layers=1).train(), ids(2, 9)
    out = built(tokens)
    x = built.embedding(tokens)
    best = (x @ built.layers[0].depth.weight[0]).argsort(1, descending=True)[:, :5]
    selected = torch.zeros(2, 9, dtype=torch.bool).scatter(1, best, True)
    assert out.depths[0].selected.equal(selected)
    gate = torch.sigmoid if weighting == "sigmoid" else (lambda r: r)
    expected = built.norm(run_by_tokens(built.layers[0], x, selected, pattern, gate))
    close(out.hidden, expected)
    draw = torch.randn(out.hidden.shape, generator=torch.Generator().manual_seed(5))
    found, wanted = (
        torch.autograd.grad((hidden * draw).sum(), list(built.parameters()), allow_unused=True)
        for hidden in (out.hidden, expected)
    )
    for (name, _), a, b in zip(built.named_parameters(), found, wanted, strict=True):
        assert (a is None) == (b is None) == ("predictor" in name)
        if a is not None:
            close(a, b)


def test_padding_never_passes_and_is_seen_by_nobody():
    built, tokens, mask = model(pattern=WINDOW, feedforward="moe").train(), ids(2, 8), torch.ones(2, 8).bool()
    mask[0, 6:], mask[1, 2:] = False, False
    out = built(tokens, attention_mask=mask)
    assert not (out.depths[0].selected & ~mask).any()
    assert out.depths[0].selected.sum(1).tolist() == [4, 2]
    assert out.routings[0].loads().sum() == 2 * 6
    other = built(tokens.where(mask, (tokens + 5) % 31), attention_mask=mask)
    close(other.hidden[mask], out.hidden[mask])


@pytest.mark.parametrize("feedforward", FEEDFORWARDS)
def test_every_parameter_learns_and_checkpointing_chooses_nothing_anew(feedforward):
    found = []
    for again in (False, True):
        built = model(feedforward=feedforward).train()
        built.gradient_checkpointing(again)
        out = built(ids(2, 9), labels=ids(2, 9))
        (out.loss + sum(depth.aux_loss() for depth in out.depths if depth is not None)).backward()
        assert [name for name, p in built.named_parameters() if p.grad is None] == []
        found.append([out.loss.detach(), *(p.grad for p in built.parameters())])
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_recomputation_keeps_the_tokens_of_the_first_run():
    """Between the two runs the router turns around: only a replay lets the same tokens pass."""
    gradients = []
    for turn in (False, True):
        built = model(layers=1).train()
        built.gradient_checkpointing(turn)
        out = built(ids(2, 9), labels=ids(2, 9))
        if turn:
            depth = built.layers[0].depth
            depth.top_tokens = lambda logits, real, depth=depth: MixtureOfDepths.top_tokens(depth, -logits, real)
        out.loss.backward()
        gradients.append([p.grad for p in built.layers[0].feedforward.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


def test_an_earlier_pass_can_be_replayed():
    built, tokens = model(feedforward="moe").train(), ids(2, 9)
    first = built(tokens)
    built.eval()
    again = built(tokens, replay=first.routings, replay_depths=first.depths)
    close(again.logits, first.logits)
    assert not built(tokens).depths[0].selected.equal(first.depths[0].selected)
    with pytest.raises(ValueError, match=r"replay_depths must have one entry for each of the 3 layers, got 1"):
        built(tokens, replay_depths=(None,))
    with pytest.raises(ValueError, match=r"replay must be of shape \[2, 4\], got \[2, 9\]"):
        built(tokens[:, :4], replay_depths=first.depths)


@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("capacity", [0.25, 0.55, 1.0])
def test_flops_are_those_that_torch_counts_in_training(capacity, length, monkeypatch):
    built = model(capacity=capacity).train()
    passing = -(-capacity * length // 1)
    monkeypatch.setattr("transformer.attention.attend", lambda q, k, v, **_: q)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(ids(1, length))
    pairs = 2 * passing * (passing + 1) / 2 + length * (length + 1) / 2
    said = built.flops_per_token(length) * length - 2 * 2 * 4 * 4 * pairs
    assert said == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert built.flops_per_token(length, active=False) >= built.flops_per_token(length)


def test_pairs_of_a_window_are_the_mean_over_all_choices():
    pattern = parse_pattern(WINDOW)
    counts = [sum(visible(WINDOW, i, j) for i in chosen for j in chosen) for chosen in combinations(range(7), 3)]
    assert visible_pairs_among(pattern, 7, 3) == pytest.approx(sum(counts) / len(counts))


def test_the_config_survives_and_refuses(tmp_path):
    built = model(capacity=0.25, weighting="raw").eval()
    built.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == built.config
    close(again(ids(2, 9)).logits, built(ids(2, 9)).logits)
    with pytest.raises(ValueError, match=r"capacity must be in \(0, 1\], got 0"):
        DepthConfig(0)
    with pytest.raises(ValueError, match="weighting must be one of sigmoid, raw, got 'tanh'"):
        DepthConfig(0.5, "tanh")


def test_a_sequence_of_no_or_one_token_and_a_lower_precision():
    built = model(feedforward="moe")
    for mode in (True, False):
        built.train(mode)
        assert built(ids(2, 0)).logits.shape == (2, 0, 31)
        assert built(ids(2, 1)).logits.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        out = built.train()(ids(2, 9), labels=ids(2, 9))
        out.loss.backward()
    assert out.loss.isfinite()


def test_a_layer_that_no_token_passes_leaves_its_record():
    """Records of experts stand at their layers: an empty one is not left out."""
    config = TransformerConfig.uniform(vocab_size=13, dim=8, num_layers=2, num_heads=2, feedforward=MoEConfig(6, 3))
    deep = dataclasses.replace(config.layers[0], depth=DepthConfig(0.5))
    model = Transformer(dataclasses.replace(config, layers=(deep, config.layers[1]))).eval()
    ids = torch.randint(13, (2, 5))
    with torch.no_grad():
        model.layers[0].depth.predictor[-1].bias.fill_(-1e4)
    output = model(ids)
    assert output.depths[0].selected.sum() == 0
    assert [routing.num_tokens for routing in output.routings] == [0, 10]
