"""Where text comes from: the interpreter's own library, files, or a Hugging Face dataset; documents, split once."""

import glob
import gzip
import hashlib
import itertools
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

STDLIB = "stdlib"
HUGGING_FACE = "hf:"
NOT_LIBRARY = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Documents, in a fixed order, already split.

    train, held_out: whole documents; no text occurs twice. skipped: files that are not UTF-8 text.
    """

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents, separators not counted."""
        return sum(len(text.encode()) for text in self.held_out)

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training documents, separators not counted."""
        return sum(len(text.encode()) for text in self.train)

    def fingerprint(self) -> str:
        """A hash of every document and its side of the split."""
        digest = hashlib.blake2b(digest_size=16)
        for side in (self.train, self.held_out):
            digest.update(b"side")
            for text in side:
                digest.update(_digest(text))
        return digest.hexdigest()


def load_corpus(
    name: str,
    *,
    held_out: float = 0.05,
    split: str = "train",
    field: str = "text",
    max_documents: int | None = None,
    streaming: bool = False,
) -> Corpus:
    """The documents called ``name``, split into training and held-out text.

    name: ``stdlib``; a file, folder or glob; or ``hf:dataset[:config]`` (see :func:`read_files`, :func:`read_hub`).
    held_out: share of the documents kept for evaluation, at least one. Documents are ordered by the hash of their
    text, so that order and split depend on nothing but the texts. A corpus of one document is cut at a line end.
    split, field: of a Hugging Face dataset; ``field`` also of JSON lines. max_documents: at most so many, the first by
    hash; with ``streaming`` the first that arrive, and nothing beyond them is downloaded.

    Raises: ValueError if there is no text, or held_out is outside (0, 1); FileNotFoundError if no file matches.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    if streaming and (max_documents is None or not name.startswith(HUGGING_FACE)):
        raise ValueError(f"streaming needs an hf: corpus and max_documents, got {name!r} and {max_documents}")
    skipped: list[str] = []
    if name == STDLIB:
        texts: Iterable[str] = read_stdlib(skipped=skipped)
    elif name.startswith(HUGGING_FACE):
        rows = read_hub(name, split=split, field=field, streaming=streaming)
        texts = itertools.islice(rows, max_documents) if streaming else rows
    else:
        texts = read_files(name, field=field, skipped=skipped)
    documents = in_hash_order(texts)[:max_documents]
    if not documents:
        raise ValueError(f"corpus {name!r} is empty: it has no document with text ({len(skipped)} files are not UTF-8)")
    train, rest = split_documents(documents, held_out=held_out)
    return Corpus(name=name, train=train, held_out=rest, skipped=tuple(skipped))


def in_hash_order(texts: Iterable[str]) -> list[str]:
    """Distinct, non-empty texts ordered by the BLAKE2b hash of their content."""
    by_hash = {_digest(text): text for text in texts if text}
    return [by_hash[key] for key in sorted(by_hash)]


def split_documents(documents: list[str], *, held_out: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training, held-out): the first ``held_out`` of the documents by number, at least one, is held out.

    A single document is cut at the line end nearest before its last ``held_out`` share of characters.
    Raises: ValueError if a single document has no line end to cut at.
    """
    if len(documents) > 1:
        count = min(max(1, round(held_out * len(documents))), len(documents) - 1)
        return tuple(documents[count:]), tuple(documents[:count])
    text = documents[0]
    cut = text.rfind("\n", 0, int(len(text) * (1 - held_out))) + 1
    if cut == 0:
        raise ValueError(f"the corpus is one document of {len(text)} characters with no line end to split it at")
    return (text[:cut],), (text[cut:],)


def read_stdlib(*, skipped: list[str] | None = None) -> Iterator[str]:
    """The .py files of the running interpreter's library, without its tests, IDLE and installed packages.

    The few that are not UTF-8 are left out and named in ``skipped``.
    """
    skipped = [] if skipped is None else skipped
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            yield from _read_text(path, skipped=skipped)


def read_files(name: str, *, field: str = "text", skipped: list[str] | None = None) -> Iterator[str]:
    """One document a file, for a file, every file below a folder (hidden ones left out), or a glob.

    ``.gz`` is unpacked; in ``.jsonl`` each line is an object whose ``field`` is a document. Files that are not UTF-8
    are left out and named in ``skipped``. Raises: FileNotFoundError if no file matches.
    """
    skipped = [] if skipped is None else skipped
    for path in _matching(name):
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            yield from _read_json_lines(path, field=field, skipped=skipped)
        else:
            yield from _read_text(path, skipped=skipped)


def read_hub(name: str, *, split: str = "train", field: str = "text", streaming: bool = False) -> Iterator[str]:
    """Documents of ``hf:dataset[:config]`` through ``datasets``: a hub name, a local folder, or a builder such as json.

    A third part gives local files: ``hf:json:/data/part*.jsonl``. streaming: read while downloading, nothing cached.
    Raises: ValueError if the dataset has no such field.
    """
    import datasets  # takes a second to import

    dataset_name, _, config = name.removeprefix(HUGGING_FACE).partition(":")
    where = {"data_files": config} if dataset_name in {"json", "text", "csv", "parquet"} else {"name": config or None}
    rows = datasets.load_dataset(dataset_name, split=split, streaming=streaming, **where)
    for row in rows:
        if field not in row:
            raise ValueError(f"dataset {name!r} has no field {field!r}, only {sorted(row)}: set data.field")
        yield row[field]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _matching(name: str) -> list[Path]:
    root = Path(name).expanduser()
    if root.is_file():
        return [root]
    candidates = root.rglob("*") if root.is_dir() else map(Path, glob.glob(str(root), recursive=True))
    base = root if root.is_dir() else Path()
    files = sorted(path for path in candidates if path.is_file() and not _hidden(path, base))
    if not files:
        raise FileNotFoundError(f"no file for corpus {name!r}: give 'stdlib', 'hf:NAME', a file, a folder or a glob")
    return files


def _hidden(path: Path, base: Path) -> bool:
    parts = path.relative_to(base).parts if path.is_relative_to(base) else path.parts
    return any(part.startswith(".") and part not in {".", ".."} for part in parts)


def _open_text(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8")


def _read_text(path: Path, *, skipped: list[str]) -> Iterator[str]:
    try:
        yield _open_text(path)
    except UnicodeDecodeError:
        skipped.append(str(path))


def _read_json_lines(path: Path, *, field: str, skipped: list[str]) -> Iterator[str]:
    for text in _read_text(path, skipped=skipped):
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ValueError(f"{path}:{number} has no text in field {field!r}: set data.field")
            yield row[field]
