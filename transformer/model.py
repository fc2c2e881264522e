"""The language model: embedding, blocks, norm, head."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe import DepthRouting, MemoryValues, Noise, Routing
from pruning.axes import Axis
from sparse_attn import KVCache, RaggedKVCache, StreamingKVCache, window_and_sinks
from transformer import accounting, axes, storage
from transformer.attention import rotary_angles, turn
from transformer.block import Block, Choices, initialise, recomputed
from transformer.config import TransformerConfig
from transformer.layer_config import LayerConfig
from transformer.loss import IGNORE, chunked_cross_entropy
from transformer.norm import RMSNorm
from transformer.padding import pads_left, require_own_positions
from transformer.prefix import past_prefix, require_whole_prefix


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass gives.

    logits [B, L, V] (None with ``return_logits=False``); loss: mean next-token cross-entropy in nats, without side
    losses, where labels were given; hidden [B, L, D] after the final norm; routings: one entry a layer, None for layers
    without experts; depths: likewise which tokens passed the layer, None where all pass. selection_losses: likewise the
    side losses of a layer's selection by name, {} if it has none; None for layers without a selection.
    """

    logits: Float[Tensor, "B L V"] | None
    loss: Float[Tensor, ""] | None
    hidden: Float[Tensor, "B L D"]
    routings: tuple[Routing | None, ...]
    depths: tuple[DepthRouting | None, ...]
    selection_losses: tuple[dict[str, Float[Tensor, ""]] | None, ...]


@dataclass
class ModelCache:
    """Keys and values of every layer (None where a layer has no attention) and the positions seen so far.

    mode: "exact" or "streaming". tokens: how many tokens each sequence has seen, if they count their own positions.
    """

    layers: list[KVCache | RaggedKVCache | StreamingKVCache | None]
    length: int = 0
    mode: str = "exact"
    tokens: Int[Tensor, "B"] | None = None

    def place(self, real: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"] | None:
        """Positions of the next columns, if each sequence counts its own real tokens; else None."""
        if self.tokens is None:
            return None
        counted = real.cumsum(1)
        positions = (self.tokens[:, None] + counted - 1).clamp_min(0)
        self.tokens = self.tokens + real.sum(1)
        return positions


class Transformer(nn.Module):
    """A transformer language model (or, with ``causal=False``, an encoder) from a :class:`TransformerConfig`.

    >>> config = TransformerConfig.uniform(vocab_size=256, dim=64, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> model = Transformer(config)
    >>> model(torch.zeros(1, 8, dtype=torch.long)).logits.shape
    torch.Size([1, 8, 256])
    """

    def __init__(self, config: TransformerConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        pools: dict[str, MemoryValues] = {}
        self.layers = nn.ModuleList(
            Block(
                config.dim,
                layer,
                norm_eps=config.norm_eps,
                dropout=config.dropout,
                name=f"layers.{index}",
                pools=pools,
                vocab_size=config.vocab_size,
            )
            for index, layer in enumerate(config.layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self._checkpointing = False
        self.register_state_dict_post_hook(storage.shared_once)
        self.register_load_state_dict_pre_hook(storage.shared_everywhere)
        # SmallInit, 0.02 at width 1000 (Nguyen & Salazar 2019, arXiv:1910.05895); outputs scaled by depth as in GPT-2
        std = math.sqrt(2 / (5 * config.dim))
        initialise(self, std=std, output_std=std / math.sqrt(2 * max(1, len(config.layers))), generator=generator)

    def forward(
        self,
        input_ids: Int[Tensor, "B L"],
        *,
        attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"] | None = None,
        labels: Int[Tensor, "B L"] | None = None,
        cache: ModelCache | None = None,
        replay: tuple[Routing | None, ...] | None = None,
        replay_depths: tuple[DepthRouting | None, ...] | None = None,
        return_logits: bool = True,
    ) -> ModelOutput:
        """Token ids [B, L] to logits [B, L, V].

        attention_mask [B, L]: 0 marks padding among these tokens; a cache remembers the padding before them. Padding on
        the left is refused with gradients, or a cache without ``unequal_rows``, where a layer counts positions.
        labels: targets at their own positions (``labels=input_ids`` is usual); the model compares position i with label
        i + 1 and skips −100, and the labels of a prefix. An encoder compares position i with label i. cache: from
        :meth:`new_cache`, updated in place; it holds keys and values without gradients, so that backward() is refused.
        replay: routings of an earlier pass; their experts are used again. replay_depths: likewise the tokens that
        passed each layer; routings of a layer that only some tokens pass fit no others. return_logits: False leaves the
        logits out, so that with labels only a chunk of them exists at a time.
        Raises ValueError for ids outside the vocabulary, a sequence over max_length, or shapes that do not agree.
        """
        seen = 0 if cache is None else cache.length if cache.tokens is None else cache.tokens[:, None]
        hidden, routings, depths, selection_losses = self.hidden_states(
            input_ids, attention_mask=attention_mask, cache=cache, replay=replay, replay_depths=replay_depths
        )
        loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels must have shape {tuple(input_ids.shape)}, got {tuple(labels.shape)}")
            shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE) if self.config.causal else labels
            if self.config.prefix_length:
                real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                shifted = past_prefix(shifted, self.config.prefix_length, seen + real.cumsum(1) - 1)
            loss = chunked_cross_entropy(hidden.flatten(0, 1), self.head_weight, shifted.flatten())
        logits = F.linear(hidden, self.head_weight) if return_logits else None
        return ModelOutput(logits, loss, hidden, routings, depths, selection_losses)

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B L"],
        *,
        attention_mask: Bool[Tensor, "B L"] | Int[Tensor, "B L"] | None = None,
        cache: ModelCache | None = None,
        replay: tuple[Routing | None, ...] | None = None,
        replay_depths: tuple[DepthRouting | None, ...] | None = None,
        noise: Noise | None = None,
    ) -> tuple[
        Float[Tensor, "B L D"],
        tuple[Routing | None, ...],
        tuple[DepthRouting | None, ...],
        tuple[dict[str, Float[Tensor, ""]] | None, ...],
    ]:
        """Hidden states [B, L, D] after the final norm, routings, depths and selection losses: all but the logits.

        noise: of the B sequences, for the routers and dropout of training; None draws from torch's global generators.
        """
        self._check(input_ids, cache, replay, replay_depths)
        start = cache.length if cache else 0
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
            )
        token_mask = None if attention_mask is None else attention_mask.bool()
        shared = cache is None or cache.tokens is None
        if shared and token_mask is not None and self.config.counts_positions and pads_left(token_mask):
            require_own_positions(self.config, len(input_ids), cache is not None)
            cache = self.new_cache(unequal_rows=len(input_ids))
        positions = None
        if cache is not None:
            real = torch.ones_like(input_ids, dtype=torch.bool) if token_mask is None else token_mask
            if start and self.config.seen_prefix:
                seen = real.new_full((len(real),), start, dtype=torch.long) if cache.tokens is None else cache.tokens
                require_whole_prefix(self.config.seen_prefix, seen, real)
            positions = cache.place(real)
        columns = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        angles = self._angles(columns if positions is None else positions)
        x = self.embedding(input_ids)
        made: list[Choices] = []
        again = self._checkpointing and torch.is_grad_enabled() and cache is None
        for index, layer in enumerate(self.layers):
            attention = self.config.layers[index].attention
            run = partial(
                _run_block, layer, angles.get(attention.head_dim) if attention else None, token_mask, input_ids,
                cache.layers[index] if cache else None, start, positions, again,
                None if noise is None else noise.at(index),
            )  # fmt: skip
            chosen = Choices(replay[index] if replay else None, replay_depths[index] if replay_depths else None)
            x, choices = recomputed(run, x, chosen) if again else run(x, chosen)
            made.append(choices)
        if cache is not None:
            cache.length = start + input_ids.shape[1]
        losses = tuple(
            choices.losses if layer.attention and layer.attention.selection else None
            for choices, layer in zip(made, self.config.layers, strict=True)
        )
        routings, depths = (tuple(getattr(choices, name) for choices in made) for name in ("routing", "depth"))
        hidden = self.norm(x)
        return hidden if cache is None else _NoBackward.apply(hidden), routings, depths, losses

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """The matrix that turns hidden states into logits: the head's own, or the embedding when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, *, mode: str = "exact", unequal_rows: int | None = None) -> ModelCache:
        """An empty cache for incremental decoding; each layer keeps only what its pattern can still see, and of a layer
        that only some tokens pass only those.

        mode "exact": positions are those of the text, the logits those of the full sequence. "streaming": positions are
        counted inside the cache, beyond max_length and for ever (:func:`sparse_attn.attend_streaming`); every attention
        must be ``causal() & (sliding_window(w) | sinks(n))`` with w + n <= max_length, or without sinks.
        unequal_rows: the number of sequences, if each shall count positions from its own first token (padding on the
        left, masked); None: they share their positions, which is as good where patterns see distances alone.
        Raises ValueError for another mode, or a layer that cannot stream.
        """
        if mode not in ("exact", "streaming"):
            raise ValueError(f"mode must be exact or streaming, got {mode!r}")
        made = [self._layer_cache(index, mode, unequal_rows is not None) for index in range(len(self.layers))]
        device = self.embedding.weight.device
        tokens = None if unequal_rows is None else torch.zeros(unequal_rows, dtype=torch.long, device=device)
        return ModelCache(made, mode=mode, tokens=tokens)

    def gradient_checkpointing(self, enabled: bool = True) -> None:
        """Keep only each block's input in training and compute the block again in the backward pass."""
        self._checkpointing = enabled

    def num_parameters(self, *, active: bool = False) -> int:
        """Number of weights; with ``active``, only those that one token uses (k of E experts)."""
        return accounting.num_parameters(self, active=active)

    def flops_per_token(self, length: int, *, active: bool = True) -> float:
        """Forward matrix-product FLOPs a token, averaged over a sequence of ``length``; see :mod:`accounting`."""
        return accounting.flops_per_token(self.config, length, active=active)

    def prunable_axes(self) -> list[Axis]:
        """What :mod:`pruning` may remove: the heads of each attention, the neurons of each dense feed-forward."""
        return axes.prunable_axes(self)

    def set_layer(self, index: int, layer: LayerConfig) -> None:
        """Record in the config what layer ``index`` has become."""
        layers = self.config.layers
        self.config = dataclasses.replace(self.config, layers=(*layers[:index], layer, *layers[index + 1 :]))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors (atomically); returns the folder."""
        return storage.save_pretrained(self, self.config, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> "Transformer":
        """Read what :meth:`save_pretrained` wrote, in evaluation mode.

        Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
        """
        return storage.from_pretrained(cls, Path(folder), dtype=dtype)

    def _layer_cache(self, index: int, mode: str, unequal: bool) -> KVCache | RaggedKVCache | StreamingKVCache | None:
        block = cast(Block, self.layers[index])
        if block.attention is None:
            return None
        pattern = block.attention.pattern
        if mode == "exact":
            return RaggedKVCache(pattern) if unequal or block.depth is not None else KVCache(pattern)
        if block.depth is not None or block.attention.selection is not None:
            raise ValueError(f"layer {index} cannot stream: its keys are chosen by content, not by their place")
        most, longest = sum(window_and_sinks(pattern)), self.config.max_length
        if most > longest:
            raise ValueError(f"layer {index}: window + sinks must be <= max_length={longest} to stream, got {most}")
        attention = block.attention
        if attention.alibi is not None:
            slopes = torch.tensor(attention.alibi, device=self.embedding.weight.device)
            return StreamingKVCache(pattern, None, softcap=attention.softcap, alibi=slopes, unequal=unequal)
        rotated = partial(turn, theta=self.config.rope_theta, scaling=self.config.rope_scaling)
        return StreamingKVCache(pattern, rotated, softcap=attention.softcap, unequal=unequal)

    def _angles(self, positions: Int[Tensor, "..."]) -> dict[int, tuple[Tensor, Tensor]]:
        attentions = (layer.attention for layer in self.config.layers)
        sizes = {attention.head_dim for attention in attentions if attention and not attention.alibi}
        theta, scaling = self.config.rope_theta, self.config.rope_scaling
        return {size: rotary_angles(positions, size, theta=theta, scaling=scaling) for size in sizes}

    def _check(
        self,
        input_ids: Tensor,
        cache: ModelCache | None,
        replay: tuple[Routing | None, ...] | None,
        replay_depths: tuple[DepthRouting | None, ...] | None,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be integers [B, L], got {input_ids.dtype} {list(input_ids.shape)}")
        if cache is not None and not self.config.causal:
            raise ValueError("an encoder (causal=False) sees later tokens and cannot take a cache: pass the whole text")
        end = (cache.length if cache else 0) + input_ids.shape[1]
        if end > self.config.max_length and (cache is None or cache.mode == "exact"):
            raise ValueError(f"sequence must be at most max_length={self.config.max_length} tokens, got {end}")
        for name, records in (("replay", replay), ("replay_depths", replay_depths)):
            if records is not None and len(records) != len(self.layers):
                count = len(self.layers)
                raise ValueError(f"{name} must have one entry for each of the {count} layers, got {len(records)}")
        # a bad id is an illegal memory access on a GPU: there the check would cost a synchronisation
        if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"input_ids must be in [0, vocab_size={self.config.vocab_size}), got {low}…{high}")


class _NoBackward(torch.autograd.Function):
    """The identity, once keys have lost their gradients in a cache."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        raise ValueError(
            "backward() needs a pass without a cache, which holds keys and values without gradients: leave out cache=, "
            "or run under torch.no_grad()"
        )


def _run_block(block, angles, token_mask, token_ids, cache, start, positions, choose_first, noise, x, replay):
    return block(
        x, angles, token_mask=token_mask, token_ids=token_ids, cache=cache, start=start, positions=positions,
        replay=replay, choose_first=choose_first, noise=noise,
    )  # fmt: skip
