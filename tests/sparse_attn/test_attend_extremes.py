"""Scores as large as floats, and no scores at all: the folded backend gives what the reference gives."""

import pytest
import torch

from sparse_attn import attend, causal, parse_pattern, sinks, sliding_window
from tests.tolerances import close

LOUD = ["causal() & sliding_window(100)", "causal() & (sliding_window(70) | sinks(4))"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("text", LOUD)
def test_scores_of_any_size_give_the_gradients_of_their_values(text, tiles, padded, monkeypatch):
    """The backward computes the scores once more: where those are large, a last bit is worth a probability."""
    monkeypatch.setattr("sparse_attn.backends.work._has_tiles", lambda: tiles)
    q, k, v, weight = (torch.randn(1, 2, 512, 64) for _ in range(4))
    mask = torch.ones(1, 512, dtype=torch.bool) if padded else None
    for size, error in ((10.0, 1e-5), (1e3, 1e-3), (1e6, 1e-5), (1e12, 1e-5)):
        found = []
        for backend, dtype in (("folded", torch.float32), ("reference", torch.float64)):
            x = [(one * factor).to(dtype).requires_grad_() for one, factor in ((q, size), (k, 1), (v, 1))]
            out = attend(*x, pattern=parse_pattern(text), backend=backend, key_mask=mask)
            found.append(torch.autograd.grad(out, x, weight.to(dtype))[2].double())
        assert (found[0] - found[1]).abs().max() <= error * found[1].abs().max(), size


def test_large_scores_of_which_the_log_sum_exp_has_a_gradient_too():
    """torch's kernel is for none of those, and its log-sum-exp is of scores that were rounded otherwise."""
    q, k, v, weight = (torch.randn(1, 2, 512, 64) for _ in range(4))
    for size in (1e6, 1e12):
        x = [(one * factor).requires_grad_() for one, factor in ((q, size), (k, 1), (v, 1))]
        out, lse = attend(*x, pattern=causal() & sliding_window(100), return_lse=True)
        (grad,) = torch.autograd.grad((out * weight).sum() + lse.sum(), x[2])
        assert grad.abs().max() <= 100 * weight.abs().max(), size  # no probability is above one


@pytest.mark.parametrize(("heads", "width", "value_width"), [(2, 0, 4), (2, 4, 0), (2, 0, 0), (0, 4, 4), (0, 0, 0)])
def test_no_heads_and_heads_of_no_width(heads, width, value_width):
    q, k = torch.randn(1, heads, 300, width), torch.randn(1, 2, 300, width)
    v = torch.randn(1, 2, 300, value_width, requires_grad=True)
    pattern = causal() & (sliding_window(100) | sinks(2))
    found, expected = (
        attend(q, k, v, pattern=pattern, return_lse=True, scale=1.0, backend=backend)
        for backend in ("folded", "reference")
    )
    for actual, wanted in zip(found, expected, strict=True):
        close(actual, wanted)
    if heads:
        assert torch.autograd.grad(found[0].sum(), v, materialize_grads=True)[0].shape == v.shape
