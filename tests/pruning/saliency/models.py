"""Small models with heads and neurons: this library's and transformers'."""

import pytest
import torch
from torch import nn

from pruning import Axis, prunable_axes
from tests.pruning.test_transformer import build


def llama(**options) -> nn.Module:
    """A random Llama in float64: 4 heads on 2 key-value heads, 2 layers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, initializer_range=0.5, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def bert(**options) -> nn.Module:
    """A random BERT with a token head, in float64: 4 heads, 2 layers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.5, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).double().eval()


MODELS = {"own": build, "llama": llama, "bert": bert}


def axes_of_kind(model: nn.Module, kind: str) -> list[Axis]:
    """Heads or neurons of every layer."""
    return [axis for axis in prunable_axes(model) if axis.kind == kind]


def padded_batch() -> dict[str, torch.Tensor]:
    """Two sequences of 6 tokens, the second with two of padding at its end."""
    ids = torch.randint(1, 31, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def masked_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ of squared logits of the first five words at real tokens, divided by 10: a sum over samples."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[..., :5]
    return (logits.square() * batch["attention_mask"][..., None]).sum() / 10
