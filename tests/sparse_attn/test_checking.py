"""What attend is told that is of another kind than its argument."""

import pytest
import torch

from sparse_attn import attend
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
    ],
)
def test_what_is_no_tensor_and_no_layout_is_named(name, given, message):
    q = torch.randn(1, 2, 32, 8)
    with unchecked(), pytest.raises(ValueError, match=message):
        attend(q, q, q, **{name: given})


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
