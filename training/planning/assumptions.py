"""What a plan is made for: a mesh, the work of a rank in a step, and the numbers that are assumed."""

from dataclasses import dataclass

from training.distributed.fitting import Shard


@dataclass(frozen=True)
class Assumptions:
    """efficiency: share of the peak that matrix products reach; overlap: share of a pass that can hide the exchanges
    that run beside it; read_efficiency: of the memory's rate in the optimiser and in FSDP2's copies; imbalance: FLOPs
    of experts on the busiest rank against the mean; gloo: exchanges go through gloo, which joins CPUs: it reduces all
    where FSDP2 asks for a part, and copies what it gathers; host: seconds of a step that no number of tokens changes;
    host_sharded, host_spread: more of them in a micro-batch for each block and the root that FSDP2 shards, and for each
    layer whose experts are spread, their exchanges apart."""

    efficiency: float = 0.45
    overlap: float = 0.8
    read_efficiency: float = 0.8
    imbalance: float = 1.1
    gloo: bool = False
    host: float = 0.0
    host_sharded: float = 0.0
    host_spread: float = 0.0

    def __post_init__(self) -> None:
        for name in ("efficiency", "read_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap must be in [0, 1], got {self.overlap}")
        if not self.imbalance >= 1:
            raise ValueError(f"imbalance must be at least 1, got {self.imbalance}")
        for name in ("host", "host_sharded", "host_spread"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Mesh:
    """``expert`` ranks share one copy of the experts; ``shard``: the rest is whole on each rank, or FSDP2-sharded."""

    expert: int
    shard: Shard

    def __str__(self) -> str:
        return f"expert_parallel={self.expert}, shard={self.shard}"


@dataclass(frozen=True)
class Work:
    """What a rank does in a step. tokens: of this rank; in ``micro_batches`` parts; checkpointing: blocks are computed
    again in the backward pass; half: products in bfloat16."""

    tokens: float
    micro_batches: int = 1
    checkpointing: bool = False
    half: bool = True

    @property
    def size(self) -> int:
        """Bytes of a number in working precision."""
        return 2 if self.half else 4

    @property
    def forwards(self) -> int:
        """Forward passes of a micro-batch: 2 with checkpointing."""
        return 2 if self.checkpointing else 1
