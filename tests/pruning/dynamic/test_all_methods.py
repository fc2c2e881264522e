"""What holds for every method that is sparse from the start: it resumes to the bit, and it is no other method."""

import copy

import pytest
import torch
from torch import nn

from pruning import uniform
from pruning.dynamic import (
    DSR,
    SET,
    SNFS,
    Attack,
    DeepR,
    NeST,
    PreferentialAttachment,
    RigL,
    RobustRewiring,
    SparseAdamW,
    StaticSparsity,
    TopKAST,
    banded,
)
from tests.pruning.test_transformer import build, ids

NEW = {
    "nest": lambda model, **o: NeST(model, sparsity=0.8, every=2, growths=3, prunings=2, growth=0.01, **o),
    "preferential": lambda model, **o: PreferentialAttachment(model, sparsity=0.8, every=2, stop=12, **o),
    "robust": lambda model, **o: RobustRewiring(model, sparsity=0.8, attack=Attack(0.1, steps=1), noise=1.0, **o),
    "banded": lambda model, **o: StaticSparsity(model, sparsity=0.8, topology=banded, **o),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "sparse": lambda p: SparseAdamW(p, lr=0.01, weight_decay=0.3),
}


def train(model, method, optimizer, count, *, seed):
    """A few steps with dropout off; after each, absent weights are 0 and so is all that the optimiser holds of them."""
    context = getattr(method, "parametrise", None)
    for step in range(count):
        batch = ids(seed=seed + step)
        optimizer.zero_grad()
        if context is None:
            model(batch, labels=batch).loss.backward()
        else:
            with context():
                model(batch, labels=batch).loss.backward()
        if method.before_step(optimizer):
            optimizer.step()
        method.after_step(optimizer)
        for name, mask in method.masks().kept.items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            for slot in optimizer.state[weight].values():
                if slot.shape == weight.shape:
                    assert not slot[~mask].any()


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NEW)
def test_zeros_stay_zero_and_a_resumed_run_is_the_undisturbed_one(name, optimizer, kind):
    model = build(kind).float().train()
    method = NEW[name](model, generator=torch.Generator().manual_seed(5))
    made = OPTIMIZERS[optimizer](model.parameters())
    first = {key: mask.clone() for key, mask in method.masks().kept.items()}
    train(model, method, made, 5, seed=0)
    saved = copy.deepcopy((model.state_dict(), method.state_dict(), made.state_dict()))
    train(model, method, made, 6, seed=5)
    moved = any(not mask.equal(first[key]) for key, mask in method.masks().kept.items())
    assert moved == (name != "banded")
    if name in ("preferential", "robust"):
        assert sum(int(m.sum()) for m in method.masks().kept.values()) == sum(int(m.sum()) for m in first.values())
    again = build(kind).float().train()
    other = NEW[name](again)
    again.load_state_dict(saved[0])
    fresh = OPTIMIZERS[optimizer](again.parameters())
    fresh.load_state_dict(saved[2])
    other.load_state_dict(saved[1])
    train(again, other, fresh, 6, seed=5)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert one.equal(two)
    for key, mask in method.masks().kept.items():
        assert mask.equal(other.masks().kept[key])


ALL = {
    "static": lambda m: StaticSparsity(m, sparsity=0.5, allocation=uniform),
    "banded": lambda m: StaticSparsity(m, sparsity=0.5, allocation=uniform, topology=banded),
    "SET": lambda m: SET(m, sparsity=0.5, allocation=uniform, every=1, fraction=0.5),
    "DeepR": lambda m: DeepR(m, sparsity=0.5, allocation=uniform),
    "DSR": lambda m: DSR(m, sparsity=0.5, allocation=uniform, every=1, fraction=0.5, threshold=0.2),
    "SNFS": lambda m: SNFS(m, sparsity=0.5, allocation=uniform, every=1, fraction=0.5, momentum=0.95),
    "RigL": lambda m: RigL(m, sparsity=0.5, allocation=uniform, every=1, fraction=0.5),
    "Top-KAST": lambda m: TopKAST(m, sparsity=0.5, backward_sparsity=0.25, allocation=uniform),
    "NeST": lambda m: NeST(m, sparsity=0.5, allocation=uniform, every=1, growths=1, prunings=1, peak_sparsity=0.2),
    "preferential": lambda m: PreferentialAttachment(m, sparsity=0.5, allocation=uniform, every=1, fraction=0.5),
    "robust": lambda m: RobustRewiring(m, sparsity=0.5, allocation=uniform, noise=0.5),
}


def test_no_two_methods_are_one():
    """Two 4×4 matrices, the same weights and gradients; all start from their own or one mask, and end apart."""
    ends = {}
    for name, make in ALL.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        method, optimizer = make(model), torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if method.before_step(optimizer):
                optimizer.step()
            method.after_step(optimizer)
        ends[name] = torch.cat([mask.flatten() for mask in method.masks().kept.values()])
    for one, mask in ends.items():
        assert int(mask.sum()) == 16, one
        for two, other in ends.items():
            assert one == two or not mask.equal(other), (one, two)
