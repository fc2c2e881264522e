"""Calibration batches: token ids or keyword dicts, and the loss that keeps samples apart."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Any]
Loss = Callable[[nn.Module, Any], Tensor]
# wraps an iterable and shows how far it is: rich.progress.track, tqdm; the caller's, so that no bar is a dependency
Progress = Callable[[Iterable[Any]], Iterable[Any]] | None
IGNORED = -100


def batch_size(batch: Batch) -> int:
    """Number of samples B: the leading size of the token ids, or of the first tensor of a keyword dict.

    Raises: ValueError if a dict holds no tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0]
    tensors = [batch["input_ids"]] if "input_ids" in batch else [v for v in batch.values() if isinstance(v, Tensor)]
    if not tensors:
        raise ValueError(f"a batch must hold token ids [B, L] or a dict with tensors, got keys {sorted(batch)}")
    return tensors[0].shape[0]


def samples_of(batch: Batch) -> Iterator[Batch]:
    """The samples of a batch one by one, each a batch of size 1; what is no tensor [B, ...] goes with each."""
    count = batch_size(batch)
    for index in range(count):
        one = slice(index, index + 1)
        if isinstance(batch, Tensor):
            yield batch[one]
        else:
            cut = {key for key, value in batch.items() if isinstance(value, Tensor) and value.shape[:1] == (count,)}
            yield {key: value[one] if key in cut else value for key, value in batch.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; other values are passed through."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def model_batches(model: nn.Module, batches: Iterable[Batch], *, progress: Progress = None) -> Iterator[Batch]:
    """`batches` on the model's device, behind `progress` if given (rich.progress.track, tqdm, ...).

    Raises: ValueError if there is no batch, if one holds no sample or no token, or if one batch is passed instead of an
    iterable of batches."""
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(f"batches must be an iterable of batches, got one {type(batches).__name__}; pass [batch]")
    device = next(model.parameters()).device
    empty = True
    for batch in progress(batches) if progress else batches:
        empty = False
        _check_filled(batch)
        yield to_device(batch, device)
    if empty:
        raise ValueError("batches must hold at least one batch, got none")


def row_batches(model: nn.Module, batches: Iterable[Batch], *, progress: Progress = None) -> Iterator[Batch]:
    """`model_batches` for what observes rows inside the model, such as the inputs of its layers.

    Of a model that `gathers_rows` the samples come one by one, and those of nothing but padding not at all: together,
    the shorter ones would be filled up with rows that are no tokens, and a mask [B, L] would be taken for one of the
    gathered rows where as many pass.
    Raises: ValueError as there."""
    apart = gathers_rows(model)
    for batch in model_batches(model, batches, progress=progress):
        yield from filter(_has_tokens, samples_of(batch)) if apart else [batch]


def gathers_rows(model: nn.Module) -> bool:
    """Whether a module says by ``gathers_rows`` that what it runs gets other rows than the batch's, as
    Mixture-of-Depths: only some tokens, and filling."""
    return any(getattr(module, "gathers_rows", False) for module in model.modules())


def _has_tokens(batch: Batch) -> bool:
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    return not isinstance(mask, Tensor) or bool(mask.any())


def _check_filled(batch: Batch) -> None:
    tensors = [batch] if isinstance(batch, Tensor) else [v for v in batch.values() if isinstance(v, Tensor)]
    if tensors and not tensors[0].numel():
        raise ValueError(f"a batch must hold at least one sample of one token, got shape {list(tensors[0].shape)}")


def next_token_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Σ_b mean_t −log p(token_{t+1} | tokens_{≤t}): a sum over samples, so that no sample scales another's gradient.

    Keyword batches are passed to the model without `labels`; labels default to input_ids, and are shifted here
    (−100 is ignored). Of a prefix language model (``config.prefix_length``) only tokens past its prefix count. Without
    labels a pair counts only where both its tokens are real under `attention_mask`. A sample without targets adds 0.
    Raises: ValueError if the model is an encoder by its config (``causal=False``), or a model of transformers that does
    not generate (BertForMaskedLM), for which no token is next; if the sequences are shorter than two tokens or the
    model returns no logits [B, L, V]."""
    if getattr(config_of(model), "causal", True) is False:
        raise ValueError("next-token loss needs a causal model, got an encoder (causal=False): pass loss=")
    if hasattr(model, "can_generate") and not model.can_generate():
        raise ValueError(f"next-token loss needs a model that generates, got {type(model).__name__}: pass loss=")
    keywords = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    targets = _targets(keywords)
    if prefix_targets(model):
        targets = targets.masked_fill(~after_prefix(model, keywords)[:, :-1], IGNORED)
    output = model(batch) if isinstance(batch, Tensor) else model(**{k: v for k, v in batch.items() if k != "labels"})
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.ndim != 3:
        raise ValueError(f"the model must return logits [B, L, V], got {type(output).__name__}; pass loss=")
    # float32: a bf16 log-sum-exp over a vocabulary loses the differences that scores are made of
    wide = torch.promote_types(logits.dtype, torch.float32)
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(wide), targets.flatten(), reduction="none", ignore_index=IGNORED
    ).view(targets.shape)
    return (each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)).sum()


def config_of(model: nn.Module) -> object:
    """The config of the model, or of the one that DistributedDataParallel and the like wrap; None without one."""
    inner = getattr(model, "module", None)
    if not hasattr(model, "config") and isinstance(inner, nn.Module):
        return config_of(inner)
    return getattr(model, "config", None)


def prefix_targets(model: nn.Module) -> int:
    """How many of the first next tokens a model may see before it predicts them: those inside its prefix."""
    return max(0, (getattr(config_of(model), "prefix_length", None) or 0) - 1)


def after_prefix(model: nn.Module, batch: Batch) -> Bool[Tensor, "B L"]:
    """Which tokens predict one past the model's prefix: all of them where it has none."""
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    # a text is counted from its first real token
    return (torch.ones_like(ids) if mask is None else mask.long()).cumsum(1) > prefix_targets(model)


def _targets(keywords: Mapping[str, Any]) -> Int[Tensor, "B L1"]:
    if "input_ids" not in keywords or keywords["input_ids"].ndim != 2 or keywords["input_ids"].shape[1] < 2:
        shape = list(keywords["input_ids"].shape) if "input_ids" in keywords else sorted(keywords)
        raise ValueError(f"next-token loss needs input_ids [B, L] with L >= 2, got {shape}; pass loss=")
    if keywords.get("labels") is not None:
        return keywords["labels"][:, 1:]
    targets, mask = keywords["input_ids"][:, 1:], keywords.get("attention_mask")
    return targets if mask is None else targets.masked_fill(~_pairs(mask.bool()), IGNORED)


def _pairs(mask: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L1"]:
    # under left padding the first real token would be predicted from a pad
    return mask[:, 1:] & mask[:, :-1]


@contextmanager
def evaluating(model: nn.Module, *, frozen: bool = True) -> Iterator[None]:
    """Evaluation mode (no dropout) and, if `frozen`, parameters without gradients; every module's mode and every
    parameter's flag come back as they were, errors included."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.requires_grad and not frozen)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def scalar_loss(model: nn.Module, batch: Batch, loss: Loss | None) -> Float[Tensor, ""]:
    """`loss(model, batch)`, or the next-token loss.

    Raises: ValueError unless it is one finite number."""
    value = next_token_loss(model, batch) if loss is None else loss(model, batch)
    if not isinstance(value, Tensor) or value.ndim:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, got {shape}")
    if not torch.isfinite(value):
        raise ValueError(f"loss must be finite, got {value.item()}")
    return value
