"""The whole model again, as loops over tokens, heads and experts; it shares no code with the library."""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turn(vector: Tensor, position: int, theta: float) -> Tensor:
    """RoPE as complex numbers: channel i and i + d/2 are the real and imaginary part."""
    half = len(vector) // 2
    out = vector.clone()
    for i in range(half):
        angle = position / theta ** (2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(state: dict[str, Tensor], prefix: str, x: Tensor, heads: int, kv_heads: int, d: int, theta: float, sees):
    length = len(x)
    q, k, v = (x @ state[f"{prefix}.{n}.weight"].T for n in ("query", "key", "value"))
    mixed = torch.zeros(length, heads * d, dtype=x.dtype)
    for h in range(heads):
        g = h * kv_heads // heads
        queries = [turn(q[i, h * d : h * d + d], i, theta) for i in range(length)]
        keys = [turn(k[i, g * d : g * d + d], i, theta) for i in range(length)]
        for i in range(length):
            seen = [j for j in range(length) if sees(i, j)]
            if not seen:
                continue
            scores = torch.stack([queries[i] @ keys[j] / math.sqrt(d) for j in seen])
            weights = scores.exp() / scores.exp().sum()
            mixed[i, h * d : h * d + d] = sum(w * v[j, g * d : g * d + d] for w, j in zip(weights, seen, strict=True))
    return mixed @ state[f"{prefix}.output.weight"].T


def dense(state: dict[str, Tensor], prefix: str, x: Tensor, activation: str) -> Tensor:
    up = x @ state[f"{prefix}.up.weight"].T
    if activation == "swiglu":
        gate = x @ state[f"{prefix}.gate.weight"].T
        middle = gate / (1 + torch.exp(-gate)) * up
    elif activation == "gelu":
        middle = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
    elif activation == "silu":
        middle = up / (1 + torch.exp(-up))
    else:
        middle = up.clamp(min=0) ** {"relu": 1, "relu2": 2}[activation]
    return middle @ state[f"{prefix}.down.weight"].T


def logits(model, ids: list[int], *, sees, moe=None) -> Tensor:
    """Logits [L, V] of one sequence in float64; ``moe(prefix, state, x)`` computes expert layers."""
    config, state = model.config, {n: t.double() for n, t in model.state_dict().items()}
    x = torch.stack([state["embedding.weight"][i] for i in ids])
    for index, layer in enumerate(config.layers):
        where = f"layers.{index}"
        if layer.attention:
            a = layer.attention
            normed = rms_norm(x, state[f"{where}.attention_norm.weight"], config.norm_eps)
            x = x + attention(
                state, f"{where}.attention", normed, a.num_heads, a.num_kv_heads, a.head_dim, config.rope_theta, sees
            )
        if layer.feedforward:
            normed = rms_norm(x, state[f"{where}.feedforward_norm.weight"], config.norm_eps)
            compute = moe or (lambda prefix, state, x, f=layer.feedforward: dense(state, prefix, x, f.activation))
            x = x + compute(f"{where}.feedforward", state, normed)
    head = state.get("head.weight", state["embedding.weight"])
    return rms_norm(x, state["norm.weight"], config.norm_eps) @ head.T
