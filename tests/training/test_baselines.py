"""The baselines: hand-worked n-gram numbers, a dictionary oracle, probabilities that sum to one, and xz by hand."""

import lzma
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.baselines import as_symbols, fit_ngram, ngram_baseline, ngram_probabilities, xz_baseline


def probability_by_loops(text: list[int], history: list[int], symbol: int, *, vocab_size: int, order: int) -> float:
    """Interpolated Kneser–Ney with dictionaries, straight from the formula."""
    raw = [defaultdict(int) for _ in range(order + 1)]
    for k in range(1, order + 1):
        for i in range(len(text) - k + 1):
            raw[k][tuple(text[i : i + k])] += 1
    probability = 1 / vocab_size
    for k in range(1, order + 1):
        counts = dict(raw[k])
        if k < order:
            counts = {gram: sum(longer[1:] == gram for longer in raw[k + 1]) for gram in raw[k]}
        once = sum(c == 1 for c in counts.values())
        twice = sum(c == 2 for c in counts.values())
        discount = once / (once + 2 * twice) if once else 0.5
        if len(history) < k - 1:
            break
        context = tuple(history[len(history) - k + 1 :])
        followers = {gram: c for gram, c in counts.items() if gram[:-1] == context and c > 0}
        total = sum(followers.values())
        if total == 0:
            continue
        kept = max(followers.get((*context, symbol), 0) - discount, 0)
        probability = (kept + discount * len(followers) * probability) / total
    return probability


def test_bigram_worked_by_hand() -> None:
    """a b a b a a: bigrams ab 2, ba 2, aa 1, so D_2 = 1/(1 + 2·2) = 1/5; left neighbours a: {b, a}, b: {a}, so
    D_1 = 1/(1 + 2·1) = 1/3, P_1(a) = (2 − 1/3)/3 + (1/3)(2/3)(1/2) = 2/3; P(b | a) = (2 − 1/5)/3 + (1/5)(2/3)(1/3)."""
    model = fit_ngram(np.array([0, 1, 0, 1, 0, 0]), vocab_size=2, order=2)
    after_a = [ngram_probabilities(model, np.array([0]), np.array([w]))[0] for w in (0, 1)]
    after_b = [ngram_probabilities(model, np.array([1]), np.array([w]))[0] for w in (0, 1)]
    np.testing.assert_allclose(after_a, [16 / 45, 29 / 45], rtol=1e-12)
    np.testing.assert_allclose(after_b, [29 / 30, 1 / 30], rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=5, max_size=40),
    heldout=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    order=st.integers(1, 5),
)
def test_probabilities_equal_the_dictionary_oracle(text: list[int], heldout: list[int], order: int) -> None:
    """Symbol 4 never occurs in training: unseen symbols and contexts are part of every case."""
    model = fit_ngram(np.array(text), vocab_size=5, order=order)
    actual = ngram_probabilities(model, np.array(text), np.array(heldout))
    expected = [
        probability_by_loops(text, text + heldout[:i], symbol, vocab_size=5, order=order)
        for i, symbol in enumerate(heldout)
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=4, max_size=60),
    history=st.lists(st.integers(0, 4), max_size=6),
    order=st.integers(1, 4),
)
def test_probabilities_sum_to_one_after_any_history(text: list[int], history: list[int], order: int) -> None:
    model = fit_ngram(np.array(text), vocab_size=5, order=order)
    past = np.array(history, dtype=np.int64)
    total = sum(ngram_probabilities(model, past, np.array([symbol]))[0] for symbol in range(5))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_bits_per_byte_count_the_text_behind_the_symbols() -> None:
    """Uniform noise over 256 bytes costs about 8 bits a byte; the same symbols standing for twice the bytes, half."""
    noise = np.random.default_rng(0).integers(0, 256, 4000)
    once = ngram_baseline(noise[:3000], noise[3000:], vocab_size=256, heldout_bytes=1000)
    twice = ngram_baseline(noise[:3000], noise[3000:], vocab_size=256, heldout_bytes=2000, unit="token")
    assert 7.9 < once.bits_per_byte < 8.3
    assert twice.bits_per_byte == pytest.approx(once.bits_per_byte / 2)
    assert once.name == "5-gram, bytes" and twice.name == "5-gram, tokens"


def test_xz_counts_only_what_the_heldout_text_adds() -> None:
    rng = np.random.default_rng(0)
    train, fresh = rng.bytes(20_000), rng.bytes(5_000)
    assert xz_baseline(train, train[:5_000]).bits_per_byte < 0.6  # a copy costs matches and headers only
    assert xz_baseline(train, fresh).bits_per_byte == pytest.approx(8.0, abs=0.1)
    stream = lzma.compress(train + fresh, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 64 << 20}])
    assert len(stream) == len(lzma.compress(train + fresh, preset=9))  # preset 9 has the dictionary that we state


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="dictionary of 8388608 bytes, got 9000010"):
        xz_baseline(b"\0" * 9_000_000, b"0123456789", preset=6)
    with pytest.raises(ValueError, match="must not be empty, got 0 and 1"):
        xz_baseline(b"", b"x")
    with pytest.raises(ValueError, match="preset must be one of"):
        xz_baseline(b"x", b"x", preset=1)
    with pytest.raises(ValueError, match="order must be >= 1, got 0"):
        fit_ngram(as_symbols(b"abc"), vocab_size=256, order=0)
    with pytest.raises(ValueError, match="at least order=5 long, got 3"):
        fit_ngram(as_symbols(b"abc"), vocab_size=256)
    with pytest.raises(ValueError, match=r"\[0, vocab_size=98\), got 97 … 99"):
        fit_ngram(as_symbols(b"abcabc"), vocab_size=98)
