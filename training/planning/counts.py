"""What a configured model holds and does, counted from its config: nothing is allocated."""

from dataclasses import dataclass
from math import comb

import torch

from moe import MemoryValues, MoE
from moe.depth import passing_tokens
from training.config import RunConfig
from training.model_config import model_config
from transformer import Transformer, TransformerConfig
from transformer.feedforward_config import MoEConfig
from transformer.layer_config import LayerConfig

GATED = ("swiglu", "reglu", "drelu")


@dataclass(frozen=True)
class Dispatch:
    """One mixture-of-experts layer: E experts of ``parameters`` weights together in ``tensors`` tensors, of which a
    token uses k; share: of the tokens that pass the layer."""

    num_experts: int
    k: int
    parameters: int
    tensors: int = 2
    share: float = 1.0

    @property
    def flops(self) -> float:
        """Forward matrix-product FLOPs of the experts a token: 2 for each weight that it uses."""
        return 2.0 * self.share * self.k / self.num_experts * self.parameters

    def other_ranks(self, ranks: int) -> float:
        """Other ranks that a token's row goes to, on average, if every set of k experts is equally likely.

        (R − 1) · (1 − C(E − E/R, k) / C(E, k)): one row for each rank with at least one of its experts. Where R does
        not divide E, the mean over ranks of both share sizes.
        """
        if ranks == 1:
            return 0.0
        size, longer = divmod(self.num_experts, ranks)
        sizes = [size + 1] * longer + [size] * (ranks - longer)
        some = [1 - comb(self.num_experts - held, self.k) / comb(self.num_experts, self.k) for held in sizes]
        return sum(some) * (ranks - 1) / ranks


@dataclass(frozen=True)
class ModelCounts:
    """Weights, work and activations of a model.

    dense: weights outside experts; root: those of them outside blocks (embedding, head, last norm); largest: weights
    of the block, or of the root, that has most; tensors: (weights, whether of experts) of every parameter in order;
    copied: weights outside experts of which a forward pass in half precision makes copies, the head's apart; mixtures:
    the mixture layers; flops: forward matrix-product FLOPs a token; activations: numbers kept a token for the backward
    pass, in working precision and (residual stream, norms' inputs) in float32; widened: more of the latter in half
    precision (inputs of routers); boundary: as activations with activation checkpointing, one residual a block; block:
    what recomputing one block keeps at its peak; vocabulary: rows of the head; tables: weights of memories."""

    dim: int
    layers: int
    dense: int
    root: int
    largest: int
    tensors: tuple[tuple[int, bool], ...]
    copied: int
    mixtures: tuple[Dispatch, ...]
    flops: float
    activations: tuple[float, float]
    widened: float
    boundary: tuple[float, float]
    block: tuple[float, float]
    vocabulary: int
    tables: int = 0

    @property
    def experts(self) -> int:
        """Weights of all experts."""
        return sum(mixture.parameters for mixture in self.mixtures)


def count_model(config: RunConfig, *, vocab_size: int | None = None) -> ModelCounts:
    """Counts for the model of a run. vocab_size: None takes data.vocab_size (bytes: 257).

    Raises: ValueError as building the model does, or for a run that starts from another model than [model]."""
    if config.init is not None:
        raise ValueError(f"init must be left out for a plan, which is of the [model] section, got {config.init}")
    vocab = vocab_size or (257 if config.data.tokenizer == "bytes" else config.data.vocab_size)
    settings = model_config(config.model, vocab_size=vocab, length=config.data.length)
    with torch.device("meta"):
        model = Transformer(settings)
    mixtures = _mixtures(settings, model, config.data.length)
    spread = {id(weight) for weight in _expert_weights(model)}
    total = model.num_parameters()
    experts = sum(mixture.parameters for mixture in mixtures)
    blocks = [_outside_experts(module) for module in model.layers]
    kept = [block_activations(settings.dim, layer) for layer in settings.layers]
    work, wide = (sum(part) for part in zip(*kept, strict=True)) if kept else (0.0, 0.0)
    return ModelCounts(
        dim=settings.dim,
        layers=len(settings.layers),
        dense=total - experts,
        root=total - experts - sum(blocks),
        largest=max([total - experts - sum(blocks), *blocks]),
        tensors=tuple((p.numel(), id(p) in spread) for p in model.parameters()),
        copied=sum(_copied(module) for module in model.layers),
        mixtures=mixtures,
        flops=model.flops_per_token(config.data.length),
        activations=(work, wide + 2 * settings.dim),
        widened=float(settings.dim * len(mixtures)),
        boundary=(0.0, float(settings.dim * (len(settings.layers) + 2))),
        block=max(kept, key=sum, default=(0.0, 0.0)),
        vocabulary=vocab,
        tables=sum(p.numel() for m in model.modules() if isinstance(m, MemoryValues) for p in m.parameters()),
    )


def _mixtures(settings: TransformerConfig, model: Transformer, length: int) -> tuple[Dispatch, ...]:
    found = []
    for layer, module in zip(settings.layers, model.layers, strict=True):
        if isinstance(layer.feedforward, MoEConfig) and isinstance(module.feedforward, MoE):
            held = [weight.numel() for weight in module.feedforward.experts.parameters()]
            share = 1.0 if layer.depth is None else passing_tokens(length, capacity=layer.depth.capacity) / length
            found.append(Dispatch(layer.feedforward.num_experts, layer.feedforward.k, sum(held), len(held), share))
    return tuple(found)


def _expert_weights(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for m in module.modules() if isinstance(m, MoE) for p in m.experts.parameters()]


def _outside_experts(block: torch.nn.Module) -> int:
    inside = {id(p) for p in _expert_weights(block)}
    return sum(p.numel() for p in block.parameters() if id(p) not in inside)


def _copied(block: torch.nn.Module) -> int:
    """Weights of matrices outside experts and routers; experts are converted one at a time, and routers not at all."""
    kept_wide = {
        id(p) for m in block.modules() if isinstance(m, MoE) for p in (*m.experts.parameters(), *m.router.parameters())
    }
    return sum(p.numel() for p in block.parameters() if p.dim() > 1 and id(p) not in kept_wide)


def block_activations(dim: int, layer: LayerConfig) -> tuple[float, float]:
    """Numbers that a block keeps for the backward pass, a token: (in working precision, in float32).

    Attention: the normed input, rotated q and k, v, and the output before and after its heads are merged; in float32
    the norm's input and the log-sum-exp. Feed-forward: the normed input; of a dense layer each of its products (two
    with a gate) before and after the activation; of a mixture k · G · F, which is what ``moe.grouped`` keeps, and in
    float32 the routing. Other kinds count as a dense layer of their hidden width, or of two times ``dim``.
    """
    work, wide = 0.0, 0.0
    if layer.attention:
        a = layer.attention
        work += dim + 3 * a.num_heads * a.head_dim + 2 * a.num_kv_heads * a.head_dim
        wide += dim + a.num_heads
    ff = layer.feedforward
    if ff is not None:
        products = 2 if getattr(ff, "activation", "swiglu") in GATED else 1
        hidden = getattr(ff, "hidden", 2 * dim)
        work += dim
        wide += dim
        if isinstance(ff, MoEConfig):
            work += ff.k * products * hidden + 2 * products * ff.shared_hidden
            wide += 2 * ff.num_experts + 8 * ff.k
        else:
            work += 2 * products * hidden
    return work, wide


def transformer_config(config: RunConfig, vocab_size: int) -> TransformerConfig:
    """The model's own config."""
    return model_config(config.model, vocab_size=vocab_size, length=config.data.length)
