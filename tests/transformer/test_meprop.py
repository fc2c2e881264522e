"""meProp as an option of the dense feed-forward: its gradients, surgery, and bad input."""

import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import close
from tests.typecheck import unchecked
from training.model_config import ModelConfig, model_config
from transformer import DenseConfig
from transformer.feedforward import FeedForward


def sparse_linear(x, weight, kept):
    """x Wᵀ for one token whose errors outside ``kept`` never arrive."""
    y = F.linear(x, weight)
    return torch.where(kept, y, y.detach())


def test_gradients_come_from_the_largest_errors_of_each_matrix():
    torch.manual_seed(0)
    layer = FeedForward(5, 7, activation="gelu", error_k=2).double()
    x, d_y = (torch.randn(1, 5, dtype=torch.float64) for _ in range(2))
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(d_y)
    kept_out = torch.zeros(1, 5, dtype=torch.bool).scatter_(1, d_y.abs().topk(2).indices, True)
    pre = F.linear(x, layer.up.weight).detach().requires_grad_()
    error = torch.autograd.grad(sparse_linear(F.gelu(pre), layer.down.weight, kept_out), pre, d_y)[0]
    kept_in = torch.zeros(1, 7, dtype=torch.bool).scatter_(1, error.abs().topk(2).indices, True)
    other, up, down = (t.detach().clone().requires_grad_() for t in (x, layer.up.weight, layer.down.weight))
    sparse_linear(F.gelu(sparse_linear(other, up, kept_in)), down, kept_out).backward(d_y)
    for found, expected in ((leaf, other), (layer.up.weight, up), (layer.down.weight, down)):
        close(found.grad, expected.grad)
    assert (layer.up.weight.grad.abs().sum(1) > 0).sum() == 2


def test_a_matrix_narrower_than_k_keeps_every_error():
    layer, dense = FeedForward(4, 6, error_k=9), FeedForward(4, 6)
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4)
    for each in (layer, dense):
        each(x).square().sum().backward()
    for found, expected in zip(layer.parameters(), dense.parameters(), strict=True):
        close(found.grad, expected.grad)


def test_words_of_a_config():
    made = model_config(
        ModelConfig(feedforward="dense", hidden=32, error_k=8, error_unified=True), vocab_size=31, length=8
    )
    assert made.layers[0].feedforward == DenseConfig(32, error_k=8, error_unified=True)


def test_bad_input():
    with unchecked():
        with pytest.raises(ValueError, match="error_k must be >= 1, got 0"):
            DenseConfig(8, error_k=0)
        with pytest.raises(
            ValueError, match="error_unified needs error_k, the number of errors that are kept, got error_k=None"
        ):
            DenseConfig(8, error_unified=True)
