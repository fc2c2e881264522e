"""Compact moments: the same weights, step by step, as a masked AdamW; memory of the active weights alone."""

import copy

import pytest
import torch
from torch import nn

from pruning.dynamic import DSR, SET, SNFS, DeepR, PreferentialAttachment, RigL, SparseAdamW, StaticSparsity
from pruning.dynamic.base import reset_state
from tests.pruning.dynamic.test_methods import net, steps
from tests.tolerances import close

METHODS = {"static": StaticSparsity, "SET": SET, "RigL": RigL, "SNFS": SNFS, "DSR": DSR, "DeepR": DeepR,
           "preferential": PreferentialAttachment}  # fmt: skip
OPTIONS = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}


def sparse(name, sparsity=0.7):
    model = net()
    options = {} if name == "DeepR" else {"every": 2, "fraction": 0.5}
    return model, METHODS[name](model, sparsity=sparsity, **options)


@pytest.mark.parametrize("name", METHODS)
def test_it_takes_the_steps_of_a_masked_adamw(name):
    (one, first), (two, second) = sparse(name), sparse(name)
    dense = torch.optim.AdamW(one.parameters(), **OPTIONS, foreach=False)
    compact = SparseAdamW(two.parameters(), **OPTIONS)
    for _ in range(15):
        steps(one, first, dense, 1)
        steps(two, second, compact, 1)
        for key, mask in first.masks().kept.items():
            assert mask.equal(second.masks().kept[key])
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            close(b, a)


def test_one_step_by_a_plain_loop():
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    mask = torch.tensor([[True, False], [False, True]])
    optimizer = SparseAdamW([parameter], lr=0.1, betas=(0.5, 0.75), eps=0.01, weight_decay=0.2)
    optimizer.activate(parameter, mask)
    wanted = {0: [1.0, 0.0, 0.0], 3: [4.0, 0.0, 0.0]}
    for t, slopes in ((1, [0.5, 9.0, 9.0, -2.0]), (2, [1.0, 9.0, 9.0, 3.0])):
        parameter.grad = torch.tensor(slopes, dtype=torch.float64).view(2, 2)
        optimizer.step()
        for place, (w, m, v) in wanted.items():
            g = slopes[place]
            m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g * g
            w = w * (1 - 0.1 * 0.2) - 0.1 * (m / (1 - 0.5**t)) / ((v / (1 - 0.75**t)) ** 0.5 + 0.01)
            wanted[place] = [w, m, v]
    expected = torch.tensor([[wanted[0][0], 2.0], [3.0, wanted[3][0]]], dtype=torch.float64)
    close(parameter, expected)


def test_memory_follows_the_active_weights():
    model = nn.Linear(64, 64, bias=False)
    method = StaticSparsity(model, sparsity=0.9)
    optimizer = SparseAdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    method.before_step(optimizer)
    optimizer.step()
    active = int(method.masks().kept["weight"].sum())
    assert optimizer.moment_bytes() == active * 12
    assert {v.shape for k, v in optimizer.state[model.weight].items() if k != "step"} == {(active,)}


def test_kept_moments_stay_and_new_ones_start_at_zero():
    parameter = nn.Parameter(torch.ones(1, 4))
    optimizer = SparseAdamW([parameter], lr=0.1)
    optimizer.activate(parameter, torch.tensor([[True, True, False, False]]))
    parameter.grad = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    optimizer.step()
    before = optimizer.state[parameter]["mean"].clone()
    optimizer.activate(parameter, torch.tensor([[False, True, False, True]]))
    state = optimizer.state[parameter]
    assert state["mean"].tolist() == [before[1].item(), 0.0] and state["index"].tolist() == [1, 3]
    optimizer.forget(parameter, torch.tensor([[True, True, False, False]]))
    assert state["mean"].tolist() == [0.0, 0.0]


def test_a_connection_that_goes_and_comes_between_two_steps_starts_afresh():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = SparseAdamW([parameter], lr=0.1)
    reset_state(optimizer, parameter, torch.ones(2, 2, dtype=torch.bool))
    optimizer.activate(parameter, torch.tensor([[True, True], [False, True]]))
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    reset_state(optimizer, parameter, torch.tensor([[False, True], [True, False]]))
    for name in ("mean", "square"):
        assert (optimizer.state[parameter][name] != 0).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_undisturbed_one(dtype):
    model, method = sparse("RigL")
    model.to(dtype)
    optimizer = SparseAdamW(model.parameters(), lr=0.01)

    def train(model, method, optimizer, seeds):
        for seed in seeds:
            for n, p in enumerate(model.parameters()):
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed * 100 + n))
                p.grad = noise.to(dtype)
            if method.before_step(optimizer):
                optimizer.step()
            method.after_step(optimizer)

    train(model, method, optimizer, range(7))
    saved = copy.deepcopy((model.state_dict(), method.state_dict(), optimizer.state_dict()))
    train(model, method, optimizer, range(7, 15))
    again, other = sparse("RigL")
    again.to(dtype).load_state_dict(saved[0])
    fresh = SparseAdamW(again.parameters(), lr=0.01)
    fresh.load_state_dict(saved[2])
    other.load_state_dict(saved[1])
    assert fresh.state[again.first.weight]["index"].dtype == torch.int32
    train(again, other, fresh, range(7, 15))
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert one.equal(two)


def test_transposed_and_empty_parameters():
    turned = nn.Parameter(torch.arange(6.0).view(2, 3).mT)
    plain = nn.Parameter(turned.detach().clone().contiguous())
    nothing = nn.Parameter(torch.zeros(0, 3))
    optimizer = SparseAdamW([turned, plain, nothing], lr=0.1)
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    for parameter in (turned, plain):
        optimizer.activate(parameter, mask)
        parameter.grad = torch.ones(3, 2)
    nothing.grad = torch.zeros(0, 3)
    optimizer.step()
    assert turned.equal(plain) and not turned.is_contiguous()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SparseAdamW([nn.Parameter(torch.ones(2))], **options)


def test_a_mask_of_another_shape_is_refused():
    parameter = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"mask must have the parameter's shape \[2, 2\], got \[4\]"):
        SparseAdamW([parameter]).activate(parameter, torch.ones(4, dtype=torch.bool))
