import pytest
import torch

from sparse_attn import attend, parse_pattern
from sparse_attn.backends.plan import make_plan
from tests.sparse_attn.test_attend import grads, tensors
from tests.tolerances import close


@pytest.mark.parametrize(
    "text", ["causal() & sliding_window(140)", "sliding_window(75)", "causal() & sliding_window(136)"]
)
@pytest.mark.parametrize(("heads", "padded"), [((2, 2), False), ((4, 2), True)])
def test_wide_windows_read_several_query_blocks_as_one(text, heads, padded):
    layout = parse_pattern(text).layout(333, block=8)
    assert any(strip.height > 8 for strip in make_plan(layout).strips)
    inputs = tensors(1, *heads, 333, 333, 3)
    key_mask = torch.rand(1, 333) > 0.2 if padded else None
    weight = torch.randn_like(inputs[0])
    results = []
    for seen in ({"layout": layout}, {"pattern": parse_pattern(text), "backend": "reference"}):
        out = attend(*inputs, key_mask=key_mask, **seen)
        results.append((out, *grads(out, None, inputs, weight, None)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
