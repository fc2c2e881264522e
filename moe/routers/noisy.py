"""The noisy top-k gate of the sparsely-gated mixture of experts."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.noise import Noise, Source, drawn
from moe.routers.linear import LinearRouter
from moe.routers.top_k import choose_top_k, draw_seed, router_logits
from moe.routing import Routing


class NoisyTopKRouter(LinearRouter):
    """h = W x + ε ⊙ softplus(W_noise x) in float32, ε ~ N(0, 1); each token goes to the k largest h.

    weight = softmax of h over the k choices. The noise is drawn in training only, from a seed that ``generator`` gives
    and the record keeps. Routing.logits is h; Routing.smooth_load is :func:`smooth_load`, for
    :func:`moe.losses.load_loss`. Shazeer et al. 2017, eq. 3-5 and appendix A (arXiv:1701.06538).
    As in the paper W_noise starts at zero, a deviation of ln 2; W starts as other routers' do, not at zero.
    A top-1 weight is always 1 and gives the router no gradient but that of its losses: take k >= 2.
    Raises: as :class:`TopKRouter`.
    """

    def __init__(self, dim: int, num_experts: int, *, k: int) -> None:
        super().__init__(dim, num_experts, k=k)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))

    def reset_parameters(self) -> None:
        """Draw W from the normal distribution of deviation dim^-1/2; W_noise = 0."""
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        token_ids: Int[Tensor, "T"] | None = None,
        padding_mask: Bool[Tensor, "T"] | None = None,
        replay: Routing | None = None,
        generator: Source | None = None,
    ) -> Routing:
        """Route x. token_ids is not used; generator seeds the noise (default: torch's global CPU generator)."""
        clean = router_logits(x, self.weight, padding_mask)
        deviation = F.softplus(router_logits(x, self.noise_weight, padding_mask))
        seed = draw_seed(replay, generator, drawn=self.training)
        noisy = clean if seed is None else clean + normal_noise(clean, seed) * deviation
        routing = choose_top_k(noisy, self.k, renormalize=True, real=padding_mask, replay=replay, noise_seed=seed)
        load = smooth_load(clean, deviation, noisy, self.k, real=padding_mask)
        return dataclasses.replace(routing, smooth_load=load)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}"


def smooth_load(
    clean: Float[Tensor, "T E"],
    deviation: Float[Tensor, "T E"],
    noisy: Float[Tensor, "T E"],
    k: int,
    *,
    real: Bool[Tensor, "T"] | None = None,
) -> Float[Tensor, "E"]:
    """load_e = Σ over real tokens of Φ((clean_e − kth_e) / deviation_e), a differentiable estimate of the load.

    kth_e is the k-th largest noisy logit of the other experts and Φ the normal distribution function: the summand is
    the probability that e stays among the best k when its own noise is drawn again. It is 1 where k = E.
    Shazeer et al. 2017, eq. 8-10 (arXiv:1701.06538).
    """
    if k == noisy.shape[1]:
        stays = torch.ones_like(clean)
    else:
        best = noisy.topk(k + 1, dim=-1)
        inside = torch.zeros_like(noisy, dtype=torch.bool).scatter_(1, best.indices[:, :k], True)
        threshold = torch.where(inside, best.values[:, k:], best.values[:, k - 1 : k])
        # softplus underflows far below zero, and 0 / 0 has no value
        margin = (clean - threshold) / deviation.clamp_min(1e-6)
        stays = (1 + torch.erf(margin / math.sqrt(2))) / 2
    if real is not None:
        stays = torch.where(real[:, None], stays, 0.0)
    return stays.sum(0)


def normal_noise(x: Float[Tensor, "T E"], seed: int | Noise) -> Float[Tensor, "T E"]:
    """N(0, 1) in the shape, dtype and device of x, the same for the same seed."""
    return drawn(seed, x, lambda part, generator: part.normal_(generator=generator))
