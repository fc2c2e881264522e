"""The gradients of absent weights are 0 when training clips: the norm is that of the weights that are there."""

import pytest
import torch
from torch import nn

from pruning import Sparsifier, one_shot
from pruning.dynamic import (
    DSR,
    SET,
    SNFS,
    DeepR,
    NeST,
    PreferentialAttachment,
    RigL,
    RobustRewiring,
    StaticSparsity,
)
from pruning.retraining import (
    DenseSparseDense,
    EarlyBirdPruning,
    GeneralizationDriven,
    HardThresholding,
    LearningCompression,
    Rewinding,
)

MADE = {
    "gradual": lambda m: Sparsifier(m, schedule=lambda step: 0.25 * min(step, 3)),
    "one-shot": lambda m: Sparsifier(m, schedule=one_shot(0.5, step=2)),
    "taylor": lambda m: Sparsifier(m, schedule=one_shot(0.5, step=2), saliency=lambda w: (w * w.grad).abs()),
    "lottery": lambda m: Rewinding(m, sparsity=0.5, every=2, rounds=2, rewind=1),
    "early bird": lambda m: EarlyBirdPruning(m, sparsity=0.5, every=1, end=3, window=2),
    "iht": lambda m: HardThresholding(m, sparsity=0.5, sparse_steps=3, dense_steps=2),
    "dsd": lambda m: DenseSparseDense(m, sparsity=0.5, begin=1, end=4),
    "generalization": lambda m: GeneralizationDriven(m, sparsity=0.5, when="low", most=0.3),
    "static": lambda m: StaticSparsity(m, sparsity=0.5),
    "SET": lambda m: SET(m, sparsity=0.5, every=1),
    "RigL": lambda m: RigL(m, sparsity=0.5, every=1),
    "SNFS": lambda m: SNFS(m, sparsity=0.5, every=1),
    "DSR": lambda m: DSR(m, sparsity=0.5, every=1),
    "DeepR": lambda m: DeepR(m, sparsity=0.5),
    "preferential": lambda m: PreferentialAttachment(m, sparsity=0.5, every=1),
    "NeST": lambda m: NeST(m, sparsity=0.5, every=1, growths=2, prunings=2),
    "robust": lambda m: RobustRewiring(m, sparsity=0.5),
}


def there(method, name):
    """Which weights train in the coming step."""
    now = getattr(method, "_now", None) if isinstance(method, HardThresholding | DenseSparseDense) else method.masks()
    return True if now is None else now.kept.get(name, True)


@pytest.mark.parametrize("name", MADE)
def test_the_norm_after_before_step_is_that_of_the_weights_that_are_there(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    method = MADE[name](model)
    optimizer, less = torch.optim.SGD(model.parameters(), lr=0.1), 0
    for _ in range(7):
        dense = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
        for key, parameter in model.named_parameters():
            parameter.grad = dense[key].clone()
        go = method.before_step(optimizer)
        expected = {key: gradient * there(method, key) for key, gradient in dense.items()}
        for key, parameter in model.named_parameters():
            assert parameter.grad.equal(expected[key])
        norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1e9) == pytest.approx(norm.item(), rel=1e-5)
        less += norm < 0.95 * torch.cat([gradient.flatten() for gradient in dense.values()]).norm()
        if go:
            optimizer.step()
        method.after_step(optimizer)
        if isinstance(method, GeneralizationDriven):
            method.observe(1.0)
    assert less >= 2


def test_a_method_that_is_finished_clears_what_it_holds():
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    method = LearningCompression(model, sparsity=0.5)
    kept = method.finish().kept["weight"]
    model.weight.grad = torch.ones(4, 4)
    assert method.before_step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert model.weight.grad.equal(kept.float())
