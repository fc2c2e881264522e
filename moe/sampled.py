"""Dot products of the rows of one matrix with chosen rows of another, nothing gathered: sampled products (SDDMM)."""

import warnings
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor


def samples_in_place(table: Float[Tensor, "S V"]) -> bool:
    """Whether :func:`sampled_products` is for this table: torch has the kernel for these types, on the CPU, by MKL."""
    exact = table.dtype in (torch.float32, torch.float64)
    return exact and table.device.type == "cpu" and torch.backends.mkl.is_available()


def sampled_products(
    x: Float[Tensor, "P V"], table: Float[Tensor, "S V"], ends: Int[Tensor, "P+1"], slots: Int[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """⟨x_p, table[slots_n]⟩ for ends_p ≤ n < ends_{p+1}: the entries of x · tableᵀ at the slots, and no other.

    Takes half of the time of the gradient of an embedding bag's weights, which is the same product; torch shares the
    rows of x among its threads. N must not exceed P·S.
    """
    _silence_csr()
    at = torch.sparse_csr_tensor(ends, slots, x.new_zeros(len(slots)), (len(x), len(table)), check_invariants=False)
    # a copy: values() is a view of a sparse tensor, which torch.compile cannot take from a graph break
    return torch.sparse.sampled_addmm(at, x, table.mT, beta=0.0).values().clone()


@cache
def _silence_csr() -> None:
    """Take torch's remark that CSR tensors are in beta, which comes once a process, from those who read warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1), check_invariants=False)
