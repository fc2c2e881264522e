"""Soft MoE: every expert works on weighted averages of all tokens."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moe.checks import at_least
from moe.experts import Experts
from moe.grouped import expert_mixture
from moe.nonlinearity import Activation


class SoftMoE(nn.Module):
    """y = C · f(Dᵀ x): slots are averages of tokens, outputs are averages of slots. Puigcerver et al. 2023
    (arXiv:2308.00951).

    l = scale · x̂ φ̂ with every token x̂ and every column φ̂ of phi [dim, E·S] divided by its L2 norm; D = softmax of l
    over the tokens of a sequence, C = softmax of l over all E·S slots, both in float32. Expert e works on slots
    e·S … e·S + S − 1. Nothing is dropped, nothing is balanced, all is differentiable; cost does not grow with E for a
    fixed number of slots.

    Every output depends on every token of its sequence, later ones included: ``sees_future`` is True, and a causal
    transformer refuses this layer unless ``allow_future`` says that the leak is wanted. Padding enters no slot and
    gets zeros.
    slots_per_expert: S. bias: as in :class:`moe.MoE`. name: says in errors which layer it was.
    Raises: ValueError for sizes below 1.

    >>> SoftMoE(8, 16, 4, slots_per_expert=2)(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    sees_future = True

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        slots_per_expert: int = 1,
        activation: Activation = "swiglu",
        bias: bool = False,
        allow_future: bool = False,
        name: str = "soft_moe",
    ) -> None:
        super().__init__()
        at_least("slots_per_expert", slots_per_expert, 1)
        self.dim, self.num_experts, self.slots_per_expert = dim, num_experts, slots_per_expert
        self.allow_future, self.name = allow_future, name
        self.experts = Experts(dim, hidden, num_experts, activation=activation, bias=bias)
        self.phi = nn.Parameter(torch.empty(dim, num_experts * slots_per_expert))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """phi from the normal distribution of deviation dim^-1/2, scale 1; the experts keep what they have."""
        nn.init.normal_(self.phi, std=self.dim**-0.5)
        nn.init.ones_(self.scale)

    def forward(
        self, x: Float[Tensor, "B L D"], *, padding_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Mix x [B, L, dim]; padding_mask: True for real tokens.

        Raises: ValueError for a wrong width or mask; FloatingPointError for NaN or infinite logits of a real token.
        """
        self._check(x, padding_mask)
        if padding_mask is not None:
            # padding may hold anything, and 0 · NaN is NaN
            x = x.masked_fill(~padding_mask[..., None], 0.0)
        logits = self.slot_logits(x)
        if not logits.detach().isfinite().all():
            raise FloatingPointError(f"{self.name}: slot logits must be finite, got NaN or infinity")
        dispatch, combine = slot_weights(logits, padding_mask)
        slots = torch.einsum("bln,bld->bnd", dispatch.to(x.dtype), x)
        return torch.einsum("bln,bnd->bld", combine.to(x.dtype), self._work(slots).to(x.dtype))

    def slot_logits(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L N"]:
        """scale · x̂ φ̂ in float32, or float64 if x is, whatever autocast says."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            directions = self.scale.to(dtype) * _unit(self.phi.to(dtype), dim=0)
            return _unit(x.to(dtype), dim=-1) @ directions

    def _work(self, slots: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        rows = rearrange(slots, "b n d -> (b n) d")
        row = torch.arange(len(rows), device=rows.device)
        expert = row % slots.shape[1] // self.slots_per_expert
        weight = torch.ones(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        experts = self.experts
        done = expert_mixture(
            rows, row, expert, weight, experts.up, experts.down, experts.activation, experts.up_bias, experts.down_bias
        )  # fmt: skip
        return rearrange(done, "(b n) d -> b n d", n=slots.shape[1])

    def _check(self, x: Float[Tensor, "B L D"], padding_mask: Bool[Tensor, "B L"] | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape [batch, length, dim={self.dim}], got {list(x.shape)}")
        if padding_mask is None:
            return
        if padding_mask.dtype != torch.bool:
            raise ValueError(f"padding_mask must be bool, True for real tokens, got {padding_mask.dtype}")
        if padding_mask.shape != x.shape[:2]:
            raise ValueError(f"padding_mask must have shape {list(x.shape[:2])}, got {list(padding_mask.shape)}")

    def extra_repr(self) -> str:
        return f"dim={self.dim}, slots_per_expert={self.slots_per_expert}, allow_future={self.allow_future}"


def slot_weights(
    logits: Float[Tensor, "B L N"], real: Bool[Tensor, "B L"] | None = None
) -> tuple[Float[Tensor, "B L N"], Float[Tensor, "B L N"]]:
    """Dispatch, softmax over real tokens, and combine, softmax over slots; both zero for padding."""
    if real is None:
        return logits.softmax(1), logits.softmax(2)
    real = real[..., None]
    # the lowest finite number: a sequence of padding alone would give NaN from −∞
    dispatch = logits.masked_fill(~real, torch.finfo(logits.dtype).min).softmax(1)
    return dispatch * real, logits.softmax(2) * real


def _unit(x: Float[Tensor, "..."], *, dim: int) -> Float[Tensor, "..."]:
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + 1e-6)
