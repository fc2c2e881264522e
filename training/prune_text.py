"""The text that `prune` calibrates on, other text that it is judged by, and the loss on it."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from pruning.batches import prefix_targets
from training.commands import run_config_of
from training.corpora import STDLIB, Corpus, load_corpus
from training.prune_arguments import PruneArguments
from training.prune_encoder import LENGTH, Encoder
from training.prune_models import Coder, Source
from training.run import read_corpus

DEFAULT_LENGTH = 512
APART = 32  # times the tokens needed that an encoder's held-out passages are spread over
POOL = 4  # times the tokens needed are encoded, and windows drawn from them
DOCUMENTS_AT_ONCE = 32
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Texts:
    """calibration: windows drawn from the training documents; held_out: windows of the others, each with the token
    after it, which overlap by that one; of an encoder, passages without it. lessons: windows of the training documents
    for --recover, as many as its steps take or there are."""

    corpus: str
    calibration: Int[Tensor, "S L"]
    held_out: Int[Tensor, "W M"]
    ahead: int = 1
    lessons: Int[Tensor, "N L"] | None = None

    @property
    def inputs(self) -> Int[Tensor, "W L"]:
        """What the model sees of the held-out windows."""
        return self.held_out[:, : self.held_out.shape[1] - self.ahead]

    def batches(self, size: int) -> list[Tensor]:
        """Calibration batches."""
        return list(self.calibration.split(size)) if len(self.calibration) else []

    def fingerprints(self) -> dict[str, str]:
        """A hash of either side."""
        found = {"calibration text": hash_of(self.calibration), "held-out text": hash_of(self.held_out)}
        return found if self.lessons is None else {**found, "recovery text": hash_of(self.lessons)}


@dataclass(frozen=True)
class Quality:
    """loss: mean nats a predicted token; bits_per_byte: where the bytes of tokens are known exactly."""

    loss: float
    tokens: int
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite beyond a float's range."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def read_texts(arguments: PruneArguments, source: Source, coder: Coder, *, most: int | None) -> Texts:
    """--data, a run's own text, or 'stdlib', split by documents and cut into windows. most: tokens the model takes.

    Raises: ValueError for a length beyond the model, and text shorter than one sequence."""
    encoder = coder.encoder
    length = sequence_length(arguments.calibration_length, most, DEFAULT_LENGTH if encoder is None else LENGTH)
    body, ahead = _body(length, encoder), int(encoder is None)
    corpus = _corpus(arguments, source)
    draw = np.random.default_rng(arguments.seed)
    order = [corpus.train[index] for index in draw.permutation(len(corpus.train))]
    calibration = _drawn(order, coder, body, arguments.sequences, draw)
    if arguments.sequences and not len(calibration):
        raise ValueError(f"the calibration text of {corpus.name!r} has fewer tokens than one sequence of "
                         f"--calibration-length={length}: give more text by --data, or a smaller length")  # fmt: skip
    held_out = _held_out(corpus, coder, body, arguments.eval_sequences, ahead)
    lessons = _lessons(order, coder, body, arguments, draw)
    if encoder is not None:
        calibration, held_out = encoder.framed(calibration), encoder.framed(held_out)
        lessons = None if lessons is None else encoder.framed(lessons)
    return Texts(corpus.name, calibration, held_out, ahead, lessons)


def _lessons(
    documents: Sequence[str], coder: Coder, length: int, arguments: PruneArguments, draw: np.random.Generator
) -> Int[Tensor, "N M"] | None:
    if not arguments.recover:
        return None
    found = _drawn(documents, coder, length, arguments.recover * arguments.batch, draw)
    if not len(found):
        raise ValueError(f"--recover needs text of at least one sequence of {length} tokens: give more by --data, or a "
                         "smaller --calibration-length")  # fmt: skip
    return found


def _drawn(
    documents: Sequence[str], coder: Coder, length: int, count: int, draw: np.random.Generator
) -> Int[Tensor, "S M"]:
    """`count` windows at random, or all there are, of the first documents that make POOL times as many tokens."""
    if not count:
        return torch.empty(0, length, dtype=torch.int64)
    tokens = encoded(documents, coder, enough=POOL * count * length)
    windows = len(tokens) // length
    chosen = draw.permutation(windows)[:count]
    return torch.from_numpy(tokens[: windows * length].reshape(windows, length)[chosen])


def _body(length: int, encoder: Encoder | None) -> int:
    """Tokens of text in a sequence."""
    if encoder is None:
        return length
    special = len(encoder.before) + len(encoder.after)
    if length < special + 2:
        raise ValueError(f"--calibration-length of an encoder must be at least {special + 2}, {special} special tokens "
                         f"and two to cut between, got {length}")  # fmt: skip
    return length - special


def sequence_length(asked: int | None, most: int | None, default: int = DEFAULT_LENGTH) -> int:
    """Tokens of a sequence. Raises: ValueError beyond what the model takes."""
    if asked is not None and most is not None and asked > most:
        raise ValueError(f"--calibration-length must be at most the model's {most} tokens, got {asked}")
    return asked or min(default, most or default)


def _corpus(arguments: PruneArguments, source: Source) -> Corpus:
    run = run_config_of(arguments.model, source.folder) if source.own else None
    if arguments.data is not None or run is None:
        return load_corpus(arguments.data or STDLIB)
    return read_corpus(run.data)


def encoded(documents: Sequence[str], coder: Coder, *, enough: int) -> np.ndarray:
    """``doc separator doc separator …`` [N]: all documents, or the first until N ≥ enough."""
    between = np.array([] if coder.separator is None else [coder.separator], dtype=np.int64)
    parts: list[np.ndarray] = []
    count = 0
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        for ids in coder.encode(documents[start : start + DOCUMENTS_AT_ONCE]):
            parts += [ids, between]
            count += len(ids) + len(between)
        if count >= enough:
            break
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _held_out(corpus: Corpus, coder: Coder, length: int, most: int, ahead: int) -> Int[Tensor, "W M"]:
    tokens = encoded(corpus.held_out, coder, enough=(1 if ahead else APART) * most * length + 1)
    if len(tokens) < 2:
        raise ValueError(f"the held-out text of {corpus.name!r} has {len(tokens)} tokens, and 2 are needed: give more")
    length = min(length, len(tokens) - ahead)
    held = (len(tokens) - ahead) // length
    windows = min(most, held)
    # passages of an encoder lie apart: neighbours would be alike, and one's half no worse a find than the other's
    starts = [at * length if ahead else at * held // windows * length for at in range(windows)]
    return torch.from_numpy(np.stack([tokens[start : start + length + ahead] for start in starts]))


@torch.no_grad()
def quality(
    model: nn.Module,
    held_out: Int[Tensor, "W M"],
    token_bytes: Tensor | None,
    *,
    batch: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> Quality:
    """Mean −log p of every token of the windows but each window's first, and those inside a prefix.

    Raises: ValueError if it is not a number, or the windows are shorter than the prefix."""
    device, nats = next(model.parameters()).device, 0.0
    vocabulary = cast(int, cast(Any, model.config).vocab_size)
    rows = max(1, min(batch, LOGITS_AT_ONCE // (held_out.shape[1] * vocabulary)))
    skipped = prefix_targets(model)
    if held_out.shape[1] <= 1 + skipped:
        raise ValueError(f"the held-out windows must hold the model's prefix_length={skipped + 1} tokens at least, "
                         f"got {held_out.shape[1] - 1}: raise --calibration-length")  # fmt: skip
    for ids in progress(list(held_out.to(device).split(rows))):
        logits = model(ids[:, :-1]).logits[:, skipped:].float()
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1 + skipped :].flatten(), reduction="sum").item()
    targets = held_out[:, 1 + skipped :]
    loss = nats / targets.numel()
    if math.isnan(loss):
        raise ValueError("the loss on held-out text must be a number, got nan: the model's weights are damaged, or "
                         "--dtype is too narrow for them")  # fmt: skip
    size = 0 if token_bytes is None else int(token_bytes[targets].sum())
    return Quality(loss, targets.numel(), nats / math.log(2) / size if size else None)


def hash_of(tensor: Tensor) -> str:
    """BLAKE2b of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(flat.tobytes(), digest_size=16).hexdigest()


def hash_of_model(model: nn.Module) -> str:
    """BLAKE2b of every parameter and buffer, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes.fromhex(hash_of(tensor)))
    return digest.hexdigest()
