"""What an update grows begins afresh: value 0, every slot of the optimiser 0; what it keeps goes on as it was."""

import pytest
import torch
from torch import nn

from pruning import uniform
from pruning.dynamic import (
    DSR,
    SET,
    SNFS,
    DeepR,
    NeST,
    PreferentialAttachment,
    RigL,
    RobustRewiring,
    SparseAdamW,
    TopKAST,
)

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.3, weight_decay=0.0),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.3, weight_decay=0.0, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "sparse": lambda p: SparseAdamW(p, lr=0.3, weight_decay=0.0),
}
SHARED = {"sparsity": 0.25, "allocation": uniform, "every": 1, "fraction": 0.5}
REGROWING = {
    "SET": lambda m, g: SET(m, generator=g, **SHARED),
    "preferential": lambda m, g: PreferentialAttachment(m, generator=g, **SHARED),
    "DSR": lambda m, g: DSR(m, generator=g, threshold=0.2, **SHARED),
}
WALKING = {
    "DeepR": lambda m, g: DeepR(m, sparsity=0.25, allocation=uniform, alpha=0.0, temperature=0.0, generator=g),
    "robust": lambda m, g: RobustRewiring(m, sparsity=0.25, allocation=uniform, noise=0.0, generator=g),
}


def single(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, 5, bias=False)


def slots(optimizer, parameter):
    """Every slot as wide as the parameter; the compact ones of SparseAdamW spread out, absent places 0."""
    state = optimizer.state[parameter]
    if "index" not in state:
        return [slot for slot in state.values() if slot.shape == parameter.shape]
    wide = []
    for name in ("mean", "square"):
        values = torch.zeros(parameter.numel())
        values[state["index"].long()] = state[name]
        wide.append(values.view(parameter.shape))
    return wide


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", REGROWING)
def test_what_is_dropped_and_drawn_again_in_one_update_has_no_moments(name, optimizer):
    """The weight shows it: a weight that stays keeps its value, one that was drawn again is exactly 0."""
    again = 0
    for seed in range(12):
        model = single(seed)
        method = REGROWING[name](model, torch.Generator().manual_seed(seed))
        made = OPTIMIZERS[optimizer](model.parameters())
        model.weight.grad = torch.ones(5, 6)
        assert method.before_step(made)
        made.step()
        method.after_step(made)
        value, mask = model.weight.detach().clone(), method.masks().kept["weight"].clone()
        held = [slot.clone() for slot in slots(made, model.weight)]
        assert value[mask].all() and all(slot[mask].all() for slot in held)
        model.weight.grad = torch.ones(5, 6)
        assert method.before_step(made)
        now = method.masks().kept["weight"]
        fresh = now & (model.weight == 0)
        for slot, old in zip(slots(made, model.weight), held, strict=True):
            assert not slot[fresh | ~now].any()
            assert slot[now & ~fresh].equal(old[now & ~fresh])
        assert model.weight[now & ~fresh].equal(value[now & ~fresh])
        again += int((fresh & mask).sum())
    assert again > 12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", WALKING)
def test_what_falls_asleep_and_wakes_in_one_step_has_no_moments(name, optimizer):
    again = 0
    for seed in range(12):
        model = single(seed)
        method = WALKING[name](model, torch.Generator().manual_seed(seed))
        made = OPTIMIZERS[optimizer](model.parameters())
        before, value = method.masks().kept["weight"].clone(), model.weight.detach().clone()
        model.weight.grad = torch.where(torch.rand(5, 6) < 0.5, 1.0, -1.0) * torch.where(value < 0, -1, 1)
        assert method.before_step(made)
        made.step()
        method.after_step(made)
        now = method.masks().kept["weight"]
        fresh = now & (model.weight == 0)
        for slot in slots(made, model.weight):
            assert not slot[fresh | ~now].any()
            assert slot[now & ~fresh].all()
        again += int((fresh & before).sum())
    assert again > 12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", [RigL, SNFS])
def test_what_rigl_and_sparse_momentum_drop_and_grow_at_once_goes_on_as_it_was(method, optimizer):
    """The authors' rule (reinit_when_same=False; a mask put on after the growth): new is what the mask had not."""
    model = single(0)
    made = OPTIMIZERS[optimizer](model.parameters())
    ours = method(model, **SHARED)
    model.weight.grad = torch.ones(5, 6)
    ours.before_step(made)
    made.step()
    ours.after_step(made)
    value, mask = model.weight.detach().clone(), ours.masks().kept["weight"].clone()
    held = [slot.clone() for slot in slots(made, model.weight)]
    smallest = value.abs().masked_fill(~mask, torch.inf).argmin()
    model.weight.grad = torch.rand(5, 6) * 0.1
    model.weight.grad.view(-1)[smallest] = 100.0
    model.weight.grad[~mask] = torch.arange(50.0, 50.0 + int((~mask).sum()))
    ours.before_step(made)
    now = ours.masks().kept["weight"]
    assert now.view(-1)[smallest]
    for slot, old in zip(slots(made, model.weight), held, strict=True):
        assert slot[now & mask].equal(old[now & mask])
        assert not slot[now & ~mask].any() and not slot[~now].any()
    assert model.weight[now & mask].equal(value[now & mask]) and not model.weight[now & ~mask].any()
    assert (now & ~mask).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_nest_grows_begins_afresh_and_what_it_keeps_goes_on(optimizer):
    model = single(0)
    method = NeST(model, sparsity=0.5, allocation=uniform, every=1, growths=2, prunings=2, peak_sparsity=0.1)
    made = OPTIMIZERS[optimizer](model.parameters())
    for step in range(5):
        mask, held = method.masks().kept["weight"].clone(), [s.clone() for s in slots(made, model.weight)]
        model.weight.grad = torch.rand(5, 6) + 0.5
        method.before_step(made)
        now = method.masks().kept["weight"]
        for slot, old in zip(slots(made, model.weight), held, strict=False):
            assert slot[now & mask].equal(old[now & mask]) and not slot[~(now & mask)].any()
        assert not model.weight[now & ~mask].any() and now.equal(mask) == (step == 0)
        made.step()
        method.after_step(made)


def test_top_kast_grows_nothing_afresh():
    """A weight outside the backward set keeps its value, so that one that comes back goes on from it."""
    model = single(0)
    value = model.weight.detach().clone()
    method, made = TopKAST(model, sparsity=0.5, allocation=uniform), torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        model.weight.grad = torch.ones(5, 6)
        method.before_step(made)
        made.step()
        method.after_step(made)
        assert model.weight.equal(value)
