"""A key–value cache that keeps only what its pattern can still see."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.patterns import Pattern


class KVCache:
    """Keys and values of one attention layer during generation, in the exact mode: positions are absolute.

    Before each append, keys that no later query can see (``pattern.retained``) are dropped as soon as more than
    ``slack`` of them have piled up, so that a step copies nothing most of the time. With
    ``causal() & (sliding_window(w) | sinks(n))`` at most w + n + slack keys are held between steps, at any length.
    Keys may be stored after RoPE. Attention over what is returned, with the positions that come with it, equals the
    full-sequence forward whatever the sizes of the chunks:

    >>> keys, values, key_positions = cache.append(k, v)
    >>> query_positions = torch.arange(cache.length - k.shape[2], cache.length)
    >>> attend(q, keys, values, pattern=cache.pattern, query_positions=query_positions,
    ...        key_positions=key_positions, key_mask=cache.key_mask)
    """

    def __init__(self, pattern: Pattern, *, slack: int = 64) -> None:
        if slack < 0:
            raise ValueError(f"slack must be >= 0, got {slack}")
        self.pattern = pattern
        self.slack = slack
        self.length = 0
        self._held = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._positions: Tensor | None = None
        self._mask: Tensor | None = None

    @property
    def held(self) -> int:
        """Keys held now; ``length`` counts all that were ever appended."""
        return self._held

    @property
    def key_mask(self) -> Bool[Tensor, "B S"] | None:
        """Which of the held keys are real, aligned with what ``append`` returned; None if no mask was ever given."""
        return None if self._mask is None else self._mask[:, : self._held]

    @torch.no_grad()
    def append(
        self,
        k: Float[Tensor, "B Hkv n d"],
        v: Float[Tensor, "B Hkv n d_v"],
        *,
        key_mask: Bool[Tensor, "B n"] | None = None,
    ) -> tuple[Float[Tensor, "B Hkv S d"], Float[Tensor, "B Hkv S d_v"], Int[Tensor, "S"]]:
        """Add the next n positions; give all held keys and values and their positions, ascending.

        key_mask: False for padding (left-padded batches). The result is a view that the next append may change.
        Raises: ValueError if shapes or types differ from those held.
        """
        self._check(k, v, key_mask)
        self._drop()
        self._reserve(k, v, key_mask is not None)
        end = self._held + k.shape[2]
        self._keys[:, :, self._held : end] = k
        self._values[:, :, self._held : end] = v
        self._positions[self._held : end] = torch.arange(self.length, self.length + k.shape[2], device=k.device)
        if self._mask is not None:
            self._mask[:, self._held : end] = True if key_mask is None else key_mask
        self._held, self.length = end, self.length + k.shape[2]
        return self._keys[:, :, :end], self._values[:, :, :end], self._positions[:end]

    def _drop(self) -> None:
        if self._positions is None:
            return
        kept = self.pattern.retained(self._positions[: self._held], self.length).nonzero().squeeze(1)
        if self._held - kept.numel() <= self.slack:
            return
        self._keys, self._values = self._keys[:, :, kept], self._values[:, :, kept]
        self._positions = self._positions[kept]
        self._mask = None if self._mask is None else self._mask[:, kept]
        self._held = kept.numel()

    def _reserve(self, k: Tensor, v: Tensor, masked: bool) -> None:
        """Room for the new keys; by halves, so that n appends copy O(n)."""
        if self._keys is None:
            self._keys, self._values = k[:, :, :0], v[:, :, :0]
            self._positions = torch.zeros(0, dtype=torch.long, device=k.device)
        if masked and self._mask is None:
            self._mask = torch.ones(k.shape[0], self._keys.shape[2], dtype=torch.bool, device=k.device)
        needed = self._held + k.shape[2]
        if needed <= self._keys.shape[2]:
            return
        room = needed + max(self.slack, needed // 2)
        self._keys, self._values = _widen(self._keys, 2, room), _widen(self._values, 2, room)
        self._positions = _widen(self._positions, 0, room)
        self._mask = None if self._mask is None else _widen(self._mask, 1, room)

    def _check(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        if k.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"k and v must be [B, Hkv, n, d] with equal B, Hkv, n, got {list(k.shape)}, {list(v.shape)}"
            )
        if key_mask is not None and key_mask.shape != (k.shape[0], k.shape[2]):
            raise ValueError(f"key_mask must be {[k.shape[0], k.shape[2]]}, got {list(key_mask.shape)}")
        for name, new, old in (("k", k, self._keys), ("v", v, self._values)):
            if old is not None and (old.shape[:2], old.shape[3], old.dtype) != (new.shape[:2], new.shape[3], new.dtype):
                raise ValueError(
                    f"{name} must match the cache: {list(old.shape[:2])}, head_dim {old.shape[3]}, {old.dtype}, "
                    f"got {list(new.shape)} {new.dtype}"
                )


def _widen(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    wider = tensor.new_zeros(shape)
    wider.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return wider
