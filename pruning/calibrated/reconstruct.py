"""Masks of one layer, and what the surviving weights become: functions of a weight matrix and its Hessian.

Everywhere: weight [out, in]; hessian [in, in] from `layer_hessian`; count: how many weights go, exactly; groups (n, m):
n of every m consecutive inputs stay instead. Weights that are zero already go before all others, and stay zero even
where they outnumber `count`; next go those of dead inputs. costs: what an error in each output costs, a factor on the
scores of its row (None: all the same). Returned: the new weight, and True where it was kept.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.calibrated.hessian import damped, dead_inputs, factorised, inverse_upper
from pruning.calibrated.selection import Groups, block_counts, lowest
from pruning.structure import within_rows

Pruned = tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]
SMALL_LAYER = 2**26
REFIT_ELEMENTS = 2**24
FEW = 16  # inputs of a sweep whose errors are passed on together


def wanda_scores(weight: Float[Tensor, "out in"], squares: Float[Tensor, "in"]) -> Float[Tensor, "out in"]:
    """abs(w_ij) · ‖x_j‖₂ with squares_j = Σ over calibration rows of x_j² (Sun et al. 2023, arXiv:2306.11695, eq. 1).

    Raises: ValueError if a sum is not finite."""
    if not torch.isfinite(squares).all():
        raise ValueError("calibration inputs must be finite and their squares must fit the dtype, got NaN or inf")
    return weight.abs() * squares.sqrt()


def wanda_mask(
    weight: Float[Tensor, "out in"], squares: Float[Tensor, "in"], count: int, *, groups: Groups = None
) -> Bool[Tensor, "out in"]:
    """The lowest `wanda_scores` go, compared inside each output row (`within_rows`); survivors keep their values."""
    scores = wanda_scores(weight, squares).masked_fill(weight == 0, -torch.inf)
    kept = within_rows(scores, count) if groups is None else ~lowest(scores, count, groups)
    return kept & (weight != 0)


def magnitude_mask(weight: Float[Tensor, "out in"], count: int, *, groups: Groups = None) -> Bool[Tensor, "out in"]:
    """The lowest abs(w) of the whole matrix go."""
    return ~lowest(weight.abs(), count, groups) & (weight != 0)


def obs_scores(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], *, damping: float = 0.01
) -> Float[Tensor, "out in"]:
    """w_ij² / (2·[H⁻¹]_jj): the error of removing one weight when the others make up for it (Hassibi & Stork 1992).

    0 for weights of dead inputs. Raises: ValueError if the damped Hessian is not positive definite."""
    inverse = torch.cholesky_inverse(factorised(hessian, damping)[0])
    scores = weight.square() / (2 * inverse.diagonal())
    return scores.masked_fill(dead_inputs(hessian), 0)


def layerwise_obs(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    count: int,
    *,
    groups: Groups = None,
    damping: float = 0.01,
    costs: Float[Tensor, "out"] | None = None,
) -> Pruned:
    """The lowest `obs_scores` of the layer go, all at once; then the survivors are refitted (`refit`).

    Layer-wise optimal brain surgeon (Dong et al. 2017, arXiv:1705.07565) ranks so too, with scores computed once. It
    adds up the updates of single removals, under which pruned weights grow back; here they are solved jointly."""
    scores = _costed(obs_scores(weight, hessian, damping=damping), costs).masked_fill(weight == 0, -torch.inf)
    kept = ~lowest(scores, count, groups) & (weight != 0)
    return refit(weight, kept, hessian, damping=damping), kept


def exact_obs(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    count: int,
    *,
    damping: float = 0.01,
    costs: Float[Tensor, "out"] | None = None,
) -> Pruned:
    """Optimal brain surgeon, one weight at a time: the lowest w_q²/(2·[H⁻¹]_qq) of the layer goes, its row becomes
    w − w_q/[H⁻¹]_qq · H⁻¹e_q, and H⁻¹ of that row loses input q before the next choice.

    Hassibi & Stork 1992; each row has an inverse of its own. float64, O(out·in² + count·in²).
    Raises: ValueError for a layer with out·in² > SMALL_LAYER, and as `obs_scores`."""
    rows, columns = weight.shape
    if rows * columns**2 > SMALL_LAYER:
        raise ValueError(f"exact OBS needs out·in² <= {SMALL_LAYER}, got {rows}·{columns}²; use 'obs' or 'sparsegpt'")
    new, dead = weight.double().clone(), dead_inputs(hessian)
    inverse = torch.cholesky_inverse(factorised(hessian.double(), damping)[0]).expand(rows, -1, -1).clone()
    zero, kept = weight == 0, torch.ones_like(weight, dtype=torch.bool)
    for _ in range(max(count, int(zero.sum()))):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        scores = _costed(new.square() / (2 * diagonal), costs).masked_fill(dead, 0).masked_fill(zero, -1)
        row, column = divmod(int(scores.masked_fill(~kept, torch.inf).argmin()), columns)
        line = inverse[row, column].clone()
        new[row] -= new[row, column] / line[column] * line
        inverse[row] -= torch.outer(line, line) / line[column]
        kept[row, column] = False
        new[row].masked_fill_(~kept[row], 0)
    return new.to(weight.dtype), kept


def sparsegpt(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    count: int,
    *,
    groups: Groups = None,
    block: int = 128,
    damping: float = 0.01,
    costs: Float[Tensor, "out"] | None = None,
    order: str | None = None,
) -> Pruned:
    """Columns from left to right; what a column loses, the columns after it make up for (Frantar & Alistarh 2023,
    arXiv:2301.00774, algorithm 1).

    With H⁻¹ = UᵀU: the score of a weight is w²/U_jj²; a removed w_j changes its row by −w_j/U_jj · U_j,j:. The mask is
    chosen for a block of columns over all rows when the sweep reaches it, n:m groups when it reaches theirs.
    order: None, or "diag": columns by descending H_jj, equal ones from left to right, so that the inputs that weigh
    most are chosen from while most others can make up for them (`act_order` of Frantar et al. 2023, arXiv:2210.17323);
    blocks are of columns in that order. Weight and mask come back in their own.
    Raises: ValueError if the block is not a multiple of m, for another order, for an order with n:m groups, whose
    columns lie together, and as `obs_scores`."""
    check_order(order, groups)
    if order is not None:
        places = hessian.diagonal().argsort(descending=True, stable=True)
        back = places.argsort()
        new, kept = sparsegpt(weight[:, places], hessian[places][:, places], count, block=block, damping=damping,
                              costs=costs)  # fmt: skip
        return new[:, back], kept[:, back]
    if groups is not None and block % groups[1]:
        raise ValueError(f"block must be a multiple of m={groups[1]} in {groups[0]}:{groups[1]}, got {block}")
    upper = inverse_upper(hessian, damping)
    zero = weight == 0
    first = zero | dead_inputs(hessian)
    ranks = torch.where(zero, -torch.inf, torch.where(first, 0.0, torch.inf)).to(weight.dtype)
    # inputs by rows: what the sweep touches of one input lies together
    new = weight.mT.clone(memory_format=torch.contiguous_format)
    gone = torch.empty_like(zero.mT, memory_format=torch.contiguous_format)
    for index, taken in enumerate(block_counts(first, count, block)):
        part = slice(index * block, min((index + 1) * block, len(new)))
        rest = slice(part.stop, None)
        gone[part], errors = _sweep(new[part], upper[part, part], ranks[:, part], taken, groups, costs)
        new[rest].addmm_(upper[part, rest].mT, errors, alpha=-1)
    return new.masked_fill_(gone, 0).mT.contiguous(), ~gone.mT.contiguous()


def check_order(order: str | None, groups: Groups) -> None:
    """Raises: ValueError for an order of columns that `sparsegpt` does not know, and one that n:m groups forbid."""
    if order not in (None, "diag"):
        raise ValueError(f"order must be None or 'diag', got {order!r}")
    if order is not None and groups is not None:
        raise ValueError(f"order={order!r} takes apart the columns of n:m groups: structure must be None, got "
                         f"{groups[0]}:{groups[1]}")  # fmt: skip


def _sweep(
    new: Float[Tensor, "block out"],
    upper: Float[Tensor, "block block"],
    ranks: Float[Tensor, "out block"],
    count: int,
    groups: Groups,
    costs: Float[Tensor, "out"] | None,
) -> tuple[Bool[Tensor, "block out"], Float[Tensor, "block out"]]:
    """One block of inputs: what is gone of it, and the scaled errors that later inputs make up for; ``new``
    [block, out], the weights turned, is updated in place, but for the zeros.

    An error reaches the next few inputs at once and the rest of the block by one product for those few, so that the
    block is not passed over once for every input. ranks: an upper bound of each score, −∞ where a weight is zero."""
    gone, errors, diagonal = torch.empty_like(new, dtype=torch.bool), torch.empty_like(new), upper.diagonal()
    scale = torch.empty_like(new)  # 1/U_jj where a weight goes, 0 where it stays
    step = len(new) if groups is None else groups[1]
    few = FEW if groups is None else -(-FEW // step) * step
    for start in range(0, len(new), few):
        stop = min(start + few, len(new))
        for j in range(start, stop):
            if not j % step:
                group = slice(j, j + step)
                scores = _costed((new[group].mT / diagonal[group]).square(), costs).minimum(ranks[:, group])
                gone[group] = (lowest(scores, count, groups) | (ranks[:, group] == -torch.inf)).mT
                torch.div(gone[group], diagonal[group, None], out=scale[group])
            torch.mul(new[j], scale[j], out=errors[j])
            new[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j], alpha=-1)
        new[stop:].addmm_(upper[start:stop, stop:].mT, errors[start:stop], alpha=-1)
    return gone, errors


def _costed(scores: Float[Tensor, "out n"], costs: Float[Tensor, "out"] | None) -> Float[Tensor, "out n"]:
    return scores if costs is None else scores * costs[:, None]


def refit(
    weight: Float[Tensor, "out in"],
    kept: Bool[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    damping: float = 0.01,
) -> Float[Tensor, "out in"]:
    """The kept weights of each row, solved by least squares to give the outputs of `weight`: with K the kept inputs,
    w_K = H_KK⁻¹·H_K,:·w₀.

    H is damped, which draws w towards w₀. Rows that lose nothing but zeros come back bit for bit.
    Raises: ValueError if the damped Hessian is not positive definite."""
    ridged = damped(hessian, factorised(hessian, damping)[1])
    target, new = weight @ ridged, weight.clone()
    changed = (~kept & (weight != 0)).any(1).nonzero().squeeze(1)
    order = changed[kept[changed].sum(1).argsort(descending=True)]
    at = 0
    while at < len(order):
        most = int(kept[order[at]].sum())
        rows = order[at : at + max(1, REFIT_ELEMENTS // max(most, 1) ** 2)]
        new[rows] = _solved(ridged, target[rows], kept[rows])
        at += len(rows)
    return new


def _solved(
    hessian: Float[Tensor, "in in"], target: Float[Tensor, "rows in"], kept: Bool[Tensor, "rows in"]
) -> Float[Tensor, "rows in"]:
    """H_KK⁻¹·target_K for each row, zero elsewhere; short rows are filled with an identity."""
    most = int(kept.sum(1).max()) if kept.numel() else 0
    inside, index = (part[:, :most] for part in kept.to(torch.uint8).sort(dim=1, descending=True, stable=True))
    real = inside.bool()
    system = hessian[index[:, :, None], index[:, None, :]] * (real[:, :, None] & real[:, None, :])
    system.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1)
    values = torch.where(real, target.gather(1, index), 0)
    solved = torch.cholesky_solve(values[..., None], torch.linalg.cholesky(system)).squeeze(-1)
    return torch.zeros_like(target).scatter(1, index, solved)


def output_error(
    weight: Float[Tensor, "out in"], new: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> float:
    """Σ‖(w − w₀)·x‖² / Σ‖w₀·x‖² over the calibration rows; 0 where the outputs are all 0."""
    change = weight - new
    scale = ((weight @ hessian) * weight).sum()
    return float(((change @ hessian) * change).sum() / scale) if scale > 0 else 0.0
