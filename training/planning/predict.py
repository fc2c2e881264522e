"""Memory, traffic and time of one step on a mesh: an analytic model whose every assumption is a named number.

Weights, gradients and both moments of AdamW are float32, as the trainer keeps them: 16 bytes a weight. A replicated
weight costs them on every rank, and 4 more in the buckets in which DistributedDataParallel reduces its gradient; under
FSDP2 1/N of them, and besides the gathered weights of two blocks (one in use, one on its way) and the gradient of one,
twice. Experts cost 16 bytes
over the ranks of their group. The head makes at most 2²² logits at once, held twice in float32. Time of a step is

    host + compute + all-to-all + max(0, gradients + weights − overlap · backward) + optimiser,

host: what no number of tokens changes (Python, launches), 0 unless given, as accelerators hide it behind their kernels;
compute = FLOPs / (peak · efficiency): forward 1, backward 2, recomputation 1 where blocks are checkpointed; the
busiest rank of an expert group has ``imbalance`` times the mean load. All-to-all is taken as hidden behind nothing (a
shared expert does run meanwhile). Collectives: ring all-reduce of n bytes sends 2 (R − 1)/R · n a rank, all-gather and
reduce-scatter (R − 1)/R · n (Patarasuk & Yuan 2009); each of its steps has the cluster's latency, and so has every
message of a mixture layer to each other rank: forward counts, places, rows, weights and results, backward the gradients
of the last three; recomputation is a forward pass once more. FSDP2 has one gather of each block and pass, and of the
rest, in every micro-batch, and one reduction of each in a step. gloo, which joins
CPUs, reduces all where a part is asked for, so that its reduce-scatter sends as much as an all-reduce.
"""

from dataclasses import dataclass

from training.planning.counts import ModelCounts
from training.planning.hardware import Cluster

WEIGHT_BYTES = 16
# what the allocator, the context and the collectives' buffers keep, of a GPU's memory
RESERVE = 0.08
# the head is applied to so many logits at once (transformer.loss), which are held twice in float32
LOGITS = 2**22
# exchanges of a mixture layer (moe.expert_parallel): counts, notes, rows, weights, results; gradients of the last three
FORWARD_EXCHANGES, BACKWARD_EXCHANGES = 5, 3


@dataclass(frozen=True)
class Assumptions:
    """efficiency: share of the peak that matrix products reach; overlap: share of the backward pass that can hide the
    reduction of gradients; read_efficiency: of the memory's rate in the optimiser; imbalance: load of the busiest rank
    of experts against the mean; reduce_scatter: whether the backend has one, as NCCL does and gloo does not; host:
    seconds of a step that no number of tokens changes."""

    efficiency: float = 0.45
    overlap: float = 0.8
    read_efficiency: float = 0.8
    imbalance: float = 1.1
    reduce_scatter: bool = True
    host: float = 0.0

    def __post_init__(self) -> None:
        for name in ("efficiency", "read_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap must be in [0, 1], got {self.overlap}")
        if self.imbalance < 1:
            raise ValueError(f"imbalance must be at least 1, got {self.imbalance}")
        if not self.host >= 0:
            raise ValueError(f"host must be at least 0, got {self.host}")


@dataclass(frozen=True)
class Mesh:
    """``expert`` ranks share one copy of the experts; ``shard``: the rest is whole on each rank, or FSDP2-sharded."""

    expert: int
    shard: str

    def __str__(self) -> str:
        return f"expert_parallel={self.expert}, shard={self.shard}"


@dataclass(frozen=True)
class Prediction:
    """One mesh. memory: bytes a rank by what holds them; sent: bytes a rank sends in a step by collective; seconds: of
    a step by part, of which the exposed ones add up to ``step_seconds``."""

    mesh: Mesh
    memory: dict[str, float]
    sent: dict[str, float]
    seconds: dict[str, float]
    step_seconds: float
    tokens_per_s: float
    utilisation: float
    fits: bool

    @property
    def memory_total(self) -> float:
        """Bytes a rank."""
        return sum(self.memory.values())


def meshes(counts: ModelCounts, ranks: int) -> list[Mesh]:
    """Every grid that the trainer takes: expert_parallel divides the ranks, and no rank is without experts."""
    least = min((mixture.num_experts for mixture in counts.mixtures), default=1)
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0 and size <= least]
    shards = ("none", "fsdp") if ranks > 1 else ("none",)
    return [Mesh(size, shard) for size in sizes for shard in shards]


def predict(
    counts: ModelCounts,
    cluster: Cluster,
    mesh: Mesh,
    *,
    tokens: int,
    micro_batches: int = 1,
    checkpointing: bool = False,
    half: bool = True,
    assumptions: Assumptions | None = None,
) -> Prediction:
    """A step of ``tokens`` tokens over all ranks, in ``micro_batches``. half: products in bfloat16.

    Raises: ValueError if the mesh does not fit the ranks or the experts, or a count is below 1."""
    given = Assumptions() if assumptions is None else assumptions
    _check(counts, cluster, mesh, tokens, micro_batches)
    size = 2 if half else 4
    mine = tokens / cluster.gpus
    sent = _sent(counts, cluster, mesh, mine, micro_batches, checkpointing, size, given)
    seconds = _seconds(counts, cluster, mesh, mine, sent, micro_batches, checkpointing, half, given)
    hidden = given.overlap * seconds["backward"]
    reduction = seconds["gradients"] + seconds["weights"]
    exposed = max(0.0, reduction - hidden)
    step = given.host + exposed + sum(seconds[part] for part in ("forward", "backward", "all-to-all", "optimiser"))
    memory = _memory(counts, cluster, mesh, mine / micro_batches, checkpointing, size)
    peak = cluster.gpu.half if half else cluster.gpu.single
    return Prediction(
        mesh,
        memory,
        sent,
        {"host": given.host} | seconds | {"exposed": exposed},
        step,
        tokens / step,
        3 * counts.flops * tokens / (step * cluster.gpus * peak),
        sum(memory.values()) <= (1 - RESERVE) * cluster.gpu.memory,
    )


def _check(counts: ModelCounts, cluster: Cluster, mesh: Mesh, tokens: int, micro_batches: int) -> None:
    if cluster.gpus % mesh.expert:
        raise ValueError(f"expert_parallel must divide gpus={cluster.gpus}, got {mesh.expert}")
    if mesh.expert > 1 and not counts.mixtures:
        raise ValueError(f"expert_parallel must be 1 for a model without experts, got {mesh.expert}")
    for name, value in (("tokens", tokens), ("micro_batches", micro_batches)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _owned(counts: ModelCounts, cluster: Cluster, mesh: Mesh) -> tuple[float, float]:
    """Weights that a rank keeps with gradients and moments: outside experts, and of experts."""
    outside, experts = float(counts.dense), float(counts.experts)
    if mesh.expert == 1:  # experts are weights like all others
        whole = outside + experts
        return (whole / cluster.gpus if mesh.shard == "fsdp" else whole), 0.0
    return (outside / cluster.gpus if mesh.shard == "fsdp" else outside), experts / mesh.expert


def _memory(
    counts: ModelCounts, cluster: Cluster, mesh: Mesh, tokens: float, checkpointing: bool, size: int
) -> dict[str, float]:
    outside, experts = _owned(counts, cluster, mesh)
    memory = {"weights, gradients, moments": WEIGHT_BYTES * (outside + experts)}
    if mesh.shard == "none" and cluster.gpus > 1:
        memory["gradient buckets"] = 4.0 * outside
    if mesh.shard == "fsdp":
        inside = max((mixture.parameters for mixture in counts.mixtures), default=0) if mesh.expert == 1 else 0
        memory["gathered weights"] = 2 * 4.0 * (counts.largest + inside)
        # the whole gradient of a block, and the buffer into which it is copied to be reduced
        memory["gathered gradients"] = 2 * 4.0 * (counts.largest + inside)
    kept = counts.boundary if checkpointing else counts.activations
    extra = counts.block if checkpointing else (0.0, 0.0)
    memory["activations"] = tokens * (size * (kept[0] + extra[0]) + 4 * (kept[1] + extra[1]))
    memory["logits"] = 2 * 4.0 * min(tokens * counts.vocabulary, LOGITS)
    return memory


def _sent(
    counts: ModelCounts,
    cluster: Cluster,
    mesh: Mesh,
    tokens: float,
    micro_batches: int,
    checkpointing: bool,
    size: int,
    given: Assumptions,
) -> dict[str, float]:
    ranks = cluster.gpus
    outside = counts.dense + (counts.experts if mesh.expert == 1 else 0)
    share = (ranks - 1) / ranks
    passes = 1 if mesh.shard == "fsdp" and given.reduce_scatter else 2
    sent = {"gradients": 4.0 * outside * share * passes, "weights": 0.0}
    if mesh.shard == "fsdp":
        # blocks are gathered for the forward and again for the backward pass of every micro-batch, the root once
        sent["weights"] = micro_batches * 4.0 * (2 * outside - counts.root) * share
    copies = ranks // mesh.expert
    owned = counts.experts / mesh.expert if mesh.expert > 1 else 0.0
    sent["expert gradients"] = 2 * (copies - 1) / copies * 4.0 * owned
    rows = sum(mixture.other_ranks(mesh.expert) for mixture in counts.mixtures)
    # a row goes and its result comes back, forward, backward, and in a forward pass that is computed again
    sent["all-to-all"] = (6 if checkpointing else 4) * rows * tokens * counts.dim * size
    return sent


def _seconds(
    counts: ModelCounts,
    cluster: Cluster,
    mesh: Mesh,
    tokens: float,
    sent: dict[str, float],
    micro_batches: int,
    checkpointing: bool,
    half: bool,
    given: Assumptions,
) -> dict[str, float]:
    rate = given.efficiency * (cluster.gpu.half if half else cluster.gpu.single)
    busiest = given.imbalance if mesh.expert > 1 else 1.0
    forward = busiest * tokens * counts.flops / rate
    copies = cluster.gpus // mesh.expert
    outside, experts = _owned(counts, cluster, mesh)
    exchanges = FORWARD_EXCHANGES * (2 if checkpointing else 1) + BACKWARD_EXCHANGES
    pairs = micro_batches * exchanges * len(counts.mixtures) * (mesh.expert - 1) * cluster.latency
    reductions, gathers = _ring_steps(counts, cluster, mesh, micro_batches, given)
    return {
        "forward": forward,
        "backward": forward * (3 if checkpointing else 2),
        "all-to-all": sent["all-to-all"] / cluster.pairwise(mesh.expert) + pairs,
        "gradients": sent["gradients"] / cluster.ring(cluster.gpus)
        + sent["expert gradients"] / cluster.ring(copies, apart=mesh.expert)
        + reductions * cluster.latency,
        "weights": sent["weights"] / cluster.ring(cluster.gpus) + gathers * cluster.latency,
        # weights, gradients and two moments are read, all but the gradients written
        "optimiser": 7 * 4.0 * (outside + experts) / (given.read_efficiency * cluster.gpu.read),
    }


def _ring_steps(
    counts: ModelCounts, cluster: Cluster, mesh: Mesh, micro_batches: int, given: Assumptions
) -> tuple[int, int]:
    """Steps of rings in a training step, one after another: of reductions of gradients, and of gathers of weights."""
    others = cluster.gpus - 1
    if mesh.shard == "none":
        return 2 * others, 0
    return (
        (counts.layers + 1) * (1 if given.reduce_scatter else 2) * others,
        micro_batches * (2 * counts.layers + 1) * others,
    )
