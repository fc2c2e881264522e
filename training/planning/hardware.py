"""Accelerators by name, as their makers describe them, and how many of them stand together."""

import difflib
from dataclasses import dataclass, replace
from typing import Self

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Hardware:
    """One accelerator.

    memory: bytes; half, single: dense FLOP/s of matrix products in bfloat16 and in float32 (TF32 where there is one);
    read: bytes/s of its memory; link: bytes/s that it can send to another one in its node, one way.
    """

    name: str
    memory: float
    half: float
    single: float
    read: float
    link: float


# Makers' data sheets, dense rates (without 2:4 sparsity), SXM boards where there are several. The sheets' NVLink and
# Infinity Fabric figures are sums of both directions, and are halved here.
HARDWARE = {
    one.name: one
    for one in (
        Hardware("a100", 80 * GB, 312 * TERA, 156 * TERA, 2039 * GB, 300 * GB),
        Hardware("h100", 80 * GB, 989 * TERA, 494 * TERA, 3350 * GB, 450 * GB),
        Hardware("h200", 141 * GB, 989 * TERA, 494 * TERA, 4800 * GB, 450 * GB),
        Hardware("b200", 180 * GB, 2250 * TERA, 1100 * TERA, 8000 * GB, 900 * GB),
        Hardware("mi300x", 192 * GB, 1307 * TERA, 653 * TERA, 5300 * GB, 448 * GB),
        Hardware("l40s", 48 * GB, 362 * TERA, 183 * TERA, 864 * GB, 32 * GB),
        Hardware("rtx4090", 24 * GB, 165 * TERA, 82 * TERA, 1008 * GB, 32 * GB),
    )
}


@dataclass(frozen=True)
class Cluster:
    """``gpus`` accelerators, ``per_node`` to a node; network: bytes/s that each can send to another node."""

    gpu: Hardware
    gpus: int
    per_node: int = 8
    network: float = 50 * GB
    latency: float = 10e-6

    def __post_init__(self) -> None:
        for name in ("gpus", "per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.network > 0:
            raise ValueError(f"bandwidth must be positive, got {self.network}")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(f"gpus must fill whole nodes of {self.per_node}, got {self.gpus}")

    @classmethod
    def named(
        cls, gpu: str, gpus: int, *, per_node: int = 8, network: float = 50 * GB, memory: float | None = None
    ) -> Self:
        """memory: bytes, instead of the data sheet's. Raises: ValueError for an unknown name, with the nearest."""
        if gpu not in HARDWARE:
            nearest = difflib.get_close_matches(gpu.lower(), HARDWARE, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(HARDWARE)}"
            raise ValueError(f"gpu must be one of the table, got {gpu!r}: {hint}")
        chosen = HARDWARE[gpu] if memory is None else replace(HARDWARE[gpu], memory=memory)
        return cls(chosen, gpus, per_node=per_node, network=network)

    def ring(self, ranks: int, *, apart: int = 1) -> float:
        """bytes/s of each rank in a ring of so many ranks, ``apart`` places from each other.

        Inside a node the link. Across nodes the rings of a collective use the network ports of all ranks of a node that
        take part, and are not faster than the link.
        """
        if (ranks - 1) * apart < self.per_node:
            return self.gpu.link
        sharing = max(1, self.per_node // apart)
        return min(self.gpu.link, self.network * sharing)

    def pairwise(self, ranks: int) -> float:
        """bytes/s of each rank in an all-to-all among ``ranks`` that follow each other.

        Of equal shares for all others, those for other nodes go through the rank's own network port.
        """
        near = min(ranks, self.per_node) - 1
        far = ranks - 1 - near
        seconds = near / self.gpu.link + far / self.network
        return (ranks - 1) / seconds if seconds else self.gpu.link
