import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import close
from transformer import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_equals_plain_cross_entropy_with_every_gradient(chunk, count):
    hidden = torch.randn(count, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (count,))
    targets[1::3] = -100
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk) * 1.7
    loss.backward()
    got = loss, hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / max(1, int((targets != -100).sum())) * 1.7
    expected.backward()
    for a, b in zip(got, (expected, hidden.grad, weight.grad), strict=True):
        close(a, b)


def test_all_targets_ignored_gives_zero_and_zero_gradient():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(6, 4), torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


def test_only_the_weight_wants_a_gradient():
    weight = torch.randn(6, 4, requires_grad=True)
    chunked_cross_entropy(torch.randn(3, 4), weight, torch.tensor([0, 5, 1])).backward()
    assert weight.grad.abs().sum() > 0


def test_autocast_keeps_softmax_in_float32():
    hidden, weight = torch.randn(9, 8), torch.randn(50, 8)
    targets = torch.randint(50, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    close(loss, F.cross_entropy(hidden @ weight.T, targets), dtype=torch.bfloat16)


@pytest.mark.parametrize(("targets", "chunk", "message"), [([6], None, r"\[0, vocabulary=6\)"), ([0], 0, "chunk")])
def test_bad_input(targets, chunk, message):
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(torch.randn(1, 4), torch.randn(6, 4), torch.tensor(targets), chunk=chunk)
