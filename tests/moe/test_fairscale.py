"""fairscale's layer against ours: the same outputs, gradients, drops and auxiliary loss."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe import (
    ExpertChoiceRouter,
    HashRouter,
    MoE,
    NoisyTopKRouter,
    SigmoidRouter,
    SinkhornRouter,
    SwitchRouter,
    Top2Router,
    TopKRouter,
    load_balancing_loss,
)
from moe.fairscale import FairscaleGate, GumbelTop2Router, from_fairscale, gumbel_noise
from tests.moe.cases import parameters
from tests.tolerances import close
from tests.typecheck import unchecked

fairscale_nn = pytest.importorskip("fairscale.nn")
DIM, HIDDEN = 6, 10


class Gated(nn.Module):
    """Named so that no name says which matrix is which."""

    def __init__(self, bias=False):
        super().__init__()
        self.a, self.b = (nn.Linear(DIM, HIDDEN, bias=bias) for _ in range(2))
        self.c = nn.Linear(HIDDEN, DIM, bias=bias)

    def forward(self, x):
        return self.c(self.a(x) * F.silu(self.b(x)))


class Shifted(nn.Module):
    """Adds what no parameter holds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x):
        return self.b(F.relu(self.a(x))) + 0.5


class Squared(nn.Module):
    def forward(self, x):
        return torch.relu(x) ** 2


def sequence(activation, hidden=HIDDEN, bias=False):
    return nn.Sequential(nn.Linear(DIM, hidden, bias=bias), activation, nn.Linear(hidden, DIM, bias=bias))


EXPERTS = {
    "swiglu": Gated,
    "swiglu, biases": lambda: Gated(bias=True),
    "gelu": lambda: sequence(nn.GELU()),
    "gelu, biases": lambda: sequence(nn.GELU(), bias=True),
    "relu, biases": lambda: sequence(nn.ReLU(), bias=True),
    "silu, biases": lambda: nn.Sequential(*sequence(nn.SiLU(), bias=True), nn.Dropout(0.0)),
    "relu2": lambda: sequence(Squared()),
}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def theirs(num_experts=4, expert="swiglu", gate=None):
    gate = fairscale_nn.Top2Gate(DIM, num_experts) if gate is None else gate
    return fairscale_nn.MOELayer(gate, nn.ModuleList(EXPERTS[expert]() for _ in range(num_experts)))


def skewed(layer, x):
    """Gate weights that send most tokens to expert 0, so that its capacity drops some."""
    with torch.no_grad():
        layer.gate.wg.weight[0] += 2 * x.reshape(-1, DIM).mean(0)
    return layer


def same_noise(monkeypatch, seed):
    """fairscale draws the noise that ours draws from this seed."""
    monkeypatch.setattr(
        "fairscale.nn.moe.top2gate.gumbel_rsample",
        lambda shape, device: gumbel_noise(torch.empty(shape, device=device), seed),
    )


def matrices(layer, router, of=lambda weight: weight):
    """What ``of`` gives for fairscale's weights, in the shapes of ours: router, up [E, D, A], down [E, D, F], and if
    there are biases theirs [E, A], [E, D]."""
    linears = [[m for m in expert.modules() if isinstance(m, nn.Linear)] for expert in layer.experts]
    if isinstance(layer.experts[0], Gated):
        linears = [[b, a, c] for a, b, c in linears]
    ups = torch.stack([torch.cat([of(up.weight) for up in ms[:-1]]).mT for ms in linears])
    found = [of(router), ups, torch.stack([of(ms[-1].weight) for ms in linears])]
    if linears[0][0].bias is not None:
        found.append(torch.stack([torch.cat([of(up.bias) for up in ms[:-1]]) for ms in linears]))
        found.append(torch.stack([of(ms[-1].bias) for ms in linears]))
    return found


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("num_experts", [2, 4])
@pytest.mark.parametrize("drops", [False, True])
def test_loaded_weights_give_the_same_outputs_and_gradients(expert, num_experts, drops, monkeypatch):
    tokens = 8 if drops else 1
    x = torch.randn(num_experts, tokens, DIM) + drops
    peer = theirs(num_experts, expert)
    if drops:
        skewed(peer, x)
    x.requires_grad_()
    layer = from_fairscale(peer)
    drops = drops and num_experts > 2  # two experts have a place for every token
    y, routing = next(
        (y, routing)
        for y, routing in (layer(x, generator=torch.Generator().manual_seed(seed)) for seed in range(200))
        if (routing.dropped.shape[0] > 0) == drops
    )
    same_noise(monkeypatch, routing.noise_seed)
    expected = peer(x)
    close(y, expected)
    close(load_balancing_loss(routing) / num_experts**2, peer.l_aux)
    d_y = torch.randn_like(y)
    ours = [x, *parameters(layer)]
    wanted = torch.autograd.grad(expected, [x, *peer.parameters()], d_y, retain_graph=True)
    gradient = dict(zip(peer.parameters(), wanted[1:], strict=True))
    found = torch.autograd.grad(y, ours, d_y, retain_graph=True)
    for got, of_theirs in zip(found, (wanted[0], *matrices(peer, peer.gate.wg.weight, gradient.get)), strict=True):
        close(got, of_theirs)
    for got, copied in zip(ours[1:], matrices(peer, peer.gate.wg.weight), strict=True):
        assert got.equal(copied)
    aux = torch.autograd.grad(load_balancing_loss(routing) / num_experts**2, layer.router.weight)[0]
    close(aux, torch.autograd.grad(peer.l_aux, peer.gate.wg.weight)[0])


class Wide(torch.Tensor):
    """fairscale's layer makes the dispatch mask float32, whatever x is."""

    def float(self):
        return self.as_subclass(torch.Tensor).double()


class WideGate(FairscaleGate):
    def forward(self, x):
        loss, combine, dispatch = super().forward(x)
        return loss, combine, dispatch.as_subclass(Wide)


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("expert", EXPERTS)
def test_in_float64_nothing_but_rounding_is_between_the_two(expert, capacity):
    peer = theirs(4, expert, gate=WideGate(TopKRouter(DIM, 4, k=2), capacity_factor=capacity)).double()
    layer = from_fairscale(peer)
    x = torch.randn(4, 7, DIM, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x)[0], peer(x)
    assert y.dtype == torch.float64
    close(y, expected)
    d_y = torch.randn_like(y)
    router = peer.gate.router.weight
    inputs = [x, *peer.parameters()]
    theirs_of = dict(zip(inputs, torch.autograd.grad(expected, inputs, d_y), strict=True))
    found = torch.autograd.grad(y, [x, *parameters(layer)], d_y)
    for got, wanted in zip(found, [theirs_of[x], *matrices(peer, router, theirs_of.get)], strict=True):
        close(got, wanted)


def test_a_bias_that_is_not_there_starts_as_zero():
    peer = theirs(4, "gelu, biases")
    peer.experts[1][2] = nn.Linear(HIDDEN, DIM, bias=False)
    layer = from_fairscale(peer, capacity_factor=None)
    x = torch.randn(9, DIM)
    close(layer.experts.forward_one(1, x), peer.experts[1](x))
    assert not layer.experts.down_bias[1].any() and layer.experts.down_bias[0].all()


def test_experts_that_no_training_has_shaped_are_told_apart():
    """Zeros as output matrices, as some layers start: every activation would fit the weights as they are."""
    for expert, activation in {"relu, biases": "relu", "silu, biases": "silu", "relu2": "relu2"}.items():
        peer = theirs(2, expert)
        with torch.no_grad():
            for one in peer.experts:
                one[2].weight.zero_()
        assert from_fairscale(peer).experts.activation == activation


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x):
        return self.b(F.dropout(F.relu(self.a(x)), 0.3, self.training))


def test_dropout_is_refused_or_left_out():
    module = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.ReLU(), nn.Dropout(0.1), nn.Linear(HIDDEN, DIM))
    for expert, message in {
        module: r"experts\.0\.2 must not drop, as moe\.Experts has no dropout, got p=0\.1: pass dropout='leave_out'",
        Dropping(): r"experts\.0 must compute the same in training and in evaluation, got other outputs",
    }.items():
        peer = fairscale_nn.MOELayer(fairscale_nn.Top2Gate(DIM, 2), nn.ModuleList([expert, copy.deepcopy(expert)]))
        with pytest.raises(ValueError, match=message):
            from_fairscale(peer)
        x = torch.randn(2, 4, DIM)
        close(from_fairscale(peer.eval(), dropout="leave_out")(x)[0], peer(x))
    with unchecked(), pytest.raises(ValueError, match="dropout must be one of refuse, leave_out, got 'keep'"):
        from_fairscale(peer, dropout="keep")


def test_two_experts_need_no_common_noise():
    peer = theirs(2, "gelu").eval()
    layer = from_fairscale(peer)
    assert not layer.training
    x = torch.randn(2, 9, DIM)
    close(layer(x)[0], peer(x))


def test_nothing_dropped_without_a_capacity():
    x = torch.randn(4, 8, DIM) + 1
    peer = skewed(theirs(4), x)
    assert from_fairscale(peer)(x)[1].dropped.shape[0] > 0
    assert from_fairscale(peer, capacity_factor=None)(x)[1].dropped.shape[0] == 0


def test_the_second_expert_is_drawn_in_proportion_to_the_others():
    router = GumbelTop2Router(3, 3, capacity_factor=None)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    x = torch.tensor([[0.6, 0.3, 0.1]]).log().repeat(20000, 1)
    loads = router(x).loads().tolist()
    assert loads[0] == 20000 and loads[1] / 20000 == pytest.approx(0.75, abs=0.02)
    quiet = GumbelTop2Router(3, 3, capacity_factor=None, noise="training").eval()
    quiet.load_state_dict(router.state_dict())
    assert quiet(x).loads().tolist() == [20000, 20000, 0]
    assert quiet.train()(x).loads()[2] > 0
    assert Top2Router(3, 3, second="always")(x).loads().max() == 20000


def test_a_token_that_lost_a_choice_keeps_its_whole_weight_unlike_top_2():
    """The fixture where the two gates of this name differ: capacity 1 of an expert that both tokens chose first."""
    ours, gshard = GumbelTop2Router(2, 2, capacity_factor=0.5), Top2Router(2, 2, second="always", capacity_factor=0.5)
    for router in (ours, gshard):
        with torch.no_grad():
            router.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found, other = ours(x), gshard(x)
    assert found.token.tolist() == other.token.tolist() == [0, 0]  # the second token has no place left at all
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found, other = ours(x), gshard(x)
    assert found.expert.tolist() == other.expert.tolist() == [0, 1]
    assert found.weight.tolist() == [1.0, 1.0]
    assert other.weight.max() < 0.8


def test_replay_repeats_choices_and_weights():
    router = GumbelTop2Router(DIM, 5).double()
    x = torch.randn(20, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(20) % 6 != 2
    routing = router(x, padding_mask=mask)
    again = router(x, padding_mask=mask, replay=routing.detach())
    assert again.token.equal(routing.token) and again.dropped.equal(routing.dropped)
    assert mask[routing.token].all()
    for got, wanted in zip(
        *(torch.autograd.grad(r.weight.square().sum(), [x, router.weight]) for r in (again, routing)), strict=True
    ):
        close(got, wanted)


def test_padding_takes_no_part_of_the_capacity():
    """Two experts: nothing to draw, so that the choices are those of the real tokens alone."""
    router = GumbelTop2Router(DIM, 2, capacity_factor=0.75)
    x, mask = torch.randn(24, DIM), torch.arange(24) % 3 != 1
    routing, alone = router(x, padding_mask=mask), router(x[mask])
    assert routing.loads().tolist() == alone.loads().tolist() == [12, 12], "0.75 of 2 · 16 / 2"
    assert routing.token.equal(mask.nonzero()[:, 0][alone.token]) and routing.expert.equal(alone.expert)
    close(routing.weight, alone.weight)


ROUTERS = {
    "top_k": lambda: TopKRouter(DIM, 4, k=2),
    "top_3": lambda: TopKRouter(DIM, 4, k=3, renormalize=False),
    "switch": lambda: SwitchRouter(DIM, 4),
    "noisy": lambda: NoisyTopKRouter(DIM, 4, k=2),
    "top_2": lambda: Top2Router(DIM, 4),
    "sigmoid": lambda: SigmoidRouter(DIM, 4, k=2),
    "sinkhorn": lambda: SinkhornRouter(DIM, 4, k=1),
    "expert_choice": lambda: ExpertChoiceRouter(DIM, 4, capacity_factor=2.0, allow_future=True),
}


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("name", ROUTERS)
def test_our_routers_gate_their_layer(name, capacity):
    gate = FairscaleGate(ROUTERS[name](), capacity_factor=capacity, drop_priority="gate").eval()
    peer = theirs(4, gate=gate).eval()
    x = torch.randn(4, 5, DIM, requires_grad=True)
    y = peer(x)
    tokens = x.reshape(-1, DIM)
    expected = torch.zeros_like(tokens)
    for token, expert, weight in zip(gate.routing.token, gate.routing.expert, gate.routing.weight, strict=True):
        row = weight * peer.experts[int(expert)](tokens[token])
        expected = expected.index_add(0, token[None], row[None])
    close(y.reshape(-1, DIM), expected)
    assert (gate.routing.dropped.shape[0] > 0) <= (capacity is not None)
    d_y, weights = torch.randn_like(y), [x, *peer.parameters()]
    d_weights = torch.autograd.grad(y, weights, d_y, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad(expected.view_as(y), weights, d_y, retain_graph=True, allow_unused=True)
    for weight, got, of_loop in zip(weights, d_weights, wanted, strict=True):
        close(*(torch.zeros_like(weight) if gradient is None else gradient for gradient in (got, of_loop)))
    close(peer.l_aux, load_balancing_loss(gate.routing))
    close(from_fairscale(peer)(x)[0], y)


def test_a_gate_can_be_copied_after_a_call():
    gate = FairscaleGate(TopKRouter(DIM, 4, k=2))
    gate(torch.randn(6, DIM))
    again = copy.deepcopy(gate)
    assert again.routing is None and gate.routing is not None
    assert again(torch.zeros(2, DIM))[1].shape[:2] == (2, 4)


def test_the_masks_have_one_token_a_place_and_agree():
    gate = FairscaleGate(TopKRouter(DIM, 4, k=2), capacity_factor=0.75)
    _, combine, dispatch = gate(torch.randn(24, DIM))
    assert combine.shape == dispatch.shape and combine.shape[:2] == (24, 4) and combine.shape[2] <= 9
    assert combine.bool().equal(dispatch)
    assert dispatch.sum(0).max() == 1, "a place holds one token"
    assert dispatch.sum((0, 2)).equal(gate.routing.loads())
    places = dispatch.any(0)
    assert (places[:, 1:] <= places[:, :-1]).all(), "places fill from the front"
    _, combine, dispatch = gate(torch.zeros(0, DIM))
    assert combine.shape == (0, 4, 1) and not dispatch.any()


def test_bad_input_says_what_is_wrong(monkeypatch):
    peer = theirs(4)
    with pytest.raises(TypeError, match="must be a fairscale.nn.MOELayer, got MoE"):
        from_fairscale(MoE(DIM, HIDDEN, 4, TopKRouter(DIM, 4, k=2)))
    short = theirs(4)
    del short.experts[3]
    with pytest.raises(ValueError, match="all num_experts=4 experts of its gate, got 3"):
        from_fairscale(short)
    for expert, message in {
        nn.Sequential(sequence(nn.GELU()), nn.LayerNorm(DIM)): (
            "experts.2 must consist of two or three Linears and an activation between them, "
            "got 2 Linears and 1.weight, 1.bias"
        ),
        nn.Linear(DIM, DIM): "got 1 Linears",
        **dict.fromkeys(
            (sequence(nn.GELU(approximate="tanh")), sequence(nn.Tanh()), sequence(nn.ReLU6()), Shifted()),
            r"experts.2 must be down\(act\(up x\)\), act being exact GELU, ReLU, SiLU or ReLU², or .*: got another",
        ),
        sequence(nn.GELU()): "experts must be alike",
    }.items():
        peer.experts[2] = expert
        with pytest.raises(ValueError, match=message):
            from_fairscale(peer)
    with pytest.raises(ValueError, match="gate must be fairscale's Top2Gate or a FairscaleGate, got Linear"):
        from_fairscale(theirs(4, gate=nn.Linear(DIM, 4)))
    with unchecked(), pytest.raises(ValueError, match="noise must be one of always, training, never, got 'no'"):
        GumbelTop2Router(DIM, 4, noise="no")
    with pytest.raises(ValueError, match="num_experts must be >= 2, got 1"):
        GumbelTop2Router(DIM, 1)
    with pytest.raises(ValueError, match="capacity_factor must be a finite number > 0, got 0"):
        FairscaleGate(TopKRouter(DIM, 4, k=2), capacity_factor=0.0)
    with pytest.raises(ValueError, match="router must choose by x alone.*got HashRouter, which reads token_ids"):
        FairscaleGate(HashRouter(DIM, 4))
    monkeypatch.setitem(sys.modules, "fairscale.nn", None)
    with pytest.raises(ImportError, match=r"pip install 'sparse-transformers\[fairscale\]'"):
        from_fairscale(theirs(4))
