"""Experts laid out in memory for decoding."""

import torch
from torch import Tensor, nn

from moe.experts import Experts
from moe.pages import advise_huge_pages


@torch.no_grad()
def prepare_for_decoding(model: nn.Module, *, compiled: bool = False) -> list[str]:
    """Lay out the experts of ``model`` so that one token reads their weights at the speed of memory; their names.

    Values, shapes and the state dict stay as they are, and the model may be trained on: the order of ``up`` in memory
    changes to that of ``nn.Linear`` and of Hugging Face's experts, where the input weights of one hidden unit are
    neighbours, and on Linux the weights move to large pages. A copy of one weight is held at a time. Do it once, after
    loading: moving a model keeps the order, taking experts away (:mod:`pruning`) gives it up.

    compiled: calls of at most 16 tokens without a graph pass by loops that ``torch.compile`` writes, at the first call
    (some seconds, and a C++ compiler; kept in torch's cache between runs). In half precision nothing else reads weights
    at the speed of memory on a CPU. A model that is given to ``torch.compile`` as a whole gets such loops by itself.
    Raises: ValueError for a model without experts.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    if not found:
        raise ValueError("model must hold experts (moe.Experts) to prepare for decoding, found none")
    for module in found.values():
        module.up.data = _in_large_pages(module.up.data.mT).mT
        module.down.data = _in_large_pages(module.down.data)
        module.compiled_decoding = compiled
    return list(found)


def _in_large_pages(weight: Tensor) -> Tensor:
    copy = torch.empty_like(weight, memory_format=torch.contiguous_format)
    advise_huge_pages(copy)
    return copy.copy_(weight)
