"""n:m groups of one layer solved one after another, mask and values together."""

from itertools import combinations
from math import comb

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.calibrated.hessian import damped, dead_inputs

SWEEPS, WIDTH, MOST = 8, 64, 512


def group_descent(
    weight: Float[Tensor, "out in"],
    new: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    groups: tuple[int, int],
    *,
    damping: float = 0.01,
    sweeps: int = SWEEPS,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """From `new`, which has n of every m consecutive inputs, to the mask and the values of each group that are best
    while all others stay, group by group, `sweeps` times over. The error never rises, and no group can be improved
    alone where it ends.

    With H damped, f(W) = tr (W − W₀)·H·(W − W₀)ᵀ and ∇ = (W − W₀)·H, a group g has b = w_g·H_gg − ∇_g. Of all sets S of
    n inputs the one with the largest b_S·H_SS⁻¹·b_Sᵀ stays, with w_S = b_S·H_SS⁻¹: coordinate descent, exact in blocks
    of m. Weights that are zero already stay zero; a dead input has no worth. One sweep takes 2·out·in² operations, as
    SparseGPT does. Arguments and what is returned are those of `pruning.calibrated.reconstruct`.
    Raises: ValueError unless 0 < n < m, with m dividing the inputs and at most MOST sets; for sweeps < 1."""
    n, m = groups
    if not 0 < n < m or weight.shape[1] % m:
        raise ValueError(f"n of m must satisfy 0 < n < m with m dividing {weight.shape[1]} inputs, got {n}:{m}")
    if comb(m, n) > MOST:
        raise ValueError(f"n of m must leave at most {MOST} choices for a group, got {comb(m, n)} for {n}:{m}")
    if sweeps < 1:
        raise ValueError(f"sweeps must be >= 1, got {sweeps}")
    dead, zero = dead_inputs(hessian), (weight == 0).mT.contiguous()
    system = damped(hessian, damping)
    sets = _sets(n, m, smaller=bool(zero.any())).to(weight.device)
    solvers = _solvers(system, sets)
    # inputs by rows: what a step touches of one input lies together
    goal, state = (part.masked_fill(dead, 0).mT.contiguous() for part in (weight, new))
    slope, kept = system @ (state - goal), torch.empty_like(zero)
    for _ in range(sweeps):
        for start in range(0, len(state), max(WIDTH // m, 1) * m):
            part = slice(start, min(start + max(WIDTH // m, 1) * m, len(state)))
            inside = slice(part.start // m, part.stop // m)
            before = state[part].clone()
            _pass(state[part], slope[part].clone(), kept[part], zero[part], system[part, part], solvers[inside], sets)
            slope.addmm_(system[:, part], state[part] - before)
    kept &= ~zero
    found = torch.where(dead, weight, state.mT).masked_fill(~kept.mT, 0)
    changed = (~kept & ~zero).any(0)[:, None]
    return torch.where(changed, found, weight), kept.mT.contiguous()


def _pass(
    state: Float[Tensor, "part out"],
    slope: Float[Tensor, "part out"],
    kept: Bool[Tensor, "part out"],
    zero: Bool[Tensor, "part out"],
    system: Float[Tensor, "part part"],
    solvers: Float[Tensor, "groups sets m m"],
    sets: Bool[Tensor, "sets m"],
) -> None:
    """Every group of a few inputs once; `state`, `slope` and `kept` are updated in place."""
    m = sets.shape[1]
    for index, solver in enumerate(solvers):
        rows = slice(index * m, (index + 1) * m)
        pull = torch.addmm(slope[rows], system[rows, rows], state[rows], beta=-1)
        tried = (solver.flatten(0, 1) @ pull).unflatten(0, sets.shape)
        gain = (tried * pull).sum(1)
        if zero[rows].any():
            gain.masked_fill_((sets.to(pull.dtype) @ zero[rows].to(pull.dtype)) > 0, -torch.inf)
        best = gain.argmax(0)
        fresh = tried.gather(0, best.expand(1, m, -1))[0]
        slope.addmm_(system[:, rows], fresh - state[rows])
        state[rows], kept[rows] = fresh, sets.mT[:, best]


def _sets(n: int, m: int, *, smaller: bool) -> Bool[Tensor, "sets m"]:
    """The sets of n of m inputs; `smaller`: after them those of fewer, for groups in which some weights must stay 0."""
    sizes = range(n, -1, -1) if smaller else (n,)
    chosen = [chosen for size in sizes for chosen in combinations(range(m), size)]
    return torch.tensor([[index in one for index in range(m)] for one in chosen])


def _solvers(system: Float[Tensor, "in in"], sets: Bool[Tensor, "sets m"]) -> Float[Tensor, "groups sets m m"]:
    """H_SS⁻¹ of each set of each group, in its rows and columns; zero elsewhere."""
    m = sets.shape[1]
    starts = torch.arange(0, len(system), m, device=system.device)
    index = starts[:, None] + torch.arange(m, device=system.device)
    own = system[index[:, :, None], index[:, None, :]]
    inside = sets[:, :, None] & sets[:, None, :]
    padded = torch.where(inside, own[:, None], torch.eye(m, dtype=system.dtype, device=system.device))
    return torch.linalg.inv(padded).masked_fill(~inside, 0)
