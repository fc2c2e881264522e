"""The flex backend against the dense reference: on CPU forwards only, which is what torch has there."""

import pytest
import torch

from sparse_attn import alibi_slopes, attend, causal, sinks, sliding_window, strided
from tests.tolerances import close

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention has gradients on CUDA only")


def make(length, keys, *, heads=4, kv_heads=2, dim=16, device="cpu"):
    draws = torch.Generator().manual_seed(length)
    sizes = ((heads, length), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(2, *size, dim, generator=draws).to(device) for size in sizes]


# every case is one compilation, of seconds: each holds several things
CASES = {
    "window-and-sinks": (causal() & (sliding_window(50) | sinks(4)), 300, 300, {}),
    "padding-and-rest": (causal() & strided(17), 130, 257, {"masked": True}),
    # both sides of a query, which stands 70 keys on: |i + 70 - j|
    "scores": (sliding_window(90), 130, 200, {"softcap": 2.0, "alibi": alibi_slopes(4)}),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_is_that_of_the_reference(name):
    pattern, length, keys, options = CASES[name]
    q, k, v = make(length, keys)
    options = dict(options)
    if options.pop("masked", False):
        options["key_mask"] = torch.rand(2, keys, generator=torch.Generator().manual_seed(0)) > 0.3
        options["key_mask"][0, :200] = False  # whole queries see nothing
    close(attend(q, k, v, pattern=pattern, backend="flex", **options),
          attend(q, k, v, pattern=pattern, backend="reference", **options))  # fmt: skip


def test_nothing_to_see_gives_zeros():
    q, k, v = make(3, 0)
    assert attend(q, k, v, pattern=causal(), backend="flex").eq(0).all()


@pytest.mark.parametrize("change, message", [
    ({"dropout": 0.1}, "has no dropout: dropout must be 0, got 0.1"),
    ({"return_lse": True}, "gives no log-sum-exp on CPU"),
    ({"grad": True}, "has no gradients on CPU"),
])  # fmt: skip
def test_what_torch_does_not_have_is_refused(change, message):
    q, k, v = make(9, 9)
    if change.pop("grad", False):
        q.requires_grad_()
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, pattern=causal() & sliding_window(3), backend="flex", **change)


@GPU
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_reference(name):
    pattern, length, keys, options = CASES[name]
    inputs = [x.requires_grad_() for x in make(length, keys, device="cuda")]
    options = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in options.items() if key != "masked"}
    results = []
    for backend in ("flex", "reference"):
        out, lse = attend(*inputs, pattern=pattern, backend=backend, return_lse=True, **options)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, torch.bfloat16)
