"""The tokenizer loses nothing, and knows how many bytes each token stands for."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.tokenizer import END_OF_DOCUMENT, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

SAMPLE = ["def f(x):\n    return x + 1\n" * 20, "naïve café → 東京\r\n\t\x00", "for i in range(10):\n        pass\n"]
BPE = train_bpe(SAMPLE, vocab_size=320)
BYTES = byte_tokenizer()
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=texts | st.sampled_from([*SAMPLE, "", END_OF_DOCUMENT, f"a{END_OF_DOCUMENT}\nb", "  \n\n  x"]))
def test_round_trip_is_lossless_and_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert sum(tokenizer.token_bytes()[ids].tolist()) == len(text.encode())


@given(text=texts)
def test_plain_bytes_give_one_token_a_byte(text: str) -> None:
    assert len(BYTES.encode(text)) == len(text.encode())
    assert BYTES.vocab_size == 257


def test_merges_shorten_text_and_batches_equal_single_texts() -> None:
    assert len(BPE.encode(SAMPLE[0])) < len(SAMPLE[0].encode()) / 2
    assert [ids.tolist() for ids in BPE.encode_documents(SAMPLE)] == [BPE.encode(text) for text in SAMPLE]


def test_saved_tokenizer_is_the_same_one(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.to_json() == BPE.to_json()
    assert again.encode(f"x{END_OF_DOCUMENT}") == BPE.encode(f"x{END_OF_DOCUMENT}")


def test_bad_requests_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_bpe(SAMPLE, vocab_size=100)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
