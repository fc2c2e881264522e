"""What a language model has to beat, on the same held-out bytes and with the same training text.

``xz -9`` (LZMA, repeats and byte statistics) and an interpolated Kneser–Ney n-gram model, over bytes or over the
model's own tokens. All are given in bits per byte of held-out text.
"""

import lzma
import time
from dataclasses import dataclass

import numpy as np

XZ_DICTIONARY = {6: 8 << 20, 7: 16 << 20, 8: 32 << 20, 9: 64 << 20}  # bytes that preset p can look back (xz(1))


@dataclass(frozen=True)
class Baseline:
    """A baseline's result. ``bits_per_byte`` is over ``heldout_bytes``; ``detail`` says what was run."""

    name: str
    bits_per_byte: float
    heldout_bytes: int
    seconds: float
    detail: str


def xz_baseline(train: bytes, heldout: bytes, *, preset: int = 9) -> Baseline:
    """8 · (len(xz(train + heldout)) − len(xz(train))) / len(heldout): what the held-out text adds to the archive.

    Raises: ValueError on empty text, an unknown preset, or text longer than the preset's dictionary, which would hide
    the start of the training text from the compressor.
    """
    if preset not in XZ_DICTIONARY:
        raise ValueError(f"preset must be one of {sorted(XZ_DICTIONARY)}, got {preset}")
    if not train or not heldout:
        raise ValueError(f"train and heldout must not be empty, got {len(train)} and {len(heldout)} bytes")
    window = XZ_DICTIONARY[preset]
    if len(train) + len(heldout) > window:
        size = len(train) + len(heldout)
        raise ValueError(f"train + heldout must fit xz -{preset}'s dictionary of {window} bytes, got {size}")
    started = time.perf_counter()
    added = len(lzma.compress(train + heldout, preset=preset)) - len(lzma.compress(train, preset=preset))
    return Baseline(
        name=f"xz -{preset}",
        bits_per_byte=8 * added / len(heldout),
        heldout_bytes=len(heldout),
        seconds=time.perf_counter() - started,
        detail=f"lzma preset {preset}, dictionary {window >> 20} MiB, xz(train + held-out) − xz(train)",
    )


@dataclass(frozen=True)
class Level:
    """The k-grams of the training text. A k-gram's key is (id of its first k−1 symbols) · vocab_size + last symbol;
    its id is the key's place in ``keys``. ``count``: occurrences (highest order) or distinct left neighbours (lower
    orders). ``total`` and ``distinct``: sum of counts, and number of counted k-grams, for each (k−1)-gram id."""

    keys: np.ndarray
    count: np.ndarray
    total: np.ndarray
    distinct: np.ndarray
    discount: float


@dataclass(frozen=True)
class NGram:
    """An n-gram model: ``levels[k−1]`` holds the k-grams, k = 1 … n."""

    vocab_size: int
    levels: tuple[Level, ...]

    @property
    def order(self) -> int:
        """n: a symbol is predicted from the n − 1 before it."""
        return len(self.levels)


def fit_ngram(symbols: np.ndarray, *, vocab_size: int, order: int = 5) -> NGram:
    """Count the n-grams of ``symbols`` [N] for interpolated Kneser–Ney smoothing (Kneser & Ney 1995; Chen & Goodman
    1998, §2.8). Raises: ValueError if there are fewer symbols than ``order`` or one is outside [0, vocab_size)."""
    if order < 1:
        raise ValueError(f"order must be >= 1, got {order}")
    if len(symbols) < order:
        raise ValueError(f"symbols must be at least order={order} long, got {len(symbols)}")
    _check_symbols(symbols, vocab_size)
    levels: list[Level] = []
    ending = np.zeros(len(symbols) + 1, dtype=np.int64)  # ending[j]: id of the (k−1)-gram before position j + k − 1
    lower_keys, lower_size, size = ending[:1], 1, 1
    for k in range(1, order + 1):
        key = ending[:-1] * vocab_size + symbols[k - 1 :]
        suffix = ending[1:]
        keys, first, ending, occurrences = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        if k > 1:
            left_neighbours = np.bincount(suffix[first], minlength=size)
            levels.append(_level(lower_keys, left_neighbours, vocab_size, contexts=lower_size))
        lower_keys, lower_size, size = keys, size, len(keys)
    levels.append(_level(lower_keys, occurrences, vocab_size, contexts=lower_size))
    return NGram(vocab_size, tuple(levels))


def _level(keys: np.ndarray, count: np.ndarray, vocab_size: int, *, contexts: int) -> Level:
    context = keys // vocab_size
    once, twice = int((count == 1).sum()), int((count == 2).sum())
    return Level(
        keys=keys,
        count=count,
        total=np.bincount(context, weights=count, minlength=contexts),
        distinct=np.bincount(context[count > 0], minlength=contexts),
        # Ney's estimate n1 / (n1 + 2·n2); without singletons it would be 0 and a new symbol impossible.
        discount=once / (once + 2 * twice) if once else 0.5,
    )


def ngram_probabilities(model: NGram, history: np.ndarray, symbols: np.ndarray) -> np.ndarray:
    """P(symbols[i] | the n − 1 symbols before it in history + symbols), float64 [len(symbols)].

    P_k(w | h) = max(c(hw) − D_k, 0) / c(h) + D_k · N(h) / c(h) · P_{k−1}(w | h without its first symbol), where N(h) is
    the number of different symbols that follow h, P_0 = 1 / vocab_size, and a context never seen passes P_{k−1} on.
    """
    _check_symbols(history, model.vocab_size)
    _check_symbols(symbols, model.vocab_size)
    keep = min(model.order - 1, len(history))
    text = np.concatenate([history[len(history) - keep :], symbols]).astype(np.int64)
    probability = np.full(len(text), 1.0 / model.vocab_size)
    before = np.zeros(len(text) + 1, dtype=np.int64)  # before[i]: id of the (k−1)-gram just before position i, or −1
    for level in model.levels:
        gram = _find(level.keys, np.where(before[:-1] < 0, -1, before[:-1] * model.vocab_size + text))
        context = before[:-1]
        seen = (context >= 0) & (level.total[context] > 0)
        total = level.total[context[seen]]
        count = np.where(gram[seen] >= 0, level.count[gram[seen]], 0)
        kept = np.maximum(count - level.discount, 0.0)
        probability[seen] = (kept + level.discount * level.distinct[context[seen]] * probability[seen]) / total
        before = np.concatenate([[-1], gram])
    return probability[keep:]


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of each wanted key in the sorted keys, −1 where it is missing."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def ngram_baseline(
    train: np.ndarray, heldout: np.ndarray, *, vocab_size: int, heldout_bytes: int, order: int = 5, unit: str = "byte"
) -> Baseline:
    """Bits per byte of an n-gram model of the symbols (bytes or tokens); the held-out text follows the training text.

    train, heldout: symbols in [0, vocab_size). heldout_bytes: bytes of text that ``heldout`` stands for.
    """
    if heldout_bytes < 1:
        raise ValueError(f"heldout_bytes must be >= 1, got {heldout_bytes}")
    started = time.perf_counter()
    model = fit_ngram(train, vocab_size=vocab_size, order=order)
    bits = -np.log2(ngram_probabilities(model, train, heldout)).sum()
    return Baseline(
        name=f"{order}-gram, {unit}s",
        bits_per_byte=float(bits) / heldout_bytes,
        heldout_bytes=heldout_bytes,
        seconds=time.perf_counter() - started,
        detail=f"interpolated Kneser–Ney over {unit}s, {len(model.levels[-1].keys):,} different {order}-grams",
    )


def as_symbols(text: bytes) -> np.ndarray:
    """The bytes of a text as symbols in [0, 256)."""
    return np.frombuffer(text, dtype=np.uint8)


def _check_symbols(symbols: np.ndarray, vocab_size: int) -> None:
    if symbols.ndim != 1:
        raise ValueError(f"symbols must have one dimension, got shape {symbols.shape}")
    if len(symbols) and not (symbols.min() >= 0 and symbols.max() < vocab_size):
        raise ValueError(f"symbols must be in [0, vocab_size={vocab_size}), got {symbols.min()} … {symbols.max()}")
