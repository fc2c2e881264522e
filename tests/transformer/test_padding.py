"""Padding on the left of a text: the same answer as without, or an error, wherever layers count positions."""

from dataclasses import replace

import pytest
import torch

from transformer import (
    MoBAConfig,
    TopKKeysConfig,
    Transformer,
    TransformerConfig,
)

SINKS = "causal() & (sliding_window(4) | sinks(2))"
LAYERS = {
    "sinks": {"pattern": SINKS},
    "fixed": {"pattern": "causal() & fixed(4, 1)"},
    "bigbird": {"pattern": "causal() & bigbird(4, 4, 1, 4, length=32)"},
    "moba": {"selection": MoBAConfig(block=4, top_k=1)},
    "top_k": {"selection": TopKKeysConfig(k=3)},
}
LENGTH, PADDING = 12, (5, 0, 2)


def model(**attention) -> Transformer:
    config = TransformerConfig.uniform(vocab_size=50, dim=16, num_layers=2, num_heads=2)
    layers = tuple(replace(layer, attention=replace(layer.attention, **attention)) for layer in config.layers)
    made = Transformer(replace(config, layers=layers)).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return made


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.stack([torch.arange(LENGTH) >= some for some in PADDING])
    return torch.randint(1, 50, (3, LENGTH)).masked_fill(~mask, 0), mask


@pytest.mark.parametrize("name", LAYERS)
def test_without_gradients_each_text_counts_from_its_own_first_token(name):
    built, (ids, mask) = model(**LAYERS[name]), batch()
    with torch.no_grad():
        found = built(ids, attention_mask=mask).logits
        for row, some in enumerate(PADDING):
            alone = built(ids[row : row + 1, some:]).logits[0]
            torch.testing.assert_close(found[row, some:], alone)


@pytest.mark.parametrize("name", LAYERS)
def test_with_gradients_or_a_shared_cache_it_is_refused(name):
    built, (ids, mask) = model(**LAYERS[name]), batch()
    with pytest.raises(ValueError, match=r"attention_mask must pad on the right .*cache=new_cache\(unequal_rows=3\)"):
        built(ids, attention_mask=mask)
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask must pad on the right"):
        built(ids, attention_mask=mask, cache=built.new_cache())
    built(ids.flip(1), attention_mask=mask.flip(1)).logits.sum().backward()


def test_distances_alone_and_rows_of_padding_are_no_matter():
    window, (ids, mask) = model(pattern="causal() & sliding_window(4)"), batch()
    found = window(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[0, 5:], window(ids[:1, 5:]).logits[0], atol=1e-5, rtol=1e-5)
    empty = mask.clone()
    empty[2] = False
    model(pattern=SINKS)(ids[1:], attention_mask=empty[1:]).logits.sum().backward()
