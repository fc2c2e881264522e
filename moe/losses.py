"""Side losses of a router. They are returned values: the caller adds them to the loss with a coefficient."""

from jaxtyping import Float
from torch import Tensor

from moe.routing import Routing, mean_over_real


def load_balancing_loss(routing: Routing) -> Float[Tensor, ""]:
    """L = E · Σ_e f_e P_e, equal to 1 under uniform routing and up to E under collapse.

    f_e: share of the choices that fell on e, counted before capacity drops any, so that Σ f_e = 1 for every K;
    P_e: mean router probability of e. Padding counts in neither. Only P carries a gradient.
    Fedus et al. 2021, eq. 4-6 (arXiv:2101.03961). 0 where no token is real.
    """
    choices = routing.choices().to(routing.scores.dtype)
    share = choices / choices.sum().clamp_min(1)
    return routing.num_experts * (share * mean_over_real(routing.scores, routing.real)).sum()


def router_z_loss(routing: Routing) -> Float[Tensor, ""]:
    """L = mean over real tokens of (ln Σ_e exp logit_e)², which keeps logits small. ST-MoE (arXiv:2202.08906)."""
    squared = routing.logits.logsumexp(-1, keepdim=True).square()
    return mean_over_real(squared, routing.real).squeeze(0)
