"""Random numbers keyed by what they are for: the same whichever process, micro-batch or recomputation draws them."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# writes random numbers into a tensor from a generator
Fill = Callable[[Tensor, torch.Generator], object]
SITE = "router"


@dataclass(frozen=True)
class Noise:
    """The random numbers of a step: a function of (key, site, sequence), with no state that moves on.

    At every site a sequence of the batch has a generator of its own, seeded by a hash of the three, and what it draws
    depends on nothing else. So it does not matter how a batch is split over processes and micro-batches, nor whether
    something is computed again; and a run that resumes at a step draws what it would have drawn.
    key: names seed, step and layer. sequences: how many are here; first: index of the first of them in the whole batch.

    >>> whole = Noise("seed 7, step 0", sequences=4)
    >>> draw = lambda noise: noise.draw("x", torch.empty(noise.sequences, 3), lambda part, g: part.normal_(generator=g))
    >>> torch.equal(draw(whole)[2:], draw(whole.rows(2, 4)))
    True
    """

    key: str
    sequences: int
    first: int = 0

    def at(self, place: object) -> "Noise":
        """Other numbers, for a part of the model: a layer."""
        return dataclasses.replace(self, key=f"{self.key}/{place}")

    def rows(self, start: int, stop: int) -> "Noise":
        """Those of the sequences start … stop of these."""
        return dataclasses.replace(self, sequences=stop - start, first=self.first + start)

    @torch.compiler.disable(reason="generators are seeded on the host")
    def draw(self, site: str, like: Float[Tensor, "T *rest"], fill: Fill) -> Float[Tensor, "T *rest"]:
        """Numbers in the shape, dtype and device of ``like``, whose T rows are equal runs of each sequence in order.

        Raises: ValueError unless the sequences divide T.
        """
        if len(like) % max(self.sequences, 1) or (len(like) and not self.sequences):
            raise ValueError(f"noise of {self.sequences} sequences must fill equal runs of rows, got {len(like)} rows")
        found = torch.empty_like(like, requires_grad=False, memory_format=torch.contiguous_format)
        generator = torch.Generator(like.device)
        each = len(like) // max(self.sequences, 1)
        for row in range(self.sequences):
            fill(found[row * each : (row + 1) * each], generator.manual_seed(self._seed(f"{site}/{self.first + row}")))
        return found

    @torch.compiler.disable(reason="generators are seeded on the host")
    def shared(self, site: str, device: torch.device | None = None) -> torch.Generator:
        """A generator for what all sequences share: the weights that a step drops, a layer that it skips."""
        return torch.Generator(device or "cpu").manual_seed(self._seed(site))

    def _seed(self, what: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.key}/{what}".encode(), digest_size=7).digest())


# where an algorithm draws from
Source = torch.Generator | Noise


def drawn(source: int | Noise, like: Float[Tensor, "T *rest"], fill: Fill) -> Float[Tensor, "T *rest"]:
    """Numbers in the shape, dtype and device of ``like``: all at once from a seed, or a router's of :class:`Noise`."""
    if isinstance(source, Noise):
        return source.draw(SITE, like, fill)
    found = torch.empty_like(like, requires_grad=False)
    fill(found, torch.Generator(device=like.device).manual_seed(source))
    return found
