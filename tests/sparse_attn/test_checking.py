"""What attend is told that is of another kind than its argument."""

import math
import re

import pytest
import torch

from sparse_attn import attend, explain_backend
from sparse_attn.selection import DSA
from tests.typecheck import unchecked


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("layout", torch.ones(32, 32, dtype=torch.bool), r"as pattern\.layout\(\) gives, .*got Tensor"),
        ("alibi", [1.0, 2.0], "alibi must be a tensor, got list"),
        ("query_positions", list(range(32)), "query_positions must be a tensor, got list"),
        ("key_positions", range(32), "key_positions must be a tensor, got range"),
        ("key_mask", [[True] * 32], "key_mask must be a tensor, got list"),
        ("query_positions", torch.ones(32, dtype=torch.bool), r"query_positions must be integers \[32\].* torch.bool"),
        ("key_positions", torch.ones(1, 32, dtype=torch.bool), r"key_positions must be integers \[32\].* torch.bool"),
        ("softcap", "3", "softcap must be finite and > 0, got '3'"),
        ("softcap", math.nan, "softcap must be finite and > 0, got nan"),
        ("dropout", None, r"dropout must be in \[0, 1\), got None"),
        ("scale", "a", "scale must be finite, got 'a'"),
        ("scale", [1.0], r"scale must be finite, got \[1.0\]"),
        ("alibi", torch.tensor([0.5, math.nan]), r"alibi must be finite slopes, got \[0.5, nan\]"),
        ("alibi", torch.tensor([-math.inf, 0.5]), r"alibi must be finite slopes, got \[-inf, 0.5\]"),
        ("pattern", 3, "pattern must be a Pattern .*got 3"),
        ("pattern", "full()", r"pattern must be a Pattern .*got 'full\(\)'"),
    ],
)
def test_what_is_no_tensor_and_no_layout_is_named(name, given, message):
    q = torch.randn(1, 2, 32, 8)
    with unchecked(), pytest.raises(ValueError, match=message):
        attend(q, q, q, **{name: given})


@pytest.mark.parametrize("wrong", [3, "full()"])
def test_what_is_no_pattern_has_no_backend(wrong):
    with unchecked(), pytest.raises(ValueError, match=f"pattern must be a Pattern .*got {re.escape(repr(wrong))}"):
        explain_backend(wrong, 4)


def test_a_selection_names_what_is_no_tensor():
    q, hidden = torch.randn(1, 2, 9, 4), torch.randn(1, 9, 6)
    for keys, message in (([1.0], "k must be a tensor, got list"), (None, "k must be a tensor, got NoneType")):
        with unchecked(), pytest.raises(ValueError, match=message):
            DSA(6, top_k=2)(q, keys, q, hidden=hidden)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_queries_keys_and_values_are_tensors(name):
    q = torch.randn(1, 2, 4, 8)
    with unchecked(), pytest.raises(ValueError, match=f"{name} must be a tensor, got NoneType"):
        attend(**({"q": q, "k": q, "v": q} | {name: None}))
