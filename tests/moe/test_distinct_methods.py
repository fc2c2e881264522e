"""No two methods are names of one computation: dropping activations, allocations, priorities, losses, memories …

One pair coincides by definition and is held equal here: "hard" with the threshold between two neighbouring magnitudes
of a single token is top-k of that token.
"""

from itertools import combinations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import (
    PEER,
    ActivePredictor,
    DropConnect,
    HeadDropout,
    LayerDrop,
    MixtureOfDepths,
    MoE,
    NoisyTopKRouter,
    PathDropout,
    ProductKeyMemory,
    SoftMoE,
    ThresholdedFeedForward,
    Thresholds,
    TopKRouter,
    calibrate_teal,
    calibrate_thresholds,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    router_z_loss,
    sparsify_activations,
    upcycle,
)
from moe.calibration import feedforward_inputs
from moe.dispatch import limit_capacity
from moe.predictor import train_predictor
from tests.tolerances import close

DIM, HIDDEN, TOKENS = 8, 24, 40


class Attention(nn.Module):
    """The four maps of one, mixing nothing."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(DIM, DIM, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.query(x) * self.key(x).tanh() + self.value(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation = "swiglu"
        self.gate, self.up = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feedforward = Attention(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feedforward(x)


def differing(one: Tensor, other: Tensor) -> float:
    """Share of the rows that differ."""
    return 1 - torch.isclose(one, other, rtol=1e-3, atol=1e-4).all(-1).float().mean().item()


def all_differ(found: dict[str, Tensor], *, least: float = 0.2) -> None:
    same = [(a, b) for a, b in combinations(found, 2) if differing(found[a], found[b]) < least]
    assert not same, f"names of one computation: {same}"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    stack = nn.Sequential(Layer(), Layer())
    with torch.no_grad():
        for layer in stack:
            layer.feedforward.down.weight *= torch.linspace(0.1, 2, HIDDEN)  # what a neuron adds is not its size alone
    return stack.eval()


def rows() -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def trained_predictors(model: nn.Module) -> dict[str, ActivePredictor]:
    """Of the neurons with a positive gate, about half of them: most are found, and few others."""
    seen, fresh = (
        feedforward_inputs(model, [torch.randn(400, DIM, generator=torch.Generator().manual_seed(seed))])
        for seed in (11, 12)
    )
    predictors = {}
    for name, x in seen.items():
        gate = model.get_submodule(name).gate
        found = train_predictor(
            x, gate(x) > 0, rank=DIM, recall=0.9, steps=150, generator=torch.Generator().manual_seed(13)
        )
        active, predicted = gate(fresh[name]) > 0, found(fresh[name]) > found.threshold
        assert predicted[active].float().mean() > 0.8 and predicted[~active].float().mean() < 0.2
        predictors[name] = found
    return predictors


def test_ways_to_drop_activations(model: nn.Module) -> None:
    found = {"dense": model(rows())}
    for method in ("hard", "cats", "cett", "teal"):
        limits = calibrate_thresholds(model, [rows()], method=method, sparsity=0.5)
        sparse = sparsify_activations(model, method=method, thresholds=limits)
        found[method] = model(rows())
        sparse.restore()
    both = calibrate_teal(model, [rows()], sparsity=0.5)
    for name, options in {
        "top_k": {"method": "hard", "top_k": HIDDEN // 2},
        "relu": {"method": "relu"},
        "teal with attention": {"method": "teal", "thresholds": both.feedforward, "attention": both.attention},
        "predictor": {"method": "hard", "predictors": trained_predictors(model)},
    }.items():  # fmt: skip
        sparse = sparsify_activations(model, **options)
        found[name] = model(rows())
        sparse.restore()
    all_differ({name: y.detach() for name, y in found.items()})


def test_hard_of_one_token_is_its_top_k() -> None:
    torch.manual_seed(0)
    net, x = Gated(), torch.randn(1, DIM)
    sizes = (nn.functional.silu(net.gate(x)) * net.up(x)).detach().abs().sort(descending=True).values[0]
    limit = float((sizes[6] + sizes[7]) / 2)
    layers = [
        ThresholdedFeedForward.from_linear(net.gate, net.up, net.down, **options)
        for options in ({"top_k": 7}, {"threshold": limit})
    ]
    close(layers[0](x), layers[1](x))


@pytest.mark.parametrize("method", ["teal", "teal with attention"])
def test_ways_to_share_out_a_sparsity(model: nn.Module, method: str) -> None:
    found: dict[str, Tensor] = {}
    for allocation in ("uniform", "greedy") if "attention" in method else ("uniform", "greedy", "equal_error"):
        if method == "teal":
            limits = calibrate_thresholds(model, [rows()], method="teal", sparsity=0.5, allocation=allocation)
        else:
            limits = calibrate_teal(model, [rows()], sparsity=0.5, allocation=allocation).feedforward
        found[allocation] = torch.tensor([[t.gate, t.up, t.down] for t in limits.values()])
    all_differ(found, least=0.9)


def test_priorities_over_capacity() -> None:
    torch.manual_seed(2)
    router = NoisyTopKRouter(DIM, 4, k=2).eval()
    routing = router(rows() + router.weight[0])
    kept = {}
    for priority in ("first_come", "gate", "choice"):
        limited = limit_capacity(routing, 0.5, priority=priority)
        kept[priority] = torch.zeros(TOKENS, 4).index_put((limited.token, limited.expert), torch.tensor(1.0))
    all_differ(kept)


def test_losses_of_a_router() -> None:
    torch.manual_seed(3)
    routing = NoisyTopKRouter(DIM, 4, k=2)(rows() * torch.linspace(0.2, 3, TOKENS)[:, None])
    found = {
        "balance": load_balancing_loss(routing),
        "balance of sequences": load_balancing_loss(routing, scope="sequence", sequences=5),
        "z": router_z_loss(routing),
        "importance": importance_loss(routing),
        "load": load_loss(routing),
        "entropy": entropy_loss(routing),
    }
    all_differ({name: loss.detach()[None, None] for name, loss in found.items()}, least=0.9)


def test_scopes_of_the_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two processes of one sequence each, "global" is the loss of the whole batch, "sequence" a mean of losses.

    The all-reduce is played by adding what the other process would send.
    """
    torch.manual_seed(14)
    router, x = TopKRouter(DIM, 4, k=2), rows()
    x = x + router.weight[:2].repeat_interleave(TOKENS // 2, 0)  # the sequences prefer different experts
    whole, halves = router(x), [router(part) for part in x.chunk(2)]
    sent = [torch.tensor([*routing.loads().tolist(), TOKENS // 2], dtype=torch.float32) for routing in halves]
    each = load_balancing_loss(whole, scope="sequence", sequences=2)
    close(each, sum(load_balancing_loss(routing) for routing in halves) / 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    shares = []
    for routing, others in zip(halves, reversed(sent), strict=True):
        monkeypatch.setattr(dist, "all_reduce", lambda sums, group=None, others=others: sums.add_(others))
        shares.append(load_balancing_loss(routing, scope="global"))
    together = sum(shares) / 2
    close(together, load_balancing_loss(whole))
    assert each > 1.05 * together, "a sequence that is all of one kind costs more under its own scope"


def test_soft_slots_are_no_choice_of_experts() -> None:
    """One set of experts and of router directions: weighted averages, all experts, the two best."""
    torch.manual_seed(15)
    soft, x = SoftMoE(DIM, HIDDEN, 4), 2 * rows()[None]
    found = {"soft": soft(x)[0].detach()}
    changed = x.clone()
    changed[:, -1] += 1
    assert differing(soft(changed)[0, :-1], found["soft"][:-1]) > 0.9, "a slot holds every token"
    for k in (2, 4):
        layer = MoE(DIM, HIDDEN, 4, TopKRouter(DIM, 4, k=k))
        with torch.no_grad():
            layer.router.weight.copy_(soft.phi.T)
            layer.experts.load_state_dict(soft.experts.state_dict())
        found[f"top {k}"] = layer(x)[0][0].detach()
        assert differing(layer(changed)[0][0, :-1], found[f"top {k}"][:-1]) == 0
    all_differ(found, least=0.9)


def test_ways_to_drop_while_training() -> None:
    torch.manual_seed(4)
    linear, heads = nn.Linear(DIM, DIM, bias=False), torch.ones(6, 4, 3, 2)
    x = torch.ones(6, DIM)

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    connect = DropConnect(linear, 0.5).train()(x, generator=seed())
    assert differing(connect, linear(x)) == 1 and torch.equal(connect, connect[:1].expand_as(connect)), (
        "one mask a call"
    )
    dropped = HeadDropout(0.5).train()(heads, generator=seed())
    assert set(dropped.flatten(2).mean(-1).unique().tolist()) == {0.0, 2.0}, "whole heads"
    assert len(dropped.flatten(2).mean(-1).unique(dim=0)) > 1, "of each sample apart"
    path = PathDropout(0.5).train()(heads, generator=seed())
    assert set(path.flatten(1).mean(-1).unique().tolist()) == {0.0, 2.0}, "whole samples"
    skips = {bool(LayerDrop(0.5).train().skips(generator=torch.Generator().manual_seed(s))) for s in range(20)}
    assert skips == {True, False}
    all_differ({"head": dropped.flatten(1), "path": path.flatten(1), "none": heads.flatten(1)}, least=0.3)


def test_memories() -> None:
    torch.manual_seed(6)
    sizes = {"num_keys": 4, "heads": 2, "k": 3, "key_dim": 6}
    layers = {"product_key": ProductKeyMemory(DIM, **sizes), "memory+": ProductKeyMemory(DIM, gated=True, **sizes),
              "peer": PEER(DIM, **sizes)}  # fmt: skip
    with torch.no_grad():
        for layer in layers.values():
            layer.keys.query.weight.copy_(layers["peer"].keys.query.weight)
            layer.keys.weight.copy_(layers["peer"].keys.weight.expand_as(layer.keys.weight))
    slots = [layer.read(rows())[1].slots for layer in layers.values()]
    assert slots[0].equal(slots[1]) and slots[0].equal(slots[2]), "the same keys find the same rows"
    all_differ({name: layer(rows()).detach() for name, layer in layers.items()}, least=0.9)


def test_weightings_and_choices_of_depth() -> None:
    torch.manual_seed(7)
    depths, x, found = MixtureOfDepths(DIM, capacity=0.5), rows().view(4, 10, DIM), {}
    for weighting in ("sigmoid", "raw"):
        for choose in ("top_k", "predictor"):
            depths.weighting = weighting
            y, _ = depths(x, lambda part, places: part.tanh(), choose=choose)
            found[f"{weighting}, {choose}"] = y.flatten(0, 1).detach()
    all_differ(found)


def test_ways_to_upcycle() -> None:
    torch.manual_seed(8)
    net, x = Gated(), rows()
    dense = net(x).detach()
    found = {}
    for name, options in {"copies": {}, "shards": {"granularity": 2}, "drawn anew": {"reinitialize": 0.5}}.items():
        layer = upcycle(net.gate.weight, net.up.weight, net.down.weight, num_experts=4, k=2, **options,
                        generator=torch.Generator().manual_seed(9))  # fmt: skip
        y = layer(x)[0].detach()
        assert (differing(y, dense) == 0) == (name != "drawn anew")
        # a change in one expert is a change of its tokens: what each token's experts hold tells the ways apart
        found[name] = layer.experts.forward_one(0, x).detach()
    all_differ(found, least=0.9)


def test_thresholds_are_compared_with_what_the_method_says() -> None:
    """One number, four meanings: the neurons that survive differ."""
    torch.manual_seed(10)
    net, kept = Gated(), {}
    with torch.no_grad():
        net.down.weight *= torch.linspace(0.1, 3, HIDDEN)
    x = rows()
    gate = nn.functional.silu(net.gate(x))
    for method in ("hard", "cats", "cett"):
        layer = ThresholdedFeedForward.from_linear(
            net.gate, net.up, net.down, method=method, threshold=Thresholds(0.1, 0.1, 0.1)
        )
        kept[method] = (layer.keep(layer.opened(gate) * net.up(x)) != 0).float()
    all_differ(kept)
