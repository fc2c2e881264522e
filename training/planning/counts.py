"""What a configured model holds and does, counted from its config: nothing is allocated."""

from dataclasses import dataclass
from math import comb

import torch

from moe import MoE
from training.config import RunConfig
from training.model_config import model_config
from transformer import Transformer, TransformerConfig
from transformer.layer_config import LayerConfig, MoEConfig

GATED = ("swiglu", "reglu", "drelu")


@dataclass(frozen=True)
class Dispatch:
    """One mixture-of-experts layer: E experts of ``parameters`` weights together, of which a token uses k."""

    num_experts: int
    k: int
    parameters: int

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
    """dense: weights outside experts; root: those of them outside blocks (embedding, head, last norm); largest: weights
    of the block, or of the root, that has most; mixtures: the mixture layers; flops: forward matrix-product FLOPs a
    token; activations: numbers kept a token for the backward pass, in working precision and (residual stream, norms'
    inputs) in float32; boundary: the same with activation checkpointing, one residual a block; block: what recomputing
    one block keeps at its peak; vocabulary: rows of the head."""

    dim: int
    layers: int
    dense: int
    root: int
    largest: int
    mixtures: tuple[Dispatch, ...]
    flops: float
    activations: tuple[float, float]
    boundary: tuple[float, float]
    block: tuple[float, float]
    vocabulary: int

    @property
    def experts(self) -> int:
        """Weights of all experts."""
        return sum(mixture.parameters for mixture in self.mixtures)


def count_model(config: RunConfig, *, vocab_size: int | None = None) -> ModelCounts:
    """Counts for the model of a run. vocab_size: None takes data.vocab_size (bytes: 257).

    Raises: ValueError as building the model does."""
    vocab = vocab_size or (257 if config.data.tokenizer == "bytes" else config.data.vocab_size)
    settings = model_config(config.model, vocab_size=vocab, length=config.data.length)
    with torch.device("meta"):
        model = Transformer(settings)
    mixtures = []
    for layer, module in zip(settings.layers, model.layers, strict=True):
        if isinstance(layer.feedforward, MoEConfig) and isinstance(module.feedforward, MoE):
            held = sum(weight.numel() for weight in module.feedforward.experts.parameters())
            mixtures.append(Dispatch(layer.feedforward.num_experts, layer.feedforward.k, held))
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
        mixtures=tuple(mixtures),
        flops=model.flops_per_token(config.data.length),
        activations=(work, wide + 2 * settings.dim),
        boundary=(0.0, float(settings.dim * (len(settings.layers) + 2))),
        block=max(kept, key=sum, default=(0.0, 0.0)),
        vocabulary=vocab,
    )


def _outside_experts(block: torch.nn.Module) -> int:
    inside = {id(p) for m in block.modules() if isinstance(m, MoE) for p in m.experts.parameters()}
    return sum(p.numel() for p in block.parameters() if id(p) not in inside)


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
