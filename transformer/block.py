"""One pre-norm block: ``x + attention(norm(x))``, then ``x + feedforward(norm(x))``."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe import PEER, DepthRouting, LayerDrop, MoE, PathDropout, ProductKeyMemory, Routing, SoftMoE
from moe.dropout import keep_mask
from moe.memory_values import MemoryValues
from moe.noise import Noise
from moe.recomputation import recomputing
from moe.routers.top_k import repeat_draw
from sparse_attn import KVCache, RaggedKVCache, StreamingKVCache
from transformer.build import build_attention, build_depth, build_feedforward
from transformer.feedforward import FeedForward, autocast_once
from transformer.layer_config import LayerConfig
from transformer.norm import RMSNorm


@dataclass(frozen=True)
class Choices:
    """What a block chose: experts for its tokens, and which tokens pass it; None where it has nothing to choose.

    losses: side losses of its attention's selection, by name.
    """

    routing: Routing | None = None
    depth: DepthRouting | None = None
    losses: dict[str, Float[Tensor, ""]] = field(default_factory=dict)

    def detach(self) -> "Choices":
        """The same without gradient history and losses: what to keep for a replay."""
        return Choices(self.routing and self.routing.detach(), self.depth and self.depth.detach())


@dataclass(frozen=True)
class Rows:
    """What goes with the rows [B, L, dim] that a block works on.

    angles: cos and sin of their rotation, [L, P] or [B, L, P]; mask: False marks padding; ids: their tokens;
    positions: where they stand, if they do not follow each other; noise: what training draws for them.
    """

    angles: tuple[Tensor, Tensor] | None = None
    mask: Bool[Tensor, "B L"] | None = None
    ids: Int[Tensor, "B L"] | None = None
    positions: Int[Tensor, "B L"] | None = None
    noise: Noise | None = None

    def at(self, places: Int[Tensor, "B C"], length: int, *, start: int, ragged: bool) -> "Rows":
        """Those of ``places`` [B, C] in [0, length]; place ``length`` is padding, which stands where the last row does.

        start: position of the first row. ragged: whether there may be padding.
        """
        inside = places.clamp_max(length - 1)
        angles = self.angles and (_picked(self.angles[0], inside), _picked(self.angles[1], inside))
        ids = None if self.ids is None else self.ids.gather(1, inside)
        positions = inside + start if self.positions is None else self.positions.gather(1, inside)
        return Rows(angles, places < length if ragged else None, ids, positions, self.noise)


def _picked(angles: Float[Tensor, "*#B L P"], places: Int[Tensor, "B C"]) -> Float[Tensor, "B C P"]:
    if angles.dim() == 2:
        return angles[places]
    return angles.gather(1, places[..., None].expand(-1, -1, angles.shape[-1]))


class Block(nn.Module):
    """Attention and feed-forward with their norms; either may be absent, and then the stream passes unchanged.

    dim: width; layer: its config; norm_eps, dropout: as in :class:`TransformerConfig`; name: for errors; pools,
    vocab_size: as in :func:`transformer.build.build_feedforward`.
    """

    def __init__(
        self,
        dim: int,
        layer: LayerConfig,
        *,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        name: str = "block",
        pools: dict[str, MemoryValues] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps=norm_eps) if layer.attention else None
        self.attention = build_attention(dim, layer.attention, norm_eps=norm_eps) if layer.attention else None
        self.feedforward_norm = RMSNorm(dim, eps=norm_eps) if layer.feedforward else None
        self.feedforward = (
            build_feedforward(dim, layer.feedforward, name=f"{name}.feedforward", pools=pools, vocab_size=vocab_size)
            if layer.feedforward
            else None
        )
        self.depth = build_depth(dim, layer.depth, name=f"{name}.depth") if layer.depth else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.path = PathDropout(layer.path_dropout) if layer.path_dropout else nn.Identity()
        self.layer_drop = LayerDrop(layer.layer_drop, rescale=layer.layer_drop_rescale)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        angles: tuple[Tensor, Tensor] | None,
        *,
        token_mask: Bool[Tensor, "B L"] | None = None,
        token_ids: Int[Tensor, "B L"] | None = None,
        cache: KVCache | RaggedKVCache | StreamingKVCache | None = None,
        start: int = 0,
        positions: Int[Tensor, "B L"] | None = None,
        replay: Choices | None = None,
        choose_first: bool = False,
        noise: Noise | None = None,
    ) -> tuple[Float[Tensor, "B L D"], Choices]:
        """x [B, L, dim] to the same shape, and what was chosen: experts, and tokens that pass.

        token_mask: False marks padding. start: position of the first row; positions: of every row, where the sequences
        of a batch count their own. With a cache a predictor chooses the tokens
        that pass, in training too: the best of a sequence are not known before its end.
        replay: use these experts and tokens instead of choosing. choose_first: choose the experts apart, then replay
        that choice, for :func:`recomputed`. noise: what routers and dropout draw from; None: torch's global generators.
        A layer that LayerDrop skips gives x, and the choices of no token.
        """
        rows, replay = Rows(angles, token_mask, token_ids, positions, noise), replay or Choices()
        if self.layer_drop.skips(generator=noise):
            return x, self._no_choices(x)
        if self.depth is None:
            y, choices = self._run(x, rows, cache, replay, choose_first)
            return self.layer_drop.rescaled(x, y), choices
        depth = self.depth.route(
            x, padding_mask=token_mask, choose="predictor" if cache is not None else "auto", replay=replay.depth
        )
        routings = []

        def run(passing: Tensor, places: Tensor) -> Tensor:
            chosen = rows.at(places, x.shape[1], start=start, ragged=depth.ragged)
            y, choices = self._run(passing, chosen, cache, replay, choose_first)
            routings.append(choices.routing)
            return y

        y = self.layer_drop.rescaled(x, self.depth.through(x, run, depth))
        return y, Choices(routings[0] if routings else self._no_choices(x).routing, depth)

    def _run(
        self,
        x: Float[Tensor, "B L D"],
        rows: Rows,
        cache: KVCache | RaggedKVCache | StreamingKVCache | None,
        replay: Choices,
        choose_first: bool,
    ) -> tuple[Float[Tensor, "B L D"], Choices]:
        losses: dict[str, Tensor] = {}
        if self.attention is not None and self.attention_norm is not None:
            normed = autocast_once(self.attention_norm(x))
            mixed, losses = self.attention(
                normed, rows.angles, token_mask=rows.mask, cache=cache, positions=rows.positions, generator=rows.noise
            )
            x = x + self._branch(mixed, "attention", rows.noise)
        if self.feedforward is None or self.feedforward_norm is None:
            return x, Choices(losses=losses)
        y, routing = _feed(self.feedforward, self.feedforward_norm(x), rows, replay, choose_first)
        return x + self._branch(y, "feedforward", rows.noise), Choices(routing, losses=losses)

    def _branch(self, y: Float[Tensor, "B L D"], site: str, noise: Noise | None) -> Float[Tensor, "B L D"]:
        """What is added to the stream: y after dropout and stochastic depth."""
        if noise is None:
            return self.path(self.dropout(y))
        if self.training and isinstance(self.dropout, nn.Dropout):
            y = y * keep_mask(y, list(y.shape), self.dropout.p, noise, site=site)
        return self.path(y, generator=noise, site=f"{site} path") if isinstance(self.path, PathDropout) else y

    def _no_choices(self, x: Float[Tensor, "B L D"]) -> Choices:
        """Of no token, so that every batch has one record for each layer with something to choose."""
        nothing, ids = x[:, :0], torch.zeros(x.shape[0], 0, dtype=torch.long, device=x.device)
        routing = self.feedforward.route(nothing, token_ids=ids) if isinstance(self.feedforward, MoE) else None
        return Choices(routing, None if self.depth is None else self.depth.route(nothing))


def _feed(
    feedforward: nn.Module, normed: Float[Tensor, "B L D"], rows: Rows, replay: Choices, choose_first: bool
) -> tuple[Float[Tensor, "B L D"], Routing | None]:
    if isinstance(feedforward, MoE):
        routing = replay.routing
        if routing is not None and feedforward.training:
            repeat_draw(routing)
        elif routing is None and choose_first:
            with torch.no_grad():
                routing = feedforward.route(normed, token_ids=rows.ids, padding_mask=rows.mask, generator=rows.noise)
        return feedforward(normed, token_ids=rows.ids, padding_mask=rows.mask, replay=routing, generator=rows.noise)
    if isinstance(feedforward, SoftMoE | ProductKeyMemory | PEER):
        return feedforward(normed, padding_mask=rows.mask), None
    if isinstance(feedforward, FeedForward):
        return feedforward(autocast_once(normed), generator=rows.noise), None
    return feedforward(autocast_once(normed)), None


def recomputed(
    run: Callable[[Tensor, Choices | None], tuple[Tensor, Choices]], x: Tensor, replay: Choices | None
) -> tuple[Tensor, Choices]:
    """``run(x, replay)``, keeping only x: the rest is computed again in the backward pass (arXiv:1604.06174).

    The second run replays what the first one chose: a gate that ties, or differs in its last bit, cannot send a token
    elsewhere. ``run`` must choose experts first and then replay in the first run too, so that both save the same
    tensors. Both draw alike from torch's generators.
    """
    chosen: list[Choices] = []

    def again(x: Tensor) -> tuple[Tensor, Choices]:
        if chosen:
            with recomputing():
                return run(x, chosen[0])
        y, choices = run(x, replay)
        chosen.append(choices.detach())
        return y, choices

    return checkpoint(again, x, use_reentrant=False)


def initialise(module: nn.Module, *, std: float, output_std: float, generator: torch.Generator | None = None) -> None:
    """Normal weights: ``output_std`` for the matrices that write to the residual stream, ``std`` for the others.

    Sub-keys, memory rows and what chooses the tokens that pass a block keep the scale of their own modules: a softmax
    over scores of 0.02 would be uniform. The noise of a noisy router and the biases of
    experts start at zero.
    """
    rows = {id(part.weight) for part in module.modules() if isinstance(part, MemoryValues)}
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        if parameter.dim() < 2 and "selection" in parts and parts[-1] == "bias":
            nn.init.zeros_(parameter)
        if parameter.dim() < 2 and "depth" not in parts:
            continue
        with torch.no_grad():
            if "depth" in parts:
                deviation = 0.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, deviation, generator=generator)
            elif parts[-2:] == ["keys", "weight"]:
                bound = parameter.shape[-1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            elif parts[-1] in ("noise_weight", "up_bias", "down_bias"):
                parameter.zero_()
            elif id(parameter) in rows:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                writes = "output" in parts or "down" in parts
                parameter.normal_(0.0, output_std if writes else std, generator=generator)
