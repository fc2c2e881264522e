"""Bytes that a rank holds at the peak of a step.

Weights, gradients and both moments of AdamW are float32, as the trainer keeps them: 4 + 4 + 8 = 16 bytes a weight, the
sum of ZeRO's 2 + 2 + 12 (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1), which FSDP2 divides by the ranks as
ZeRO's third stage does. Autocast adds a bfloat16 copy of every matrix outside experts and routers: autograd keeps it
for the backward pass, under FSDP2 too, where the float32 weights are let go; with checkpointing autocast's own cache
keeps it until the forward pass ends.
"""

from training.planning.assumptions import Mesh, Work
from training.planning.counts import ModelCounts
from training.planning.hardware import Cluster

WEIGHT_BYTES = 16
# the head is applied to so many logits at once (transformer.loss), which are held twice in float32
LOGITS = 2**22


def owned(counts: ModelCounts, ranks: int, mesh: Mesh) -> tuple[float, float]:
    """Weights that a rank keeps with gradients and moments: outside experts, and of spread experts."""
    outside, experts = float(counts.dense), float(counts.experts)
    if mesh.expert == 1:  # experts are weights like all others
        outside, experts = outside + experts, 0.0
    return (outside / ranks if mesh.shard == "fsdp" else outside), experts / mesh.expert


def rank_memory(counts: ModelCounts, cluster: Cluster, mesh: Mesh, work: Work) -> dict[str, float]:
    """Bytes by what holds them."""
    outside, experts = owned(counts, cluster.gpus, mesh)
    memory = {"weights, gradients, moments": WEIGHT_BYTES * (outside + experts)}
    if mesh.shard == "none" and cluster.gpus > 1:
        memory["gradient buckets"] = 4.0 * outside
    if mesh.shard == "fsdp":
        memory |= _gathered(counts, mesh)
    if work.half:
        memory["bfloat16 weights"] = 2.0 * counts.copied
    tokens = work.tokens / work.micro_batches
    memory["activations"] = _activations(counts, mesh, work, tokens)
    memory["logits"] = 2 * 4.0 * min(tokens * counts.vocabulary, LOGITS)
    # formed with the loss, beside the gradient to which the backward pass adds it; and the head in working precision
    memory["head"] = (4.0 + (2.0 if work.half else 0.0)) * counts.vocabulary * counts.dim
    return memory


def _gathered(counts: ModelCounts, mesh: Mesh) -> dict[str, float]:
    inside = max((mixture.parameters for mixture in counts.mixtures), default=0) if mesh.expert == 1 else 0
    block = 4.0 * (counts.largest + inside)
    # one block in use and one on its way; the whole gradient of one, and the buffer from which it is reduced
    return {"gathered weights": 2 * block, "gathered gradients": 2 * block}


def _activations(counts: ModelCounts, mesh: Mesh, work: Work, tokens: float) -> float:
    kept = counts.boundary if work.checkpointing else counts.activations
    extra = counts.block if work.checkpointing else (0.0, 0.0)
    layers = min(len(counts.mixtures), 1) if work.checkpointing else len(counts.mixtures)
    wide = kept[1] + extra[1] + (counts.widened / max(1, len(counts.mixtures)) * layers if work.half else 0.0)
    total = tokens * (work.size * (kept[0] + extra[0]) + 4 * wide)
    if mesh.expert > 1:
        # the rows of this rank and of others in one tensor; its own are kept for the router besides, in float32
        came = sum(mixture.other_ranks(mesh.expert) for mixture in counts.mixtures[:layers])
        total += work.size * tokens * counts.dim * (came + (0 if work.half else layers))
    return total
