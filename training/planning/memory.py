"""Bytes that a rank holds at the moment of a step when they are most.

Weights, gradients and both moments of AdamW are float32, as the trainer keeps them: 4 + 4 + 8 = 16 bytes a weight, the
sum of ZeRO's 2 + 2 + 12 (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1), which FSDP2 divides by the ranks as
ZeRO's third stage does. Tables of memories have one moment a weight, and their gradient, which is sparse, is counted
whole. Not all else is there at the same time, so that the peak is the largest of these moments:

- loss: every activation, the logits of a chunk and the head's gradient; gradients only of earlier micro-batches;
- backward, for each block: activations of the blocks before it, its own with the gradients inside it, and the
  gradients of those behind it;
- the end: every gradient and that of the embedding beside it, no activation;
- under FSDP2 also the gathering of each block in the forward pass.

FSDP2 (torch/distributed/fsdp/_fully_shard, 2.13) gathers a block into one flat buffer and copies that into its
parameters; in the forward pass the buffer lives until the next block's has been filled, in the backward pass the next
block's is filled while this one computes. The block's whole gradient is there before the parameters go, and the buffer
that the block before it was reduced from goes only then. What lies outside blocks stays gathered from the start of the
forward pass to the end of the backward pass, and its gradient stays whole. gloo gathers into a copy
(ProcessGroupGloo.cpp). Autocast adds a bfloat16 copy of every matrix outside experts and routers: autograd keeps it for
the backward pass, under FSDP2 too; with checkpointing autocast's own cache keeps it until the forward pass ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from training.planning.assumptions import Assumptions, Mesh, Work
from training.planning.counts import Block, ModelCounts
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


def rank_memory(
    counts: ModelCounts, cluster: Cluster, mesh: Mesh, work: Work, given: Assumptions
) -> tuple[str, dict[str, float]]:
    """The moment of a step at which most is held, and bytes by what holds them."""
    rank = _Rank(counts, cluster.gpus, mesh, work, given.gloo)
    return max(rank.moments(), key=lambda moment: sum(moment[1].values()))


@dataclass(frozen=True)
class _Rank:
    """What one rank holds at each moment of the last micro-batch of a step."""

    counts: ModelCounts
    ranks: int
    mesh: Mesh
    work: Work
    gloo: bool

    @property
    def sharded(self) -> bool:
        return self.mesh.shard == "fsdp"

    @property
    def tokens(self) -> float:
        return self.work.tokens / self.work.micro_batches

    @property
    def embedding(self) -> float:
        return 4.0 * self.counts.vocabulary * self.counts.dim

    @property
    def tied(self) -> bool:
        return 4 * self.counts.root < 2 * self.embedding

    def moments(self) -> Iterator[tuple[str, dict[str, float]]]:
        yield "loss", self.loss()
        for place in range(self.counts.layers):
            yield "backward", self.backward(place)
            if self.sharded:
                yield "forward", self.gathering(place)
        yield "end", self.end()

    def always(self) -> dict[str, float]:
        outside, experts = owned(self.counts, self.ranks, self.mesh)
        # tables of memories, which are never shared out, have one moment a weight (training.rowwise_adam)
        held = {"weights and moments": (WEIGHT_BYTES - 4) * (outside + experts) - 4.0 * self.counts.tables}
        if not self.sharded and self.ranks > 1:
            held["gradient buckets"] = 4.0 * outside
        return held

    def loss(self) -> dict[str, float]:
        size, head = self.work.size, self.counts.vocabulary * self.counts.dim
        count = min(self.tokens * self.counts.vocabulary, LOGITS)
        # the gradient of the chunk's logits remains when the head's gradient, a second one, is formed from it
        later = (4.0 + (2.0 if self.work.half else 0.0)) * count + size * head
        return self.always() | self.activations(self.counts.layers) | {
            "gradients": self.accumulated(),
            "gathered weights": self.root,
            "logits": max(8.0 * count, later),
            "head": (6.0 if self.work.half else 4.0) * head,
        }  # fmt: skip

    def backward(self, place: int) -> dict[str, float]:
        block, blocks = self.counts.blocks[place], self.counts.blocks
        formed = self.shard(block) if not self.sharded else self.spread(block)
        if self.mesh.expert > 1:
            formed += self.spread(block)  # divided by the group's size into a copy
        behind = sum(self.shard(other) for other in blocks[place + 1 :])
        gradients = (self.accumulated() or behind) + formed + (0.0 if self.sharded else self.embedding)
        # beside those inside the feed-forward: the residual stream's, as it came and with the branch's part
        inner = self.tokens * self.work.size * (block.inner + 2 * self.counts.dim)
        held = self.always() | self.activations(place + 1, recomputed=block) | {"gradients": gradients}
        held["activations"] += inner
        if self.sharded:
            coming = self.whole(blocks[place - 1]) if place else 0.0
            reduced = self.whole(blocks[place + 1]) if place + 1 < len(blocks) else 0.0
            held["gathered weights"] = self.root + self.whole(block) + coming
            held["gathered gradients"] = self.embedding + reduced + max(self.whole(block), coming * self.gloo)
        return held

    def end(self) -> dict[str, float]:
        outside, experts = owned(self.counts, self.ranks, self.mesh)
        beside = self.embedding if self.tied or self.accumulated() else 0.0
        held = self.always() | {"gradients": 4.0 * (outside + experts) + (0.0 if self.sharded else beside)}
        if self.sharded:
            held["gathered weights"] = self.root
            held["gathered gradients"] = (
                self.root + beside + (self.whole(self.counts.blocks[0]) if self.counts.blocks else 0.0)
            )
        return held

    def gathering(self, place: int) -> dict[str, float]:
        """The larger of: a block's buffer is filled beside that of the block before it; its parameters beside its
        buffer, with what it keeps."""
        block, before = (
            self.whole(self.counts.blocks[place]),
            self.whole(self.counts.blocks[place - 1]) if place else 0.0,
        )
        held = self.always() | {"gradients": self.accumulated()}
        filled = self.activations(place) | {"gathered weights": self.root + before + block * (1 + self.gloo)}
        used = self.activations(place + 1) | {"gathered weights": self.root + 2 * block}
        return held | max(filled, used, key=lambda part: sum(part.values()))

    @property
    def root(self) -> float:
        """What is outside blocks, while it is gathered."""
        return 4.0 * self.counts.root if self.sharded else 0.0

    def whole(self, block: Block) -> float:
        """What FSDP2 gathers of a block."""
        return 4.0 * (block.weights + (block.experts if self.mesh.expert == 1 else 0))

    def spread(self, block: Block) -> float:
        """Gradients of this rank's experts of a block, where experts are spread."""
        return 4.0 * block.experts / self.mesh.expert if self.mesh.expert > 1 else 0.0

    def shard(self, block: Block) -> float:
        """Gradients that this rank keeps of a block."""
        return self.whole(block) / (self.ranks if self.sharded else 1) + self.spread(block)

    def accumulated(self) -> float:
        """Gradients of earlier micro-batches."""
        return 4.0 * sum(owned(self.counts, self.ranks, self.mesh)) if self.work.micro_batches > 1 else 0.0

    def activations(self, places: int, *, recomputed: Block | None = None) -> dict[str, float]:
        """What so many blocks, and the embedding and last norm, keep, and their copies in half precision. recomputed:
        the block whose forward pass runs again where only one residual of each is kept."""
        blocks = self.counts.blocks[:places]
        held = self.tokens * 4 * 2 * self.counts.dim
        copied = sum(block.copied for block in blocks)
        if self.work.checkpointing:
            held += self.tokens * 4 * places * self.counts.dim
            held += 0.0 if recomputed is None else self.kept(recomputed)
            copied = copied if recomputed is None else recomputed.copied
        else:
            held += sum(self.kept(block) for block in blocks)
        return {"activations": held} | ({"bfloat16 weights": 2.0 * copied} if self.work.half else {})

    def kept(self, block: Block) -> float:
        """Bytes of a block's activations."""
        work, wide = block.kept
        if block.mixture is not None and self.work.half:
            wide += self.counts.dim  # a router's input in float32
        if block.mixture is not None and self.mesh.expert > 1:
            # the rows of this rank and of others in one tensor; its own are kept for the router besides, in float32
            work += self.counts.dim * (block.mixture.other_ranks(self.mesh.expert) + (0 if self.work.half else 1))
        return self.tokens * (self.work.size * work + 4 * wide)
