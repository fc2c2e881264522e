"""Patterns whose keys lie at multiples of a step attend each remainder apart, as the reference does."""

from dataclasses import replace

import pytest
import torch

from sparse_attn import alibi_slopes, attend, parse_pattern
from sparse_attn.backends.plan import make_plan
from tests.sparse_attn.test_attend import grads, tensors
from tests.tolerances import close

CASES = [
    ("causal() & dilated(16, 4)", 256, 256, 4),
    ("causal() & dilated(16, 4)", 256, 320, 4),
    ("dilated(20, 2)", 250, 250, 2),
    ("causal() & (dilated(8, 8) | dilated(40, 4))", 200, 200, 4),
]
OPTIONS = {
    "plain": {},
    "capped": {"softcap": 2.0, "alibi": alibi_slopes(4)},
    "padded": {"key_mask": torch.tensor([[False] * 3 + [True] * 400, [True] * 403])},
    "half": {},
}


@pytest.mark.parametrize(("text", "q_len", "kv_len", "step"), CASES)
@pytest.mark.parametrize("case", OPTIONS)
def test_attend_equals_the_reference(text, q_len, kv_len, step, case):
    dtype = torch.bfloat16 if case == "half" else torch.float64
    inputs = tensors(2, 4, 2, q_len, kv_len, 6, dtype=dtype)
    layout = parse_pattern(text).layout(q_len, kv_len, block=16, offset=kv_len - q_len)
    plan = make_plan(layout)
    assert plan.inner is not None and plan.inner[0] == step
    assert plan.inner[1].layout.visible_pairs() * step == layout.visible_pairs()
    options = dict(OPTIONS[case])
    if case == "padded":
        options["key_mask"] = options["key_mask"][:, :kv_len]
    weight, lse_weight = torch.randn(2, 4, q_len, 6, dtype=dtype), torch.randn(2, 4, q_len, dtype=dtype)
    results = []
    for backend in ("auto", "reference"):
        out, lse = attend(*inputs, layout=layout, backend=backend, return_lse=True, **options)
        taken = None if case == "half" else lse
        results.append((out, lse, *grads(out, taken, inputs, weight, lse_weight)))
    assert results[0][0].dtype == dtype
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, dtype)


def test_dropout_gradient_is_that_of_the_sampled_function():
    inputs = tensors(1, 2, 1, 64, 64, 3)
    layout = parse_pattern("causal() & dilated(8, 4)").layout(64, block=16)

    def sampled(*inputs):
        torch.manual_seed(3)
        return attend(*inputs, layout=layout, dropout=0.4)[:, :, ::21]

    assert torch.autograd.gradcheck(sampled, inputs, fast_mode=True)


def test_what_has_no_common_step_is_left_whole():
    dilated = parse_pattern("causal() & dilated(16, 4)")
    assert make_plan(dilated.layout(254, block=16)).inner is None  # no multiple of the step
    assert make_plan(dilated.layout(256, 256, block=16, offset=3)).inner is None  # distances are no multiples of it
    assert make_plan(parse_pattern("causal() & sliding_window(40)").layout(256, block=16)).inner is None
    layout = dilated.layout(256, block=16)
    masks = layout.masks.clone()
    masks[layout.mask_index[-1], 5, 5] = False
    assert make_plan(replace(layout, masks=masks)).inner is None  # remainders differ
