"""The worst small change of the input embeddings, by projected gradient ascent, and the loss there."""

from collections.abc import Callable, Iterator
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
        Raises: ValueError if the model shows no input embedding, the loss reads none or is not one finite number."""
        ascent = _Ascent(self, generator=generator, shared=shared)
        with evaluating(model), torch.enable_grad():
            for _ in range(self.steps):
                with _embedded(model, ascent.added):
                    value = scalar_loss(model, batch, self.loss)
                ascent.climb(value)
        return ascent.found().detach()


class _Ascent:
    """δ and its cube. The first pass shows the embeddings x: under FSDP2 their table is whole inside a pass alone."""

    def __init__(self, attack: Attack, *, generator: torch.Generator | None, shared: bool) -> None:
        self.attack, self.generator, self.shared = attack, generator, shared
        self.limit = 0.0
        self.delta: Tensor | None = None

    def added(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """x + δ."""
        if self.delta is None:
            self.delta = self._begun(x.detach()).requires_grad_()
        return x + self.delta

    def climb(self, value: Float[Tensor, ""]) -> None:
        """A step of δ up the loss, back into the cube."""
        step, delta = self.limit if self.attack.steps == 1 else 2.5 * self.limit / self.attack.steps, self.found()
        (slope,) = torch.autograd.grad(value, delta)
        self.delta = (delta.detach() + step * slope.sign()).clamp(-self.limit, self.limit).requires_grad_()

    def found(self) -> Float[Tensor, "B L D"]:
        """δ. Raises: ValueError if no pass has shown the embeddings."""
        if self.delta is None:
            raise ValueError("loss must pass the batch through the model's input embedding, got one that does not")
        return self.delta

    def _begun(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        square = x.double().square().mean() if x.numel() else torch.zeros((), dtype=torch.float64, device=x.device)
        self.limit = self.attack.radius * float((averaged({"": square})[""] if self.shared else square).sqrt())
        if not self.attack.random_start:
            return torch.zeros_like(x)
        return (torch.rand(x.shape, generator=self.generator).to(x) * 2 - 1) * self.limit


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
    with _embedded(model, lambda x: x + delta):
        yield


@contextmanager
def _embedded(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = input_embedding(model).register_forward_hook(lambda module, arguments, output: change(output))
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
