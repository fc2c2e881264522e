"""Every public layer and router under input that is wrong, empty, huge or lopsided: a clear error or a right answer."""

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from moe import (
    PEER,
    BalancedAssignmentRouter,
    ExpertChoiceRouter,
    HashRouter,
    MePropLinear,
    MoE,
    NoisyTopKRouter,
    ProductKeyMemory,
    SigmoidRouter,
    SinkhornRouter,
    SoftMoE,
    SwitchRouter,
    ThresholdedFeedForward,
    Top2Router,
    TopKRouter,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    router_z_loss,
    routing_stats,
)
from moe.dropout import PathDropout
from moe.fairscale import GumbelTop2Router
from tests.typecheck import unchecked

DIM, EXPERTS = 8, 4
ROUTERS: dict[str, Callable[..., nn.Module]] = {
    "top_k": lambda dim=DIM, experts=EXPERTS: TopKRouter(dim, experts, k=2),
    "switch": lambda dim=DIM, experts=EXPERTS: SwitchRouter(dim, experts, jitter=0.1, capacity_factor=1.25),
    "noisy": lambda dim=DIM, experts=EXPERTS: NoisyTopKRouter(dim, experts, k=2),
    "top_2": lambda dim=DIM, experts=EXPERTS: Top2Router(dim, experts, capacity_factor=1.0),
    "sigmoid": lambda dim=DIM, experts=EXPERTS: SigmoidRouter(dim, experts, k=2),
    "sinkhorn": lambda dim=DIM, experts=EXPERTS: SinkhornRouter(dim, experts, k=2),
    "base": lambda dim=DIM, experts=EXPERTS: BalancedAssignmentRouter(dim, experts),
    "expert_choice": lambda dim=DIM, experts=EXPERTS: ExpertChoiceRouter(dim, experts),
    "hash": lambda dim=DIM, experts=EXPERTS: HashRouter(dim, experts, k=2),
}
SCORED = [name for name in ROUTERS if name != "hash"]
K_ROUTERS = (TopKRouter, NoisyTopKRouter, SigmoidRouter, SinkhornRouter, HashRouter)
ALL_ROUTERS = (*K_ROUTERS, SwitchRouter, Top2Router, BalancedAssignmentRouter, ExpertChoiceRouter)


def ids_for(tokens: int) -> torch.Tensor:
    return torch.arange(tokens) % 50


@pytest.mark.parametrize("router", K_ROUTERS)
@pytest.mark.parametrize("k", [0, -1, EXPERTS + 1, 1.5, True, math.nan])
def test_k_must_be_a_number_of_experts(router, k) -> None:
    with pytest.raises(ValueError, match=rf"k must be .*got {k}"), unchecked():
        router(DIM, EXPERTS, k=k)


@pytest.mark.parametrize("router", ALL_ROUTERS)
@pytest.mark.parametrize(("name", "sizes"), [("dim", (0, 4)), ("dim", (8.0, 4)), ("dim", (True, 4)),
                                             ("num_experts", (8, 0)), ("num_experts", (8, 4.5))])  # fmt: skip
def test_sizes_of_routers_must_be_whole_and_positive(router, name, sizes) -> None:
    options = {"k": 1} if router in K_ROUTERS else {}
    with (
        pytest.raises(ValueError, match=rf"{name} must be .*got {sizes[name != 'dim']}"),
        unchecked(),
    ):
        router(*sizes, **options)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_capacity_must_be_finite_and_positive(factor) -> None:
    message = rf"capacity_factor must be a finite number > 0, got {factor}"
    for make in (SwitchRouter, Top2Router, ExpertChoiceRouter):
        with pytest.raises(ValueError, match=message):
            make(DIM, EXPERTS, capacity_factor=factor)
    with pytest.raises(ValueError, match=message):
        MoE(DIM, 6, EXPERTS, TopKRouter(DIM, EXPERTS, k=1), capacity_factor=factor)


@pytest.mark.parametrize(("name", "sizes"), [("hidden", (8, 0, 4)), ("hidden", (8, 2.5, 4)), ("hidden", (8, True, 4))])
def test_sizes_of_experts(name, sizes) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*got {sizes[1]}"), unchecked():
        MoE(*sizes, TopKRouter(8, 4, k=1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SinkhornRouter(8, 4, iterations=2.5), r"iterations must be an int >= 1, got 2\.5"),
        (lambda: BalancedAssignmentRouter(8, 4, rounds=2.5), r"rounds must be an int >= 1, got 2\.5"),
        (lambda: ThresholdedFeedForward(8.5, 6), r"dim must be an int >= 1, got 8\.5"),
        (lambda: ThresholdedFeedForward(8, 8.5), r"hidden must be an int >= 1, got 8\.5"),
        (lambda: ThresholdedFeedForward(8, 6, top_k=2.5), r"top_k must be in \[1, hidden=6\], got 2\.5"),
        (lambda: ThresholdedFeedForward(8, 6, top_k=True), r"top_k must be in \[1, hidden=6\], got True"),
        (lambda: MePropLinear(8, 6, k=2.5), r"k must be in \[1, outputs=6\], got 2\.5"),
        (lambda: MePropLinear(8.5, 6, k=2), r"inputs must be an int >= 1, got 8\.5"),
        (lambda: MePropLinear(8, 0, k=1), r"outputs must be >= 1, got 0"),
        (lambda: SigmoidRouter(8, 4, k=2, num_groups=2.0), r"num_groups must be an int, got 2\.0"),
        (
            lambda: SigmoidRouter(8, 4, k=2, num_groups=2, top_groups=1.0),
            r"top_groups must be in .*num_groups=2\], got 1",
        ),
        (lambda: HashRouter(8, 4, seed=1.5), r"seed must be an int, got 1\.5"),
    ],
)
def test_counts_are_whole_numbers(build, message) -> None:
    with pytest.raises(ValueError, match=message), unchecked():
        build()


@pytest.mark.parametrize("value", ["a", True, [1.0]], ids=str)
@pytest.mark.parametrize(
    ("build", "message"),
    [
        *[
            (lambda value, make=make: make(8, 4, capacity_factor=value), "capacity_factor must be a finite number > 0")
            for make in (SwitchRouter, Top2Router, ExpertChoiceRouter, GumbelTop2Router)
        ],
        (lambda value: MoE(8, 6, 4, SigmoidRouter(8, 4, k=1), capacity_factor=value), "capacity_factor must be"),
        (lambda value: SwitchRouter(8, 4, jitter=value), r"jitter must be in \[0, 1\)"),
        (lambda value: SigmoidRouter(8, 4, k=2, scale=value), "scale must be a finite number > 0"),
        (lambda value: SigmoidRouter(8, 4, k=2, bias_update=value), "bias_update must be a finite number >= 0"),
        (lambda value: SinkhornRouter(8, 4, temperature=value), "temperature must be a finite number > 0"),
        (lambda value: BalancedAssignmentRouter(8, 4, epsilon=value), "epsilon must be a finite number > 0"),
        (PathDropout, r"p must be in \[0, 1\)"),
    ],
)  # fmt: skip
def test_rates_and_factors_are_numbers(build, message, value) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*, got {re.escape(repr(value))}"), unchecked():
        build(value)


def test_options_of_the_layer() -> None:
    router = TopKRouter(DIM, EXPERTS, k=1)
    for options in ({"shared_hidden": -1}, {"shared_hidden": 1.5}, {"shared_hidden": True}):
        with pytest.raises(ValueError, match=r"shared_hidden must be .*got"), unchecked():
            MoE(DIM, 6, EXPERTS, router, **options)
    with pytest.raises(ValueError, match=r"router.num_experts must be num_experts=5, got 4"):
        MoE(DIM, 6, 5, router)
    with pytest.raises(ValueError, match=r"activation"), unchecked():
        MoE(DIM, 6, EXPERTS, router, activation="tanh")


@pytest.mark.parametrize("name", ROUTERS)
def test_wrong_shapes_are_named(name) -> None:
    router = ROUTERS[name]()
    with pytest.raises(ValueError, match=r"x must have width dim=8, got 7"), unchecked():
        router(torch.randn(5, 7), token_ids=ids_for(5))
    with pytest.raises(ValueError, match=r"padding_mask must have .*5.*got.*4"), unchecked():
        router(torch.randn(5, DIM), token_ids=ids_for(5), padding_mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"padding_mask must be bool.*got torch.float32"), unchecked():
        router(torch.randn(5, DIM), token_ids=ids_for(5), padding_mask=torch.ones(5))
    layer = MoE(DIM, 6, EXPERTS, router, name="layers.3")
    with pytest.raises(ValueError, match=r"layers.3: x must have width dim=8, got 7"):
        layer(torch.randn(2, 5, 7))
    with pytest.raises(ValueError, match=r"layers.3: padding_mask must have shape \[2, 5\]"), unchecked():
        layer(torch.randn(2, 5, DIM), token_ids=ids_for(10).view(2, 5), padding_mask=torch.ones(10).bool())


def test_ids_for_hash() -> None:
    router = HashRouter(DIM, EXPERTS, vocab_size=50)
    x = torch.randn(3, DIM)
    for ids, message in (
        (None, "token_ids must be given"),
        (torch.tensor([0, 50, 1]), r"< vocab_size=50, got 50"),
        (torch.tensor([0, -1, 1]), r">= 0, got -1"),
        (torch.tensor([0, 1]), r"token_ids must have shape \[3\]"),
        (torch.tensor([0.0, 1.7, 2.0]), r"token_ids must be integers, got torch.float32"),
        (torch.tensor([True, False, True]), r"token_ids must be integers, got torch.bool"),
    ):
        with pytest.raises(ValueError, match=message), unchecked():
            router(x, token_ids=ids)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_no_token_is_routed_by_nan(name, bad, training) -> None:
    layer = MoE(DIM, 6, EXPERTS, ROUTERS[name](), name="layers.3").train(training)
    x = torch.randn(2, 5, DIM)
    x[1, 2, 0] = bad
    with pytest.raises(FloatingPointError, match=r"layers.3: .*NaN or infinity for 1 of 10 tokens"):
        layer(x)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2] = False
    y, routing = layer(x, padding_mask=mask)
    assert y.isfinite().all() and (y[1, 2] == 0).all() and 7 not in routing.token.tolist()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_no_tokens(name, training) -> None:
    layer = MoE(DIM, 6, EXPERTS, ROUTERS[name](), capacity_factor=1.0).train(training)
    x = torch.randn(2, 0, DIM, requires_grad=True)
    y, routing = layer(x, token_ids=torch.zeros(2, 0, dtype=torch.long))
    losses = [f(routing) for f in (load_balancing_loss, router_z_loss, importance_loss, entropy_loss)]
    (y.sum() + sum(losses)).backward()
    assert y.shape == x.shape and [loss.item() for loss in losses] == [0.0] * 4
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    stats = routing_stats(routing)
    assert stats.imbalance == stats.variation == stats.entropy == stats.confidence == stats.drop_fraction == 0.0


@pytest.mark.parametrize("name", ROUTERS)
def test_only_padding(name) -> None:
    layer = MoE(DIM, 6, EXPERTS, ROUTERS[name]())
    y, routing = layer(torch.randn(3, DIM), token_ids=ids_for(3), padding_mask=torch.zeros(3, dtype=torch.bool))
    assert (y == 0).all() and routing.padding == 3
    assert all(f(routing).item() == 0 for f in (load_balancing_loss, router_z_loss, importance_loss, entropy_loss))


def test_an_expert_without_tokens_gets_no_gradient_and_no_nan() -> None:
    layer = MoE(DIM, 6, EXPERTS, TopKRouter(DIM, EXPERTS, k=1, renormalize=False))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2, 0] = 5.0
    x = torch.rand(20, DIM) + 0.1
    y, routing = layer(x)
    (y.square().sum() + load_balancing_loss(routing)).backward()
    assert routing.loads().tolist() == [0, 0, 20, 0]
    for weight in layer.experts.parameters():
        assert weight.grad is not None and weight.grad[[0, 1, 3]].abs().max() == 0 and weight.grad[2].abs().max() > 0


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_the_largest_float16_inputs_are_routed_by_finite_float32_logits(name, training) -> None:
    router = ROUTERS[name]().half().train(training)
    x = (torch.randn(64, DIM).sign() * 6e4).half()
    routing = router(x, token_ids=ids_for(64))
    for values in (routing.logits, routing.scores, routing.weight):
        assert values.dtype == torch.float32 and values.isfinite().all()
    assert (routing.scores.sum(-1) - 1).abs().max() < 1e-4
    for loss in (load_balancing_loss, router_z_loss, importance_loss, entropy_loss):
        assert loss(routing).isfinite()
    if name in SCORED:
        routing.scores.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


@pytest.mark.parametrize("name", SCORED)
def test_overflow_before_the_router_is_refused(name) -> None:
    x = torch.full((3, DIM), 6e4).half() * 2  # inf in float16
    with pytest.raises(FloatingPointError, match="NaN or infinity for 3 of 3 tokens"):
        ROUTERS[name]()(x)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "base"])
def test_many_tokens_and_experts(name) -> None:
    router = ROUTERS[name](4, 512).eval()
    with torch.no_grad():
        routing = router(torch.randn(100_000, 4), token_ids=ids_for(100_000))
    counts = routing.choices()
    assert counts.shape == (512,) and routing.num_tokens == 100_000
    assert routing.token.max() < 100_000 and (routing.token.diff() >= 0).all() and routing.weight.isfinite().all()


def test_all_tokens_on_one_expert_need_no_more_memory_than_spread_ones() -> None:
    """Nothing is padded to the busiest expert: the bytes that autograd saves stay those of an even load."""

    def saved(*, collapsed: bool) -> int:
        torch.manual_seed(0)
        layer = MoE(16, 32, 64, TopKRouter(16, 64, k=1, renormalize=False))
        x = torch.randn(2048, 16)
        if collapsed:
            x[:] = x[0]
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, routing = layer(x)
        loads = routing.loads()
        assert (loads.max() == 2048) == collapsed
        assert y.isfinite().all()
        return sum(sizes.values())

    assert saved(collapsed=True) <= 1.1 * saved(collapsed=False)


@pytest.mark.parametrize("make", [
    lambda **o: ProductKeyMemory(DIM, **({"num_keys": 4, "heads": 2, "k": 2, "key_dim": 6} | o)),
    lambda **o: PEER(DIM, **({"num_keys": 4, "heads": 2, "k": 2, "key_dim": 6} | o)),
])  # fmt: skip
def test_memories(make) -> None:
    for options, message in (
        ({"k": 0}, r"k must be .*got 0"), ({"k": 5}, r"k must be .*got 5"), ({"heads": 0}, r"heads must be .*got 0"),
        ({"num_keys": 0}, r"num_keys must be .*got 0"), ({"key_dim": 5}, r"key_dim must be .*got 5"),
        ({"key_dim": 6.0}, r"key_dim must be an int >= 2, got 6\.0"), ({"k": 1.5}, r"k must be in \[1, .*got 1\.5"),
        ({"heads": 2.0}, r"heads must be an int >= 1, got 2\.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message), unchecked():
            make(**options)
    layer = make()
    assert layer(torch.randn(2, 0, DIM)).shape == (2, 0, DIM)
    with pytest.raises(ValueError, match=r"width dim=8, got 7"):
        layer(torch.randn(2, 3, 7))
    with pytest.raises(FloatingPointError):
        layer(torch.full((2, 3, DIM), math.nan))
    layer = make(name="layers.3")
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool):
        message = rf"layers\.3: x must have the dtype of the query's weight, torch\.float32, .*, got {dtype}"
        with pytest.raises(ValueError, match=message), unchecked():
            layer(torch.ones(3, DIM, dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16), unchecked():
            if dtype == torch.bfloat16:
                assert layer(torch.ones(3, DIM, dtype=dtype)).dtype == dtype
            else:
                with pytest.raises(ValueError, match=message):
                    layer(torch.ones(3, DIM, dtype=dtype))


def test_soft_moe() -> None:
    for options, message in (({"slots_per_expert": 0}, "slots_per_expert must be .*got 0"),):
        with pytest.raises(ValueError, match=message):
            SoftMoE(DIM, 6, EXPERTS, **options)
    layer = SoftMoE(DIM, 6, EXPERTS, allow_future=True)
    assert layer(torch.randn(2, 0, DIM)).shape == (2, 0, DIM)
    with pytest.raises(ValueError, match=r"dim=8\], got \[2, 3, 7\]"):
        layer(torch.randn(2, 3, 7))


@pytest.mark.parametrize("router", [*ROUTERS, "gumbel"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": 4}, r"replay\.expert must be in \[0, num_experts=4\), got 4"),
        ({"expert": -1}, r"replay\.expert must be in \[0, num_experts=4\), got -1"),
        ({"token": 6}, r"replay\.token must be in \[0, num_tokens=6\), got 6"),
        ({"token": -2}, r"replay\.token must be in \[0, num_tokens=6\), got -2"),
        ({"dropped": [0, 7]}, r"replay\.dropped\[:, 1\] must be in \[0, num_experts=4\), got 7"),
        ({"dropped": [9, 1]}, r"replay\.dropped\[:, 0\] must be in \[0, num_tokens=6\), got 9"),
        ({"order": True}, r"replay\.token must ascend, got \[\d, \d\] at assignment \d"),
    ],
)
def test_a_replay_of_ids_out_of_range_is_refused(router, change, message) -> None:
    """-1 would pick the last expert's weight, and tokens in another order another token's sum, without an error."""
    made = GumbelTop2Router(DIM, EXPERTS, capacity_factor=None) if router == "gumbel" else ROUTERS[router]()
    x, ids = torch.randn(6, DIM), ids_for(6)
    record = made(x, token_ids=ids).detach()
    made(x, token_ids=ids, replay=record)
    for name, value in change.items():
        if name == "dropped":
            record = replace(record, dropped=torch.tensor([value]))
        elif name == "order":
            record = replace(record, token=record.token.flip(0), expert=record.expert.flip(0))
        else:
            changed = getattr(record, name).clone()
            changed[-1 if value > 0 else 0] = value
            record = replace(record, **{name: changed})
    with pytest.raises(ValueError, match=message):
        made(x, token_ids=ids, replay=record)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(("name", "shape"), [("up_bias", [4, 24]), ("down_bias", [4, 8])])
def test_a_bias_of_another_shape_is_named(tokens, name, shape) -> None:
    layer = MoE(DIM, 12, EXPERTS, TopKRouter(DIM, EXPERTS, k=2), bias=True)
    bias = layer.experts.get_parameter(name)
    for wrong in (bias[:, :1], bias[0], bias[:1]):
        setattr(layer.experts, name, nn.Parameter(wrong.clone()))
        message = f"{name} must be {shape}, a row for each expert, got {list(wrong.shape)}"
        with unchecked(), torch.no_grad(), pytest.raises(ValueError, match=re.escape(message)):
            layer(torch.randn(tokens, DIM))
