"""What generation must give for prompts of unequal length."""

import torch
from torch import Tensor

from transformer import Transformer, generate


def assert_generates_each_as_alone(model: Transformer, tokens: Tensor) -> None:
    """Two prompts, the second with 5 places of padding on its left, go on as each does by itself."""
    mask = torch.ones(tokens.shape, dtype=torch.long)
    mask[1, :5] = 0
    both = generate(model, tokens, attention_mask=mask, max_new_tokens=5, prefill_chunk=4)
    alone = [generate(model, prompt, max_new_tokens=5, prefill_chunk=4) for prompt in (tokens[:1], tokens[1:, 5:])]
    assert both[:1].equal(alone[0]) and both[1:, 5:].equal(alone[1])
