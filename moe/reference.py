"""The oracle: routing by loops over tokens, the mixture with every expert applied to every token. Slow on purpose."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def mixture_of_experts(
    x: Float[Tensor, "T D"],
    router: Float[Tensor, "E D"],
    up: Float[Tensor, "E D A"],
    down: Float[Tensor, "E D F"],
    up_bias: Float[Tensor, "E A"] | None = None,
    down_bias: Float[Tensor, "E D"] | None = None,
    *,
    k: int,
    renormalize: bool,
    activation: str = "swiglu",
    real: list[bool] | None = None,
    capacity_factor: float | None = None,
) -> Float[Tensor, "T D"]:
    """y_t = Σ_e weights_te · (act(x_t · up_e + up_bias_e) · down_eᵀ + down_bias_e), differentiable in every tensor."""
    weights = combine_weights(x @ router.mT, k=k, renormalize=renormalize, real=real, capacity_factor=capacity_factor)
    hidden = torch.einsum("td,eda->tea", x, up)
    if up_bias is not None:
        hidden = hidden + up_bias
    if activation == "swiglu":
        gate, value = hidden[..., : down.shape[2]], hidden[..., down.shape[2] :]
        hidden = gate / (1 + torch.exp(-gate)) * value
    elif activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    elif activation == "silu":
        hidden = hidden / (1 + torch.exp(-hidden))
    else:
        hidden = torch.where(hidden > 0, hidden, torch.zeros_like(hidden)) ** {"relu": 1, "relu2": 2}[activation]
    y = torch.einsum("te,tef,edf->td", weights, hidden, down)
    return y if down_bias is None else y + weights @ down_bias


def combine_weights(
    logits: Float[Tensor, "T E"],
    *,
    k: int,
    renormalize: bool,
    real: list[bool] | None = None,
    capacity_factor: float | None = None,
) -> Float[Tensor, "T E"]:
    """The weight of every expert on every token, zero where it was not chosen or lost its place."""
    num_tokens, num_experts = logits.shape
    chosen = {t: _best(logits[t], k) for t in range(num_tokens) if real is None or real[t]}
    room = math.inf
    if capacity_factor is not None:
        room = max(1, math.ceil(k * len(chosen) / num_experts * capacity_factor - 1e-9))
    taken = [0] * num_experts
    rows = []
    for t in range(num_tokens):
        odds = torch.exp(logits[t] - logits[t].max())
        probabilities = odds / odds.sum()
        total = sum(probabilities[e] for e in chosen.get(t, [])) if renormalize else 1.0
        row = [logits.new_zeros(())] * num_experts
        for e in chosen.get(t, []):
            if taken[e] < room:
                row[e] = probabilities[e] / total
                taken[e] += 1
        rows.append(torch.stack(row))
    return torch.stack(rows) if rows else logits * 0


def _best(logits: Float[Tensor, "E"], k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda e: -logits[e].item())[:k]
