"""Held-out loss, exactly: nats a token and bits a byte."""

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from moe import MemoryStats
from moe.memory_stats import MemoryMeter
from moe.product_key import Lookup, ProductKeys
from training.data import IGNORED, held_out_batches
from training.tokenizer import Tokenizer
from transformer import Transformer, chunked_cross_entropy


@dataclass(frozen=True)
class Evaluation:
    """loss: mean nats a predicted token. bits_per_byte: all nats / ln 2 / bytes of text predicted.

    The separator after each document is predicted and paid for, and adds no byte.
    dead_experts: for each layer with experts, how many of them took no token. passed: for each Mixture-of-Depths
    layer, the share of the tokens that passed it, as its predictor chose. memories: how each layer's memory was used.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    dead_experts: tuple[int, ...] = ()
    passed: tuple[float, ...] = ()
    memories: tuple[MemoryStats, ...] = ()

    def line(self) -> dict[str, Any]:
        """As it stands in metrics.jsonl."""
        return {
            "eval_loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "dead_experts": list(self.dead_experts),
            "passed": list(self.passed),
            "memories": [asdict(use) for use in self.memories],
        }


def evaluate(
    model: Transformer,
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int = 8,
    max_batches: int | None = None,
    autocast: AbstractContextManager[object] | None = None,
) -> Evaluation:
    """The model's loss on ``separator doc separator … separator`` [N], every token after the first predicted once,
    but for those inside the prefix of a window where the model has a prefix_length.

    length: longest context (windows do not overlap). max_batches: stop early; the bytes counted are those of the
    tokens predicted, so the figure is exact for the part seen. The model's mode and generators are left as found.
    Raises: ValueError if there is nothing to predict, or length or batch is below 1.
    """
    _check(len(tokens), length, batch, model.config.prefix_length)
    token_bytes = tokenizer.token_bytes()
    nats, count, size = 0.0, 0, 0
    was_training = model.training
    model.eval()
    device = model.head_weight.device
    batches = held_out_batches(tokens, batch=batch, length=length, padding_id=tokenizer.eos_id)
    loads: dict[int, torch.Tensor] = {}
    passing: dict[int, torch.Tensor] = {}
    with memory_meters(model) as memories, torch.no_grad():
        for window in itertools.islice(batches, max_batches):
            item = window.past_prefix(model.config.prefix_length)
            here = item.to(device)
            with autocast or nullcontext():
                hidden, routings, depths, _ = model.hidden_states(here.inputs, attention_mask=here.mask)
                mean = chunked_cross_entropy(hidden.flatten(0, 1), model.head_weight, here.targets.flatten())
            nats += mean.item() * item.num_targets
            count += item.num_targets
            size += int(token_bytes[item.targets[item.targets != IGNORED]].sum())
            for layer, (routing, depth) in enumerate(zip(routings, depths, strict=True)):
                if routing is not None:
                    _add(loads, layer, routing.loads())
                if depth is not None:
                    _add(passing, layer, torch.stack([depth.selected.sum(), depth.real.sum()]))
    model.train(was_training)
    if size == 0:
        raise ValueError("the held-out text has 0 bytes: bits per byte is undefined")
    return Evaluation(
        loss=nats / count,
        bits_per_byte=nats / math.log(2) / size,
        tokens=count,
        bytes=size,
        dead_experts=tuple(int((load == 0).sum()) for load in loads.values()),
        passed=tuple((passed / real.clamp_min(1)).item() for passed, real in passing.values()),
        memories=tuple(meter.result() for meter in memories.values()),
    )


def _check(tokens: int, length: int, batch: int, prefix: int) -> None:
    if tokens < 2 or length < 1 or batch < 1:
        raise ValueError(f"need tokens ≥ 2, length ≥ 1 and batch ≥ 1, got {tokens}, {length} and {batch}")
    if length < prefix:
        raise ValueError(f"length must be >= the model's prefix_length={prefix}, got {length}")


@contextmanager
def memory_meters(model: Transformer) -> Iterator[dict[int, MemoryMeter]]:
    """A meter for each layer with product keys (a memory, or PEER), fed by every forward pass inside the context.

    Compiled layers of such a model run uncompiled meanwhile: what was compiled without a meter would not feed one.
    """
    found = [(index, keys) for index, layer in enumerate(model.layers) for keys in _product_keys(layer)]
    meters = {index: MemoryMeter(keys.num_keys**2) for index, keys in found}
    with ExitStack() as stack:
        if found:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for index, keys in found:
            stack.callback(keys.register_forward_hook(partial(_feed, meters[index])).remove)
        yield meters


def _product_keys(layer: nn.Module) -> Iterator[ProductKeys]:
    return (module for module in layer.modules() if isinstance(module, ProductKeys))


def _feed(meter: MemoryMeter, keys: nn.Module, inputs: tuple[object, ...], lookup: Lookup) -> None:
    meter.update(lookup)


def _add(totals: dict[int, torch.Tensor], layer: int, counts: torch.Tensor) -> None:
    totals[layer] = totals[layer] + counts if layer in totals else counts
