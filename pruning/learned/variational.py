"""Variational dropout: each weight learns how noisy it may be, and the noisiest go."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pruning.learned.base import LearnedSparsity
from pruning.learned.movement import mean_of

CLIP = 8.0
K1, K2, K3 = 0.63576, 1.87320, 1.48695


def log_alpha(theta: Float[Tensor, "..."], log_sigma2: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log α = log σ² − log θ², clipped to ±8: the noise a weight has for its size."""
    return (log_sigma2 - torch.log(theta.square() + 1e-16)).clamp(-CLIP, CLIP)


def kl_to_prior(log_alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """KL(q ‖ log-uniform prior) ≈ k1 − k1 σ(k2 + k3 log α) + ½ log(1 + 1/α), up to a constant; 0 as α → ∞.

    Molchanov et al. 2017 (arXiv:1701.05369), eq. 14: k1 = 0.63576, k2 = 1.87320, k3 = 1.48695."""
    return K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


@final
class VariationalDropout(LearnedSparsity):
    """w ~ N(θ, α θ²) with α learned for each weight; side loss strength · mean KL; w = 0 where log α > threshold.

    Molchanov et al. 2017 (arXiv:1701.05369): additive parametrisation (σ² is the parameter), log α clipped to ±8,
    pruned above 3. Linear layers draw activations, not weights (local reparametrisation, Kingma et al. 2015,
    arXiv:1506.02557): y = x θᵀ + b + √(x² (α θ²)ᵀ) ⊙ ε, with ε of torch's global generator, as its dropout. Stacks of
    experts, and matrices that no nn.Linear owns, draw w once a step from ``generator``. Evaluation uses θ and the
    zeros. strength: number of weights / number of training targets is the paper's. The sparsity is found, not asked
    for. start: log σ² at first. Layers compiled before must not be: a compiled layer does not run the hooks.
    Raises: as :class:`LearnedSparsity`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        threshold: float = 3.0,
        start: float = -10.0,
        gate_lr: float = 1.0,
        weights: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, strength=strength, gate_lr=gate_lr, weights=weights, generator=generator)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(f"variational dropout must train in one process, got {torch.distributed.get_world_size()}")
        self.threshold = threshold
        self._own_gates({name: torch.full_like(weight, start) for name, weight in self._weights.items()})
        owners = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Linear)}
        self._linear = {name: owners[id(weight)] for name, weight in self._weights.items() if id(weight) in owners}

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ, with this step's noise where no Linear adds its own; in evaluation θ without the noisiest."""
        spread = log_alpha(theta, self._gates[name])
        if not training:
            return theta * (spread <= self.threshold)
        if name in self._linear:
            return theta
        noise = self.noise(name, theta.shape, "normal").to(theta.dtype)
        return theta + theta.abs() * torch.exp(spread / 2) * noise

    @contextmanager
    def parametrise(self) -> Iterator[None]:
        """As the others; in training the Linear layers' outputs are noisy."""
        hooks = []
        with super().parametrise():
            if self.model.training and not self.finished:
                hooks = [layer.register_forward_hook(partial(_noisy, self._weights[name], self._gates[name]))
                         for name, layer in self._linear.items()]  # fmt: skip
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def loss(self) -> Tensor:
        """strength · mean KL, whose gradient reaches σ² and θ."""
        parts = {name: kl_to_prior(log_alpha(self.part(name), gate)) for name, gate in self._gates.items()}
        return self.strength * mean_of(parts)

    def noise_levels(self) -> dict[str, Tensor]:
        """log α of every weight."""
        return {name: log_alpha(weight.detach(), self._gates[name].detach()) for name, weight in self._weights.items()}


def _noisy(theta: Tensor, log_sigma2: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The output plus noise of the variance that independent weights give it."""
    # float32: under autocast x² would lose what the square root then magnifies
    with torch.autocast(output.device.type, enabled=False):
        variance = theta.square() * log_alpha(theta, log_sigma2).exp()
        spread = F.linear(inputs[0].to(theta.dtype).square(), variance)
        return output + ((spread + 1e-8).sqrt() * torch.randn_like(spread)).to(output.dtype)
