"""Softcap, ALiBi and dropout in layers that choose their keys: trained, decoded, drawn again."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe import Noise
from sparse_attn.selection import ScoreOptions
from tests.tolerances import close
from tests.transformer.generation import assert_generates_each_as_alone
from tests.transformer.test_selection import LENGTH, VARIANTS, ids
from transformer import AttentionConfig, DenseConfig, LayerConfig, Transformer, TransformerConfig
from transformer.build import build_attention

SLOPES = (0.5, 0.2, 0.1, 0.0)
WORDS = {"softcap": 0.6, "dropout": 0.4, "alibi": True, "alibi_slopes": SLOPES}


def attention_of(kind, **words):
    selection = VARIANTS[kind]
    kv_heads = 4 if getattr(selection, "shared_qk", False) else 2
    return AttentionConfig(4, kv_heads, 8, selection=selection, **WORDS | words)


def model(kind, **words):
    layer = LayerConfig(attention_of(kind, **words), DenseConfig(16))
    config = TransformerConfig(vocab_size=19, dim=16, layers=(layer,) * 2, max_length=LENGTH)
    built = Transformer(config, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():  # scores far enough apart that every term shows
        for block in built.layers:
            block.attention.key.weight.mul_(8)
    return built


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_layer_hands_its_words_to_the_selection(kind):
    attention = build_attention(16, attention_of(kind)).double()
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3)).double()
    q, k, v = (
        None if linear is None else linear(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for linear in (attention.query, attention.key, attention.value)
    )
    q = k if q is None else q
    # every sequence has a seed of its own, alike in whichever batch
    noise = Noise("step", sequences=2)
    seeds = noise.draw(
        "attention probabilities", torch.empty(2, dtype=torch.float64),
        lambda part, g: part.random_(0, 2**53, generator=g),
    ).long()  # fmt: skip
    for training in (True, False):
        attention.train(training)
        options = ScoreOptions(0.6, torch.tensor(SLOPES), 0.4 if training else 0.0, seeds)
        expected = attention.selection(q, k, v, hidden=x, scoring=options).out.transpose(1, 2).flatten(2)
        close(attention(x, None, generator=noise)[0], attention.output(expected))


@pytest.mark.parametrize("kind", VARIANTS)
def test_cached_decoding_equals_the_full_forward(kind):
    built = model(kind).eval()
    with torch.no_grad():
        whole, cache = built(ids()).logits, built.new_cache()
        parts = [built(part, cache=cache).logits for part in ids().split([6, 1, 1, 9, 4], 1)]
    close(torch.cat(parts, 1), whole)
    for words in ({"softcap": None}, {"alibi_slopes": (0.3, 0.0, 0.4, 0.1)}):
        other = model(kind, **words).eval()
        other.load_state_dict(built.state_dict())
        assert (other(ids()).logits - whole).abs().max() > 1e-3
    other = ids()
    other[:, 13:] = (other[:, 13:] + 7) % 19
    close(built(other).logits[:, :13], whole[:, :13])


@pytest.mark.parametrize("kind", VARIANTS)
def test_prompts_of_unequal_length_are_each_as_if_alone(kind):
    assert_generates_each_as_alone(model(kind).eval(), ids()[:, :9])


@pytest.mark.parametrize("kind", VARIANTS)
def test_dropout_is_drawn_for_each_sequence_and_again_when_recomputed(kind):
    built, noise = model(kind).train(), Noise("seed 0, step 3", sequences=2)
    before = torch.get_rng_state()
    whole = built.hidden_states(ids(), noise=noise)[0]
    assert torch.get_rng_state().equal(before)
    parts = [built.hidden_states(ids()[row : row + 1], noise=noise.rows(row, row + 1))[0] for row in (0, 1)]
    close(torch.cat(parts), whole)
    assert not torch.allclose(built.hidden_states(ids(), noise=Noise("step 4", sequences=2))[0], whole)
    for source in (noise, None):
        gradients = []
        for again in (False, True):
            built.gradient_checkpointing(again)
            built.zero_grad()
            torch.manual_seed(5)
            built.hidden_states(ids(), noise=source)[0].square().sum().backward()
            gradients.append([p.grad for p in built.parameters() if p.grad is not None])
        for ours, theirs in zip(*gradients, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("kind", ["moba", "lsh"])
def test_the_words_survive_and_a_generator_draws_too(kind, tmp_path):
    built = model(kind)
    built.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == built.config
    close(again.double()(ids()).logits, built.eval()(ids()).logits)
    attention = build_attention(16, dataclasses.replace(attention_of(kind), alibi_slopes=None)).train()
    x = torch.randn(2, 9, 16)
    outs = [attention(x, None, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert outs[0].equal(outs[1]) and not outs[0].equal(outs[2])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [None, "moba", "nsa"])
@pytest.mark.parametrize("rate", ["dropout", "head_dropout", "drop_connect"])
def test_a_generator_is_refused_where_activations_are_computed_again(rate, kind, reentrant):
    words = {"dropout": 0.0, rate: 0.4}
    config = attention_of(kind, **words) if kind else AttentionConfig(4, 2, 8, **WORDS | words)
    attention = build_attention(16, config).double().train()
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3)).double().requires_grad_()

    def gradients(source, again):
        torch.manual_seed(7)

        def run(x):
            return attention(x, None, generator=source)[0]

        out = checkpoint(run, x, use_reentrant=reentrant) if again else run(x)
        attention.zero_grad()
        out.square().sum().backward()
        return [p.grad for p in attention.parameters()]

    for source in (Noise("step", sequences=2), None):
        for ours, theirs in zip(gradients(source, True), gradients(source, False), strict=True):
            close(ours, theirs)
    gradients(torch.Generator().manual_seed(1), False)
    with pytest.raises(ValueError, match="generator must be a moe.Noise or None where activations are computed again"):
        gradients(torch.Generator().manual_seed(1), True)
    attention.eval()
    gradients(torch.Generator().manual_seed(1), True)
