"""Documents to batches of token ids: tokenised once, packed without padding, resumable at any batch."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe import Noise
from training.corpora import Corpus
from training.durable import replace_durably
from training.tokenizer import FILE_NAME, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from transformer.prefix import past_prefix

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Token ids and the ids that follow them.

    targets: -100 where there is nothing to predict. mask: True at real tokens; None where all are. noise: what the
    step draws for these sequences; None: torch's global generators.
    """

    inputs: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"]
    mask: Bool[Tensor, "B L"] | None = None
    noise: Noise | None = None

    @property
    def num_targets(self) -> int:
        """Number of positions that have something to predict."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), mask, self.noise)

    def keyed(self, *, seed: int, step: int) -> "Batch":
        """The same as the whole batch of a step, whose noise depends on nothing but seed and step."""
        return Batch(self.inputs, self.targets, self.mask, Noise(f"{seed}/{step}", len(self.inputs)))

    def past_prefix(self, length: int) -> "Batch":
        """The same without the targets inside a prefix of ``length`` tokens."""
        if length <= 1:
            return self
        place = None if self.mask is None else self.mask.cumsum(1) - 1
        return replace(self, targets=past_prefix(self.targets, length, place))

    def rows(self, start: int, stop: int) -> "Batch":
        """Sequences start..stop of the batch: a micro-batch."""
        mask = None if self.mask is None else self.mask[start:stop]
        noise = None if self.noise is None else self.noise.rows(start, stop)
        return Batch(self.inputs[start:stop], self.targets[start:stop], mask, noise)


@dataclass(frozen=True)
class Data:
    """A tokenised corpus: ``separator doc separator doc … separator``, for training and held-out documents.

    Every token of a document and the separator after it is predicted once in an epoch (the last length-1 or fewer of
    an epoch's tokens wait for the next), and exactly once in an evaluation. skipped: files left out as not UTF-8.
    validation: of documents that are neither trained on nor held out, for choices between runs; None without any.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    train_bytes: int
    held_out_bytes: int
    fingerprint: str
    skipped: tuple[str, ...] = ()
    validation: np.ndarray | None = None


def prepare(
    corpus: Corpus, *, length: int, tokenizer: str = "bpe", vocab_size: int = 8192, cache: Path | None = None
) -> Data:
    """Tokenise a corpus for sequences of ``length`` tokens.

    tokenizer: ``bpe`` (learnt from the training documents), ``bytes``, or the path of a tokenizer.json.
    cache: folder that keeps tokenizers and token ids under the hash of what they were made from.
    Raises: ValueError if the training text is shorter than one sequence and its next token.
    """
    encoder = make_tokenizer(corpus, kind=tokenizer, vocab_size=vocab_size, cache=cache)
    train = tokenise(corpus.train, encoder, cache=cache)
    if len(train) < length + 1:
        raise ValueError(
            f"corpus {corpus.name!r} has {len(train)} training tokens, fewer than one sequence of length={length}"
            " and its next token: give more text or a smaller data.length"
        )
    held_out = tokenise(corpus.held_out, encoder, cache=cache)
    print_of_content = hashlib.blake2b((corpus.fingerprint() + encoder.to_json()).encode(), digest_size=16).hexdigest()
    return Data(
        encoder, train, held_out, corpus.train_bytes, corpus.held_out_bytes, print_of_content, corpus.skipped,
        tokenise(corpus.validation, encoder, cache=cache) if corpus.validation else None,
    )  # fmt: skip


def make_tokenizer(corpus: Corpus, *, kind: str, vocab_size: int, cache: Path | None = None) -> Tokenizer:
    """``bytes``, a saved tokenizer, or a BPE learnt from the training documents (from the cache if it was before)."""
    if kind == "bytes":
        return byte_tokenizer()
    if kind != "bpe":
        return load_tokenizer(kind)
    cached = None if cache is None else cache / f"bpe{vocab_size}-{_hash_of(corpus.train)}-{FILE_NAME}"
    if cached is not None and cached.is_file():
        return load_tokenizer(cached)
    learnt = train_bpe(corpus.train, vocab_size=vocab_size)
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(cached, learnt.to_json().encode())
    return learnt


def tokenise(documents: Sequence[str], tokenizer: Tokenizer, *, cache: Path | None = None) -> np.ndarray:
    """``separator doc separator doc … separator`` as the smallest unsigned integers that hold the vocabulary [N].

    With a cache the array is memory-mapped from a .npy file (no pickle), written once and whole.
    """
    if cache is None:
        return _pack(documents, tokenizer)
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"tokens-{_hash_of([tokenizer.to_json(), *documents])}.npy"
    if not file.is_file():
        content = io.BytesIO()
        np.save(content, _pack(documents, tokenizer), allow_pickle=False)
        replace_durably(file, content.getvalue())
    return np.load(file, mmap_mode="r", allow_pickle=False)


@runtime_checkable
class Stream(Protocol):
    """An endless run of training batches that can go on where it stopped."""

    def next(self) -> Batch:
        """The next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it is: tensors and JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        ...


class Batches:
    """An endless, seeded stream of training batches whose position is one number.

    Each epoch cuts the tokens into windows of ``length`` (the spare tokens fall at a random offset) and visits them in
    a random order, both drawn from (seed, epoch): any batch can be had without those before it.
    """

    def __init__(self, tokens: np.ndarray, *, batch: int, length: int, seed: int) -> None:
        """tokens [N], N > length. Raises: ValueError if batch or length is below 1, or there are too few tokens."""
        if batch < 1 or length < 1 or len(tokens) < length + 1:
            raise ValueError(f"need batch ≥ 1 and 1 ≤ length < tokens={len(tokens)}, got {batch} and {length}")
        self.tokens, self.batch, self.length, self.seed = tokens, batch, length, seed
        self.windows = (len(tokens) - 1) // length
        self.consumed = 0
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def next(self) -> Batch:
        """The batch at the position, which moves on."""
        rows = [self._window(self.consumed + row) for row in range(self.batch)]
        self.consumed += self.batch
        ids = torch.from_numpy(np.stack(rows))
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    @property
    def epoch(self) -> float:
        """Passes over the tokens so far."""
        return self.consumed / self.windows

    def state_dict(self) -> dict[str, int]:
        """Position, and what it is a position in."""
        shape = {"batch": self.batch, "length": self.length, "seed": self.seed, "tokens": len(self.tokens)}
        return {"consumed": self.consumed, **shape}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Move to a saved position. Raises: ValueError if it belongs to other tokens, batches or another seed."""
        mine = self.state_dict()
        for key in ("batch", "length", "seed", "tokens"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the checkpoint was trained with data {key}={state[key]}, this run has {mine[key]}:"
                    " resume with the same data settings, or start a new --out"
                )
        self.consumed = state["consumed"]

    def _window(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, self.windows)
        if epoch != self._epoch:
            self._epoch, self._starts = epoch, self._draw_epoch(epoch)
        start = self._starts[position]
        return self.tokens[start : start + self.length + 1].astype(np.int64)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        draw = np.random.default_rng((self.seed, epoch))
        spare = len(self.tokens) - 1 - self.windows * self.length
        return draw.permutation(self.windows) * self.length + draw.integers(spare + 1)


def held_out_batches(tokens: np.ndarray, *, batch: int, length: int, padding_id: int = 0) -> Iterator[Batch]:
    """Every token after the first predicted exactly once, in order, from at most ``length`` tokens before it.

    Windows do not overlap; the last one is padded.
    """
    windows = [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]
    for first in range(0, len(windows), batch):
        yield _padded(windows[first : first + batch], length=length, padding_id=padding_id)


def _padded(windows: Sequence[np.ndarray], *, length: int, padding_id: int) -> Batch:
    inputs = torch.full((len(windows), length), padding_id)
    targets = torch.full((len(windows), length), IGNORED)
    for row, window in enumerate(windows):
        ids = torch.from_numpy(window.astype(np.int64))
        inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
    mask = targets != IGNORED
    return Batch(inputs, targets, None if bool(mask.all()) else mask)


def _pack(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    separator = np.array([tokenizer.eos_id], dtype=kind)
    parts = [separator]
    for ids in tokenizer.encode_documents(documents):
        parts += [ids.astype(kind), separator]
    return np.concatenate(parts)


def _hash_of(texts: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.hexdigest()
