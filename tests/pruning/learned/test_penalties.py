"""Penalties against loops, their gradients against finite differences, and what they favour."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from pruning import prunable_axes
from pruning.learned import group_lasso, hoyer_square, l1, l2, polarization, soft_threshold
from tests.pruning.toy import toy


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 4, generator=draw).double(), "b": torch.randn(2, 3, 2, generator=draw).double()}


def entries(tensors) -> list[list[float]]:
    return [tensor.flatten().tolist() for tensor in tensors.values()]


LOOPS = {
    l1: lambda parts: sum(abs(w) for part in parts for w in part),
    l2: lambda parts: sum(w * w / 2 for part in parts for w in part),
    hoyer_square: lambda parts: sum(sum(abs(w) for w in p) ** 2 / sum(w * w for w in p) for p in parts),
    polarization: lambda parts: (
        1.2 * sum(abs(w) for p in parts for w in p)
        - sum(abs(w - sum(map(sum, parts)) / sum(map(len, parts))) for p in parts for w in p)
    ),
}


@pytest.mark.parametrize("penalty", LOOPS, ids=lambda penalty: penalty.__name__)
def test_values_and_gradients(penalty):
    found = weights()
    assert float(penalty(found)) == pytest.approx(LOOPS[penalty](entries(found)), rel=1e-12)
    names, leaves = list(found), [tensor.requires_grad_() for tensor in found.values()]
    assert gradcheck(lambda *ts: penalty(dict(zip(names, ts, strict=True))), leaves)


def test_group_lasso_by_loops():
    model = toy((4, 2, 3))
    parameters = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    heads, neurons = prunable_axes(model)
    width, total = heads.width, 0.0
    p = {name: value.detach().numpy() for name, value in parameters.items()}
    for h in range(4):
        part = [
            p["attention.0.q.weight"][h * width : (h + 1) * width],
            p["attention.0.o.weight"][:, h * width : (h + 1) * width],
        ]
        total += math.sqrt(sum(x.size for x in part)) * math.sqrt(sum((x**2).sum() for x in part))
    for n in range(3):
        up, down = p["feedforward.0.gate_up.weight"], p["feedforward.0.down.weight"]
        part = [up[n], up[3 + n], down[:, n]]
        total += math.sqrt(sum(x.size for x in part)) * math.sqrt(sum((x**2).sum() for x in part))
    assert float(group_lasso(parameters, axes=[heads, neurons])) == pytest.approx(total, rel=1e-12)


def test_a_unit_that_is_zero_has_no_gradient_and_no_nan():
    model = toy((1, 1, 3))
    axis = prunable_axes(model)[1]
    with torch.no_grad():
        for part in axis.slices:
            tensor = model.get_parameter(part.parameter)
            tensor.narrow(part.dim % tensor.ndim, part.offset + 1, 1).zero_()
    parameters = dict(model.named_parameters())
    group_lasso(parameters, axes=[axis]).backward()
    slope = model.get_parameter("feedforward.0.down.weight").grad
    assert torch.isfinite(slope).all() and not slope[:, 1].any() and slope[:, 0].any()


@given(st.floats(0.01, 100), st.integers(0, 5))
def test_hoyer_square_is_blind_to_scale_and_counts_equal_weights(scale, seed):
    found = weights(seed)
    scaled = {name: tensor * scale for name, tensor in found.items()}
    assert float(hoyer_square(scaled)) == pytest.approx(float(hoyer_square(found)), rel=1e-9)
    assert float(hoyer_square({"w": torch.tensor([2.0, -2.0, 0.0, 2.0, 0.0])})) == pytest.approx(3.0)
    assert float(hoyer_square({"w": torch.zeros(4)})) == 0.0


def test_polarisation_prefers_gates_apart():
    apart = {"g": torch.tensor([0.0, 0.0, 1.0, 1.0])}
    alike = {"g": torch.full((4,), 0.5)}
    assert float(l1(apart)) == float(l1(alike))
    assert float(polarization(apart)) < float(polarization(alike))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.floats(0, 3))
def test_the_soft_threshold_is_the_proximal_point(values, delta):
    got = soft_threshold(torch.tensor(values, dtype=torch.float64), delta)
    for value, point in zip(values, got.tolist(), strict=True):
        grid = np.linspace(-6, 6, 2401)
        best = grid[np.argmin((grid - value) ** 2 / 2 + delta * np.abs(grid))]
        assert abs(point - best) <= 0.0051


def test_a_penalty_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a penalty needs tensors, got none"):
        l1({})
