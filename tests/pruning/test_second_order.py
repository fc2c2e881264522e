"""Diagonals of the Hessian against torch's own Hessian and against sums over every label."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning.saliency.second_order import hessian_diagonal, obd
from tests.tolerances import close


class Softmax(nn.Module):
    """Logits of the next token from the one before, by one matrix."""

    def __init__(self, vocab=3):
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab, vocab, dtype=torch.float64))

    def forward(self, input_ids, attention_mask=None):
        return F.one_hot(input_ids, len(self.table)).double() @ self.table


IDS = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 1]])


def quadratic(model, batch):
    """Σ over samples of ½·(w·x)² + Σ w⁴, whose Hessian is known."""
    return ((batch @ model.weight[0]).square() / 2).sum() + len(batch) * model.weight.pow(4).sum()


def test_hutchinson_is_exact_where_the_hessian_is_diagonal_and_unbiased_elsewhere():
    model, x = nn.Linear(3, 1, bias=False).double(), torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0])
    weights = {"weight": model.weight}
    found = hessian_diagonal(model, weights, [x], estimator="hutchinson", loss=quadratic)["weight"]
    close(found, torch.tensor([[1.0, 4.0, 9.0]], dtype=torch.float64) / 3 + 12 * model.weight.detach().square())
    mixed = torch.randn(5, 3, dtype=torch.float64)
    exact = torch.autograd.functional.hessian(
        lambda w: (mixed @ w).square().sum() / 2 + 5 * w.pow(4).sum(), model.weight[0].detach())  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    found = hessian_diagonal(model, weights, [mixed], estimator="hutchinson", loss=quadratic, draws=400,
                             generator=generator)["weight"][0]  # fmt: skip
    assert (found - exact.diagonal() / 5).abs().max() < 0.15 * exact.diagonal().max() / 5


def test_empirical_fisher_squares_the_gradient_of_each_sample():
    model = Softmax()
    found = hessian_diagonal(model, {"table": model.table}, [IDS], estimator="empirical_fisher")["table"]
    expected = torch.zeros_like(found)
    for row in IDS:
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(row[:-1]), row[1:]), model.table)
        expected += gradient.square() / 2
    close(found, expected)


def test_fisher_is_the_gauss_newton_diagonal_which_here_is_the_hessian():
    model = Softmax()

    def mean_loss(table):
        return sum(F.cross_entropy(table[row[:-1]], row[1:]) for row in IDS) / 2

    exact = torch.autograd.functional.hessian(mean_loss, model.table.detach()).reshape(9, 9).diagonal().view(3, 3)
    generator = torch.Generator().manual_seed(0)
    options = {"estimator": "fisher", "draws": 400, "generator": generator}
    found = hessian_diagonal(model, {"table": model.table}, [IDS], **options)["table"]
    assert (found - exact).abs().max() < 0.15 * exact.max()
    other = hessian_diagonal(model, {"table": model.table}, [IDS], estimator="empirical_fisher")["table"]
    assert (other - exact).abs().max() > 0.3 * exact.max()


def test_obd_by_hand():
    assert obd(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 2.0])).tolist() == [1.0, 9.0]


@pytest.mark.parametrize("options, message", [
    ({"estimator": "exact"}, "one of empirical_fisher, fisher, hutchinson, got 'exact'"),
    ({"draws": 0}, "draws must be >= 1, got 0"),
    ({"loss": quadratic}, "takes no loss"),
])  # fmt: skip
def test_bad_options(options, message):
    model = Softmax()
    with pytest.raises(ValueError, match=message):
        hessian_diagonal(model, {"table": model.table}, [IDS], **options)


def test_frozen_weights_are_named():
    model = Softmax().requires_grad_(False)
    with pytest.raises(ValueError, match="got 'table' frozen"):
        hessian_diagonal(model, {"table": model.table}, [IDS])


@pytest.mark.parametrize("real", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("by", ["attention_mask", "labels"])
def test_fisher_is_scaled_by_the_predictions_that_count(real, by):
    """mean over samples of T · g², g the gradient of the mean over the T pairs that padding or labels leave."""
    model, ids = Softmax(), torch.tensor([[0, 1, 1, 2, 0]])
    given = torch.tensor([real]) if by == "attention_mask" else ids.masked_fill(torch.tensor([real]) == 0, -100)
    found = hessian_diagonal(model, {"table": model.table}, [{"input_ids": ids, by: given}], estimator="fisher",
                             generator=torch.Generator().manual_seed(5))["table"]  # fmt: skip
    chances = model(ids)[0, :-1].detach().float().softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    counted = [t for t in range(4) if real[t + 1] and (by == "labels" or real[t])]
    gradient = torch.zeros_like(found)
    for t in counted:
        row = model.table.detach()[ids[0, t]].softmax(-1) - F.one_hot(drawn[t], 3)
        gradient[ids[0, t]] += row / len(counted)
    close(found, len(counted) * gradient.square())
