"""Expert choice: the experts pick their tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.checks import positive
from moe.dispatch import expert_capacity
from moe.noise import Source
from moe.routers.linear import LinearRouter
from moe.routers.top_k import choose_top_k, router_logits
from moe.routing import Routing


class ExpertChoiceRouter(LinearRouter):
    """p = softmax over experts of W x in float32; each expert takes the C tokens with its largest p_e, weighted by p_e.

    C = min(T, ceil(T / E · capacity_factor)) over the T real tokens of the call, so that every expert has the same
    load, and a token is taken by 0 to E experts. Zhou et al. 2022 (arXiv:2202.09368). In the Routing tokens ascend, and
    inside a token experts ascend: no choice of a token comes before another.

    Whether a token is taken depends on every other token of the call, later ones included: ``sees_future`` is True, a
    causal transformer refuses this router unless ``allow_future`` says that the leak is wanted, and a token decoded
    alone is taken by every expert, whatever the factor (C is at least 1): the router is not for generation.
    Raises: ValueError for sizes below 1 or a capacity_factor that is not finite and positive; FloatingPointError for
    NaN or infinite logits of a real token.

    >>> routing = ExpertChoiceRouter(8, 4, capacity_factor=2.0)(torch.randn(6, 8))
    >>> routing.loads().tolist()
    [3, 3, 3, 3]
    """

    sees_future = True

    def __init__(self, dim: int, num_experts: int, *, capacity_factor: float = 2.0, allow_future: bool = False) -> None:
        super().__init__(dim, num_experts, k=None)
        positive("capacity_factor", capacity_factor)
        self.capacity_factor, self.allow_future = capacity_factor, allow_future

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        token_ids: Int[Tensor, "T"] | None = None,
        padding_mask: Bool[Tensor, "T"] | None = None,
        replay: Routing | None = None,
        generator: Source | None = None,
    ) -> Routing:
        """Route x. token_ids and generator are not used: the choice depends on x alone, and nothing is drawn."""
        logits = router_logits(x, self.weight, padding_mask)
        if replay is not None:
            return choose_top_k(logits, 1, renormalize=False, real=padding_mask, replay=replay)
        token, expert = choose_tokens(logits, self.capacity_factor, padding_mask)
        scores = logits.softmax(-1)
        return Routing(
            token, expert, scores[token, expert], logits, scores, self.num_experts, x.shape[0],
            dropped=token.new_zeros(0, 2), real=padding_mask,
        )  # fmt: skip

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_experts={self.num_experts}"
        return f"{sizes}, capacity_factor={self.capacity_factor}, allow_future={self.allow_future}"


@torch.no_grad()
def choose_tokens(
    logits: Float[Tensor, "T E"], capacity_factor: float, real: Bool[Tensor, "T"] | None = None
) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """Tokens and experts of the assignments, where each expert takes its C most probable real tokens."""
    num_tokens, num_experts = logits.shape
    # log-probabilities: distinct ones can underflow to equal probabilities
    affinity = logits.log_softmax(-1)
    if real is not None:
        affinity = affinity.masked_fill(~real[:, None], -torch.inf)
        num_tokens = int(real.sum())
    capacity = min(num_tokens, expert_capacity(num_tokens, num_experts, capacity_factor))
    taken = torch.zeros_like(affinity, dtype=torch.bool)
    taken.scatter_(0, affinity.topk(capacity, dim=0).indices, True)
    token, expert = taken.nonzero(as_tuple=True)
    return token, expert
