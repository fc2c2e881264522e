"""The dropout family beyond single activations: weights, heads, residual paths, whole layers.

All are the identity in evaluation and for p = 0, and all but LayerDrop scale what is kept by 1 / (1 − p), so that the
expectation in training is the value in evaluation. ``generator`` may give the draws, a torch.Generator or
:class:`moe.Noise`; by default they come from the global generator of the tensor's device, whose state activation
checkpointing restores.
"""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from moe.checks import below_one
from moe.noise import Noise, Source


class DropConnect(nn.Module):
    """x (W ⊙ M / (1 − p))ᵀ + b, each weight dropped with probability p, one mask a call. Wan et al. 2013 (ICML).

    Wraps a Linear, which keeps its parameters. The activations are not dropped: an input reaches an output or not,
    the same for every row of the call. Raises: ValueError for p outside [0, 1).
    """

    def __init__(self, linear: nn.Linear, p: float) -> None:
        super().__init__()
        self.linear, self.p = linear, _checked_probability(p)

    def forward(self, x: Float[Tensor, "*batch I"], *, generator: Source | None = None) -> Float[Tensor, "*batch O"]:
        """x [..., in] → [..., out]."""
        return drop_connect(self.linear, x, self.p if self.training else 0.0, generator=generator)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def drop_connect(
    linear: nn.Module,
    x: Float[Tensor, "*batch I"],
    p: float,
    *,
    generator: Source | None = None,
    site: str = "weights",
) -> Float[Tensor, "*batch O"]:
    """linear(x) with each weight dropped with probability p, for a layer that keeps its name; its hooks still run.

    p = 0 calls any module that stands for the Linear. From :class:`moe.Noise` all sequences of a step get one mask,
    which ``site`` names."""
    if p == 0:
        return linear(x)
    whole = cast(Tensor, linear.weight)
    if isinstance(generator, Noise):
        generator = generator.shared(site, whole.device)
    weight = whole * keep_mask(whole, list(whole.shape), _checked_probability(p), generator)
    return functional_call(linear, {"weight": weight}, (x,))


class HeadDropout(nn.Module):
    """Drops whole attention heads, each head of each sample with probability p (structured dropout; DropHead, Zhou et
    al. 2020, arXiv:2004.13342, which rescales by the number kept where this divides by 1 − p).

    Raises: ValueError for p outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = _checked_probability(p)

    def forward(self, heads: Float[Tensor, "B H L d"], *, generator: Source | None = None) -> Float[Tensor, "B H L d"]:
        """The heads' outputs, before the output projection, in the same shape. Raises: ValueError unless 4-D."""
        if heads.dim() != 4:
            raise ValueError(f"heads must have shape [B, H, L, d], got {list(heads.shape)}")
        if not self.training or self.p == 0:
            return heads
        return heads * keep_mask(heads, [*heads.shape[:2], 1, 1], self.p, generator, site="heads")

    def extra_repr(self) -> str:
        return f"p={self.p}"


class PathDropout(nn.Module):
    """Stochastic depth: a residual branch is dropped for a whole sample with probability p. Huang et al. 2016
    (arXiv:1603.09382). Apply it to the branch before it is added: x + path(branch(x)).

    The branch has run by then: this regularises and saves no time; :class:`LayerDrop` does.
    Raises: ValueError for p outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = _checked_probability(p)

    def forward(
        self, branch: Float[Tensor, "B *rest"], *, generator: Source | None = None, site: str = "path"
    ) -> Float[Tensor, "B *rest"]:
        """The branch [B, ...], each sample either zero or divided by 1 − p. site: which one, for :class:`moe.Noise`."""
        if not self.training or self.p == 0:
            return branch
        return branch * keep_mask(branch, [len(branch)] + [1] * (branch.dim() - 1), self.p, generator, site=site)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LayerDrop(nn.Module):
    """A whole layer is skipped for a whole batch with probability p, and does not run. Fan et al. 2019
    (arXiv:1909.11556).

    rescale: False, as in the paper, gives the layer's own output when it runs. True gives x + (layer(x) − x) / (1 − p),
    whose expectation is layer(x) for a fixed x.
    Data parallel ranks that draw differently skip different layers: give them one :class:`moe.Noise`, or generators
    with the same seed.
    Raises: ValueError for p outside [0, 1).
    """

    def __init__(self, p: float, *, rescale: bool = False) -> None:
        super().__init__()
        self.p, self.rescale = _checked_probability(p), rescale

    def forward(
        self,
        layer: Callable[[Tensor], Tensor],
        x: Float[Tensor, "*shape"],
        *,
        generator: Source | None = None,
    ) -> Float[Tensor, "*shape"]:
        """layer(x), or x itself where the layer is skipped."""
        return x if self.skips(generator=generator) else self.rescaled(x, layer(x))

    def rescaled(self, x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """What y = layer(x) becomes where the layer runs: y itself unless ``rescale``, and in evaluation."""
        scaled = self.rescale and self.training and self.p > 0
        return x + (y - x) / (1 - self.p) if scaled else y

    def skips(self, *, generator: Source | None = None) -> bool:
        """Draw whether the layer is skipped this time, for a layer that returns more than one tensor."""
        if not self.training or self.p == 0:
            return False
        source: torch.Generator | None = generator.shared("layer") if isinstance(generator, Noise) else generator
        # drawn on the host, which decides whether to launch the layer at all
        device = "cpu" if source is None else source.device
        return bool(torch.rand((), generator=source, device=device) < self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, rescale={self.rescale}"


def keep_mask(
    like: Float[Tensor, "..."],
    shape: list[int],
    p: float,
    generator: Source | None = None,
    *,
    site: str = "mask",
) -> Float[Tensor, "..."]:
    """1 / (1 − p) with probability 1 − p, else 0, in the dtype and on the device of ``like``.

    site: of :class:`moe.Noise`, whose sequences are the first dimension."""
    if isinstance(generator, Noise):
        kept = generator.draw(site, like.new_empty(shape), lambda part, g: part.bernoulli_(1 - p, generator=g))
        return kept / (1 - p)
    # drawn in float32: in bfloat16 a uniform number has 8 bits, and small p would be off
    draw = torch.rand(shape, device=like.device, generator=generator)
    return (draw >= p).to(like.dtype) / (1 - p)


def _checked_probability(p: float) -> float:
    below_one("p", p)
    return p
