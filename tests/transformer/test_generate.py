import dataclasses

import pytest
import torch

from tests.tolerances import close
from tests.transformer.test_model import MIXTURE, WINDOW, model_of, unequal, uniform
from tests.typecheck import unchecked
from transformer import MoEConfig, SoftMoEConfig, Transformer, generate, stream
from transformer.generate import choose

CONFIGS = [uniform(), uniform(feedforward=MIXTURE, pattern=WINDOW), unequal()]


@pytest.mark.parametrize("config", CONFIGS)
def test_greedy_equals_the_full_forward_at_every_step(config):
    model = model_of(config).eval()
    ids = torch.randint(13, (3, 4))
    expected = ids
    for _ in range(9):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert generate(model, ids, max_new_tokens=9).equal(expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pieces", [[1] * 11, [4, 3, 4], [10, 1]])
def test_cached_logits_equal_the_full_forward(config, pieces):
    model = model_of(config, torch.float64).eval()
    ids = torch.randint(13, (2, 11))
    cache, logits = model.new_cache(), []
    for piece in ids.split(pieces, dim=1):
        logits.append(model(piece, cache=cache).logits)
    close(torch.cat(logits, 1), model(ids).logits)
    assert cache.length == 11


def test_prompts_of_unequal_length():
    model = model_of(uniform(feedforward=MIXTURE, pattern="causal() & sliding_window(4)"), torch.float64).eval()
    short, long = torch.randint(13, (1, 2)), torch.randint(13, (1, 5))
    padded = torch.cat([torch.nn.functional.pad(short, (3, 0)), long])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    both = generate(model, padded, max_new_tokens=6, attention_mask=mask)
    assert both[:1, 3:].equal(generate(model, short, max_new_tokens=6))
    assert both[1:].equal(generate(model, long, max_new_tokens=6))


def test_sampling_is_repeatable_and_streams_the_same_tokens():
    model = model_of(uniform())
    ids = torch.randint(13, (2, 3))
    options = {"max_new_tokens": 8, "temperature": 1.3, "top_k": 5, "top_p": 0.9}
    runs = [generate(model, ids, generator=torch.Generator().manual_seed(4), **options) for _ in range(2)]
    streamed = list(stream(model, ids, generator=torch.Generator().manual_seed(4), **options))
    assert runs[0].equal(runs[1]) and torch.stack(streamed, 1).equal(runs[0][:, 3:])
    assert model.training


def test_stops_at_the_end_token():
    model = model_of(uniform()).eval()
    ids = torch.randint(13, (2, 3))
    tokens = generate(model, ids, max_new_tokens=8)[:, 3:]
    eos = int(tokens[0, 0])
    ended = generate(model, ids, max_new_tokens=8, eos_id=eos)[:, 3:]
    for row, plain in zip(ended, tokens, strict=True):
        hits = (plain == eos).nonzero()
        until = int(hits[0]) + 1 if len(hits) else len(row)
        assert row[:until].equal(plain[:until][: len(row)]) and (row[until:] == eos).all()


def test_nothing_to_generate():
    ids = torch.zeros(1, 2, dtype=torch.long)
    assert generate(Transformer(uniform()), ids, max_new_tokens=0).equal(ids)


def frequencies(logits, **options):
    rows = torch.tensor(logits).expand(20000, -1)
    drawn = choose(rows, 1.0, generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn, minlength=rows.shape[1]) / len(rows)


def test_top_k_keeps_exactly_k_under_ties():
    seen = frequencies([1.0, 2.0, 2.0, 2.0, 0.0], top_k=2)
    assert (seen > 0).tolist() == [False, True, True, False, False]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    seen = frequencies(probabilities.log().tolist(), top_p=0.7)
    expected = torch.tensor([0, 2 / 3, 0, 1 / 3])
    assert (seen - expected).abs().max() < 0.02
    assert frequencies(probabilities.log().tolist(), top_p=0.01)[1] == 1


def test_temperature_follows_the_softmax():
    seen = frequencies([0.0, 1.0, 2.0])
    assert (seen - torch.tensor([0.0, 1.0, 2.0]).softmax(0)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
        ({"max_new_tokens": 2000}, r"must fit max_length=1024, got 3 \+ 2000"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be >= 1"),
        ({"top_k": 2.5}, r"top_k must be >= 1, an int, got 2\.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "attention_mask must be 0 on the left"),
    ],
)
def test_bad_options(options, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        generate(Transformer(uniform()), torch.zeros(1, 3, dtype=torch.long), **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    ("ahead", "kind"),
    [
        (MoEConfig(6, 4, router="expert_choice", allow_future=True), "the expert_choice router"),
        (SoftMoEConfig(6, 4, allow_future=True), "soft_moe"),
    ],
)
def test_a_model_that_looks_ahead_generates_only_where_that_is_said(ahead, kind):
    config = uniform()
    layers = (config.layers[0], dataclasses.replace(config.layers[1], feedforward=ahead), *config.layers[2:])
    config = dataclasses.replace(config, layers=layers)
    assert config.sees_future == (1,) and not uniform().sees_future
    model, ids = Transformer(config), torch.randint(13, (2, 3))
    for draw in (generate, stream):
        with pytest.raises(ValueError, match=rf"got {kind} in layer 1, .*: pass allow_future=True \(--allow-future\)"):
            draw(model, ids, max_new_tokens=2)
    assert generate(model, ids, max_new_tokens=2, allow_future=True).shape == (2, 5)


def test_an_encoder_or_an_empty_prompt_cannot_generate():
    with pytest.raises(ValueError, match="causal model"):
        generate(Transformer(uniform(causal=False)), torch.zeros(1, 3, dtype=torch.long), max_new_tokens=1)
    with pytest.raises(ValueError, match="at least 1 token"):
        generate(Transformer(uniform()), torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1)
