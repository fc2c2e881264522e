"""What becomes of scores under every choice of keys: softcap, the ALiBi bias, dropped probabilities.

The pairs of a choice are computed in pieces whose order depends on the choice, and again in the backward pass. So
whether dropout takes a probability is a function of its sequence's seed, head, query and key, and not of a draw.
Two branches see what a pattern shows, NSA's window and DSA's warm-up (:func:`attend_pattern`): they draw from torch's
generator under the sequence's seed, so that there the lengths matter too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.attend import attend
from sparse_attn.checking import check_scores
from sparse_attn.patterns import Pattern
from sparse_attn.seeding import attend_seeded

# of SplitMix64 (Steele, Lea and Flood 2014), as the signed numbers that torch has
GOLDEN, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Pairs(NamedTuple):
    """Whose score each number is: sequence, query head, positions of query and key; integers that broadcast to it."""

    batch: Tensor
    head: Tensor
    query: Tensor
    key: Tensor


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """s_ij = cap(scale · q_i·k_j) - alibi_h · |i - j|, cap(x) = softcap · tanh(x / softcap), and dropout of softmax(s).

    The three as in :func:`sparse_attn.attend`; dropout acts wherever it is given: pass 0 in evaluation. seeds: of each
    sequence, for what it drops; None: drawn from torch's global generator.

    >>> MoBA(block=64, top_k=8)(q, k, v, scoring=ScoreOptions(softcap=50.0, alibi=alibi_slopes(8)))
    """

    softcap: float | None = None
    alibi: Float[Tensor, "H"] | None = None
    dropout: float = 0.0
    seeds: Int[Tensor, "B"] | None = None

    @property
    def plain(self) -> bool:
        """Whether a score is scale · q·k alone."""
        return self.softcap is None and self.alibi is None

    def for_call(self, q: Float[Tensor, "B H L d"]) -> "ScoreOptions":
        """The same where q is, with a seed for every sequence if any is needed. Raises: ValueError for what does not
        fit q."""
        check_scores(q, self.softcap, self.alibi, self.dropout)
        if self.seeds is not None and (tuple(self.seeds.shape) != (q.shape[0],) or self.seeds.dtype != torch.int64):
            raise ValueError(f"seeds must be int64 [{q.shape[0]}], got {self.seeds.dtype} {list(self.seeds.shape)}")
        seeds = self.seeds
        if self.dropout and seeds is None:
            seeds = torch.randint(2**62, (q.shape[0],), device=q.device)
        slopes = None if self.alibi is None else self.alibi.to(q.device)
        return replace(self, alibi=slopes, seeds=None if seeds is None else seeds.to(q.device))

    def score_(self, scores: Tensor, pairs: Callable[[], Pairs], *, derivative: bool = False) -> Tensor | None:
        """Cap scale · q·k and add the bias, in place; the derivative of the capped score, where it is not 1."""
        slope = None
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_()
            slope = 1 - scores.square() if derivative else None
            scores.mul_(self.softcap)
        if self.alibi is not None:
            _, head, query, key = pairs()
            scores.addcmul_(self.alibi.to(scores)[head], (query - key).abs().to(scores.dtype), value=-1)
        return slope

    def keep(self, pairs: Callable[[], Pairs], like: Tensor, *, branch: int = 0) -> Tensor | None:
        """Factors on the probabilities, 0 or 1 / (1 - dropout), in the dtype of ``like``; None without dropout.
        branch: of a layer that has several kinds of probabilities."""
        if not self.dropout or self.seeds is None:
            return None
        return (~dropped(self.seeds, pairs(), self.dropout, branch)).to(like.dtype).div_(1 - self.dropout)


PLAIN = ScoreOptions()


def dropped(seeds: Int[Tensor, "B"], pairs: Pairs, rate: float, branch: int = 0) -> Bool[Tensor, "..."]:
    """Whether dropout at ``rate`` takes a probability: number ``key`` of the SplitMix64 of its query and head."""
    # 32 bits of positions would wrap
    batch, head, query, key = (x.long() for x in pairs)
    row = _mixed(seeds[batch] + _signed((branch + 1) * GOLDEN))
    row = _mixed(row + head * GOLDEN)
    row = _mixed(row + query * GOLDEN)
    return _mixed(row + (key + 1) * GOLDEN) < int(rate * 2**64) - 2**63


def _signed(x: int) -> int:
    """x modulo 2^64, as torch's int64 holds it."""
    return (x + 2**63) % 2**64 - 2**63


def _mixed(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The finaliser of SplitMix64, of which each bit of x moves each bit."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    """x >> places of unsigned numbers."""
    return (x >> places) & (2 ** (64 - places) - 1)


def attend_pattern(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    pattern: Pattern,
    options: ScoreOptions,
    key_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H L d_v"]:
    """:func:`sparse_attn.attend` with these options; a sequence's dropout draws under its own seed."""

    def some(rows: slice) -> Tensor:
        return attend(
            q[rows], k[rows], v[rows], pattern=pattern, softcap=options.softcap, alibi=options.alibi,
            dropout=options.dropout, key_mask=None if key_mask is None else key_mask[rows],
        )  # fmt: skip

    if not options.dropout or options.seeds is None:
        return some(slice(None))
    return attend_seeded(some, options.seeds.tolist(), q.device)
