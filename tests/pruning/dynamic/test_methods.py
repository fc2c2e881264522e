"""Dynamic sparse training: what drops and grows, worked by hand, and what holds for every method."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruning import erk, uniform
from pruning.dynamic import DSR, SET, SNFS, DeepR, RigL, TopKAST
from pruning.dynamic.base import apportion

METHODS = {"SET": SET, "RigL": RigL, "SNFS": SNFS, "DSR": DSR, "DeepR": DeepR}


class Net(nn.Module):
    """Two matrices and a stack of three experts; one of the matrices is small, so that ERK keeps it denser."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24, bias=False), nn.Linear(24, 4)
        self.experts = nn.Parameter(torch.randn(3, 4, 8) * 0.5)

    def forward(self, x):
        hidden = self.second(self.first(x).relu())
        return torch.einsum("bi,eio->beo", hidden, self.experts).sum((1, 2))


def net():
    torch.manual_seed(0)
    return Net()


def steps(model, method, optimizer, count, *, seed=0):
    """Train a little; what each call of before_step said."""
    generator = torch.Generator().manual_seed(seed)
    said = []
    for _ in range(count):
        x = torch.randn(8, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x.sum(1)).square().mean().backward()
        said.append(method.before_step(optimizer))
        if said[-1]:
            optimizer.step()
        method.after_step(optimizer)
    return said


def count(method):
    return {name: int(mask.sum()) for name, mask in method.masks().kept.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
                                       lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)])  # fmt: skip
def test_the_number_of_connections_stays_and_zeros_stay_zero(name, optimizer):
    model = net()
    options = {} if name == "DeepR" else {"every": 3}
    method = METHODS[name](model, sparsity=0.8, stop=20, **options)
    total = sum(count(method).values())
    before = {k: mask.clone() for k, mask in method.masks().kept.items()}
    made = optimizer(model.parameters())
    for _ in range(24):
        steps(model, method, made, 1)
        assert sum(count(method).values()) == total
        for key, mask in method.masks().kept.items():
            weight = model.get_parameter(key)
            assert not weight[~mask].any()
            for slot in made.state[weight].values():
                if slot.shape == weight.shape:
                    assert not slot[~mask].any()
    if name not in ("DSR", "DeepR"):
        assert any(not mask.equal(before[k]) for k, mask in method.masks().kept.items())


@pytest.mark.parametrize("name", [*METHODS, "TopKAST"])
def test_a_resumed_run_is_the_undisturbed_one(name):
    options = {"every": 3} if name not in ("DeepR",) else {}
    extra = {"generator": torch.Generator().manual_seed(5)} if name != "TopKAST" else {}
    make = METHODS.get(name, TopKAST)
    model = net()
    method = make(model, sparsity=0.7, **options, **extra)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, method, optimizer, 10)
    saved = copy.deepcopy((model.state_dict(), method.state_dict(), optimizer.state_dict()))
    steps(model, method, optimizer, 10, seed=1)
    again = net()
    other = make(again, sparsity=0.7, **options)
    again.load_state_dict(saved[0])
    fresh = torch.optim.AdamW(again.parameters(), lr=0.01)
    fresh.load_state_dict(saved[2])
    other.load_state_dict(saved[1])
    steps(again, other, fresh, 10, seed=1)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert one.equal(two)


def single(method, weight, gradient, mask, **options):
    """One update of one matrix with the given state; the new mask and weight."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made = method(model, sparsity=1 - mask.float().mean().item(), allocation=uniform, every=1, **options)
    with torch.no_grad():
        model.weight.copy_(weight * mask)
        made.masks().kept["weight"].copy_(mask)
    model.weight.grad = gradient.clone()
    made.step = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    said = made.before_step(optimizer)
    return made.masks().kept["weight"].clone(), model.weight.detach().clone(), said, model.weight.grad


def test_rigl_drops_the_smallest_and_grows_the_steepest():
    weight = torch.tensor([[3.0, -0.1, 2.0, 0.0, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 0.5, 0.0, -9.0, 1.0, 2.0]])
    mask = torch.tensor([[True, True, True, False, False, False]])
    kept, values, said, left = single(RigL, weight, gradient, mask, fraction=0.4)
    assert kept.tolist() == [[True, False, True, True, False, False]]
    assert values.tolist() == [[3.0, 0.0, 2.0, 0.0, 0.0, 0.0]]
    assert said is False and left.tolist() == [[0.0, 0.0, 0.0, -9.0, 0.0, 0.0]]


def test_rigl_keeps_the_value_of_a_weight_that_is_dropped_and_grown_at_once():
    weight = torch.tensor([[3.0, -0.1, 2.0, 0.0]])
    gradient = torch.tensor([[0.0, 7.0, 0.0, 1.0]])
    kept, values, _, _ = single(RigL, weight, gradient, weight != 0, fraction=0.4)
    assert kept.tolist() == [[True, True, True, False]] and values.tolist() == [[3.0, pytest.approx(-0.1), 2.0, 0.0]]


def test_set_grows_without_a_look_at_the_gradient():
    weight = torch.tensor([[3.0, -0.1, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    grown = set()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        kept, values, said, _ = single(
            SET, weight, torch.tensor([[0.0] * 7 + [9.0]]), weight != 0, fraction=0.4, generator=generator
        )
        assert said and kept.sum() == 3 and kept[0, 0] and kept[0, 2] and values[0, 1] == 0
        grown |= set(kept[0].nonzero().flatten().tolist())
    assert grown == set(range(8))


def test_sparse_momentum_moves_connections_to_where_the_momentum_is():
    model = nn.ModuleDict({"quiet": nn.Linear(4, 2, bias=False), "busy": nn.Linear(4, 2, bias=False)})
    method = SNFS(model, sparsity=0.5, allocation=uniform, every=1, fraction=0.5, momentum=0.0)
    for name, slope in (("quiet", 0.0), ("busy", 1.0)):
        model[name].weight.grad = torch.full((2, 4), slope)
    busy = method.masks().kept["busy.weight"].clone()
    method.step = 1
    method.before_step(torch.optim.SGD(model.parameters(), lr=1.0))
    assert count(method) == {"quiet.weight": 2, "busy.weight": 6}
    assert busy.sum() == 4


def test_the_momentum_is_an_exponential_mean():
    model = nn.Linear(4, 2, bias=False)
    method = SNFS(model, sparsity=0.5, momentum=0.9)
    for slope in (1.0, 2.0):
        model.weight.grad = torch.full((2, 4), slope)
        method.look()
    assert method.extra_state()["weight"][0, 0] == pytest.approx(0.9 * 0.1 + 0.1 * 2)


def test_dsr_drops_below_its_threshold_and_adapts_it():
    weight = torch.tensor([[3.0, -0.1, 2.0, 0.05, 0.0, 0.0, 0.0, 0.0]])
    model = nn.Linear(8, 1, bias=False)
    for fraction, threshold in ((0.5, 0.2), (0.9, 0.4), (0.1, 0.1)):
        method = DSR(model, sparsity=0.5, allocation=uniform, every=1, fraction=fraction, threshold=0.2)
        with torch.no_grad():
            model.weight.copy_(weight)
            method.masks().kept["weight"].copy_(weight != 0)
        method.step = 1
        method.before_step(torch.optim.SGD(model.parameters(), lr=1.0))
        assert method.threshold == pytest.approx(threshold)
        assert method.masks().kept["weight"].sum() == 4
        assert model.weight.tolist() == [[3.0, 0, 2.0, 0, 0, 0, 0, 0]]


def test_deep_r_puts_to_sleep_what_changes_its_sign():
    model = nn.Linear(4, 1, bias=False)
    method = DeepR(model, sparsity=0.5, allocation=uniform, alpha=0.0, temperature=0.0)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.5, 0.0, 0.0]]))
        method.masks().kept["weight"].copy_(model.weight != 0)
        method.extra_state()["weight"].copy_(torch.tensor([[1, -1, 1, 1]], dtype=torch.int8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.tensor([[0.8, 0.1, 5.0, 5.0]])  # 0.5 - 0.8 < 0: asleep; -0.5 - 0.1 keeps its sign
    assert method.before_step(optimizer)
    optimizer.step()
    method.after_step(optimizer)
    kept = method.masks().kept["weight"][0]
    assert kept.sum() == 2 and kept[1]
    assert model.weight[0].tolist() == [0.0, pytest.approx(-0.6), 0.0, 0.0]


def test_the_prior_of_deep_r_pulls_to_zero():
    model = nn.Linear(4, 1, bias=False)
    method = DeepR(model, sparsity=0.0, alpha=0.1, temperature=0.0)
    signs = torch.where(model.weight < 0, -1.0, 1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros(1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method.before_step(optimizer)
    method.after_step(optimizer)
    moved = before - 0.01 * 0.1 * signs
    assert torch.allclose(model.weight, torch.where(moved * signs >= 0, moved, 0.0))


def test_top_kast_sees_a_moves_b_and_leaves_the_rest():
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[6.0, -5.0, 4.0, 3.0, 2.0, -1.0]]))
    method = TopKAST(model, sparsity=2 / 3, backward_sparsity=1 / 3, allocation=uniform, penalty=0.3)
    with method.parametrise():
        assert model.weight.tolist() == [[6.0, -5.0, 0, 0, 0, 0]]
        model(torch.ones(1, 6)).sum().backward()
    assert model.weight.tolist() == [[6.0, -5.0, 4.0, 3.0, 2.0, -1.0]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert method.before_step(optimizer)
    wanted = [1 + 0.3 * 6, 1 - 0.3 * 5, 1 + 0.3 * 4 * 3, 1 + 0.3 * 3 * 3, 0, 0]
    assert model.weight.grad[0].tolist() == pytest.approx(wanted)
    optimizer.step()
    method.after_step(optimizer)
    assert model.weight[0, 4:].tolist() == [2.0, -1.0]
    assert method.masks().kept["weight"].tolist() == [[True, True, False, False, False, False]]
    method.finish()
    assert (model.weight != 0).sum() == 2


def test_top_kast_holds_what_decay_and_momentum_would_move():
    model = net()
    method = TopKAST(model, sparsity=0.9, backward_sparsity=0.5, every=100)
    outside = {k: ~m for k, m in method.state_dict()["backward"].items()}
    before = {k: model.get_parameter(k).detach().clone() for k in outside}
    steps(model, method, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), 5)
    for k, where in outside.items():
        assert model.get_parameter(k)[where].equal(before[k][where])


@given(
    st.integers(0, 200),
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 50)), min_size=1, max_size=6),
)
def test_apportion_gives_out_all_it_can_in_proportion(total, parts):
    shares, limits = [s for s, _ in parts], [n for _, n in parts]
    given_out = apportion(total, shares, limits)
    assert sum(given_out) == min(total, sum(limits))
    assert all(0 <= g <= n for g, n in zip(given_out, limits, strict=True))
    assert apportion(10, [1.0, 3.0, 1.0], [9, 9, 9]) == [2, 6, 2]
    assert apportion(10, [1.0, 3.0, 1.0], [9, 4, 9]) == [3, 4, 3]
    assert apportion(4, [7, 5], [9, 11]) == [2, 2], "remainders of 2.33 and 1.67"


@given(st.floats(0, 0.99), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5))
def test_erk_keeps_exactly_the_share_and_makes_small_matrices_denser(sparsity, shapes):
    scores = {str(i): torch.zeros(shape) for i, shape in enumerate(shapes)}
    removed = erk(scores, sparsity)
    assert sum(removed.values()) == sum(uniform({"all": torch.zeros(sum(a * b for a, b in shapes))}, sparsity).values())
    assert all(0 <= removed[name] <= score.numel() for name, score in scores.items())


def test_erk_by_hand():
    removed = erk({"square": torch.zeros(10, 10), "tall": torch.zeros(40, 10)}, 0.8)
    # 100 stay, in proportion to 20 : 50
    assert removed == {"square": 100 - 29, "tall": 400 - 71}
    assert erk({"tiny": torch.zeros(1, 8), "large": torch.zeros(100, 100)}, 0.5)["tiny"] == 0


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (RigL, {"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        (RigL, {"sparsity": 0.5, "fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        (SET, {"sparsity": 0.5, "every": 0}, "every must be >= 1, got 0"),
        (SNFS, {"sparsity": 0.5, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (DSR, {"sparsity": 0.5, "threshold": 0.0}, "threshold must be > 0, got 0.0"),
        (DeepR, {"sparsity": 0.5, "alpha": -1.0}, "alpha must be >= 0, got -1.0"),
        (TopKAST, {"sparsity": 0.5, "backward_sparsity": 0.6}, r"backward_sparsity must be in \[0, sparsity=0.5\]"),
    ],
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(net(), **options)
