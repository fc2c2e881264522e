"""Mask and survivors of one layer found together, by the alternating direction method of multipliers."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.calibrated.hessian import damped, dead_inputs
from pruning.calibrated.selection import Groups, lowest

STEPS, RAMP = 32, 16


def admm(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    count: int,
    *,
    groups: Groups = None,
    damping: float = 0.01,
    costs: Float[Tensor, "out"] | None = None,
    steps: int = STEPS,
    ramp: int = RAMP,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """min tr (V − V₀)·A·(V − V₀)ᵀ over V that are zero outside a mask, which is found on the way (Boža 2024,
    arXiv:2401.02938, with its gradual choice of the mask).

    A = D⁻¹·H·D⁻¹ has the diagonal 1 before it is damped, with D_j² = H_jj; V = W·D. From V = V₀, U = 0, `steps` times:
    Z = V + U where the mask keeps it, else 0; U ← V + U − Z; V ← (V₀·A + Z − U)·(A + I)⁻¹. The k-th of the first `ramp`
    steps masks the share 1 − (1 − k/ramp)³ of all that go, the lowest (V + U)²; of n:m groups only what is not among
    the n largest of its group. Then the mask stays and Z comes near the least squares on it. A step takes 2·out·in²
    operations. Arguments and what is returned are those of `pruning.calibrated.reconstruct`.
    Raises: ValueError unless 1 <= ramp <= steps, and for negative damping."""
    if not 1 <= ramp <= steps:
        raise ValueError(f"ramp must be in [1, steps={steps}], got {ramp}")
    zero, dead = weight == 0, dead_inputs(hessian)
    scale = hessian.diagonal().sqrt().masked_fill(dead, 1)
    system = damped(hessian / torch.outer(scale, scale), damping)
    unit = torch.eye(len(system), dtype=system.dtype, device=system.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system + unit))
    primal = weight * scale
    target, dual, kept = primal @ system, torch.zeros_like(weight), ~zero
    for step in range(1, steps + 1):
        total = primal + dual
        if step <= ramp:
            scores = total.square() if costs is None else total.square() * costs[:, None]
            scores = scores.masked_fill(dead, 0).masked_fill(zero, -torch.inf)
            kept = ~_gone(scores, count, groups, 1 - (1 - step / ramp) ** 3) & ~zero
        sparse = total.masked_fill(~kept, 0)
        dual = total - sparse
        primal = (target + sparse - dual) @ inverse
    changed = (~kept & ~zero).any(1, keepdim=True)
    return torch.where(changed, (primal + dual).masked_fill(~kept, 0) / scale, weight), kept


def _gone(scores: Float[Tensor, "out in"], count: int, groups: Groups, share: float) -> Bool[Tensor, "out in"]:
    """True at the lowest of those that go in the end: at a share of `count`, or of what the groups lose."""
    if groups is None:
        return lowest(scores, round(share * count))
    last = lowest(scores, count, groups)
    return lowest(scores.masked_fill(~last, torch.inf), round(share * int(last.sum())))
