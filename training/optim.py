"""AdamW with the right parameters decayed, learning-rate schedules, and clipping."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Schedule = Literal["cosine", "wsd", "constant"]


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

    Not decayed: embeddings (and a head tied to them), biases, gains of norms. router_lr: factor on the learning rate
    of the matrices of routers. Each group carries its factor as ``lr_factor``; frozen parameters are left out.
    """
    exempt = {id(parameter) for parameter in _embeddings(model)}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in exempt and "bias" not in name.rpartition(".")[2]
            factor = router_lr if "router" in name.split(".") else 1.0
            groups.setdefault((weight_decay if decays else 0.0, factor), []).append(parameter)
    return [{"params": p, "weight_decay": decay, "lr_factor": factor} for (decay, factor), p in groups.items()]


def lr_multiplier(
    step: int,
    *,
    steps: int,
    kind: Schedule = "cosine",
    warmup: int = 0,
    final: float = 0.1,
    decay_fraction: float = 0.2,
) -> float:
    """Factor on the peak learning rate for step 0, 1, …, steps - 1.

    Warm-up: (step+1)/warmup. Then, with t from 0 to 1 over the rest of the steps,
    cosine: final + (1-final)·(1+cos πt)/2 (Loshchilov & Hutter 2017, arXiv:1608.03983);
    wsd: 1, then linearly to ``final`` over the last ``decay_fraction`` of all steps (Hu et al. 2024, arXiv:2404.06395);
    constant: 1.
    Raises: ValueError if warmup exceeds steps, or final or decay_fraction is outside [0, 1].
    """
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must be in [0, steps={steps}], got {warmup}")
    if not 0 <= final <= 1 or not 0 <= decay_fraction <= 1:
        raise ValueError(f"final and decay_fraction must be in [0, 1], got {final} and {decay_fraction}")
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        t = (step - warmup) / max(1, steps - warmup)
        return final + (1 - final) * (1 + math.cos(math.pi * min(t, 1.0))) / 2
    decay_steps = max(1, round(steps * decay_fraction))
    t = (step - (steps - decay_steps)) / decay_steps
    return 1.0 - (1 - final) * min(max(t, 0.0), 1.0)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group ``lr`` times its own ``lr_factor`` (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip(parameters: Iterable[Tensor], norm: Tensor, *, limit: float) -> None:
    """Scale gradients in place by min(1, limit/norm), given their norm (Pascanu et al. 2013, arXiv:1211.5063)."""
    torch.nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], limit, norm)


def _embeddings(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
