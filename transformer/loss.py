"""Next-token cross-entropy that never holds all logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
_LOGITS_PER_CHUNK = 1 << 22


def chunked_cross_entropy(
    hidden: Float[Tensor, "N D"],
    head_weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "N"],
    *,
    chunk: int | None = None,
    ignore_index: int = IGNORE,
) -> Float[Tensor, ""]:
    """mean over kept targets of ``logsumexp(z) − z[target]`` with ``z = head_weight · hidden``, in nats, float32.

    Rows go through the head ``chunk`` at a time (default: as many as make 2²² logits), and each chunk's gradient is
    formed while its logits are at hand: beside the gradients themselves the memory is ``chunk · V`` numbers instead
    of ``N · V``. Under autocast the products run in the autocast type; softmax and sums are float32 (float64 for
    float64 input). Without any kept target the loss is 0.
    Raises: ValueError if chunk < 1 or a kept target is outside [0, V).
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    kept = targets != ignore_index
    if not torch.compiler.is_compiling() and kept.any():
        low, high = targets[kept].aminmax()
        if low < 0 or high >= len(head_weight):
            raise ValueError(
                f"targets must be in [0, vocabulary={len(head_weight)}) or {ignore_index}, got {int(low)}…{int(high)}"
            )
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = chunk or max(1, _LOGITS_PER_CHUNK // len(head_weight))
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, head_weight, targets, kept, rows, compute)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, kept, rows, compute):
        exact = torch.float64 if compute == torch.float64 else torch.float32
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        count = kept.sum().clamp(min=1).to(exact)
        head = weight.detach().to(compute)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, keep = hidden[part].detach().to(compute), kept[part]
            target = targets[part].where(keep, 0)[:, None].long()
            log_p = torch.log_softmax((h @ head.T).to(exact), dim=1)
            total -= log_p.gather(1, target).squeeze(1).where(keep, 0).sum()
            if not any(wanted):
                continue
            error = log_p.exp_()
            error.scatter_add_(1, target, error.new_full(target.shape, -1.0))
            error = error.to(compute)
            share = (keep / count)[:, None]  # on rows of D numbers, not of V
            if grad_hidden is not None:
                grad_hidden[part] = (error @ head) * share
            if grad_weight is not None:
                grad_weight += error.T @ (h * share).to(compute)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
            None,
            None,
        )
