"""A linear regression whose gradient is written out in NumPy, and a net of matrices and experts that methods train."""

import numpy as np
import torch
from torch import nn

OUT, IN, ROWS = 3, 5, 7


class Net(nn.Module):
    """Two matrices and a stack of experts under the name that says how it is laid out, [E, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20, bias=False), nn.Linear(20, 6)
        self.experts = nn.Module()
        self.experts.down = nn.Parameter(torch.randn(3, 4, 6) * 0.4)

    def forward(self, x):
        hidden = self.second(self.first(x).relu())
        return torch.einsum("bi,eoi->beo", hidden, self.experts.down).sum(1)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_optimizer(model, method, *, lr: float = 0.01, kind=torch.optim.AdamW):
    """The model's parameters and the method's, as the trainer has them."""
    optimizer = kind(model.parameters(), lr=lr)
    for group in method.parameter_groups():
        optimizer.add_param_group(group)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    return optimizer


def train(model, method, optimizer, count, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 12, generator=generator)
        with method.parametrise():
            (model(x) - x[:, :4] * 2).square().mean().backward()
        if method.before_step(optimizer):
            optimizer.step()
        optimizer.zero_grad()
        method.after_step(optimizer)


class Regression:
    """L(W) = ½ Σ (x Wᵀ − t)², ∂L/∂W = (x Wᵀ − t)ᵀ x, in float64; the torch side and the NumPy side side by side."""

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.x, self.t = draw.normal(size=(ROWS, IN)), draw.normal(size=(ROWS, OUT))
        self.start = draw.normal(size=(OUT, IN)) * 0.5

    def model(self) -> nn.Linear:
        model = nn.Linear(IN, OUT, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(self.start))
        return model

    def loss(self, model: nn.Module) -> torch.Tensor:
        return (model(torch.from_numpy(self.x)) - torch.from_numpy(self.t)).square().sum() / 2

    def slope(self, w: np.ndarray) -> np.ndarray:
        return (self.x @ w.T - self.t).T @ self.x

    def run(self, model, method, *, steps: int, lr: float, **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
        for group in method.parameter_groups():
            optimizer.add_param_group(group)
        for _ in range(steps):
            with method.parametrise():
                self.loss(model).backward()
            assert method.before_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(optimizer)
        return optimizer


def smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """True where a score stays when the ``count`` smallest go, the earlier first."""
    order = sorted(range(scores.size), key=lambda i: (scores.flat[i], i))
    keep = np.ones(scores.size, dtype=bool)
    keep[order[:count]] = False
    return keep.reshape(scores.shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
