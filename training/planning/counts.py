"""What a configured model holds and does, counted from its config: nothing is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch

from moe import MemoryValues, MixtureOfDepths, MoE
from moe.depth import passing_tokens
from sparse_attn.selection import DSA
from training.config import RunConfig
from training.model_config import model_config
from transformer import Transformer, TransformerConfig
from transformer.feedforward_config import MoEConfig
from transformer.layer_config import LayerConfig

GATED = ("swiglu", "reglu", "drelu")


@dataclass(frozen=True)
class Dispatch:
    """One mixture-of-experts layer: E experts of ``parameters`` weights together in ``tensors`` tensors, of which a
    token uses k; share: of the tokens that pass the layer; biases: those of the weights that no product takes."""

    num_experts: int
    k: int
    parameters: int
    tensors: int = 2
    share: float = 1.0
    biases: int = 0

    @property
    def flops(self) -> float:
        """Forward matrix-product FLOPs of the experts a token: 2 for each weight of a matrix that it uses."""
        return 2.0 * self.share * self.k / self.num_experts * (self.parameters - self.biases)

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
class Block:
    """One layer of the model.

    weights: outside experts, a table that layers share in the last of them; kept: numbers kept a token for the backward
    pass, in working precision and (residual stream, norms' inputs) in float32; inner: gradients a token that its
    feed-forward holds at once; copied: weights outside experts of which a forward pass in half precision makes copies;
    mixture: its experts.
    """

    weights: int
    kept: tuple[float, float]
    inner: float = 0.0
    copied: int = 0
    mixture: Dispatch | None = None

    @property
    def experts(self) -> int:
        """Weights of its experts."""
        return 0 if self.mixture is None else self.mixture.parameters


@dataclass(frozen=True)
class ModelCounts:
    """Weights, work and activations of a model.

    dense: weights outside experts; root: those of them outside blocks (embedding, head, last norm); tensors: (weights,
    whether of experts) of every parameter in order; blocks: the layers, in order; flops: forward matrix-product FLOPs a
    token; vocabulary: rows of the head; tables: weights of memories."""

    dim: int
    dense: int
    root: int
    tensors: tuple[tuple[int, bool], ...]
    blocks: tuple[Block, ...]
    flops: float
    vocabulary: int
    tables: int = 0

    @property
    def layers(self) -> int:
        """Blocks."""
        return len(self.blocks)

    @property
    def mixtures(self) -> tuple[Dispatch, ...]:
        """The mixture layers."""
        return tuple(block.mixture for block in self.blocks if block.mixture is not None)

    @property
    def copied(self) -> int:
        """Weights outside experts of which a forward pass in half precision makes copies, the head's apart."""
        return sum(block.copied for block in self.blocks)

    @property
    def experts(self) -> int:
        """Weights of all experts."""
        return sum(block.experts for block in self.blocks)


def count_model(config: RunConfig, *, vocab_size: int | None = None) -> ModelCounts:
    """Counts for the model of a run. vocab_size: None takes data.vocab_size (bytes: 257).

    Raises: ValueError as building the model does, or for a run that starts from another model than [model]."""
    if config.init is not None:
        raise ValueError(f"init must be left out for a plan, which is of the [model] section, got {config.init}")
    vocab = vocab_size or (257 if config.data.tokenizer == "bytes" else config.data.vocab_size)
    settings = model_config(config.model, vocab_size=vocab, length=config.data.length)
    with torch.device("meta"):
        model = Transformer(settings)
    spread = {id(weight) for weight in _expert_weights(model)}
    modules = list(model.layers)
    parts = zip(settings.layers, modules, _outside_experts(modules), strict=True)
    blocks = tuple(_block(settings, *part, config.data.length) for part in parts)
    total = model.num_parameters()
    dense = total - sum(block.experts for block in blocks)
    return ModelCounts(
        dim=settings.dim,
        dense=dense,
        root=dense - sum(block.weights for block in blocks),
        tensors=tuple((p.numel(), id(p) in spread) for p in model.parameters()),
        blocks=blocks,
        flops=model.flops_per_token(config.data.length),
        vocabulary=vocab,
        tables=sum(p.numel() for m in model.modules() if isinstance(m, MemoryValues) for p in m.parameters()),
    )


def _block(
    settings: TransformerConfig, layer: LayerConfig, module: torch.nn.Module, weights: int, length: int
) -> Block:
    return Block(
        weights=weights,
        kept=block_activations(settings.dim, layer),
        inner=inner_gradients(settings.dim, layer),
        copied=_copied(module),
        mixture=_mixture(layer, module, length),
    )


def _mixture(layer: LayerConfig, module: torch.nn.Module, length: int) -> Dispatch | None:
    if not isinstance(layer.feedforward, MoEConfig) or not isinstance(module.feedforward, MoE):
        return None
    held = [weight.numel() for weight in module.feedforward.experts.parameters()]
    biases = sum(weight.numel() for weight in module.feedforward.experts.parameters() if weight.ndim == 2)
    share = 1.0 if layer.depth is None else passing_tokens(length, capacity=layer.depth.capacity) / length
    return Dispatch(layer.feedforward.num_experts, layer.feedforward.k, sum(held), len(held), share, biases)


def _expert_weights(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for m in module.modules() if isinstance(m, MoE) for p in m.experts.parameters()]


def _outside_experts(blocks: Sequence[torch.nn.Module]) -> list[int]:
    """Weights outside experts of each block. A table that several share (memory_pool) is the last one's: its gradient
    is there from that block's backward pass on."""
    seen = {id(p) for block in blocks for p in _expert_weights(block)}
    found = []
    for block in reversed(blocks):
        mine = [p for p in block.parameters() if id(p) not in seen]
        found.append(sum(p.numel() for p in mine))
        seen |= {id(p) for p in mine}
    return found[::-1]


def _copied(block: torch.nn.Module) -> int:
    """Weights of projections, dense layers and shared experts. Routed experts are converted one at a time; routers,
    depth's predictors, lightning indexers, and keys and tables of memories are not: what they compute is float32."""
    apart = {id(p) for m in block.modules() if isinstance(m, DSA | MixtureOfDepths) for p in m.parameters()}
    matrices = [m.weight for m in block.modules() if isinstance(m, torch.nn.Linear)]
    shared = [p for m in block.modules() if isinstance(m, MoE) and m.shared is not None for p in m.shared.parameters()]
    return sum(p.numel() for p in matrices + shared if id(p) not in apart)


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


def inner_gradients(dim: int, layer: LayerConfig) -> float:
    """Gradients a token that the backward pass of a feed-forward holds at once, beside what the block keeps.

    That of its input, and of a dense layer of width F those of the activation's result and of each of the G products
    from which it came, (G + 1) · F; of a mixture k · G · F, those of what it keeps (:mod:`moe.grouped`).
    """
    ff = layer.feedforward
    if ff is None:
        return float(dim)
    products = 2 if getattr(ff, "activation", "swiglu") in GATED else 1
    hidden = getattr(ff, "hidden", 2 * dim)
    if isinstance(ff, MoEConfig):
        return float(dim + products * (ff.k * hidden + ff.shared_hidden))
    return float(dim + (products + 1) * hidden)
