"""Hash routing: the expert is a fixed function of the token's id."""

import heapq
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.checks import at_least, whole
from moe.noise import Source
from moe.routers.linear import check_sizes
from moe.routers.top_k import choose_top_k
from moe.routing import Routing

_BITS = 0xFFFFFFFF
# in place of an expert, in a table that is not made yet
UNKNOWN = -1


class HashRouter(nn.Module):
    """expert = hash(token id), k distinct experts a token, each with weight 1/k. Roller et al. 2021 (arXiv:2106.04426).

    No parameters: the choice is known before the first layer runs, is the same wherever the token stands, and does not
    learn. Without vocab_size the experts come from an integer hash of the id and the seed, for ids of any size: uniform
    over many ids, uneven over few. With vocab_size they come from a fixed table (buffer ``table`` [vocab_size, k]) in
    which each of the k choices spreads the vocabulary over the experts evenly, to within one id. With frequencies
    [vocab_size] as well, the table evens out their sums instead: frequent ids come first, each to the k experts that
    carry least so far (the paper's balanced assignment). frequencies "later": the table waits for :meth:`balance`, or
    for a state dict that holds one. All of it is the same in every process and version.

    scores: 1/k on the chosen experts and 0 elsewhere; logits: their logarithms, with the lowest finite number for the
    logarithm of 0. So softmax(logits) = scores, the entropy is ln k and the z-loss 0; no loss gets a gradient.
    A replay keeps the recorded choices.
    Raises: ValueError for k outside [1, num_experts], for frequencies without vocab_size or of another length or sign,
    without token_ids or before :meth:`balance`, and for ids that are no integers, or of real tokens negative or not
    below vocab_size.

    >>> routing = HashRouter(8, 4, k=2)(torch.randn(3, 8), token_ids=torch.tensor([7, 8, 7]))
    >>> routing.expert[:2].equal(routing.expert[4:]), routing.weight.tolist()
    (True, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    """

    table: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 1,
        vocab_size: int | None = None,
        seed: int = 0,
        frequencies: Float[Tensor, "V"] | Int[Tensor, "V"] | Literal["later"] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_experts=num_experts, k=k)
        if vocab_size is not None:
            at_least("vocab_size", vocab_size, 1)
        whole("seed", seed)
        self.dim, self.num_experts, self.k, self.vocab_size, self.seed = dim, num_experts, k, vocab_size, seed
        table = None
        # counted on the CPU, wherever the table lies
        with torch.device("cpu"):
            if isinstance(frequencies, Tensor):
                table = balanced_table(_checked(frequencies, vocab_size).tolist(), num_experts, k)
            elif frequencies is not None:
                table = torch.full((_size_of_table(vocab_size), k), UNKNOWN)
            elif vocab_size is not None:
                table = even_table(vocab_size, num_experts, k, seed)
        self.register_buffer("table", None if table is None else table.to(torch.get_default_device()))

    @property
    def waits(self) -> bool:
        """Whether the table is still to be made, by :meth:`balance`."""
        return self.table is not None and int(self.table[0, 0]) == UNKNOWN

    def balance(self, frequencies: Float[Tensor, "V"] | Int[Tensor, "V"]) -> None:
        """Make the table anew so that these frequencies of the ids fall on the experts evenly.

        Raises: ValueError for a router without a table, and as the constructor.
        """
        if self.table is None:
            raise ValueError("a HashRouter must have a table to balance: give it vocab_size")
        with torch.device("cpu"):
            table = balanced_table(_checked(frequencies, self.vocab_size).tolist(), self.num_experts, self.k)
        self.table.copy_(table)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        token_ids: Int[Tensor, "T"] | None = None,
        padding_mask: Bool[Tensor, "T"] | None = None,
        replay: Routing | None = None,
        generator: Source | None = None,
    ) -> Routing:
        """Route by token_ids. Of x only the width, device and precision matter; generator is not used."""
        if x.shape[1] != self.dim:
            raise ValueError(f"x must have width dim={self.dim}, got {x.shape[1]}")
        expert = self._look_up(self._checked_ids(x, token_ids, padding_mask))
        chosen = torch.zeros(x.shape[0], self.num_experts, dtype=torch.bool, device=x.device).scatter_(1, expert, True)
        scores = chosen.to(torch.promote_types(x.dtype, torch.float32)) / self.k
        logits = scores.log().clamp_min(torch.finfo(scores.dtype).min)
        if replay is not None:
            routing = choose_top_k(logits, 1, renormalize=False, real=padding_mask, replay=replay)
            token, expert, real, dropped = routing.token, routing.expert, routing.real, routing.dropped
        else:
            rows = torch.arange(x.shape[0], device=x.device)
            rows = rows if padding_mask is None else rows[padding_mask]
            token, expert, real = rows.repeat_interleave(self.k), expert[rows].reshape(-1), padding_mask
            dropped = token.new_zeros(0, 2)
        return Routing(
            token, expert, torch.full_like(token, 1 / self.k, dtype=scores.dtype), logits, scores, self.num_experts,
            x.shape[0], dropped=dropped, real=real,
        )  # fmt: skip

    def _look_up(self, ids: Int[Tensor, "T"]) -> Int[Tensor, "T K"]:
        if self.table is None:
            return distinct_experts(ids, self.num_experts, self.k, self.seed)
        if self.waits:
            raise ValueError("the table of frequencies='later' must be made before routing: call balance(frequencies)")
        return self.table[ids]

    def _checked_ids(
        self, x: Float[Tensor, "T D"], ids: Int[Tensor, "T"] | None, real: Bool[Tensor, "T"] | None
    ) -> Int[Tensor, "T"]:
        if ids is None:
            raise ValueError("token_ids must be given to a HashRouter, one for each token, got None")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"token_ids must be integers, got {ids.dtype}")
        if real is not None and real.dtype != torch.bool:
            raise ValueError(f"padding_mask must be bool, True for real tokens, got {real.dtype}")
        for name, values in (("token_ids", ids), ("padding_mask", real)):
            if values is not None and values.shape != x.shape[:1]:
                raise ValueError(f"{name} must have shape [{x.shape[0]}], one entry a token, got {list(values.shape)}")
        # padding often carries an id like -100; whatever it is, it is not routed
        ids = ids.long() if real is None else ids.long().masked_fill(~real, 0)
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < 0:
            raise ValueError(f"token_ids must be >= 0, got {low}")
        if self.vocab_size is not None and high >= self.vocab_size:
            raise ValueError(f"token_ids must be < vocab_size={self.vocab_size}, got {high}")
        return ids

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}"
        return f"{sizes}, vocab_size={self.vocab_size}, seed={self.seed}"


def mix(ids: Int[Tensor, "..."], seed: int) -> Int[Tensor, "..."]:
    """A 32-bit hash of each id ≥ 0 and the seed, as int64 in [0, 2^32): xor-shift-multiply rounds, twice.

    The multipliers stay below 2^31, so that products of 32-bit numbers fit into int64 on every device.
    """
    return _scramble(_scramble((ids ^ (ids >> 32)) & _BITS) ^ int(_scramble(torch.tensor((seed + 0x9E3779B9) & _BITS))))


def _scramble(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _BITS
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _BITS
    return x ^ (x >> 15)


def distinct_experts(ids: Int[Tensor, "T"], num_experts: int, k: int, seed: int) -> Int[Tensor, "T K"]:
    """k different experts for each id: hash j, modulo E − j, counts through the experts not chosen yet."""
    chosen: list[Tensor] = []
    for j in range(k):
        pick = mix(ids, seed * num_experts + j) % (num_experts - j)
        for earlier in torch.stack(chosen).sort(dim=0).values if chosen else ():
            pick = pick + (pick >= earlier)
        chosen.append(pick)
    return torch.stack(chosen, dim=1)


def even_table(vocab_size: int, num_experts: int, k: int, seed: int) -> Int[Tensor, "V K"]:
    """k different experts for each id, such that for each j the j-th choices differ by at most one id in number.

    The ids, in the order of their hashes, are dealt to the experts round by round; choice j deals every round with a
    rotation of its own, so that two ids that share one expert need not share the others.
    """
    order = mix(torch.arange(vocab_size), seed).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(vocab_size))
    rotation = distinct_experts(place // num_experts, num_experts, k, seed)
    return (place[:, None] + rotation) % num_experts


def balanced_table(frequencies: list[float], num_experts: int, k: int) -> Int[Tensor, "V K"]:
    """k different experts for each id: the ids, most frequent first, each take the k experts of least total so far."""
    table = torch.empty(len(frequencies), k, dtype=torch.int64)
    totals = [(0.0, expert) for expert in range(num_experts)]
    for token in sorted(range(len(frequencies)), key=lambda t: -frequencies[t]):
        lightest = [heapq.heappop(totals) for _ in range(k)]
        table[token] = torch.tensor([expert for _, expert in lightest])
        for total, expert in lightest:
            heapq.heappush(totals, (total + frequencies[token], expert))
    return table


def _size_of_table(vocab_size: int | None) -> int:
    if vocab_size is None:
        raise ValueError("vocab_size must be given with frequencies='later', got None")
    return vocab_size


def _checked(frequencies: Tensor, vocab_size: int | None) -> Tensor:
    if vocab_size is None or list(frequencies.shape) != [vocab_size]:
        raise ValueError(f"frequencies must have shape [vocab_size={vocab_size}], got {list(frequencies.shape)}")
    if not (frequencies.isfinite().all() and (frequencies >= 0).all()):
        raise ValueError(f"frequencies must be finite and >= 0, got a least of {frequencies.min().item()}")
    return frequencies.double()
