"""Balanced assignment in training, plain top-k in evaluation: S-BASE by Sinkhorn, BASE by auction."""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.checks import at_least, positive
from moe.dispatch import group_by_expert
from moe.noise import Source
from moe.routers.linear import LinearRouter
from moe.routers.top_k import choose_top_k, router_logits
from moe.routing import Routing


class SinkhornRouter(LinearRouter):
    """In training each token takes the k best experts of a balanced transport plan, in evaluation those of its logits.

    The plan is exp((logits + u_t + v_e) / temperature) with rows that sum to 1 and columns near T / E, after a fixed
    number of Sinkhorn iterations (:func:`transport_plan`); no gradient passes through it. S-BASE, Clark et al. 2022
    (arXiv:2202.01169). Loads come out near T·k / E, not equal: see :class:`BalancedAssignmentRouter` for equal ones.
    weight: σ(logit) for k = 1 (as BASE), softmax(logits)_e without renormalising for k > 1 (as Megatron-LM), of the raw
    logits in training and evaluation alike. scores = softmax(logits).
    In training the choice for a token depends on all real tokens of the call; in evaluation on the token alone.
    Raises: ValueError for k outside [1, num_experts], iterations below 1, a temperature that is not finite and
    positive; FloatingPointError for NaN or infinite logits of a real token.
    """

    def __init__(
        self, dim: int, num_experts: int, *, k: int = 1, iterations: int = 8, temperature: float = 1.0
    ) -> None:
        super().__init__(dim, num_experts, k=k)
        at_least("iterations", iterations, 1)
        positive("temperature", temperature)
        self.iterations, self.temperature = iterations, temperature

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
        affinity = logits.detach()
        if self.training and replay is None:
            rows = _real_rows(padding_mask, len(x), x.device)
            plan = transport_plan(affinity[rows], iterations=self.iterations, temperature=self.temperature)
            affinity = affinity.index_put((rows,), plan)
        routing = choose_top_k(affinity, self.k, renormalize=False, real=padding_mask, replay=replay)
        return _weigh(routing, logits, sigmoid=self.k == 1)

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}"
        return f"{sizes}, iterations={self.iterations}, temperature={self.temperature}"


class BalancedAssignmentRouter(LinearRouter):
    """In training every expert gets the same number of tokens, such that the sum of logits is largest; top-1 otherwise.

    The assignment comes from :func:`balanced_assignment`, an auction of at most ``rounds`` rounds; loads are
    floor(T / E) or ceil(T / E), always. weight = σ(logit); scores = softmax(logits). BASE, Lewis et al. 2021
    (arXiv:2103.16716). In training the choice for a token depends on all real tokens of the call; in evaluation on the
    token alone, as under :class:`SinkhornRouter` with k = 1: in evaluation the two are one.
    Raises: ValueError for sizes or rounds below 1, epsilon that is not finite and positive; FloatingPointError for NaN
    or infinite logits of a real token.
    """

    def __init__(self, dim: int, num_experts: int, *, rounds: int = 500, epsilon: float = 0.01) -> None:
        super().__init__(dim, num_experts, k=1)
        at_least("rounds", rounds, 1)
        positive("epsilon", epsilon)
        self.rounds, self.epsilon = rounds, epsilon

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
        routing = choose_top_k(logits, 1, renormalize=False, real=padding_mask, replay=replay)
        if self.training and replay is None:
            values = logits.detach()[routing.token]
            expert = balanced_assignment(values, rounds=self.rounds, epsilon=self.epsilon)
            routing = dataclasses.replace(routing, expert=expert)
        return _weigh(routing, logits, sigmoid=True)

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_experts={self.num_experts}"
        return f"{sizes}, rounds={self.rounds}, epsilon={self.epsilon}"


@torch.no_grad()
def transport_plan(logits: Float[Tensor, "T E"], *, iterations: int, temperature: float = 1.0) -> Float[Tensor, "T E"]:
    """Logarithm of the plan: rows sum to 1 exactly, columns approach T / E.

    Each iteration subtracts from every column its log-sum-exp, then from every row its own; that the columns get T / E
    follows. In log space no exponential overflows, and a temperature below 1e-30 of the largest |logit| counts as that,
    the limit of none, so that no quotient does either.
    """
    plan = logits / _attained(logits, temperature)
    for _ in range(iterations):
        plan = plan - plan.logsumexp(0, keepdim=True)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan


def _attained(logits: Float[Tensor, "T E"], temperature: float) -> Float[Tensor, ""]:
    """The temperature, or the nearest to it by which logits of this dtype and size can be divided."""
    least = logits.abs().amax() * 1e-30 if logits.numel() else logits.new_zeros(())
    finite = torch.finfo(logits.dtype)
    return least.clamp_min(min(max(temperature, finite.tiny), finite.max))


@torch.no_grad()
def balanced_assignment(values: Float[Tensor, "T E"], *, rounds: int = 500, epsilon: float = 0.01) -> Int[Tensor, "T"]:
    """The expert of each token: loads floor(T / E) or ceil(T / E), the sum of values[t, expert_t] near its maximum.

    The T mod E experts that most tokens prefer take one token more. With these loads the sum is within T·epsilon of the
    largest possible if the auction ends within ``rounds``. Each round, every token without a place bids for the expert
    of best value − price, up to the price at which the second best were as good, plus epsilon; an expert keeps its
    highest bids, and its price is the lowest of them once it is full (Bertsekas & Castañon 1989). Prices start from 30
    Sinkhorn iterations, which leaves tens of rounds instead of hundreds. Values further apart than 1,000 epsilon are
    auctioned with larger ones first, a 200th of their range and then a fifth of the last, each from the prices that the
    last left (epsilon scaling): so the rounds do not grow with the range. If they are used up, the assignment of the
    last epsilon that came to its end stands; where none did, tokens without a place go, best value first, where there
    is room.
    Raises: ValueError for rounds below 0 or an epsilon that is not finite and positive.
    """
    at_least("rounds", rounds, 0)
    positive("epsilon", epsilon)
    capacity = _capacities(values)
    steps = _epsilons(values, epsilon)
    price = _starting_price(values, 10 * steps[0])
    values = values.masked_fill(capacity == 0, -torch.inf)
    ended: Tensor | None = None
    for step in steps:
        expert, price, rounds = _auction(values, capacity, price, step, rounds)
        if bool((expert < 0).any()):
            return _fill_up(values, expert, capacity) if ended is None else ended
        ended = expert
    return expert


def _epsilons(values: Float[Tensor, "T E"], epsilon: float) -> list[float]:
    """What bids are raised by, auction after auction: down to ``epsilon``, by fifths."""
    if not values.numel():
        return [epsilon]
    apart = float(values.max()) - float(values.min())
    if not 1000 * epsilon < apart < torch.inf:
        return [epsilon]
    steps = [apart / 200]
    while steps[-1] > epsilon:
        steps.append(max(steps[-1] / 5, epsilon))
    return steps


def _auction(
    values: Float[Tensor, "T E"],
    capacity: Int[Tensor, "E"],
    start: Float[Tensor, "E"],
    epsilon: float,
    rounds: int,
) -> tuple[Int[Tensor, "T"], Float[Tensor, "E"], int]:
    """Expert of each token, −1 without one; the prices; the rounds that are left."""
    expert, bid = capacity.new_full(values.shape[:1], -1), values.new_zeros(len(values))
    price = start
    while True:
        free = (expert < 0).nonzero()[:, 0]
        if not (rounds and len(free)):
            return expert, price, rounds
        expert[free], bid[free] = _bids(values[free], price, epsilon)
        expert = _keep_highest(expert, bid, capacity)
        price = _lowest_kept(expert, bid, capacity, start)
        rounds -= 1


def _bids(
    values: Float[Tensor, "n E"], price: Float[Tensor, "E"], epsilon: float
) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
    """The expert of best profit for each row, and the price at which the second best would equal it, plus epsilon."""
    best = (values - price).topk(min(2, values.shape[1]), dim=1)
    expert, first, second = best.indices[:, 0], best.values[:, 0], best.values[:, -1]
    # no second expert has any room: nobody to outbid
    margin = torch.where(second.isinf(), 0.0, first - second)
    return expert, price[expert] + margin + epsilon


def _capacities(values: Float[Tensor, "T E"]) -> Int[Tensor, "E"]:
    num_tokens, num_experts = values.shape
    each, left = divmod(num_tokens, num_experts)
    preferred = torch.bincount(values.argmax(1), minlength=num_experts)
    capacity = torch.full_like(preferred, each)
    capacity[preferred.argsort(descending=True, stable=True)[:left]] += 1
    return capacity


def _keep_highest(expert: Int[Tensor, "T"], bid: Float[Tensor, "T"], capacity: Int[Tensor, "E"]) -> Int[Tensor, "T"]:
    """The experts with all but the ``capacity`` highest bids of each set back to −1."""
    held = (expert >= 0).nonzero()[:, 0]
    held = held[bid[held].argsort(descending=True, stable=True)]
    groups = group_by_expert(held, expert[held], len(capacity))
    starts = groups.counts.cumsum(0) - groups.counts
    grouped = expert[groups.token]
    rank = torch.arange(len(held), device=held.device) - starts[grouped]
    return expert.index_fill(0, groups.token[rank >= capacity[grouped]], -1)


def _lowest_kept(
    expert: Int[Tensor, "T"], bid: Float[Tensor, "T"], capacity: Int[Tensor, "E"], start: Float[Tensor, "E"]
) -> Float[Tensor, "E"]:
    """The lowest bid that each full expert holds; the starting price where there is room, which any bid may take."""
    held = expert >= 0
    full = torch.bincount(expert[held], minlength=len(capacity)) == capacity
    return torch.where(full, start.scatter_reduce(0, expert[held], bid[held], "amin", include_self=False), start)


def _starting_price(values: Float[Tensor, "T E"], temperature: float) -> Float[Tensor, "E"]:
    """Prices under which the soft assignment is balanced: any start is right, this one leaves few rounds to bid."""
    if not len(values):
        return values.new_zeros(values.shape[1])
    plan = transport_plan(values, iterations=30, temperature=temperature)
    # ln plan = (value − price_e) / temperature + a constant of the row: any one row tells the prices
    price = values[0] - _attained(values, temperature) * plan[0]
    return price - price.min()


def _fill_up(values: Float[Tensor, "T E"], expert: Int[Tensor, "T"], capacity: Int[Tensor, "E"]) -> Int[Tensor, "T"]:
    """Places for the tokens without one. Every pass places all of them or fills an expert: at most E passes."""
    for _ in range(len(capacity)):
        free = (expert < 0).nonzero()[:, 0]
        if not len(free):
            break
        room = capacity - torch.bincount(expert[expert >= 0], minlength=len(capacity))
        best = values[free].masked_fill(room == 0, -torch.inf).max(dim=1)
        wish = torch.full_like(expert, -1).index_put((free,), best.indices)
        wish = _keep_highest(wish, best.values.new_zeros(len(expert)).index_put((free,), best.values), room)
        expert = torch.where(wish >= 0, wish, expert)
    return expert


def _weigh(routing: Routing, logits: Float[Tensor, "T E"], *, sigmoid: bool) -> Routing:
    scores = logits.softmax(-1)
    gates = logits.sigmoid() if sigmoid else scores
    return dataclasses.replace(routing, weight=gates[routing.token, routing.expert], logits=logits, scores=scores)


def _real_rows(real: Bool[Tensor, "T"] | None, num_tokens: int, device: torch.device) -> Int[Tensor, "n"]:
    return torch.arange(num_tokens, device=device) if real is None else real.nonzero()[:, 0]
