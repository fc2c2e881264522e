"""Sparse gradients for data parallel training: each rank sends the few largest entries and remembers the rest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Method = Literal["topk", "randomk", "threshold", "dropping", "adacomp", "dgc"]
METHODS = ("topk", "randomk", "threshold", "dropping", "adacomp", "dgc")
# methods whose number of entries follows from the sizes, so that ranks need not tell it
COUNTED = ("topk", "randomk", "dropping", "dgc")
# densities of the first fifths of the warm-up (Lin et al. 2018, section 3.3), then the one asked
DGC_WARMUP = (0.25, 0.0625, 0.015625, 0.004)
Reduced = torch.futures.Future[Tensor]


@dataclass(frozen=True)
class Sent:
    """Entries of a flat gradient of ``size`` numbers that one rank sends: values[n] belongs to index[n]."""

    index: Int[Tensor, "n"]
    values: Float[Tensor, "n"]
    size: int


@dataclass
class Traffic:
    """What this rank has put on the wire since the start: bytes sent, and what dense all-reduce would have taken."""

    sent: int = 0
    dense: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together: ``parts`` are the flat ones of the parameters ``names``, in order, and share
    the memory of ``buffer``."""

    names: tuple[str, ...]
    parts: tuple[Tensor, ...]
    buffer: Tensor


def compress_gradients(
    model: DistributedDataParallel,
    method: Method = "topk",
    *,
    density: float = 0.01,
    threshold: float = 1e-3,
    bin_size: int = 500,
    momentum: float = 0.9,
    clip: float | None = None,
    warmup: int = 0,
    error_feedback: bool = True,
    seed: int = 0,
) -> "GradientCompressor":
    """Register a communication hook on ``model`` that averages sparse gradients; returns its state, to checkpoint.

    Each rank adds its gradient g (divided by the number of ranks) to what it has not sent so far, r; a = r + g.

    "topk": the ⌈density·n⌉ largest abs(a) of each parameter. "randomk": as many, drawn alike on every rank.
    "threshold": abs(a) ≥ threshold. "dropping": the ⌈density·n⌉ largest of a whole bucket of parameters, so that a
    layer with large gradients sends more (Aji & Heafield 2017, arXiv:1704.05021). What is not sent is the next r.
    "adacomp": in each bin of ``bin_size`` entries those where abs(a + g) ≥ max abs(a) of the bin, sent as sign(a) times
    the mean of these maxima; the next r is a minus what was sent (Chen et al. 2018, arXiv:1712.02679).
    "dgc": u ← momentum·u + g, v ← v + u; the largest of v are sent, u and v are 0 there (Lin et al. 2018,
    arXiv:1712.01887). The optimiser must not add momentum again.

    clip: each rank's gradient is first scaled to at most the norm ``clip``·ranks^-½ (Lin et al. 2018, section 3.2).
    Clip here and not what was reduced: that would lose a part of what the ranks count as sent. It needs the norm of
    all of it, so that nothing is sent before the backward pass has ended (None and ``inf``: not clipped). warmup: steps
    in which the density falls 25, 6.25, 1.6, 0.4% to ``density``, of the methods that have one. error_feedback: False
    forgets what is not sent, to measure what remembering is worth.

    A bucket of gradients is one exchange: streams of (index, value) are gathered and summed on every rank while the
    backward pass goes on, values alone for "randomk"; where that would take as many bytes as the dense gradient, that
    is reduced instead. "threshold" and "adacomp" first agree on the length. Parameters that DDP ignores (sharded
    experts) stay local.
    Raises: ValueError for another method or numbers out of range; TypeError unless ``model`` is DDP.

    >>> compressor = compress_gradients(DistributedDataParallel(model), "topk", density=0.01)
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model must be a DistributedDataParallel, got {type(model).__name__}")
    _check(method, density, threshold, bin_size, momentum, clip, warmup)
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    compressor = GradientCompressor(
        names, method, density=density, threshold=threshold, bin_size=bin_size, momentum=momentum, clip=clip,
        warmup=warmup, error_feedback=error_feedback, seed=seed, group=model.process_group,
    )  # fmt: skip
    model.register_comm_hook(compressor, _hook)
    return compressor


class GradientCompressor:
    """What a rank remembers between steps: unsent gradients by parameter name, and the traffic so far.

    names: id of each parameter → its name. The other arguments are those of :func:`compress_gradients`.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        method: Method,
        *,
        density: float,
        threshold: float,
        bin_size: int,
        momentum: float,
        clip: float | None,
        warmup: int,
        seed: int,
        error_feedback: bool = True,
        group: Any = None,
    ) -> None:
        self.names, self.method, self.group = names, method, group
        self.density, self.threshold, self.bin_size = density, threshold, bin_size
        self.momentum, self.warmup, self.seed = momentum, warmup, seed
        self.clip = None if clip == math.inf else clip
        self.error_feedback = error_feedback
        self.step = 0
        self.residuals: dict[str, Tensor] = {}
        self.velocities: dict[str, Tensor] = {}
        self.traffic = Traffic()
        self._waiting: list[tuple[Bucket, Reduced]] = []

    def present_density(self) -> float:
        """The share that this step sends."""
        if self.step >= self.warmup:
            return self.density
        stage = self.step * (len(DGC_WARMUP) + 1) // self.warmup
        return max(self.density, DGC_WARMUP[stage]) if stage < len(DGC_WARMUP) else self.density

    def compress(self, name: str, gradient: Float[Tensor, "n"]) -> Sent:
        """What to send of one parameter's flat gradient; the rest is remembered."""
        sent = self._dgc(name, gradient) if self.method == "dgc" else self._select(name, gradient)
        if not self.error_feedback:
            self.residuals[name].zero_()
        return sent

    def _select(self, name: str, gradient: Float[Tensor, "n"]) -> Sent:
        residual = self._held(self.residuals, name, gradient)
        total = residual + gradient
        if self.method == "adacomp":
            index, values = _adacomp(total, gradient, self.bin_size)
        else:
            index = self._choose(name, total)
            values = total[index]
        residual.copy_(total).index_add_(0, index, -values)
        return Sent(index, values, gradient.numel())

    def _choose(self, name: str, total: Float[Tensor, "n"]) -> Int[Tensor, "k"]:
        count = max(1, math.ceil(self.present_density() * total.numel()))
        if self.method == "threshold":
            return (total.abs() >= self.threshold).nonzero().squeeze(1)
        if self.method == "randomk":
            generator = torch.Generator().manual_seed(hash((self.seed, self.step, name_number(name))) % 2**63)
            return torch.randperm(total.numel(), generator=generator)[:count].to(total.device)
        return total.abs().topk(count).indices

    def _dgc(self, name: str, gradient: Float[Tensor, "n"]) -> Sent:
        velocity, residual = self._held(self.velocities, name, gradient), self._held(self.residuals, name, gradient)
        velocity.mul_(self.momentum).add_(gradient)
        residual.add_(velocity)
        index = self._choose(name, residual)
        values = residual[index]
        residual[index] = 0
        velocity[index] = 0
        return Sent(index, values, gradient.numel())

    def _held(self, store: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        if name not in store:
            store[name] = torch.zeros_like(like)
        return store[name]

    def reduce(self, bucket: Bucket, *, last: bool) -> Reduced:
        """Start to replace a bucket's buffer by the mean over ranks of what they send; the result is the buffer.

        last: of the step. With ``clip`` nothing starts before it, as the norm is that of all buckets.
        """
        reduced: Reduced = torch.futures.Future()
        self._waiting.append((bucket, reduced))
        if last or self.clip is None:
            waiting, self._waiting = self._waiting, []
            self.clip_locally([part for held, _ in waiting for part in held.parts])
            for held, promised in waiting:
                self._begin(held).add_done_callback(partial(_hand_over, promised))
        if last:
            self.step += 1
            self.traffic.steps += 1
        return reduced

    def _begin(self, bucket: Bucket) -> Any:
        if self.method == "dropping":
            sent = self._drop(bucket)
        else:
            pairs = zip(bucket.names, bucket.parts, strict=True)
            sent = _joined([self.compress(name, part) for name, part in pairs])
        return begin_sparse_all_reduce(
            sent, bucket.buffer, counted=self.method in COUNTED, same_index=self.method == "randomk",
            group=self.group, traffic=self.traffic,
        )  # fmt: skip

    def _drop(self, bucket: Bucket) -> Sent:
        """The parameters of a bucket compete; they are remembered by name, as buckets are rebuilt."""
        pairs = zip(bucket.names, bucket.parts, strict=True)
        residuals = [self._held(self.residuals, name, part) for name, part in pairs]
        total = torch.cat([r + g for r, g in zip(residuals, bucket.parts, strict=True)])
        index = total.abs().topk(max(1, math.ceil(self.present_density() * total.numel()))).indices
        values = total[index]
        left = total.index_fill(0, index, 0.0)
        for residual, rest in zip(residuals, left.split([part.numel() for part in bucket.parts]), strict=True):
            residual.copy_(rest if self.error_feedback else torch.zeros_like(rest))
        return Sent(index, values, total.numel())

    def clip_locally(self, gradients: list[Tensor]) -> None:
        """Scale this rank's gradients to the norm clip / √ranks, for a sum whose norm is about ``clip``."""
        if self.clip is None:
            return
        limit = self.clip / math.sqrt(dist.get_world_size(self.group))
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.mul_((limit / norm.clamp_min(1e-12)).clamp(max=1.0))

    def state_dict(self) -> dict[str, Any]:
        """Step, residuals and velocities of this rank, for its checkpoint."""
        return {"step": self.step, "residuals": dict(self.residuals), "velocities": dict(self.velocities)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``. Raises: ValueError for a parameter that the model does not have."""
        known = set(self.names.values())
        for kind in ("residuals", "velocities"):
            if odd := sorted(set(state[kind]) - known):
                raise ValueError(f"{kind} must be of the model's parameters, got {odd[0]!r}")
        self.step = state["step"]
        self.residuals, self.velocities = dict(state["residuals"]), dict(state["velocities"])


def sparse_all_reduce(sent: Sent, *, group: Any = None, traffic: Traffic | None = None) -> Float[Tensor, "size"]:
    """Σ over ranks of the sparse vectors, dense on every rank: :func:`begin_sparse_all_reduce`, waited for."""
    into = sent.values.new_empty(sent.size)
    begin_sparse_all_reduce(sent, into, group=group, traffic=traffic).wait()
    return into


def begin_sparse_all_reduce(
    sent: Sent,
    into: Float[Tensor, "size"],
    *,
    counted: bool = False,
    same_index: bool = False,
    group: Any = None,
    traffic: Traffic | None = None,
) -> Any:
    """Start Σ over ranks of the sparse vectors, dense into ``into`` on every rank; returns its future.

    Streams of (int32 or int64 index, value) are gathered in one exchange (SparCML, Renggli et al. 2019,
    arXiv:1802.08021, whose recursive doubling is not used); where the longest of them times the ranks would outweigh
    the dense vector, the vector itself is reduced. counted: every rank sends as many entries; else their numbers go
    round first. same_index: at the same places, so that the values alone are reduced.
    Bytes sent by a rank: (R − 1)·n·(4 or 8 + bytes of a value), 2·(R − 1)/R·n·(bytes of a value) for the values alone,
    and 2·(R − 1)·8 for the numbers.
    """
    ranks = dist.get_world_size(group)
    most = sent.index.numel() if counted else _longest(sent, group)
    width, wide = sent.values.element_size(), torch.int32 if sent.size < 2**31 else torch.int64
    dense_bytes = 2 * sent.size * width * (ranks - 1) // ranks
    stream_bytes = most * (wide.itemsize + width) * (ranks - 1)
    if same_index:
        stream_bytes = 2 * most * width * (ranks - 1) // ranks
    if traffic is not None:
        traffic.sent += min(stream_bytes, dense_bytes) + (0 if counted else 16 * (ranks - 1))
        traffic.dense += dense_bytes
    if stream_bytes >= dense_bytes:
        into.zero_().index_add_(0, sent.index, sent.values)
        return dist.all_reduce(into, group=group, async_op=True).get_future().then(partial(_reduced, into, None))
    if same_index:
        work = dist.all_reduce(sent.values, group=group, async_op=True)
        return work.get_future().then(partial(_reduced, into, sent))
    stream = _packed(sent, most, wide)
    gathered = [torch.empty_like(stream) for _ in range(ranks)]
    work = dist.all_gather(gathered, stream, group=group, async_op=True)
    return work.get_future().then(partial(_summed, stream, gathered, into, most, wide))


def _longest(sent: Sent, group: Any) -> int:
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=sent.values.device)
    counts[dist.get_rank(group)] = sent.index.numel()
    dist.all_reduce(counts, group=group)
    return int(counts.max())


def _joined(several: list[Sent]) -> Sent:
    """Several vectors' entries as those of the vectors one behind the other."""
    starts = [0]
    for sent in several:
        starts.append(starts[-1] + sent.size)
    index = torch.cat([sent.index + start for sent, start in zip(several, starts, strict=False)])
    return Sent(index, torch.cat([sent.values for sent in several]), starts[-1])


def _packed(sent: Sent, most: int, wide: torch.dtype) -> Tensor:
    """Indices, then values, as bytes, filled up to ``most`` entries with zeros at index 0."""
    missing = most - sent.index.numel()
    index = nn.functional.pad(sent.index.to(wide), (0, missing))
    values = nn.functional.pad(sent.values, (0, missing))
    return torch.cat([index.view(torch.uint8), values.view(torch.uint8)])


def _reduced(into: Tensor, sent: Sent | None, done: Any) -> Tensor:
    """What was reduced in place: ``into`` itself, or the values of ``sent``, which belong into it."""
    done.value()  # an exchange that failed raises here
    return into if sent is None else into.zero_().index_add_(0, sent.index, sent.values)


def _summed(stream: Tensor, gathered: list[Tensor], into: Tensor, most: int, wide: torch.dtype, done: Any) -> Tensor:
    """Every rank's stream added up. stream: what this rank sent, which has to live until here."""
    done.value()
    into.zero_()
    for row in gathered:
        # cloned: values need not begin at a multiple of their width
        index, values = (part.clone() for part in row.split([most * wide.itemsize, most * into.element_size()]))
        into.index_add_(0, index.view(wide), values.view(into.dtype))
    return into


def _hand_over(promised: Reduced, done: Any) -> None:
    try:
        promised.set_result(done.value())
    except RuntimeError as error:  # another rank is gone: whoever waits is told
        promised.set_exception(error)  # type: ignore[arg-type]  # torch's stub asks for a result


def _hook(compressor: GradientCompressor, bucket: dist.GradBucket) -> Reduced:
    buffer = bucket.buffer()
    # DDP hands over sums of nothing: dividing here makes the reduced gradient the mean over ranks
    buffer.div_(dist.get_world_size(compressor.group))
    names = tuple(compressor.names[id(parameter)] for parameter in bucket.parameters())
    parts = tuple(gradient.reshape(-1) for gradient in bucket.gradients())
    return compressor.reduce(Bucket(names, parts, buffer), last=bucket.is_last())


def _adacomp(total: Float[Tensor, "n"], gradient: Float[Tensor, "n"], size: int) -> tuple[Tensor, Tensor]:
    bins = -(-total.numel() // size)
    padded = nn.functional.pad(total.abs(), (0, bins * size - total.numel())).view(bins, size)
    most = padded.amax(1)
    limit = most.repeat_interleave(size)[: total.numel()]
    index = (((total + gradient).abs() >= limit) & (limit > 0)).nonzero().squeeze(1)
    return index, total[index].sign() * most.mean()


def name_number(name: str) -> int:
    """A number of a parameter's name that is the same in every process (Python's own hash of text is not)."""
    return int.from_bytes(name.encode()[-7:], "big") + len(name)


def _check(
    method: str, density: float, threshold: float, bin_size: int, momentum: float, clip: float | None, warmup: int
) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    for name, value, least in (("bin_size", bin_size, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    for name, number in (("threshold", threshold), ("clip", clip)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be > 0, got {number}")
