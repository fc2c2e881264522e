"""Sampling with a cache: greedy, temperature, top-k, nucleus; whole sequences or a stream."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer.config import TransformerConfig
from transformer.feedforward_config import MoEConfig
from transformer.model import ModelCache, Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    input_ids: Int[Tensor, "B L"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"] | None = None,
    streaming: bool = False,
    prefill_chunk: int | None = None,
    allow_future: bool = False,
) -> Int[Tensor, "B M"]:
    """The prompt followed by up to ``max_new_tokens`` sampled tokens, [B, L + n]; the options are :func:`stream`'s.

    Ends early once every row has produced ``eos_id``; a finished row goes on with ``eos_id``.
    """
    tokens = stream(
        model, input_ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        generator=generator, eos_id=eos_id, attention_mask=attention_mask, streaming=streaming,
        prefill_chunk=prefill_chunk, allow_future=allow_future,
    )  # fmt: skip
    return torch.cat([input_ids, *(token[:, None] for token in tokens)], dim=1)


def stream(
    model: Transformer,
    input_ids: Int[Tensor, "B L"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"] | None = None,
    streaming: bool = False,
    prefill_chunk: int | None = None,
    allow_future: bool = False,
) -> Iterator[Int[Tensor, "B"]]:
    """Yield the next token of every row, [B], one step at a time.

    temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled. top_k: only the k most
    likely; top_p: only the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751).
    generator: makes sampling repeatable. attention_mask: 0 marks padding on the left of shorter prompts, each of which
    counts positions from its own first token. streaming: positions are counted inside the cache, so that the text may
    go on beyond max_length (:meth:`Transformer.new_cache`). prefill_chunk: read the prompt in pieces of so many tokens,
    which bounds memory and changes nothing else; None: at once. allow_future: sample all the same from a model with
    layers that compare a token with later ones (expert choice, Soft MoE), which are not there yet: the text is then
    drawn from other distributions than training saw, and depends on the batch, the prompt's length and prefill_chunk.
    Raises ValueError, at the call, for options out of range, an empty prompt, a prompt plus new tokens beyond
    max_length unless streaming, fewer tokens than a prefix has, an encoder, padding that is not on the left, a model
    that cannot stream, or one that looks ahead without allow_future.
    """
    if not allow_future:
        require_no_future(model.config)
    _check(model, input_ids, max_new_tokens, temperature, top_k, top_p, attention_mask, streaming, prefill_chunk)
    cache = model.new_cache(
        mode="streaming" if streaming else "exact",
        unequal_rows=len(input_ids) if _count_their_own(model, attention_mask) else None,
    )
    choice = (temperature, top_k, top_p)
    return _steps(
        model, cache, input_ids, max_new_tokens, choice, generator, eos_id, attention_mask, prefill_chunk
    )  # fmt: skip


def _steps(
    model: Transformer,
    cache: ModelCache,
    ids: Tensor,
    max_new_tokens: int,
    shape: tuple[float, int | None, float | None],
    generator: torch.Generator | None,
    eos_id: int | None,
    mask: Tensor | None,
    prefill_chunk: int | None,
) -> Iterator[Tensor]:
    was_training = model.training
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    model.eval()
    try:
        for _ in range(max_new_tokens):
            with torch.no_grad():
                hidden = _read(model, cache, ids, mask, prefill_chunk)
                logits = torch.nn.functional.linear(hidden, model.head_weight)
                token = choose(logits, *shape, generator=generator)
            if eos_id is not None:
                token = token.where(~finished, eos_id)
                finished |= token == eos_id
            yield token
            if eos_id is not None and finished.all():
                return
            ids, mask = token[:, None], None
    finally:
        model.train(was_training)


def _read(
    model: Transformer, cache: ModelCache, ids: Tensor, mask: Tensor | None, chunk: int | None
) -> Float[Tensor, "B D"]:
    """The hidden states of the last column of ids, after all went through the cache in chunks."""
    size = chunk or ids.shape[1]
    masks = [None] * -(-ids.shape[1] // size) if mask is None else mask.split(size, dim=1)
    for some, real in zip(ids.split(size, dim=1), masks, strict=True):
        hidden = model.hidden_states(some, attention_mask=real, cache=cache)[0]
    return hidden[:, -1]


def choose(
    logits: Float[Tensor, "B V"],
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B"]:
    """One token for each row of logits. Exactly ``top_k`` candidates remain under ties, lowest ids first."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = float("-inf")
    if top_p is not None:
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
    drawn = torch.multinomial(ordered.softmax(-1), 1, generator=generator)
    return ids.gather(1, drawn).squeeze(1)


def _check(
    model: Transformer,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    mask: Tensor | None,
    streaming: bool,
    prefill_chunk: int | None,
) -> None:
    if not model.config.causal:
        raise ValueError("generation needs a causal model, got an encoder (causal=False)")
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids must be integers [B, L], got {ids.dtype} {list(ids.shape)}")
    if ids.shape[1] < 1:
        raise ValueError("the prompt must hold at least 1 token, got 0")
    _check_prefix(model.config.seen_prefix, ids, mask, prefill_chunk)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    # the last token that is sampled is never fed back
    longest = ids.shape[1] + max(0, max_new_tokens - 1)
    if longest > model.config.max_length and not streaming:
        raise ValueError(
            f"prompt and new tokens must fit max_length={model.config.max_length}, "
            f"got {ids.shape[1]} + {max_new_tokens}"
        )
    if not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise ValueError(f"temperature must be 0 (greedy) or in [1e-6, inf), got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be >= 1, an int, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if mask is not None and not bool((mask.bool().cummax(1).values == mask.bool()).all() and mask[:, -1].all()):
        raise ValueError("attention_mask must be 0 on the left and 1 on the right of every prompt")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be >= 1, got {prefill_chunk}")


def _check_prefix(prefix: int, ids: Tensor, mask: Tensor | None, chunk: int | None) -> None:
    """Every prompt holds the whole prefix, which sees itself, and the first chunk of the prompts does too."""
    padding = 0
    if mask is not None and mask.shape == ids.shape:
        padding = ids.shape[1] - int(mask.bool().sum(1).min())
    if ids.shape[1] - padding < prefix:
        raise ValueError(
            f"the prompt must hold the prefix_length={prefix} tokens that see each other, got {ids.shape[1] - padding}"
        )
    if prefix and chunk is not None and chunk < padding + prefix:
        raise ValueError(
            f"prefill_chunk must be >= {padding + prefix}, prefix_length and the padding before it, got {chunk}"
        )


def require_no_future(config: TransformerConfig) -> None:
    """Raises: ValueError naming the first layer of a causal model that compares a token with later ones."""
    if config.causal and config.sees_future:
        feedforward = config.layers[config.sees_future[0]].feedforward
        kind = "the expert_choice router" if isinstance(feedforward, MoEConfig) else "soft_moe"
        raise ValueError(
            f"generation needs layers that look at earlier tokens alone, got {kind} in layer {config.sees_future[0]}, "
            f"which compares a token with later ones: pass allow_future=True (--allow-future) to sample all the same"
        )


def _count_their_own(model: Transformer, mask: Tensor | None) -> bool:
    """Whether some rows are shorter and some layer counts positions from the start."""
    return mask is not None and not bool(mask.all()) and model.config.counts_positions
