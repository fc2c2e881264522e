"""The worst small change of the input embeddings, by projected gradient ascent, and the loss there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.agreement import averaged
from pruning.batches import Batch, Loss, evaluating, scalar_loss


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on the input embeddings x [B, L, D], inside a cube of half width ε.

    δ ← clip(δ + α · sign(∇_δ loss(x + δ)), −ε, ε), ``steps`` times (Madry et al. 2018, arXiv:1706.06083), from 0 or,
    with ``random_start``, from a uniform draw in the cube. One step from 0 with α = ε is FGSM (Goodfellow et al. 2015,
    arXiv:1412.6572). ε = radius · RMS(x), so that a radius means the same for embeddings of any scale;
    α = 2.5 ε / steps, and ε for one step. loss(model, batch): None is the next-token loss. Dropout is off.
    Raises: ValueError unless radius ≥ 0 and steps ≥ 1.
    """

    radius: float
    steps: int = 3
    random_start: bool = False
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if not self.radius >= 0:
            raise ValueError(f"radius must be >= 0, got {self.radius}")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")

    def perturbation(
        self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None, shared: bool = False
    ) -> Float[Tensor, "B L D"]:
        """δ for a batch of token ids, or of keywords with ``input_ids``. generator: of a random start, on the CPU.

        shared: the rows are this process's share of a batch of which each process has as many: ε is that of all
        together, one exchange of a number, and each row's δ the one that a process with all rows would find.
        Raises: ValueError if the model shows no input embedding or the loss is not one finite number."""
        ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        with evaluating(model), torch.enable_grad():
            x = input_embedding(model)(ids).detach()
            square = x.double().square().mean() if x.numel() else torch.zeros((), dtype=torch.float64, device=x.device)
            limit = self.radius * float((averaged({"": square})[""] if shared else square).sqrt())
            step = limit if self.steps == 1 else 2.5 * limit / self.steps
            delta = torch.zeros_like(x)
            if self.random_start:
                delta += (torch.rand(x.shape, generator=generator).to(x) * 2 - 1) * limit
            for _ in range(self.steps):
                delta.requires_grad_()
                with perturbed(model, delta):
                    value = scalar_loss(model, batch, self.loss)
                (slope,) = torch.autograd.grad(value, delta)
                delta = (delta.detach() + step * slope.sign()).clamp(-limit, limit)
        return delta.detach()


def adversarial_loss(attack: Attack, *, generator: torch.Generator | None = None) -> Loss:
    """loss(model, batch) at the perturbation that ``attack`` finds against the model as it is: min over weights of the
    max over δ (arXiv:1706.06083, eq. 2.1). For training loops that call a loss; the gradient is that of the weights."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        delta = attack.perturbation(model, batch, generator=generator)
        with perturbed(model, delta):
            return scalar_loss(model, batch, attack.loss)

    return loss


@contextmanager
def perturbed(model: nn.Module, delta: Float[Tensor, "B L D"]) -> Iterator[None]:
    """Inside, the model's input embeddings are x + delta."""
    handle = input_embedding(model).register_forward_hook(lambda module, arguments, output: output + delta)
    try:
        yield
    finally:
        handle.remove()


def input_embedding(model: nn.Module) -> nn.Module:
    """The module that turns token ids into vectors: ``get_input_embeddings()`` of a Hugging Face model, else
    ``model.embedding``. Raises: ValueError if the model has neither."""
    ask = getattr(model, "get_input_embeddings", None)
    found = ask() if ask is not None else getattr(model, "embedding", None)
    if not isinstance(found, nn.Module):
        raise ValueError(f"{type(model).__name__} must have get_input_embeddings() or .embedding to be perturbed")
    return found
