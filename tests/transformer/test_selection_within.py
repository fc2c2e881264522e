"""Layers whose top-k keys and DSA choose among the keys of their pattern: from the config to decoding."""

import dataclasses
import json

import pytest
import torch

from tests.tolerances import close
from tests.transformer.generation import assert_generates_each_as_alone
from tests.transformer.test_selection import CHOICES, LENGTH, chosen, ids
from training.model_config import ModelConfig, model_config
from transformer import AttentionConfig, DenseConfig, LayerConfig, Transformer, TransformerConfig
from transformer.selection_cost import selection_flops

PATTERNS = {
    "window": ("causal() & (sliding_window(4) | global_tokens(5))", lambda i, j: i - j < 4 or 5 in (i, j)),
    "far": ("causal() & (~sliding_window(3) | sinks(1))", lambda i, j: i - j >= 3 or j < 1),
}
CASES = [(kind, name) for kind in ("top_k", "dsa") for name in PATTERNS]


def config(kind, name, **options):
    selection = dataclasses.replace(CHOICES[kind], **options)
    layer = LayerConfig(AttentionConfig(4, 2, 8, PATTERNS[name][0], selection=selection), DenseConfig(16))
    return TransformerConfig(vocab_size=19, dim=16, layers=(layer,) * 2, max_length=LENGTH)


def model(kind, name, **options):
    return Transformer(config(kind, name, **options), generator=torch.Generator().manual_seed(0)).double()


def shown(name, length):
    return torch.tensor([[j <= i and PATTERNS[name][1](i, j) for j in range(length)] for i in range(length)])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_cached_decoding_is_the_full_forward_and_nothing_else_is_chosen(kind, name):
    # long enough for a cache to drop what a window has left behind, if it were one of the pattern
    layers = config(kind, name).layers
    long = TransformerConfig(vocab_size=19, dim=16, layers=layers, max_length=150)
    built = Transformer(long, generator=torch.Generator().manual_seed(0)).double().eval()
    tokens = torch.randint(19, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = chosen(built, tokens).to_mask()
    wanted = shown(name, 150).sum(1).clamp(max=5).expand(mask.shape[:3])
    assert mask.sum(-1).equal(wanted) and not (mask & ~shown(name, 150)).any()
    with torch.no_grad():
        whole, cache = built(tokens).logits, built.new_cache()
        parts = [built(part, cache=cache).logits for part in tokens.split([70, 1, 30, 1, 48], 1)]
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_prompts_of_unequal_length_are_each_as_if_alone(kind, name):
    assert_generates_each_as_alone(model(kind, name).eval(), ids()[:, :9])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_step_reaches_every_parameter_and_the_config_survives(kind, name, tmp_path):
    built = model(kind, name).train()
    gradients = []
    for again in (False, True):
        built.gradient_checkpointing(again)
        built.zero_grad()
        out = built(ids(), labels=ids())
        (out.loss + sum(sum(losses.values()) for losses in out.selection_losses)).backward()
        gradients.append([p.grad for p in built.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)
    built.save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).config == built.config
    assert TransformerConfig.from_dict(json.loads(json.dumps(built.config.to_dict()))) == built.config


@pytest.mark.parametrize("length", [1, 7, 130])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_chosen_pairs_are_counted_one_query_at_a_time(name, length):
    counts = shown(name, length).sum(1)
    for kind, most in (("top_k", 5), ("dsa", 5), ("dsa warm", length)):
        part, options = kind.split()[0], {"warm_up": True} if kind == "dsa warm" else {}
        attention = config(part, name, **options).layers[0].attention
        # the pattern changes what is attended to, not what choosing costs
        bare = dataclasses.replace(attention, pattern="causal()")
        dense = torch.arange(1, length + 1).clamp(max=most).sum()
        spared = 4 * 4 * 8 * (dense - counts.clamp(max=most).sum())
        assert selection_flops(16, bare, length) - selection_flops(16, attention, length) == spared
    heads = ["sliding_window(2)", "sinks(3)", "sliding_window(1)", "sinks(1)"]
    attention = AttentionConfig(4, 2, 8, f"causal() & per_head({', '.join(heads)})", selection=CHOICES["top_k"])
    pairs = sum(min(i + 1, w) for i in range(length) for w in (2, 3, 1, 1))
    assert selection_flops(16, attention, length) == 2 * 4 * 8 * length * (length + 1) // 2 + 4 * 8 * pairs


def test_the_words_of_a_config_are_those_of_the_layer():
    words = {"dim": 16, "layers": 2, "heads": 4, "pattern": PATTERNS["window"][0], "selection": "top_k", "select_k": 3}
    made = model_config(ModelConfig(**words), vocab_size=19, length=LENGTH)
    assert made.layers[0].attention.pattern == PATTERNS["window"][0]
    mask = chosen(Transformer(made).eval(), ids()).to_mask()
    assert mask.any() and not (mask & ~shown("window", LENGTH)).any()
