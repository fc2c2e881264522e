"""The Hessian of a layer's squared output error: damped, inverted and checked."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

RETRIES = 2


class DampingRaised(UserWarning):
    """A Hessian took more damping than was asked for; ``damping``: how much."""

    def __init__(self, message: str, damping: float) -> None:
        super().__init__(message)
        self.damping = damping


@contextmanager
def naming_layer(label: str) -> Iterator[list[float]]:
    """While inside, warnings of raised damping are held; on leaving each is given with the layer's name. Yields the
    list that then holds those dampings."""
    raised: list[float] = []
    with warnings.catch_warnings(record=True) as held:
        warnings.simplefilter("always", DampingRaised)
        yield raised
    for one in held:
        if isinstance(one.message, DampingRaised):
            raised.append(one.message.damping)
            warnings.warn(DampingRaised(f"{label}: {one.message}", one.message.damping), stacklevel=3)
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def layer_hessian(gram: Float[Tensor, "in in"], rows: int) -> Float[Tensor, "in in"]:
    """H = 2 · XᵀX / rows, the Hessian of mean ‖(w − w₀)·x‖² in one output's weights w [in]; gram is XᵀX.

    Raises: ValueError if rows < 1 or the Gram matrix is not finite."""
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}")
    if not torch.isfinite(gram).all():
        raise ValueError("calibration inputs must be finite and their products must fit the dtype, got NaN or inf")
    return gram * (2 / rows)


def dead_inputs(hessian: Float[Tensor, "in in"]) -> Tensor:
    """True [in] for inputs that were zero in every calibration row: their weights changed no output."""
    return hessian.diagonal() == 0


def damped(hessian: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """H + damping · mean(diag H) · I; a dead input, which couples with nothing, gets the diagonal 1.

    damping: a share of the mean diagonal (0.01 in SparseGPT, arXiv:2301.00774).
    Raises: ValueError if damping is negative or not finite."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be in [0, inf), got {damping}")
    dead, ridged = dead_inputs(hessian), hessian.clone()
    diagonal = ridged.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal.masked_fill_(dead, 1)
    return ridged


def factorised(hessian: Float[Tensor, "in in"], damping: float) -> tuple[Float[Tensor, "in in"], float]:
    """Lower Cholesky factor of the damped Hessian, and the damping that it took.

    A matrix that is not positive definite is tried again with ten times the damping (at least 0.01), up to RETRIES
    times, and warns of it (`DampingRaised`). Raises: ValueError that lists what was tried; never another matrix in its
    place."""
    tried = [damping]
    for _ in range(RETRIES + 1):
        factor, info = torch.linalg.cholesky_ex(damped(hessian, tried[-1]))
        if not info.item():
            if tried[-1] != damping:
                warnings.warn(DampingRaised(
                    f"the Hessian is not positive definite with damping {damping:g} of its mean diagonal; "
                    f"{tried[-1]:g} was taken: calibrate on more tokens", tried[-1]
                ), stacklevel=2)  # fmt: skip
            return factor, tried[-1]
        tried.append(max(10 * tried[-1], 0.01))
    shares = ", ".join(f"{share:g}" for share in tried[:-1])
    raise ValueError(
        f"the Hessian must be positive definite, got one that is not with damping {shares} of its mean diagonal; "
        f"calibrate on more tokens, or pass a larger damping="
    )


def inverse_upper(hessian: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """Upper factor U of the damped Hessian's inverse, H⁻¹ = UᵀU, without that inverse.

    With P the reversal of the inputs and P·H·P = L·Lᵀ, U = P·L⁻¹·P: one Cholesky factor and one triangular inverse.
    U_jj² is [inverse of H restricted to the inputs j, j+1, …]_jj: what exact elimination in order would use.
    Raises: ValueError as `factorised`."""
    lower = factorised(hessian.flip(0, 1), damping)[0]
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
