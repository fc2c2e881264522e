"""One plain model out of the parts that the ranks hold."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe import ShardedExperts
from transformer import Transformer, TransformerConfig


@torch.no_grad()
def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as one process would hold it, on every rank; every rank calls it."""
    found = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        for name, tensor in model.state_dict().items()
    }
    for name, module in model.named_modules():
        if isinstance(module, ShardedExperts):
            found |= {f"{name}.{key}": value.detach() for key, value in module.whole().named_parameters()}
    return found


def in_parts(model: nn.Module) -> bool:
    """Whether this process holds a part of some weights alone: shards, split heads, spread experts."""
    split = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return split or any(isinstance(module, ShardedExperts) for module in model.modules())


def whole_copy(model: Transformer) -> Transformer:
    """The model as one process would hold it, on every rank, for passes that no layout takes; every rank calls it.

    In evaluation mode; its weights share memory with those that the rank holds whole, and train as the model's do."""
    with torch.device("meta"):
        plain = Transformer(model.config)
    plain.load_state_dict(whole_weights(model), assign=True)
    for name, parameter in model.named_parameters():
        plain.get_parameter(name).requires_grad_(parameter.requires_grad)
    return plain.eval()


def export(model: Transformer, folder: Path, *, write: bool) -> None:
    """Gather the model and leave config.json and model.safetensors in ``folder``, one whole model for
    :meth:`Transformer.from_pretrained`. Every rank calls it; the one with ``write`` writes. A config.json that is there
    stays as the manifest of its checkpoint says: a run that resumes may have other settings of training.

    Every rank holds the whole weights for a moment.
    """
    weights = whole_weights(model)
    if not write:
        return
    written = folder / "config.json"
    with torch.device("meta"):
        plain = Transformer(TransformerConfig.load(written) if written.is_file() else model.config)
    plain.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()}, assign=True)
    plain.save_pretrained(folder)
