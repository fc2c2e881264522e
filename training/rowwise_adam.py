"""Adam for tables of which a step touches a few rows: product-key memories, PEER."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moe.pages import advise_huge_pages

# rows that are updated together: the temporaries of a chunk stay in cache
CHUNK_ROWS = 1024


class RowwiseAdam(torch.optim.Optimizer):
    """Adam with one second moment for each row of a table [S, V], applied to the rows that have a gradient.

    At step t, for each row r of the gradient g, V wide:

        m_r ← β₁ m_r + (1 − β₁) g_r                    v_r ← β₂ v_r + (1 − β₂) · mean_d g_rd²
        w_r ← w_r − lr · m_r / (1 − β₁ᵗ) / (√(v_r / (1 − β₂ᵗ)) + eps)

    as the optimiser PARTIAL_ROWWISE_ADAM of FBGEMM does (fbgemm_gpu/codegen/genscript/optimizers.py). Lazy: the
    moments of an untouched row stay as they are, and t counts steps of the optimiser, not visits to the row; a row
    first met late in training thus takes a first step of up to (1 − β₁) / √(1 − β₂) · lr. No weight decay.

    The cost of a step follows the rows of the gradient; S costs memory only: S·V + S numbers, allocated as zeros at
    the first step. A gradient accumulated over several backward passes, in which rows repeat, is summed first.

    params: 2-d float32 or float64 tables, or groups of them, each group with its own lr if it likes.
    Raises: ValueError for a parameter of another shape or dtype, lr or eps below 0, betas outside [0, 1); at a step,
    RuntimeError for a dense gradient.

    >>> table = torch.nn.Parameter(torch.ones(3, 2))
    >>> torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    >>> RowwiseAdam([table], lr=0.5).step()
    >>> table.detach()
    tensor([[1.0000, 1.0000],
            [0.5000, 0.5000],
            [1.0000, 1.0000]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add tables, with their own lr, betas and eps if given. Raises: as the class."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the rows that have a gradient. Returns what closure returned, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update(table, table.grad, group)
        return loss

    def _update(self, table: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        rows, values = touched_rows(grad)
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.empty_like(table), table.new_empty(len(table))
            for moment in (state["exp_avg"], state["exp_avg_sq"]):
                advise_huge_pages(moment)
                moment.zero_()
        state["step"] += 1
        t, (beta1, beta2) = int(state["step"]), group["betas"]
        root = root_mean_square(state["exp_avg_sq"], rows, values, beta=beta2, unbias=1 - beta2**t)
        scale = root.add_(group["eps"]).reciprocal_().mul_(-float(group["lr"]) / (1 - beta1**t))
        # every operation on a chunk costs the start of torch's threads: what is one number a row stays outside
        for some, gradients, factors in zip(
            *(x.split(CHUNK_ROWS) for x in (rows, values, scale[:, None])), strict=True
        ):
            mean = state["exp_avg"].index_select(0, some).lerp_(gradients, 1 - beta1)
            state["exp_avg"].index_copy_(0, some, mean)
            table.add_(sparse_rows(some, mean.mul_(factors), table.shape))


def touched_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, each once and ascending, and their gradients [rows, V]. Raises: RuntimeError for a dense gradient."""
    if not grad.is_sparse or grad.sparse_dim() != 1:
        raise RuntimeError(
            f"RowwiseAdam must get a gradient that is sparse in its rows, got a {grad.layout} gradient of shape "
            f"{list(grad.shape)}: make the table with sparse=True, or give it to a dense optimiser"
        )
    rows, values = grad._indices()[0], grad._values()
    # autograd forgets that a gradient is coalesced; looking is cheap, coalescing again is not
    if not grad.is_coalesced() and not bool((rows[1:] > rows[:-1]).all()):
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values()
    return rows, values


def coalesced(grad: Tensor) -> Tensor:
    """The same gradient with each row once. Raises: RuntimeError for a dense gradient."""
    return sparse_rows(*touched_rows(grad), grad.shape)


def sparse_rows(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A tensor that is zero but for these rows, each named once and ascending."""
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)


def root_mean_square(square: Tensor, rows: Tensor, grads: Tensor, *, beta: float, unbias: float) -> Tensor:
    """√(v_r / unbias) for some rows [n], after v_r ← β₂ v_r + (1 − β₂) · mean_d g_rd² in place; unbias: 1 − β₂ᵗ."""
    power = torch.linalg.vector_norm(grads, dim=1).square_().div_(grads.shape[1])
    v = square.index_select(0, rows).lerp_(power, 1 - beta)
    square.index_copy_(0, rows, v)
    return v.div_(unbias).sqrt_()


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must be >= 0, got {group[name]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
    for table in group["params"]:
        if table.ndim != 2:
            raise ValueError(f"a table must have 2 dimensions, rows and width, got shape {list(table.shape)}")
        if table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a table must be float32 or float64, got {table.dtype}")
