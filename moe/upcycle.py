"""From a dense feed-forward network to a mixture of experts that computes the same at step 0."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import at_least
from moe.experts import Experts
from moe.layer import MoE
from moe.nonlinearity import Activation
from moe.routers.top_k import TopKRouter


@torch.no_grad()
def upcycle(
    gate: Float[Tensor, "F D"] | None,
    up: Float[Tensor, "F D"],
    down: Float[Tensor, "D F"],
    *,
    num_experts: int,
    k: int,
    granularity: int = 1,
    activation: Activation = "swiglu",
    reinitialize: float = 0.0,
    generator: torch.Generator | None = None,
    gate_bias: Float[Tensor, "F"] | None = None,
    up_bias: Float[Tensor, "F"] | None = None,
    down_bias: Float[Tensor, "D"] | None = None,
) -> MoE:
    """A MoE with copies of the dense network down · act(up x), equal to it in output until the first update.

    gate, up, down: the weights of the dense layer's three Linears; gate is None but for swiglu. They are copied.
    gate_bias, up_bias, down_bias: the Linears' biases; with one of them the experts have biases, those that are None
    start as zeros.

    granularity 1 (sparse upcycling, Komatsuzaki et al. 2022, arXiv:2212.05055): every expert is a copy, the router is
    fresh. The gates are renormalised, so that Σ_e w_e f(x) = f(x) whatever the router says.

    granularity G > 1 (virtual groups, He et al. 2024, arXiv:2410.07524): the F neurons are cut into G shards, so that
    f = Σ_s f_s, and experts g·G … g·G + G − 1 of width F / G, one copy of every shard, form virtual group g of
    num_experts / G. The rows of a group in the router start out identical: its G experts have the same probability, and
    the k best experts are the k / G best groups, whole. Each token so meets every shard equally often, with the
    renormalised weights of the copies of one shard adding up to 1 / G; the experts' weights are scaled to give G·f_s.
    The scale is spread over the matrices in which f_s is homogeneous: √G on value and down (swiglu), on up and down
    (relu), G on down (gelu, silu), ∛G on up and down (relu2). A bias before the activation is scaled as its matrix is;
    every expert adds the whole of down_bias, as the weights of a token's experts sum to 1. Training separates the
    rows, for every expert has its own gradient.

    reinitialize r: each expert draws ⌊r · neurons⌋ of its own neurons anew, at random, from normal distributions with
    the mean and deviation of what they replace in each matrix, so that the copies differ from the start (Nakamura et
    al. 2025, arXiv:2502.19261, find 0.5 best for long training; Qwen2's experts, arXiv:2407.10671, also start half
    random). The mixture then no longer equals the dense network; 0, the default, keeps it equal.

    With k = 1 the renormalised gate is the constant 1, and the router gets no gradient from the output.
    generator: draws the router, then the neurons; default torch's global one.
    Raises: ValueError for matrices or biases of other shapes, a gate that does not go with the activation, granularity
    that is no int >= 1 or does not divide F, num_experts and k, k outside [1, num_experts], or reinitialize outside
    [0, 1].

    >>> layer = upcycle(None, torch.randn(6, 4), torch.randn(4, 6), num_experts=3, k=2, activation="gelu")
    >>> layer.experts.down.shape
    torch.Size([3, 4, 6])
    """
    _check_matrices(gate, up, down, activation)
    _check_biases(up, gate, {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias})
    hidden, dim = up.shape
    _check_granularity(granularity, hidden=hidden, num_experts=num_experts, k=k)
    if not 0 <= reinitialize <= 1:
        raise ValueError(f"reinitialize must be in [0, 1], got {reinitialize}")
    router = TopKRouter(dim, num_experts, k=k, renormalize=True)
    bias = not (gate_bias is up_bias is down_bias is None)
    layer = MoE(dim, hidden // granularity, num_experts, router, activation=activation, bias=bias).to(up)
    groups = num_experts // granularity
    rows = torch.empty(groups, dim, dtype=torch.float32, device="cpu" if generator is None else generator.device)
    nn.init.normal_(rows, std=dim**-0.5, generator=generator)
    router.weight.copy_(repeat(rows, "g d -> (g s) d", s=granularity))
    up_scale, down_scale = _scales(activation, granularity)
    parts = [up * up_scale] if gate is None else [gate, up * up_scale]
    shards = torch.cat([rearrange(part, "(s f) d -> s d f", s=granularity) for part in parts], dim=-1)
    layer.experts.up.copy_(repeat(shards, "s d a -> (g s) d a", g=groups))
    shards = rearrange(down * down_scale, "d (s f) -> s d f", s=granularity)
    layer.experts.down.copy_(repeat(shards, "s d f -> (g s) d f", g=groups))
    if layer.experts.up_bias is not None and layer.experts.down_bias is not None:
        zeros = up.new_zeros(hidden)
        inner = [zeros if up_bias is None else up_bias * up_scale]
        inner = inner if gate is None else [zeros if gate_bias is None else gate_bias, *inner]
        shards = torch.cat([rearrange(part, "(s f) -> s f", s=granularity) for part in inner], dim=-1)
        layer.experts.up_bias.copy_(repeat(shards, "s a -> (g s) a", g=groups))
        layer.experts.down_bias.copy_(up.new_zeros(dim) if down_bias is None else down_bias)
    _reinitialize(layer.experts, reinitialize, generator)
    return layer


def _reinitialize(experts: Experts, share: float, generator: torch.Generator | None) -> None:
    """Draw that share of each expert's neurons anew, matrix by matrix like what was there."""
    count = int(share * experts.hidden + 1e-9)
    if not count:
        return
    device = "cpu" if generator is None else generator.device
    for index, (up, down) in enumerate(zip(experts.up, experts.down, strict=True)):
        drawn = torch.randperm(experts.hidden, generator=generator, device=device)[:count].to(up.device)
        biases = () if experts.up_bias is None else experts.up_bias[index, None].split(experts.hidden, dim=-1)
        for matrix in (*up.split(experts.hidden, dim=-1), down, *biases):
            old = matrix[:, drawn]
            noise = torch.randn(old.shape, generator=generator, device=device).to(old)
            matrix[:, drawn] = old.mean() + old.std(correction=0) * noise


def _scales(activation: Activation, granularity: int) -> tuple[float, float]:
    """Factors on up and down whose joint effect on the output is ``granularity``."""
    if activation in ("gelu", "silu"):
        return 1.0, float(granularity)
    share = granularity ** (1 / 3 if activation == "relu2" else 1 / 2)
    return share, share


def _check_matrices(gate: Tensor | None, up: Tensor, down: Tensor, activation: Activation) -> None:
    if up.dim() != 2 or down.shape != up.shape[::-1]:
        raise ValueError(f"up and down must have shapes [F, D] and [D, F], got {list(up.shape)} and {list(down.shape)}")
    if gate is not None and gate.shape != up.shape:
        raise ValueError(f"gate must have the shape of up, {list(up.shape)}, got {list(gate.shape)}")
    if (gate is not None) != (activation == "swiglu"):
        given = "None" if gate is None else "a matrix"
        raise ValueError(f"gate must be a matrix for swiglu and None otherwise, got {given} for {activation!r}")


def _check_biases(up: Tensor, gate: Tensor | None, biases: dict[str, Tensor | None]) -> None:
    if gate is None and biases["gate_bias"] is not None:
        raise ValueError("gate_bias must be None without a gate, got a vector")
    for name, bias in biases.items():
        size = up.shape[1] if name == "down_bias" else up.shape[0]
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} must have shape [{size}], got {list(bias.shape)}")


def _check_granularity(granularity: int, *, hidden: int, num_experts: int, k: int) -> None:
    at_least("granularity", granularity, 1)
    for name, size in (("F", hidden), ("num_experts", num_experts), ("k", k)):
        if size % granularity:
            raise ValueError(f"granularity must divide {name}={size}, got {granularity}")
