"""Variational dropout: each weight learns how noisy it may be, and the noisiest go."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pruning.agreement import averaged
from pruning.learned.base import LearnedSparsity
from pruning.learned.movement import mean_of
from pruning.sharding import gathered, own_part, sharded_as

CLIP = 8.0
K1, K2, K3 = 0.63576, 1.87320, 1.48695


def log_alpha(theta: Float[Tensor, "..."], log_sigma2: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log α = log σ² − log θ², clipped to ±8: the noise a weight has for its size."""
    return (log_sigma2 - torch.log(theta.square() + 1e-16)).clamp(-CLIP, CLIP)


def kl_to_prior(log_alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """KL(q ‖ log-uniform prior) ≈ k1 − k1 σ(k2 + k3 log α) + ½ log(1 + 1/α), up to a constant; 0 as α → ∞.

    Molchanov et al. 2017 (arXiv:1701.05369), eq. 14: k1 = 0.63576, k2 = 1.87320, k3 = 1.48695."""
    return K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


@runtime_checkable
class RowNoise(Protocol):
    """The random numbers of the sequences of a pass, the same whichever process or micro-batch has them:
    `moe.Noise`."""

    def draw(self, site: str, like: Tensor, fill: Callable[[Tensor, torch.Generator], object]) -> Tensor:
        """Numbers in the shape, dtype and device of ``like``, whose rows are equal runs of each sequence in order."""
        ...


@final
class VariationalDropout(LearnedSparsity):
    """w ~ N(θ, α θ²) with α learned for each weight; side loss strength · mean KL; w = 0 where log α > threshold.

    Molchanov et al. 2017 (arXiv:1701.05369): additive parametrisation (σ² is the parameter), log α clipped to ±8,
    pruned above 3. Linear layers draw activations, not weights (local reparametrisation, Kingma et al. 2015,
    arXiv:1506.02557): y = x θᵀ + b + √(x² (α θ²)ᵀ) ⊙ ε, with ε of the sequences that
    :meth:`draw_from` names, or of torch's global generator, as its dropout. Stacks of experts, and matrices that no
    nn.Linear owns, draw w once a step from ``generator``. Evaluation uses θ and the zeros. strength: number of weights
    / number of training targets is the paper's. The sparsity is found, not asked for. start: log σ² at first. Layers
    compiled before must not be: a compiled layer does not run the hooks.

    Ranks draw for their own rows, and the gradients of the Linear layers' σ² are averaged over all of them as
    ``parametrise`` ends, so that they train as one process does if they name their sequences. Of weights that FSDP2
    shards, every rank holds these σ² whole while the passes of a step run: 4 bytes a weight in float32.
    Raises: as :class:`LearnedSparsity`; in a pass, ValueError for a Linear layer that computes in parts (split heads).
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
        self.threshold = threshold
        self._own_gates({name: torch.full_like(weight, start) for name, weight in self.views().items()})
        owners = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Linear)}
        self._linear = {name: owners[id(weight)] for name, weight in self._weights.items() if id(weight) in owners}
        self._rows: RowNoise | None = None
        self._levels: dict[str, Tensor] = {}

    def pass_parameters(self) -> list[Tensor]:
        """The whole σ² that this process's passes inside ``parametrise`` read: what stands in their ``.grad`` as it
        ends joins the gates' gradients, averaged over the ranks."""
        return list(self._levels.values())

    def draw_from(self, noise: RowNoise | None) -> None:
        """The next passes inside ``parametrise`` are of these sequences; None: draw from torch's global generator."""
        self._rows = noise

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ, with this step's noise where no Linear adds its own; in evaluation θ without the noisiest."""
        gate = self._gates[name]
        spread = log_alpha(theta, self.gate_part(name))
        if not training:
            return theta * (spread <= self.threshold)
        if name in self._linear:
            return theta
        drawn = own_part(sharded_as(self.noise(name, gate.shape, "normal"), gate.detach()))
        return theta + theta.abs() * torch.exp(spread / 2) * drawn.to(theta.dtype)

    @contextmanager
    def parametrise(self) -> Iterator[None]:
        """As the others; in training the Linear layers' outputs are noisy."""
        with super().parametrise():
            if not self.model.training or self.finished:
                yield
                return
            levels = self._levels = gathered({name: self._gates[name].detach() for name in self._linear})
            hooks = [layer.register_forward_hook(partial(self._noisy, name, levels[name].requires_grad_()))
                     for name, layer in self._linear.items()]  # fmt: skip
            try:
                yield
            finally:
                self._rows, self._levels = None, {}
                for hook in hooks:
                    hook.remove()
            self._collect(levels)

    def loss(self) -> Tensor:
        """strength · mean KL, whose gradient reaches σ² and θ."""
        parts = {name: kl_to_prior(log_alpha(self.part(name), self.gate_part(name))) for name in self._gates}
        return self.strength * mean_of(parts, total=self.number_of_gates())

    def noise_levels(self) -> dict[str, Tensor]:
        """log α of every weight."""
        return self.wholes({name: log_alpha(own_part(weight.data), self.gate_part(name).detach())
                            for name, weight in self._weights.items()})  # fmt: skip

    @torch.no_grad()
    def _collect(self, levels: dict[str, Tensor]) -> None:
        """The mean over the ranks of what their passes left on the whole σ², to the gates."""
        found = {name: torch.zeros_like(level) if level.grad is None else level.grad for name, level in levels.items()}
        for name, slope in averaged(found).items():
            gate = self._gates[name]
            part = sharded_as(slope, gate.detach())
            gate.grad = part if gate.grad is None else gate.grad + part

    def _noisy(
        self, name: str, log_sigma2: Tensor, layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """The output plus noise of the variance that independent weights give it."""
        theta = layer.weight  # FSDP2 puts the gathered one here
        if isinstance(theta, DTensor):
            raise ValueError(
                f"{name} must be whole in the forward pass under variational dropout, got {theta.placements}"
            )
        # float32: under autocast x² would lose what the square root then magnifies
        with torch.autocast(output.device.type, enabled=False):
            variance = theta.square() * log_alpha(theta, log_sigma2).exp()
            spread = F.linear(inputs[0].to(theta.dtype).square(), variance)
            return output + ((spread + 1e-8).sqrt() * self._drawn(name, spread)).to(output.dtype)

    def _drawn(self, name: str, like: Tensor) -> Tensor:
        if self._rows is None:
            return torch.randn_like(like)
        return self._rows.draw(f"noise of {name}", like, lambda part, generator: part.normal_(generator=generator))
