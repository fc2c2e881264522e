"""NeST: growth of connections and neurons against plain loops, its schedule, and its neurons' births."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruning import Axis, Slice, uniform
from pruning.dynamic import NeST
from pruning.dynamic.bridges import births, of_strength
from tests.pruning.dynamic.test_methods import net
from tests.pruning.test_transformer import build, ids
from tests.tolerances import close


class FeedForward(nn.Module):
    """y = x S + down(relu(up x)): S, which is 0, is the bridge whose gradient NeST looks at."""

    def __init__(self, hidden=6):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(3, hidden, bias=False), nn.Linear(hidden, 4, bias=False)
        self.bridge = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):
        return x @ self.bridge + self.down(self.up(x).relu())

    def prunable_axes(self):
        size = self.up.out_features
        return [Axis("neuron", 0, "neurons", size, 1, "down", (Slice("up.weight", 0, 1), Slice("down.weight", 1, 1)),
                     lambda kept: None)]  # fmt: skip


def nest(model, **options):
    return NeST(model, **{"sparsity": 0.5, "allocation": uniform, "every": 1, "growths": 2, "prunings": 2} | options)


def test_the_bridging_gradient_is_that_of_a_connection_past_the_layer():
    model = FeedForward()
    method = nest(model, weights=["up.weight", "down.weight"])
    method.step = 1
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    for part in x.split(1):
        (model(part) - 1).pow(2).sum().backward()
    close(method._bridging["neurons"], -model.bridge.grad)


def births_by_loop(bridging, pairs_each, count, coins):
    rows, columns = bridging.shape
    ranked = sorted(((i, j) for i in range(rows) for j in range(columns)), key=lambda p: -abs(float(bridging[p])))
    made, coins = [], iter(coins)
    for r in range(count):
        chosen = ranked[r * pairs_each : (r + 1) * pairs_each]
        if not chosen:
            break
        incoming, outgoing = [0.0] * rows, [0.0] * columns
        for i, j in chosen:
            value, coin = float(bridging[i, j]), next(coins)
            incoming[i] += coin * math.copysign(1, value) * math.sqrt(abs(value))
            outgoing[j] += coin * math.sqrt(abs(value))
        made.append((incoming, outgoing))
    return made


@given(st.integers(1, 4), st.integers(1, 4), st.floats(0.01, 1), st.integers(0, 9), st.integers(0, 99))
def test_births_are_the_plain_loop(rows, columns, growth, count, seed):
    bridging = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    size = max(1, math.ceil(growth * rows * columns))
    draws = torch.Generator().manual_seed(seed)
    coins = []
    for start in range(0, min(count * size, rows * columns), size):
        left = min(size, rows * columns - start)
        coins += [-1.0 if u < 0.5 else 1.0 for u in torch.rand(left, generator=draws).tolist()]
    made = births(bridging, growth=growth, count=count, generator=torch.Generator().manual_seed(seed))
    wanted = births_by_loop(bridging, size, count, coins)
    assert len(made) == len(wanted)
    for birth, (incoming, outgoing) in zip(made, wanted, strict=True):
        close(birth.incoming, torch.tensor(incoming))
        close(birth.outgoing, torch.tensor(outgoing))


def test_a_new_neuron_starts_as_a_step_of_gradient_descent_would():
    bridging = torch.tensor([[0.0, -4.0], [1.0, 0.5]])
    (birth,) = births(bridging, growth=0.25, count=1, generator=torch.Generator())
    product = birth.incoming[:, None] * birth.outgoing
    close(product, torch.tensor([[0.0, -4.0], [0.0, 0.0]]))


def test_strength_by_hand():
    weight, mask = torch.tensor([[1.0, -3.0], [100.0, 0.0]]), torch.tensor([[True, True], [False, False]])
    close(of_strength(torch.tensor([0.0, 2.0, -6.0]), weight, mask, 0.5), torch.tensor([0.0, 0.5, -1.5]))


def test_connections_by_hand():
    model = nn.Linear(4, 2, bias=False)
    method = nest(model, sparsity=0.5, seed_sparsity=0.75, peak_sparsity=0.25, growths=2, prunings=1)
    mask = torch.tensor([[True, False, False, False], [False, True, False, False]])
    values = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]])
    with torch.no_grad():
        model.weight.copy_(values)
        method.masks().kept["weight"].copy_(mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    for gradient in ([[9, 1, -5, 2], [4, 9, 0.5, 0.1]], [[0, 7, 0, 6], [0, 0, 1, 2]], [[0.0] * 4] * 2):
        model.weight.grad = torch.tensor(gradient, dtype=torch.float32)
        method.step = len(seen) + 1
        assert method.before_step(optimizer)
        seen.append(method.masks().kept["weight"].int().tolist())
        with torch.no_grad():
            model.weight.masked_fill_(method.masks().kept["weight"] & (model.weight == 0), len(seen))
    assert seen[0] == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert seen[1] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    # 3, then 1 and 1 grown, -1, then 2 and 2: of the four ones the earlier two go
    assert seen[2] == [[1, 1, 0, 1], [0, 1, 0, 0]]


def train(model, method, count, *, optimizer, batch):
    for _ in range(count):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        if method.before_step(optimizer):
            optimizer.step()
        method.after_step(optimizer)
        yield


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_counts_follow_the_schedule_and_unborn_neurons_have_no_connection(kind):
    model = build(kind).float()
    method = NeST(model, sparsity=0.8, every=2, growths=3, prunings=2, seed_width=0.5, growth=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    total = sum(mask.numel() for mask in method.masks().kept.values())
    counts, alive = [], []
    for _ in train(model, method, 13, optimizer=optimizer, batch=ids()):
        counts.append(sum(int(mask.sum()) for mask in method.masks().kept.values()))
        alive.append({name: int(live.sum()) for name, live in method.live().items()})
        for name, mask in method.masks().kept.items():
            assert not model.get_parameter(name)[~mask].any()
        for n, live in enumerate(method.live().values()):
            layer = model.layers[n].feedforward
            for weight in (layer.up.weight.mT, layer.gate.weight.mT, layer.down.weight):
                assert not weight[:, ~live].any()
    assert len(alive[0]) == (2 if kind == "dense" else 0)
    assert all(a <= b for a, b in pairwise(counts[:7])) and counts[6] > 1.5 * counts[0]
    assert counts[-1] == counts[10] and abs(counts[-1] - 0.2 * total) <= len(method.masks().kept)
    if kind == "dense":
        births_seen = [sum(now.values()) for now in alive]
        assert (
            births_seen[0] == 24 and births_seen[1] == 24 and births_seen[2] > 24 and births_seen[-1] > births_seen[2]
        )


def test_all_neurons_are_born_where_there_is_room():
    model = FeedForward(hidden=8)
    method = nest(model, weights=["up.weight", "down.weight"], sparsity=0.2, peak_sparsity=0.0, growth=0.1, growths=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    for number in range(6):
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).pow(2).mean().backward()
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer)
        assert int(method.live()["neurons"].sum()) == min(4 + number, 8)
    # at the peak every place of every neuron is there, the births' and those that policy 1 adds
    assert method._target("up.weight", 4) == 24


def test_neurons_without_a_pass_are_an_error_and_none_are_wanted_with_full_width():
    for width, fails in ((0.5, True), (1.0, False)):
        model = FeedForward()
        method = nest(model, weights=["up.weight", "down.weight"], seed_width=width)
        method.step = 1
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if fails:
            with pytest.raises(RuntimeError, match="NeST grows neurons of 'neurons' at step 1, but saw no forward"):
                method.before_step(torch.optim.SGD(model.parameters(), lr=1.0))
        else:
            assert method.before_step(torch.optim.SGD(model.parameters(), lr=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"peak_sparsity": 0.6}, r"peak_sparsity must be in \[0, sparsity=0.5\], got 0.6"),
        ({"seed_sparsity": 0.1, "peak_sparsity": 0.2}, r"seed_sparsity must be in \[peak_sparsity=0.2, 1\), got 0.1"),
        ({"growths": 0}, "growths must be >= 1, got 0"),
        ({"prunings": 0}, "prunings must be >= 1, got 0"),
        ({"seed_width": 0.0}, r"seed_width must be in \(0, 1\], got 0.0"),
        ({"growth": 2.0}, r"growth must be in \(0, 1\], got 2.0"),
        ({"strength": 0.0}, "strength must be > 0, got 0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nest(net(), **options)
