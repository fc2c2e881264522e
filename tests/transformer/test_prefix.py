"""Prefix language models: what the loss counts, what may look ahead, and decoding that equals the full pass."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pruning.batches import next_token_loss
from sparse_attn import bigbird, causal, full, global_tokens, parse_pattern, per_head, prefix_lm, sinks, sliding_window
from tests.tolerances import close
from transformer import Transformer, TransformerConfig, from_hugging_face, generate, to_hugging_face
from transformer.prefix import past_prefix

PREFIX, LENGTH = 5, 14
PATTERNS = {
    "prefix": "prefix_lm(5)",
    "shorter": "prefix_lm(3)",
    "within a window": "prefix_lm(5) & (sliding_window(4) | sinks(5))",
    "per head": "per_head(prefix_lm(5), causal() & sliding_window(4))",
    "two layers": None,
}


def model(name: str = "prefix") -> Transformer:
    config = TransformerConfig.uniform(
        vocab_size=40, dim=16, num_layers=2, num_heads=2, prefix_length=PREFIX, pattern=PATTERNS[name]
    )
    if name == "two layers":
        first, second = config.layers
        window = replace(second.attention, pattern="causal() & sliding_window(3)")
        config = replace(config, layers=(first, replace(second, attention=window)))
    made = Transformer(config, generator=torch.Generator().manual_seed(0)).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return made


def ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(40, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PATTERNS)
def test_no_counted_prediction_depends_on_what_it_predicts_or_on_what_follows(name):
    built, text = model(name), ids()
    before = built(text).logits
    for changed in range(LENGTH):
        other = text.clone()
        other[:, changed] = (other[:, changed] + 1) % 40
        moved = (built(other).logits - before).abs().amax((0, 2)) > 1e-12
        # position i predicts i + 1: the first that counts is the last of the prefix
        assert not moved[PREFIX - 1 : changed].any(), changed
        assert moved[changed:].any()
        if name == "prefix" and changed < PREFIX:
            assert moved[:PREFIX].all(), "a prefix sees the whole of itself"


def test_the_loss_is_the_mean_over_the_tokens_past_the_prefix():
    built, text = model(), ids()
    with torch.no_grad():
        logits = built(text).logits
        wanted = [
            -logits[row, place].log_softmax(0)[text[row, place + 1]]
            for row in range(3)
            for place in range(PREFIX - 1, LENGTH - 1)
        ]
        close(built(text, labels=text).loss, torch.stack(wanted).mean())
        close(next_token_loss(built, text), torch.stack(wanted).mean() * 3)
        assert built(text[:, :PREFIX], labels=text[:, :PREFIX]).loss == 0
        causal_model = Transformer(replace(built.config, layers=(), prefix_length=0)).double()
        close(next_token_loss(causal_model, text), causal_model(text, labels=text).loss * 3)


def test_the_prefix_is_that_of_the_text_whatever_comes_before_it():
    built, text = model(), ids()
    mask = torch.stack([torch.arange(LENGTH) >= some for some in (0, 6, 3)])
    labels = text.masked_fill(~mask, -100)
    with torch.no_grad():
        alone = [
            built(text[row : row + 1, some:], labels=text[row : row + 1, some:]) for row, some in enumerate((0, 6, 3))
        ]
        counted = torch.tensor([LENGTH - some - PREFIX for some in (0, 6, 3)])
        wanted = (torch.stack([output.loss for output in alone]) * counted).sum() / counted.sum()
        close(built(text, attention_mask=mask, labels=labels).loss, wanted)
        close(built(text, attention_mask=mask, labels=labels, cache=built.new_cache(unequal_rows=3)).loss, wanted)
        summed = torch.stack([output.loss for output in alone]).sum()
        close(next_token_loss(built, {"input_ids": text, "attention_mask": mask.long()}), summed)
        cache, logits = built.new_cache(), built(text).logits
        built(text[:, :7], cache=cache)
        own = -logits[:, 7:-1].log_softmax(-1).gather(2, text[:, 8:, None]).mean()
        close(built(text[:, 7:], labels=text[:, 7:], cache=cache).loss, own)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chunks", [(5, 9), (7, 1, 1, 5), (14,), (6, 6, 2)])
def test_decoding_equals_the_full_pass_once_the_prefix_came_whole(name, chunks):
    built, text = model(name), ids()
    with torch.no_grad():
        wanted, cache = built(text).logits, built.new_cache()
        found = [built(part, cache=cache).logits for part in text.split(chunks, 1)]
    close(torch.cat(found, 1), wanted)


def test_prompts_of_unequal_length_continue_as_alone():
    built, text = model(), ids()
    mask = torch.stack([torch.arange(LENGTH) >= some for some in (0, 9, 4)])
    padded = text.masked_fill(~mask, 0)
    found = generate(built, padded, max_new_tokens=6, attention_mask=mask, prefill_chunk=14)
    for row, some in enumerate((0, 9, 4)):
        alone = generate(built, text[row : row + 1, some:], max_new_tokens=6)
        assert found[row, LENGTH:].equal(alone[0, LENGTH - some :])


def test_a_prefix_that_comes_in_pieces_is_refused():
    built, text = model(), ids()
    with torch.no_grad():
        cache = built.new_cache()
        built(text[:, :4], cache=cache)
        with pytest.raises(ValueError, match=r"first prefix_length=5 tokens of a text at once.*got 4 before these"):
            built(text[:, 4:], cache=cache)
        cache = built.new_cache(unequal_rows=2)
        mask = torch.tensor([[True] * 5, [False] * 3 + [True] * 2])
        built(text[:2, :5], attention_mask=mask, cache=cache)
        with pytest.raises(ValueError, match="got 2 before these"):
            built(text[:2, 5:], cache=cache)
        built(text[:2, 5:], attention_mask=torch.tensor([[True] * 9, [False] * 9]), cache=cache)
    with pytest.raises(ValueError, match="the prompt must hold the prefix_length=5 tokens.*got 4"):
        generate(built, text[:, :4], max_new_tokens=1)
    with pytest.raises(ValueError, match="the prompt must hold the prefix_length=5 tokens.*got 4"):
        generate(
            built, text[:, :6], max_new_tokens=1, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]] + [[1] * 6] * 2)
        )
    with pytest.raises(ValueError, match="prefill_chunk must be >= 7, prefix_length and the padding before it, got 6"):
        mask = torch.tensor([[0, 0] + [1] * 12] + [[1] * 14] * 2)
        generate(built, text, max_new_tokens=1, attention_mask=mask, prefill_chunk=6)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_short_prefixes_leave_out_all_but_their_last_token(length):
    targets = torch.arange(1, 7).view(2, 3)
    kept = past_prefix(targets, length)
    assert kept.tolist() == [[-100 if at < length - 1 else row * 3 + at + 1 for at in range(3)] for row in range(2)]


def test_a_text_may_begin_after_the_first_call():
    """A row of padding has seen nothing of its prefix yet; a first token alone has."""
    built, text = model(), ids(2)
    mask = torch.tensor([[True] * 6, [False] * 6])
    with torch.no_grad():
        cache = built.new_cache(unequal_rows=2)
        built(text[:, :6], attention_mask=mask, cache=cache)
        found = built(text[:, 6:], cache=cache).logits[1]
        close(found, built(text[1:, 6:]).logits[0])
        cache = built.new_cache(unequal_rows=2)
        built(text[:, :6], attention_mask=mask, cache=cache)
        # all 7 predictions of the first text, and those of the second that are past its own prefix
        alone = built(text[1:, 6:], labels=text[1:, 6:]).loss * (8 - PREFIX)
        first = -built(text[:1]).logits[0, 6:-1].log_softmax(-1).gather(1, text[0, 7:, None]).sum()
        close(built(text[:, 6:], labels=text[:, 6:], cache=cache).loss, (first + alone) / (7 + 8 - PREFIX))
        for cache in (built.new_cache(), built.new_cache(unequal_rows=2)):
            built(text[:, :1], cache=cache)
            with pytest.raises(ValueError, match="got 1 before these"):
                built(text[:, 1:], cache=cache)


def test_a_causal_model_with_a_prefix_in_its_loss_alone_decodes_token_by_token():
    built, text = Transformer(replace(model("prefix").config, layers=model("two layers").config.layers[1:])), ids()
    assert built.config.seen_prefix == 0
    with torch.no_grad():
        cache = built.eval().new_cache()
        found = [built(part, cache=cache).logits for part in text.split(1, 1)]
        close(torch.cat(found, 1), built(text).logits)
    assert generate(built, text[:, :1], max_new_tokens=2).shape == (3, 3)
    assert generate(built, text[:, :3], max_new_tokens=2, prefill_chunk=1).shape == (3, 5)
    logits = built(text).logits[:, PREFIX - 1 : -1].log_softmax(-1)
    own = -logits.gather(2, text[:, PREFIX:, None]).mean()
    close(built(text, labels=text).loss, own)
    close(next_token_loss(built, text), own * 3)
    close(next_token_loss(nn.DataParallel(built), text), own * 3)


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [
        ("prefix_lm(6)", 5),
        ("prefix_lm(5)", 0),
        ("full()", 5),
        ("sliding_window(4)", 5),
        ("prefix_lm(5) | sliding_window(4)", 5),
        ("per_head(prefix_lm(5), prefix_lm(6))", 5),
        ("global_tokens(0)", 5),
        ("~causal()", 5),
    ],
)
def test_what_looks_past_the_prefix_is_refused(pattern, prefix):
    with pytest.raises(ValueError, match=r"layer 0: pattern .* sees the future"):
        TransformerConfig.uniform(vocab_size=4, dim=8, num_layers=1, num_heads=2, pattern=pattern, prefix_length=prefix)


def test_the_refusal_says_what_to_set():
    with pytest.raises(
        ValueError, match="or prefix_length, got 0, to the number of its first tokens, which the loss then leaves out"
    ):
        TransformerConfig.uniform(vocab_size=4, dim=8, num_layers=1, num_heads=2, pattern="prefix_lm(5)")
    sizes = {"vocab_size": 4, "dim": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=r"prefix_length must be 0 for an encoder \(causal=False\), got 3"):
        TransformerConfig.uniform(**sizes, pattern="full()", causal=False, prefix_length=3)
    with pytest.raises(ValueError, match="prefix_length must be < max_length=8, got 8"):
        TransformerConfig.uniform(**sizes, prefix_length=8, max_length=8)
    with pytest.raises(ValueError, match="prefix_length must be >= 0, got -1"):
        TransformerConfig.uniform(**sizes, prefix_length=-1)


@pytest.mark.parametrize(
    "pattern",
    [
        causal(), full(), sinks(3), prefix_lm(3), causal() & sinks(3), prefix_lm(3) & sliding_window(2),
        prefix_lm(3) | sinks(4), per_head(causal(), prefix_lm(2)), global_tokens(1), causal() & global_tokens(1),
        parse_pattern("~causal()"), causal() & bigbird(2, 2, 1, 2, length=8), sinks(2) & sliding_window(1),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("prefix", range(5))
def test_is_causal_after_is_never_wrong_about_what_is_seen(pattern, prefix):
    place = torch.arange(8)
    heads = pattern.heads if hasattr(pattern, "heads") else (pattern,)
    ahead = torch.stack([head.visible(place[:, None], place) for head in heads]) & (place > place[:, None])
    looks_past = bool(ahead[..., prefix:].any())
    assert not (pattern.is_causal_after(prefix) and looks_past)
    assert pattern.is_causal_after(0) == pattern.is_causal
    if str(pattern) in ("prefix_lm(3)", "causal() | sinks(3)", "sinks(3)"):
        assert pattern.is_causal_after(prefix) == (not looks_past)


def test_config_survives_its_file_and_weights_learn(tmp_path):
    built, text = model("two layers"), ids()
    assert TransformerConfig.from_dict(built.config.to_dict()) == built.config
    built.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config.prefix_length == PREFIX
    again.train()(text, labels=text).loss.backward()
    assert all(weight.grad is not None for weight in again.parameters())


def test_weights_of_hugging_face_take_a_prefix(tmp_path):
    config = TransformerConfig.uniform(vocab_size=40, dim=16, num_layers=1, num_heads=2, tied=False)
    to_hugging_face(Transformer(replace(config, prefix_length=3)), tmp_path)
    read = from_hugging_face(tmp_path, pattern="prefix_lm(4)", prefix_length=4)
    assert read.config.seen_prefix == 4 and from_hugging_face(tmp_path).config.prefix_length == 0
    with pytest.raises(ValueError, match="or prefix_length, got 0"):
        from_hugging_face(tmp_path, pattern="prefix_lm(4)")
