"""Unequal prompts, prefill in chunks, decoding beyond max_length, and another pattern for loaded weights."""

from dataclasses import replace

import pytest
import torch

from sparse_attn import parse_pattern
from tests.tolerances import close
from tests.transformer.test_model import MIXTURE, model_of, uniform
from tests.typecheck import unchecked
from transformer import DepthConfig, Transformer, from_hugging_face, generate, to_hugging_face
from transformer.hf_patterns import with_pattern

SINKS = "causal() & (sliding_window(4) | sinks(2))"


def padded_with(lengths, longest):
    ids = torch.randint(13, (len(lengths), longest))
    return ids, (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_padded_rows_count_from_their_own_first_token(streaming, chunk):
    model = model_of(uniform(feedforward=MIXTURE, pattern=SINKS), torch.float64).eval()
    ids, mask = padded_with([2, 9, 5], 9)
    options = {"max_new_tokens": 12, "streaming": streaming, "prefill_chunk": chunk}
    both = generate(model, ids, attention_mask=mask, **options)
    for row, length in enumerate([2, 9, 5]):
        alone = generate(model, ids[row : row + 1, 9 - length :], **options)
        assert both[row : row + 1, 9 - length :].equal(alone)


@pytest.mark.parametrize(
    "pattern", [SINKS, "causal() & fixed(4, 1)", "causal() & (dilated(2, 3) | global_tokens(0, 5))"]
)
def test_a_prompt_in_chunks_gives_the_same_text(pattern):
    model = model_of(uniform(pattern=pattern), torch.float64).eval()
    ids = torch.randint(13, (2, 11))
    whole = generate(model, ids, max_new_tokens=9)
    assert all(generate(model, ids, max_new_tokens=9, prefill_chunk=chunk).equal(whole) for chunk in (1, 4, 50))


def test_streaming_equals_exact_until_the_cache_is_full_and_chunks_change_nothing():
    model = model_of(uniform(pattern=SINKS, max_length=8), torch.float64).eval()
    ids = torch.randint(13, (2, 40))
    short = model(ids[:, :6], cache=model.new_cache(mode="streaming")).logits
    close(short, model(ids[:, :6]).logits)
    logits = []
    for sizes in ([40], [1] * 40, [7, 30, 1, 2]):
        cache = model.new_cache(mode="streaming")
        logits.append(torch.cat([model(some, cache=cache).logits for some in ids.split(sizes, 1)], 1))
        assert cache.length == 40
    # RoPE's angles are float32, and each chunk counts them from elsewhere
    close(logits[1], logits[0], torch.float32)
    close(logits[2], logits[0], torch.float32)
    exact = Transformer(replace(model.config, max_length=40)).double().eval()
    exact.load_state_dict(model.state_dict())
    assert (exact(ids).logits - logits[0])[:, 8:].abs().max() > 1e-6


def test_streaming_goes_on_beyond_max_length():
    model = model_of(uniform(pattern=SINKS, max_length=6)).eval()
    ids = torch.randint(13, (1, 3))
    with pytest.raises(ValueError, match="must fit max_length=6"):
        generate(model, ids, max_new_tokens=50)
    assert generate(model, ids, max_new_tokens=200, streaming=True).shape == (1, 203)


def test_a_model_that_cannot_stream_is_refused():
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="streaming needs the pattern"):
        generate(Transformer(uniform()), ids, max_new_tokens=1, streaming=True)
    with pytest.raises(ValueError, match=r"layer 0: window \+ sinks must be <= max_length=5 to stream, got 6"):
        Transformer(uniform(pattern=SINKS, max_length=5)).new_cache(mode="streaming")
    config = uniform(pattern=SINKS)
    deep = replace(config, layers=(replace(config.layers[0], depth=DepthConfig()), config.layers[1]))
    with pytest.raises(ValueError, match="layer 0 cannot stream"):
        Transformer(deep).new_cache(mode="streaming")
    with pytest.raises(ValueError, match="mode must be exact or streaming, got 'ring'"):
        Transformer(config).new_cache(mode="ring")
    with pytest.raises(ValueError, match="prefill_chunk must be >= 1, got 0"):
        generate(Transformer(config), ids, max_new_tokens=1, prefill_chunk=0)


def test_loaded_weights_take_another_pattern(tmp_path):
    model = model_of(uniform()).eval()
    folder = to_hugging_face(model, tmp_path)
    ids = torch.randint(13, (2, 12))
    sparse = from_hugging_face(folder, pattern=SINKS)
    expected = Transformer(with_pattern(model.config, SINKS)).eval()
    expected.load_state_dict(model.state_dict())
    close(sparse(ids).logits, expected(ids).logits)
    assert [layer.attention.pattern for layer in sparse.config.layers] == [SINKS] * 2
    assert (sparse(ids).logits - model(ids).logits).abs().max() > 1e-4
    assert from_hugging_face(folder, pattern=parse_pattern(SINKS)).config == sparse.config
    mixed = from_hugging_face(folder, pattern=[None, parse_pattern(SINKS)])
    assert [layer.attention.pattern for layer in mixed.config.layers] == ["causal()", SINKS]
    with pytest.raises(ValueError, match="one for each of the 2 layers, got 1"):
        from_hugging_face(folder, pattern=[SINKS])
    with pytest.raises(ValueError, match="sees the future"):
        from_hugging_face(folder, pattern="sliding_window(4)")
    with pytest.raises(ValueError, match="did you mean 'sinks'"):
        from_hugging_face(folder, pattern="causal() & sink(4)")
    for wrong, message in ((3, "one text or Pattern, .* got 3"), ([None, 3], "text, a Pattern or None, got 3")):
        with unchecked(), pytest.raises(ValueError, match=message):
            from_hugging_face(folder, pattern=wrong)
