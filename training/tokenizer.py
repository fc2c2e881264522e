"""Byte-level byte-pair encoding, and plain bytes as the same encoding with no merges."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_DOCUMENT = "<|endoftext|>"
BYTES_VOCABULARY = 257
FILE_NAME = "tokenizer.json"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back without loss: every byte of the text belongs to exactly one token.

    ``<|endoftext|>`` written in a text is encoded as those characters; the separator's id never comes from text.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(compare=False)

    def __post_init__(self) -> None:
        if self.backend.token_to_id(END_OF_DOCUMENT) is None:
            raise ValueError(f"the tokenizer has no {END_OF_DOCUMENT} token to separate documents: train one here")
        self.backend.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """Number of ids, the separator included."""
        return self.backend.get_vocab_size()

    @property
    def eos_id(self) -> int:
        """Id of the separator that follows every document."""
        return self.backend.get_vocab()[END_OF_DOCUMENT]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without a separator."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without separators, encoded in parallel."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; separators are left out, and bytes that end in mid-character become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> Int[Tensor, "V"]:
        """Number of text bytes in each token, 0 for the separator: what makes bits per byte exact."""
        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        for token, index in self.backend.get_vocab().items():
            lengths[index] = len(token)  # a byte-level token has one character for each byte
        lengths[self.eos_id] = 0
        return lengths

    def to_json(self) -> str:
        """The content of ``tokenizer.json``."""
        return self.backend.to_str()

    def save(self, path: Path | str) -> None:
        """Write ``tokenizer.json`` at ``path``, a file, or in ``path``, a folder that exists."""
        path = Path(path)
        (path / FILE_NAME if path.is_dir() else path).write_text(self.to_json(), encoding="utf-8")


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE learnt from ``texts`` (Sennrich et al. 2016, over bytes as in GPT-2).

    Raises: ValueError if vocab_size is too small for the 256 bytes and the separator.
    """
    if vocab_size < BYTES_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {BYTES_VOCABULARY} (bytes and separator), got {vocab_size}")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def byte_tokenizer() -> Tokenizer:
    """One token for each byte: 256 ids and the separator."""
    return train_bpe([], vocab_size=BYTES_VOCABULARY)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read ``tokenizer.json``, or the folder that holds it.

    Raises: FileNotFoundError if there is none; ValueError if it is not a byte-level tokenizer with the separator.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {file}: give a {FILE_NAME}, 'bpe' or 'bytes'")
    backend = tokenizers.Tokenizer.from_file(str(file))
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(backend.get_vocab())
    if missing:
        raise ValueError(f"{file} is not byte-level: {len(missing)} of 256 bytes have no token, so text would be lost")
    return Tokenizer(backend)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
