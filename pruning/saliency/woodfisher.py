"""WoodFisher: the inverse of the empirical Fisher matrix, block by block, from the gradient of every sample."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pruning.batches import Batch, Loss, Progress, batch_size, evaluating, model_batches, samples_of, scalar_loss


def inverse_fisher(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    *,
    block: int = 64,
    damping: float = 1e-5,
    loss: Loss | None = None,
    progress: Progress = None,
) -> dict[str, Float[Tensor, "blocks block block"]]:
    """(λI + 1/N Σ_b g_b g_bᵀ)⁻¹ of every `block` consecutive weights of each matrix (row after row), float64.

    Singh & Alistarh 2020 (arXiv:2004.14340), eq. 3 to 6: from H⁻¹ = I/λ, for each sample's gradient q in turn
    H⁻¹ ← H⁻¹ − (H⁻¹q)(H⁻¹q)ᵀ / (N + qᵀH⁻¹q). g_b: gradient of one sample's loss. λ: damping. A last block that the
    weights do not fill is padded; memory is 8 · block bytes a weight, and each sample takes one backward pass.
    Raises: ValueError if block < 1, damping <= 0, batches are empty, a weight is frozen, or, before any work, the
    blocks do not fit into the memory that is free."""
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be in (0, inf), got {damping}")
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ValueError(f"the Fisher matrix needs weights with requires_grad=True, got {frozen[0]!r} frozen")
    _require_memory(weights, block)
    held = list(model_batches(model, batches))
    samples = sum(batch_size(batch) for batch in held)
    inverse = {name: _scaled_identity(weight, block, 1 / damping) for name, weight in weights.items()}
    with evaluating(model, frozen=False), torch.enable_grad():
        for batch in progress(held) if progress else held:
            for sample in samples_of(batch):
                value = scalar_loss(model, sample, loss)
                found = torch.autograd.grad(value, list(weights.values()), allow_unused=True, materialize_grads=True)
                for matrix, gradient in zip(inverse.values(), found, strict=True):
                    _add_sample(matrix, in_blocks(gradient, block), samples)
    return inverse


def _require_memory(weights: Mapping[str, Tensor], block: int) -> None:
    for device in {weight.device for weight in weights.values()}:
        sizes = [weight.numel() for weight in weights.values() if weight.device == device]
        needed, free = sum(8 * block**2 * -(-size // block) for size in sizes), free_memory(device)
        if free is not None and needed > free:
            raise ValueError(
                f"inverse Fisher blocks of {block} take {needed / 1e9:.1f} GB for {sum(sizes):,} weights, and "
                f"{free / 1e9:.1f} GB are free on {device}: name fewer weights=, or use method 'obd' or 'sparsegpt'"
            )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated there; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _scaled_identity(weight: Tensor, block: int, scale: float) -> Float[Tensor, "blocks block block"]:
    count = -(-weight.numel() // block)
    return torch.eye(block, dtype=torch.float64, device=weight.device).mul(scale).repeat(count, 1, 1)


def _add_sample(inverse: Float[Tensor, "n b b"], gradient: Float[Tensor, "n b"], samples: int) -> None:
    product = torch.einsum("nij,nj->ni", inverse, gradient)
    scale = samples + (gradient * product).sum(1)
    inverse.baddbmm_(product[:, :, None], product[:, None] / scale[:, None, None], alpha=-1)


def in_blocks(values: Tensor, block: int) -> Float[Tensor, "blocks block"]:
    """The values in order, `block` to a row, float64; zeros fill the last."""
    flat = values.detach().reshape(-1).double()
    return torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)


def woodfisher_scores(weights: Mapping[str, Tensor], inverse: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
    """w_i² / (2 [H⁻¹]_ii): the loss that removing one weight adds once the others of its block make up for it; float64.

    Singh & Alistarh 2020 (arXiv:2004.14340), eq. 2, after Hassibi & Stork 1992. inverse: from `inverse_fisher`."""
    scores = {}
    for name, weight in weights.items():
        diagonal = inverse[name].diagonal(dim1=1, dim2=2).reshape(-1)[: weight.numel()].view(weight.shape)
        scores[name] = weight.detach().double().square() / (2 * diagonal)
    return scores


@torch.no_grad()
def woodfisher_update(
    weight: Float[Tensor, "..."], kept: Bool[Tensor, "..."], inverse: Float[Tensor, "blocks block block"]
) -> Float[Tensor, "..."]:
    """The weight with the pruned entries Q at 0 and the others moved by δ = −H⁻¹_{:Q} (H⁻¹_{QQ})⁻¹ w_Q, in each block.

    For one weight that is −w_i/[H⁻¹]_ii · H⁻¹e_i; for several it is the joint optimum, which single updates added up
    miss where the weights interact. Returns a new tensor of the weight's dtype.
    Raises: ValueError if kept or inverse has another shape."""
    size = inverse.shape[-1]
    if kept.shape != weight.shape or len(inverse) * size < weight.numel():
        raise ValueError(
            f"kept and inverse must fit {list(weight.shape)}, got {list(kept.shape)}, {list(inverse.shape)}"
        )
    values, gone = in_blocks(weight, size), in_blocks(~kept, size).bool()
    # rows of kept weights become those of the identity, so that all blocks are solved at once
    pairs = gone[:, :, None] & gone[:, None, :]
    eye = torch.eye(size, dtype=torch.float64, device=weight.device)
    lagrange = torch.linalg.solve(torch.where(pairs, inverse, eye), values * gone)
    new = values - torch.einsum("nij,nj->ni", inverse, lagrange * gone)
    new = new.masked_fill(gone, 0).reshape(-1)[: weight.numel()].view(weight.shape)
    return new.to(weight.dtype)
