"""What stays of an attention layer that has lost all its heads."""

from typing import Any

import torch
from torch import Tensor, nn


class OutputBias(nn.Module):
    """An output projection without inputs: its bias alone, or zero."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D], of which only the shape counts, to the same shape."""
        nothing = torch.zeros_like(x)
        return nothing if self.bias is None else nothing + self.bias


class HeadlessAttention(nn.Module):
    """An attention module without heads. It still counts tokens in the cache, where transformers reads the sequence
    length off layer 0.

    output: the name of the output projection inside the module, of which `bias` stays; None where the projection lies
    outside (BERT), which then gets [B, L, 0]."""

    def __init__(
        self,
        head_dim: int,
        layer_idx: int | None,
        *,
        output: str | None,
        bias: nn.Parameter | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.layer_idx, self.output = head_dim, layer_idx, output
        self.dropout = dropout or nn.Identity()
        if output is not None:
            self.add_module(output, OutputBias(bias))

    # transformers decides which keywords its layers pass, and adds to them between versions
    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        """hidden_states [B, L, D] to ([B, L, D], None), or ([B, L, 0], None)."""
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        if cache is not None:
            # one number a token: a cache layer without any says that it has seen no token
            seen = hidden_states.new_zeros(*hidden_states.shape[:2], 1, 1).transpose(1, 2)
            cache.update(seen, seen, self.layer_idx)
        if self.output is None:
            return hidden_states[..., :0], None
        return self.dropout(self.get_submodule(self.output)(hidden_states)), None
