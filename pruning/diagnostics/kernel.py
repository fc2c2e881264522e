"""The empirical neural tangent kernel, and how far it is from another's."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.batches import Batch, evaluating
from pruning.diagnostics.figure import axes_for, labelled
from pruning.diagnostics.kept import kept_of
from pruning.masking import Masks

# (model, batch) → outputs [n, K] of n samples
Outputs = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class TangentKernel:
    """K_ab = 1/K · Σ_c ⟨∂f_c(x_a)/∂θ, ∂f_c(x_b)/∂θ⟩ [n, n] (float64): Jacot et al. 2018 (arXiv:1806.07572), its trace
    over the K outputs c. parameters: how many weights the gradients are of, those that masks keep. weights: how many
    they would be of without masks. samples: a digest of the batch. What is None is not known, and not compared."""

    matrix: Float[Tensor, "n n"]
    outputs: int
    parameters: int
    weights: int | None = None
    samples: str | None = None

    def distance(self, other: "TangentKernel") -> float:
        """1 − ⟨K, K'⟩ / (‖K‖ ‖K'‖) in Frobenius norm: 0 for kernels that differ by a factor (Fort et al. 2020,
        arXiv:2010.15110). One may be under masks and the other not. Of a model that units were taken out of, take the
        kernel before they are, under the masks of their weights: it is the same, and of as many weights.
        Raises: ValueError for kernels of other samples, of another number of outputs or of weights (masks aside), and
        for one that is 0."""
        one, two = self._comparable(other)
        scale = float(one.norm() * two.norm())
        if not scale:
            raise ValueError("a kernel of norm 0 has no direction: distance needs two that are not 0, got norm 0")
        return 1 - float((one * two).sum()) / scale

    def relative_change(self, other: "TangentKernel") -> float:
        """‖K − K'‖ / ‖K'‖ in Frobenius norm, which also sees a factor. Raises: as :meth:`distance`."""
        one, two = self._comparable(other)
        if not two.any():
            raise ValueError("the other kernel must not be 0, got norm 0")
        return float((one - two).norm() / two.norm())

    def plot(self, *, ax: Any = None) -> Any:
        """The matrix as a picture; returns the axes."""
        ax = axes_for(ax)
        ax.imshow(self.matrix.numpy())
        return labelled(ax, x="sample", y="sample", title="empirical tangent kernel")

    def _comparable(self, other: "TangentKernel") -> tuple[Tensor, Tensor]:
        if self.matrix.shape != other.matrix.shape:
            raise ValueError(
                f"kernels must be of the same samples: other must be {list(self.matrix.shape)}, "
                f"got {list(other.matrix.shape)}"
            )
        for what, mine, theirs in (("samples", self.samples, other.samples), ("outputs", self.outputs, other.outputs),
                                   ("weights, masks aside", self.weights, other.weights)):  # fmt: skip
            if mine is not None and theirs is not None and mine != theirs:
                raise ValueError(f"kernels must be of the same {what}: other must have {mine}, got {theirs}")
        return self.matrix, other.matrix


def last_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "n V"]:
    """The logits of each sequence's last token."""
    output = model(batch) if isinstance(batch, Tensor) else model(**batch)
    return (output if isinstance(output, Tensor) else output.logits)[:, -1]


def tangent_kernel(
    model: nn.Module,
    batch: Batch,
    *,
    outputs: Outputs = last_logits,
    weights: Sequence[str] | None = None,
    masks: Masks | None = None,
) -> TangentKernel:
    """The kernel of ``model`` on a batch of a few samples, exact: one backward pass for each sample and output.

    outputs: f, to [n, K]. weights: parameter names, None all that train. masks: gradients of the weights that are
    there alone, as training under the masks would use. Memory: n gradients.
    Raises: ValueError for outputs of another shape, unknown names, none that train, and masks of other parameters or
    shapes than the model's."""
    own = dict(model.named_parameters())
    names = [name for name, p in own.items() if p.requires_grad] if weights is None else list(weights)
    unknown = [name for name in names if name not in own]
    if unknown or not names:
        raise ValueError(f"weights must name parameters of the model, got {unknown[0] if unknown else 'none'!r}")
    kept = kept_of(masks, model)
    with evaluating(model, frozen=False), torch.enable_grad():
        found = outputs(model, batch)
        if found.ndim != 2:
            raise ValueError(f"outputs must return [n, K], got {list(found.shape)}")
        samples, count = found.shape
        total = torch.zeros(samples, samples, dtype=torch.float64)
        for output in range(count):
            rows = [_gradient(found[n, output], own, names, kept) for n in range(samples)]
            matrix = torch.stack(rows)
            total += (matrix @ matrix.mT).cpu()
    parameters = sum(int(kept[n].sum()) if n in kept else own[n].numel() for n in names)
    whole = sum(own[n].numel() for n in names)
    return TangentKernel(total / max(count, 1), count, parameters, whole, _digest(batch))


def _digest(batch: Batch) -> str:
    """Of the shapes and values of a batch's tensors, wherever they lie and however wide they are."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted({"input_ids": batch}.items() if isinstance(batch, Tensor) else batch.items()):
        if isinstance(tensor, Tensor):
            wide = tensor.detach().cpu().to(torch.float64 if tensor.is_floating_point() else torch.int64)
            digest.update(f"{name}{list(tensor.shape)}".encode() + wide.numpy().tobytes())
    return digest.hexdigest()


def _gradient(value: Tensor, own: dict[str, nn.Parameter], names: list[str], kept: dict[str, Tensor]) -> Tensor:
    chosen = [own[name] for name in names]
    found = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True, materialize_grads=True)
    parts = [g * kept[n].to(g.device) if n in kept else g for n, g in zip(names, found, strict=True)]
    return torch.cat([part.flatten().double() for part in parts])
