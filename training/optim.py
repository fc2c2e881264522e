"""AdamW with the right parameters decayed, row-wise Adam for memories, learning-rate schedules, and clipping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe import MemoryValues
from moe.memory_values import sparse_tables
from pruning.dynamic import SparseAdamW
from training.rowwise_adam import RowwiseAdam, coalesced

Schedule = Literal["cosine", "wsd", "constant"]


@dataclass(frozen=True)
class Optimizers:
    """The optimisers of one model, which step together.

    main: of every parameter with a dense gradient; sparsifiers see this one. tables: of the tables of memories, None
    for a model without any, which forget their moments where a lottery goes back (:mod:`training.moments`).
    """

    main: torch.optim.Optimizer
    tables: RowwiseAdam | None = None

    @property
    def others(self) -> tuple[torch.optim.Optimizer, ...]:
        """All but ``main``."""
        return () if self.tables is None else (self.tables,)

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.main.step()
        if self.tables is not None:
            self.tables.step()

    def zero_grad(self) -> None:
        """Drop every gradient."""
        self.main.zero_grad()
        if self.tables is not None:
            self.tables.zero_grad()

    def owner(self, parameter: Tensor) -> torch.optim.Optimizer:
        """The optimiser that a parameter belongs to; ``main`` for one that belongs to none, such as a frozen one."""
        groups = self.tables.param_groups if self.tables is not None else []
        if self.tables is not None and any(parameter is table for group in groups for table in group["params"]):
            return self.tables
        return self.main


def make_optimizers(
    model: nn.Module,
    *,
    lr: float,
    memory_lr: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    router_lr: float = 1.0,
    sparse_state: bool = False,
) -> Optimizers:
    """:func:`adamw`, and :class:`RowwiseAdam` without decay for the tables of memories, if the model has any.

    Sets ``sparse`` on every :class:`moe.MemoryValues`, so that a step costs what its rows cost and not the table.
    memory_lr: of the tables, constant over the run. Lample et al. 2019 (arXiv:1907.05242) learn values, which few
    tokens update, at a higher rate than the rest, and Memory+ (arXiv:2412.09764) at a constant one.
    Across processes: DistributedDataParallel takes sparse gradients of nn.Embedding alone. Leave the tables out of it
    and gather their rows, or keep sparse=False and :func:`adamw`.
    sparse_state: :class:`pruning.dynamic.SparseAdamW` instead, with moments of the weights that are there alone.
    Raises: ValueError for tables that are neither float32 nor float64.
    """
    for module in model.modules():
        if isinstance(module, MemoryValues):
            module.sparse = True
    tables = [table for table in sparse_tables(model) if table.requires_grad]
    main: torch.optim.Optimizer
    if sparse_state:
        groups = parameter_groups(model, weight_decay=weight_decay, router_lr=router_lr)
        main = SparseAdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    else:
        main = adamw(model, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, router_lr=router_lr)
    return Optimizers(main, RowwiseAdam(tables, lr=memory_lr, betas=betas, eps=eps) if tables else None)


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    router_lr: float = 1.0,
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over :func:`parameter_groups`."""
    groups = parameter_groups(model, weight_decay=weight_decay, router_lr=router_lr)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def parameter_groups(model: nn.Module, *, weight_decay: float, router_lr: float = 1.0) -> list[dict[str, Any]]:
    """Groups for an optimiser: weight matrices decay, stacked expert matrices too; nothing else does.

    Not decayed: embeddings (and a head tied to them), the rows of memories, biases, gains of norms. router_lr: factor
    on the learning rate of the matrices of routers. Each group carries its factor as ``lr_factor``. Left out: frozen
    parameters, and tables whose gradients are sparse, which are :class:`RowwiseAdam`'s.
    """
    exempt = {id(parameter) for parameter in _embeddings(model)}
    rowwise = {id(table) for table in sparse_tables(model)}
    groups: dict[tuple[float, float, object], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in rowwise:
            decays = parameter.ndim >= 2 and id(parameter) not in exempt and "bias" not in name.rpartition(".")[2]
            factor = router_lr if "router" in name.split(".") else 1.0
            # a fused step takes tensors of one mesh, or of none
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((weight_decay if decays else 0.0, factor, mesh), []).append(parameter)
    return [{"params": p, "weight_decay": decay, "lr_factor": factor} for (decay, factor, _), p in groups.items()]


def lr_multiplier(
    step: int,
    *,
    steps: int,
    kind: Schedule = "cosine",
    warmup: int = 0,
    final: float = 0.1,
    decay_fraction: float = 0.2,
) -> float:
    """Factor on the peak learning rate for step 0, 1, …, steps - 1: at the last step exactly ``final``.

    Warm-up: (step+1)/warmup, so that the peak is step warmup-1 (step 0 without warm-up). Then
    cosine: final + (1-final)·(1+cos πt)/2, t from 0 at the peak to 1 at step steps-1 (Loshchilov & Hutter 2017,
    arXiv:1608.03983);
    wsd: 1, then linearly to ``final`` over the last :func:`decay_steps` steps (a schedule of the shape that Hu et al.
    2024, arXiv:2404.06395, name; the linear cooldown is in Hägele et al. 2024, arXiv:2405.18392);
    constant: 1, with no ``final``. A run of one step, or one that is all warm-up, ends at the peak.
    Raises: ValueError if warmup exceeds :func:`longest_warmup`, final is outside [0, 1] or decay_fraction (0, 1].
    """
    if not 0 <= final <= 1:
        raise ValueError(f"final must be in [0, 1], got {final}")
    longest = longest_warmup(steps, kind=kind, decay_fraction=decay_fraction)
    if not 0 <= warmup <= longest:
        raise ValueError(f"warmup must be in [0, {longest}] for {kind} over steps={steps}, got {warmup}")
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        peak = max(warmup - 1, 0)
        t = (step - peak) / max(1, steps - 1 - peak)
        return final + (1 - final) * (1 + math.cos(math.pi * t)) / 2
    decay = decay_steps(steps, decay_fraction=decay_fraction)
    t = max(0.0, (step - (steps - 1 - decay)) / max(1, decay))
    return (1 - t) + final * t


def longest_warmup(steps: int, *, kind: Schedule, decay_fraction: float) -> int:
    """Most steps of warm-up that a schedule has room for: all, or for wsd those before it decays."""
    return steps - decay_steps(steps, decay_fraction=decay_fraction) if kind == "wsd" else steps


def decay_steps(steps: int, *, decay_fraction: float) -> int:
    """Steps of wsd below the peak: ``decay_fraction`` of all, at least one, and never the first.

    Raises: ValueError if decay_fraction is outside (0, 1].
    """
    if not 0 < decay_fraction <= 1:
        raise ValueError(f"decay_fraction must be in (0, 1], got {decay_fraction}")
    return min(max(1, round(steps * decay_fraction)), steps - 1)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group ``lr`` times its own ``lr_factor`` (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients together; a sparse one is first summed over repeated rows, in place of ``grad``."""
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = coalesced(parameter.grad)
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    return torch.nn.utils.get_total_norm(values)


def clip(parameters: Iterable[Tensor], norm: Tensor, *, limit: float) -> None:
    """Scale gradients in place by min(1, limit/norm), given their norm (Pascanu et al. 2013, arXiv:1211.5063)."""
    torch.nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], limit, norm)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory: of a DTensor its shard, of any other all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _embeddings(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding | MemoryValues)]
