"""The errors of attend: each names the argument, its bound and its value."""

from collections.abc import Sequence
from math import inf

import numpy as np
import torch
from torch import Tensor

from sparse_attn.choice import Choice
from sparse_attn.layout import BlockLayout
from sparse_attn.patterns import Pattern, PerHead

BACKENDS = ("auto", "reference", "sdpa", "folded", "flex", "triton")


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
) -> None:
    """Shapes and dtypes."""
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    check_shapes(q, k, v, key_mask)
    for name, positions, length in (
        ("query_positions", query_positions, q.shape[2]),
        ("key_positions", key_positions, k.shape[2]),
    ):
        if positions is None:
            continue
        check_tensor(name, positions)
        shapes = ((length,), (q.shape[0], length))
        whole = not positions.is_floating_point() and positions.dtype != torch.bool
        if tuple(positions.shape) not in shapes or not whole:
            raise ValueError(
                f"{name} must be integers [{length}] or {list(shapes[1])}, "
                f"got {positions.dtype} {list(positions.shape)}"
            )


def check_shapes(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """Floating q [B, H, L, d], k [B, Hkv, S, d], v [B, Hkv, S, d_v], Hkv a divisor of H, and a mask over the keys."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, length, head_dim], got shape {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating, got {tensor.dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v must have the batch, heads and length of k={list(k.shape)}, got {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k must have the batch and head_dim of q={list(q.shape)}, got {list(k.shape)}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"key heads must divide the {q.shape[1]} query heads, got {k.shape[1]}")
    check_mask("key_mask", key_mask, k)


def check_tensor(name: str, given: object) -> None:
    """A tensor, not a list of numbers."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(given).__name__}")


def check_integers(name: str, given: Tensor) -> None:
    """A tensor of integers."""
    check_tensor(name, given)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {given.dtype}")


def check_least(name: str, given: object, least: int) -> None:
    """A whole number, which True is not, of at least ``least``."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer | torch.SymInt) or given < least:
        raise ValueError(f"{name} must be >= {least}, got {given!r}")


def check_dimensions(name: str, given: Tensor) -> None:
    """A tensor of integers with 4 dimensions."""
    check_integers(name, given)
    if given.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions, got shape {list(given.shape)}")


def check_within(name: str, given: Tensor, least: int, end: int) -> None:
    """Every number in [least, end)."""
    if not given.numel():
        return
    low, high = (int(x) for x in given.aminmax())
    if low < least or high >= end:
        raise ValueError(f"{name} must be in [{least}, {end}), got {low if low < least else high}")


def check_once(name: str, lists: Tensor) -> None:
    """No list, along the last dimension, names an index twice; -1 stands for none and may come often."""
    # on CPU numpy's sort, which takes a sixth of the time of torch's
    ordered = torch.from_numpy(np.sort(lists.numpy(), -1)) if lists.device.type == "cpu" else lists.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(f"{name} must come at most once in a list, got {int(ordered[..., 1:][twice][0])} twice")


def check_mask(name: str, mask: Tensor | None, k: Tensor) -> None:
    """A mask over the keys of k [B, Hkv, S, d] is bool [B, S]: ~ and indexing take other types for something else."""
    if mask is None:
        return
    check_tensor(name, mask)
    if mask.dtype != torch.bool or mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"{name} must be bool {[k.shape[0], k.shape[2]]}, got {mask.dtype} {list(mask.shape)}")


def check_scores(q: Tensor, softcap: float | None, alibi: Tensor | None, dropout: float) -> None:
    """What is done to the scores of q [B, H, L, d] and to their probabilities."""
    if softcap is not None and not (_is_number(softcap) and 0 < softcap < inf):
        raise ValueError(f"softcap must be finite and > 0, got {softcap!r}")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
    if alibi is None:
        return
    check_tensor("alibi", alibi)
    if tuple(alibi.shape) != (q.shape[1],) or not alibi.is_floating_point():
        raise ValueError(f"alibi must be floating slopes [{q.shape[1]}], got {alibi.dtype} {list(alibi.shape)}")
    if alibi.requires_grad:
        raise ValueError("alibi must be fixed slopes, got a tensor that requires grad")
    # on the CPU alone, and not in a compiled graph: reading a number of a GPU waits for all that it has to do
    if alibi.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(alibi.isfinite().all()):
        raise ValueError(f"alibi must be finite slopes, got {alibi.tolist()}")


def _is_number(given: object) -> bool:
    return isinstance(given, int | float | np.number)


def check_pattern(pattern: object) -> None:
    """A pattern, a sequence with one for each head, or None."""
    if isinstance(pattern, str) or not isinstance(pattern, Pattern | Sequence | None):
        raise ValueError(f"pattern must be a Pattern (parse_pattern reads text), got {pattern!r}")


def check_seed(seed: object) -> None:
    """What torch's generators take as a seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2**63, 2**64), got {seed!r}")


def check_options(
    q: Tensor,
    k: Tensor,
    pattern: Pattern | None,
    layout: object,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float | None,
    softcap: float | None,
    alibi: Tensor | None,
    dropout: float,
    backend: str,
    return_lse: bool,
) -> None:
    """Options that do not fit the tensors or each other."""
    if isinstance(pattern, PerHead) and len(pattern.heads) != q.shape[1]:
        raise ValueError(f"per_head must hold a pattern for each of {q.shape[1]} query heads, got {len(pattern.heads)}")
    if scale is not None and not (_is_number(scale) and -inf < scale < inf):
        raise ValueError(f"scale must be finite, got {scale!r}")
    check_scores(q, softcap, alibi, dropout)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "sdpa" and return_lse:
        raise ValueError("backend='sdpa' gives no log-sum-exp: use 'folded' or 'reference'")
    if backend == "sdpa" and softcap is not None:
        raise ValueError("backend='sdpa' has no softcap: use 'folded' or 'reference'")
    if backend == "triton" and (softcap is not None or alibi is not None):
        raise ValueError("backend='triton' has neither softcap nor alibi: use 'folded' or 'reference'")
    if layout is None:
        return
    if not isinstance(layout, BlockLayout | Choice):
        raise ValueError(
            "layout must be a BlockLayout, as pattern.layout() gives, or what a selection chose (BlockSelection, "
            f"TokenSelection, Buckets), got {type(layout).__name__}"
        )
    if pattern is not None or query_positions is not None or key_positions is not None:
        raise ValueError("layout already holds the pattern and the positions: pass layout alone")
    if isinstance(layout, Choice):
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend must be 'auto' or 'reference' for what a selection chose, got {backend!r}")
        return
    if (layout.q_len, layout.kv_len) != (q.shape[2], k.shape[2]):
        raise ValueError(f"layout must be for lengths {(q.shape[2], k.shape[2])}, got {(layout.q_len, layout.kv_len)}")
    if not torch.compiler.is_compiling():
        layout.check()
