"""No two routers are names of one computation: on the same weights, tokens and seeds each chooses or weighs otherwise.

Four pairs coincide by definition, and are held equal here: SwitchRouter without jitter and capacity is
``TopKRouter(k=1, renormalize=False)``; ``Top2Router(second="always")`` is ``TopKRouter(k=2)``, and without capacity so
is ``GumbelTop2Router(noise="never")``; in evaluation ``SinkhornRouter(k=1)`` is ``BalancedAssignmentRouter``.
"""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from moe import (
    BalancedAssignmentRouter,
    ExpertChoiceRouter,
    HashRouter,
    NoisyTopKRouter,
    Routing,
    SigmoidRouter,
    SinkhornRouter,
    SwitchRouter,
    Top2Router,
    TopKRouter,
)
from moe.fairscale import GumbelTop2Router
from tests.tolerances import close

DIM, EXPERTS, TOKENS = 6, 8, 40
ROUTERS: dict[str, Callable[[], nn.Module]] = {
    "top_k": lambda: TopKRouter(DIM, EXPERTS, k=2),
    "top_k, unrenormalised": lambda: TopKRouter(DIM, EXPERTS, k=2, renormalize=False),
    "top_k of one": lambda: TopKRouter(DIM, EXPERTS, k=1, renormalize=False),
    "switch with jitter": lambda: SwitchRouter(DIM, EXPERTS, jitter=0.3),
    "switch with capacity": lambda: SwitchRouter(DIM, EXPERTS, capacity_factor=1.0),
    "noisy": lambda: NoisyTopKRouter(DIM, EXPERTS, k=2),
    "top_2": lambda: Top2Router(DIM, EXPERTS),
    "top_2 with capacity": lambda: Top2Router(DIM, EXPERTS, capacity_factor=1.0),
    "gumbel": lambda: GumbelTop2Router(DIM, EXPERTS, capacity_factor=None),
    "gumbel with capacity": lambda: GumbelTop2Router(DIM, EXPERTS),
    "gumbel without noise": lambda: GumbelTop2Router(DIM, EXPERTS, noise="never"),
    "sigmoid": lambda: SigmoidRouter(DIM, EXPERTS, k=2),
    "sigmoid with bias": lambda: biased(SigmoidRouter(DIM, EXPERTS, k=2)),
    "grouped": lambda: SigmoidRouter(DIM, EXPERTS, k=2, num_groups=4, top_groups=1),
    "expert_choice": lambda: ExpertChoiceRouter(DIM, EXPERTS, capacity_factor=2.0),
    "hash": lambda: HashRouter(DIM, EXPERTS, k=2),
    "hash of another seed": lambda: HashRouter(DIM, EXPERTS, k=2, seed=1),
    "sinkhorn": lambda: SinkhornRouter(DIM, EXPERTS, k=2),
    "sinkhorn of one": lambda: SinkhornRouter(DIM, EXPERTS, k=1),
    "base": lambda: BalancedAssignmentRouter(DIM, EXPERTS),
}


def biased(router: SigmoidRouter) -> SigmoidRouter:
    """With what balancing could have added: the even experts lag behind."""
    router.bias[::2] = 0.4
    return router


def routed(make: Callable[[], nn.Module], *, training: bool = True) -> Routing:
    draws = torch.Generator().manual_seed(0)
    weight, x = torch.randn(EXPERTS, DIM, generator=draws) / 2, torch.randn(TOKENS, DIM, generator=draws)
    x = x + 2 * weight[0]  # a common lean to one expert, which balancing works against
    router = make().train(training)
    if hasattr(router, "weight"):
        with torch.no_grad():
            router.weight.copy_(weight)
    return router(x, token_ids=torch.arange(TOKENS), generator=torch.Generator().manual_seed(1))


def combined(routing: Routing) -> Tensor:
    """[T, E]: the weight of each expert for each token, NaN where it is not chosen."""
    table = torch.full((TOKENS, EXPERTS), torch.nan)
    table[routing.token, routing.expert] = routing.weight.detach()
    return table


def share_of_equal_tokens(one: Tensor, other: Tensor) -> float:
    return torch.isclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True).all(1).float().mean().item()


@pytest.fixture(scope="module")
def tables() -> dict[str, Tensor]:
    return {name: combined(routed(make)) for name, make in ROUTERS.items()}


@pytest.mark.parametrize(("one", "other"), combinations(ROUTERS, 2))
def test_two_names_are_two_computations(tables: dict[str, Tensor], one: str, other: str) -> None:
    assert share_of_equal_tokens(tables[one], tables[other]) < 0.9


@pytest.mark.parametrize(
    ("one", "other", "training"),
    [
        (lambda: SwitchRouter(DIM, EXPERTS), ROUTERS["top_k of one"], True),
        (lambda: Top2Router(DIM, EXPERTS, second="always"), ROUTERS["top_k"], True),
        (lambda: GumbelTop2Router(DIM, EXPERTS, capacity_factor=None, noise="never"), ROUTERS["top_k"], True),
        (ROUTERS["sinkhorn of one"], ROUTERS["base"], False),
    ],
    ids=["switch", "top_2", "gumbel", "sinkhorn"],
)
def test_pairs_that_coincide_by_definition(
    one: Callable[[], nn.Module], other: Callable[[], nn.Module], training: bool
) -> None:
    first, second = routed(one, training=training), routed(other, training=training)
    assert first.token.equal(second.token)
    assert first.expert.equal(second.expert)
    close(first.weight, second.weight)
