"""Every held-out byte is counted once, every training window comes once an epoch, and any position can be resumed."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.corpora import Corpus, load_corpus, read_files
from training.data import IGNORED, Batches, held_out_batches, prepare, tokenise
from training.folders import mark
from training.tokenizer import byte_tokenizer

TEXTS = [f"document {number}: " + "naïve words → " * number + "\n" for number in range(1, 21)]


def write_corpus(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


def test_split_is_by_document_and_depends_only_on_the_texts(tmp_path: Path) -> None:
    corpus = load_corpus(str(write_corpus(tmp_path)), held_out=0.2)
    assert sorted(corpus.train + corpus.held_out) == sorted(TEXTS)
    assert len(corpus.held_out) == 4
    (tmp_path / "00.txt").rename(tmp_path / "zz.md")
    (tmp_path / "copy.txt").write_text(TEXTS[3], encoding="utf-8")
    again = load_corpus(f"{tmp_path}/*", held_out=0.2)
    assert (again.train, again.held_out) == (corpus.train, corpus.held_out)
    assert again.fingerprint() == corpus.fingerprint()


def test_validation_text_is_taken_from_training_alone(tmp_path: Path) -> None:
    folder = str(write_corpus(tmp_path))
    whole, parted = load_corpus(folder, held_out=0.2), load_corpus(folder, held_out=0.2, validation=0.25)
    assert parted.held_out == whole.held_out and len(parted.validation) == 5
    assert sorted(parted.train + parted.validation) == sorted(whole.train)
    assert parted.fingerprint() != whole.fingerprint() == load_corpus(folder, held_out=0.2, validation=0).fingerprint()
    data = prepare(parted, length=8, tokenizer="bytes")
    assert data.tokenizer.decode(data.validation[1:-1].tolist()).startswith(parted.validation[0])
    assert prepare(whole, length=8, tokenizer="bytes").validation is None
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "only.txt").write_text(text := "".join(f"line {number}\n" for number in range(100)))
    one = load_corpus(str(tmp_path / "one"), held_out=0.1, validation=0.2)
    assert one.train[0] + one.validation[0] + one.held_out[0] == text
    assert 0.18 < len(one.validation[0]) / len(text) < 0.22
    with pytest.raises(ValueError, match=r"validation must be in \[0, 1 - held_out=0.8\), got 0.8"):
        load_corpus(folder, held_out=0.2, validation=0.8)


def test_one_document_is_cut_at_a_line_end(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "only.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "only.txt"), held_out=0.1)
    assert corpus.train[0] + corpus.held_out[0] == text
    assert corpus.train[0].endswith("\n")
    assert 0.09 < len(corpus.held_out[0]) / len(text) < 0.12


def test_packed_formats_and_files_that_are_not_text(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "line\u2028separator"])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed\r\ntext"))
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    corpus = load_corpus(str(tmp_path))
    assert set(corpus.train + corpus.held_out) == {*TEXTS, "line\u2028separator", "packed\r\ntext"}
    assert corpus.skipped == (str(tmp_path / "c.bin"),)


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_dataset_from_local_files(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    name = f"hf:json:{tmp_path}/rows.jsonl"
    limit = 5 if streaming else None
    corpus = load_corpus(name, field="body", streaming=streaming, max_documents=limit)
    assert sorted(corpus.train + corpus.held_out) == sorted(TEXTS[:limit])
    with pytest.raises(ValueError, match=r"row 0 of .* has no field 'text', only \['body'\]: set data\.text_field"):
        load_corpus(name)


def test_what_is_hidden_or_written_by_this_package_is_no_document(tmp_path: Path) -> None:
    base = tmp_path / ".notes" / "mine"
    for folder in (base / ".git", base / "runs" / "a" / "checkpoints", base / "sub"):
        folder.mkdir(parents=True)
        (folder / "inside.txt").write_text(f"inside {folder.name}\n")
    (base / ".hidden.txt").write_text("hidden\n")
    mark(base / "runs" / "a")
    (base / "plain.txt").write_text("plain\n")
    expected = ["plain\n", "inside sub\n"]
    assert list(read_files(str(base))) == expected
    assert list(read_files(f"{base}/**")) == expected
    assert list(read_files(str(base / "runs" / "a" / "checkpoints"))) == ["inside checkpoints\n"]
    with pytest.raises(ValueError, match="is a folder that runs or caches are written to"):
        load_corpus(str(base / "runs" / "a"))


@pytest.mark.parametrize(
    "spoil", [lambda raw: raw[:-9], lambda raw: raw[:12] + b"\xff" * 9 + raw[21:], lambda raw: b"no"]
)
def test_a_damaged_gz_is_named(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.txt.gz").write_bytes(spoil(gzip.compress("".join(TEXTS).encode())))
    with pytest.raises(ValueError, match=r"a\.txt\.gz is damaged or not gzip"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl:2 is not JSON"),
        ('{"text": 3}', r"a\.jsonl:2 has no text in field 'text': set data\.text_field"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2 has half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "good"}\n{"text": "cut', r"JSON"),
        ('{"text": 1}\n{"text": 2}\n', r"row 0 of dataset .* has int in 'text', not text: set data\.text_field"),
    ],
    ids=["broken", "number"],
)
def test_a_bad_hugging_face_dataset_is_a_value_error(tmp_path: Path, streaming: bool, lines: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        load_corpus(f"hf:json:{tmp_path}/rows.jsonl", streaming=streaming, max_documents=5)


def test_a_builder_without_files_is_refused() -> None:
    with pytest.raises(ValueError, match="'hf:json' names no files: give hf:json:FILES"):
        load_corpus("hf:json")


def test_the_interpreters_library_is_a_corpus() -> None:
    corpus = load_corpus("stdlib", max_documents=40)
    assert (len(corpus.train), len(corpus.held_out)) == (38, 2)
    assert corpus == load_corpus("stdlib", max_documents=40)


def test_bad_corpora_are_refused_before_work_starts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file for corpus"):
        load_corpus(str(tmp_path))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_corpus(str(tmp_path))
    (tmp_path / "short.txt").write_text("a\nb\n")
    corpus = load_corpus(str(tmp_path), held_out=0.4)
    with pytest.raises(ValueError, match="fewer than one sequence of length=64"):
        prepare(corpus, length=64, tokenizer="bytes")
    with pytest.raises(ValueError, match="held_out must be between 0 and 1"):
        load_corpus(str(tmp_path), held_out=1.0)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 4))
def test_evaluation_counts_every_byte_and_separator_once(texts: list[str], length: int, batch: int) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenise(texts, tokenizer)
    counted, targets = 0, []
    for item in held_out_batches(tokens, batch=batch, length=length):
        real = item.targets[item.targets != IGNORED]
        counted += int(tokenizer.token_bytes()[real].sum())
        targets += real.tolist()
    assert counted == sum(len(text.encode()) for text in texts)
    assert targets == tokens[1:].tolist()
    assert targets.count(tokenizer.eos_id) == len(texts)


@given(st.integers(2, 60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_visits_every_window_once_and_resumes_anywhere(
    tokens: int, length: int, batch: int, seed: int
) -> None:
    ids = np.arange(tokens, dtype=np.uint16)
    length = min(length, tokens - 1)
    batches = Batches(ids, batch=batch, length=length, seed=seed)
    windows = (tokens - 1) // length
    drawn = [batches.next() for _ in range(windows)]
    starts = [row[0] for item in drawn for row in item.inputs.tolist()]
    for epoch in range(batch):
        visited = starts[epoch * windows : (epoch + 1) * windows]
        assert Counter(start // length for start in visited) == Counter(range(windows))
    assert all((item.targets == item.inputs + 1).all() for item in drawn)
    resumed = Batches(ids, batch=batch, length=length, seed=seed)
    middle = windows // 2
    resumed.load_state_dict({**batches.state_dict(), "consumed": middle * batch})
    for item in drawn[middle:]:
        assert (resumed.next().inputs == item.inputs).all()


def test_position_of_other_data_is_refused() -> None:
    state = Batches(np.arange(50), batch=2, length=4, seed=0).state_dict()
    with pytest.raises(ValueError, match="data length=4, this run has 5"):
        Batches(np.arange(50), batch=2, length=5, seed=0).load_state_dict(state)


def test_cache_holds_what_tokenising_gives_and_is_written_whole(tmp_path: Path) -> None:
    corpus = Corpus("texts", train=tuple(TEXTS[2:]), held_out=tuple(TEXTS[:2]))
    plain = prepare(corpus, length=8, vocab_size=300)
    for _ in range(2):
        cached = prepare(corpus, length=8, vocab_size=300, cache=tmp_path / "cache")
        assert (cached.train == plain.train).all()
        assert (cached.held_out == plain.held_out).all()
        assert cached.fingerprint == plain.fingerprint
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name.split("-")[0] for name in names] == ["bpe300", "tokens", "tokens"]
    assert plain.held_out_bytes == sum(len(text.encode()) for text in TEXTS[:2])
