"""Where text comes from: the interpreter's own library, files, or a Hugging Face dataset; documents, split once."""

import glob
import gzip
import hashlib
import itertools
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.folders import MARKER

STDLIB = "stdlib"
HUGGING_FACE = "hf:"
BUILDERS = frozenset({"json", "text", "csv", "parquet"})
NOT_LIBRARY = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Documents, in a fixed order, already split.

    train, held_out, validation: whole documents; no text occurs twice. validation: kept from both, for choices between
    runs. skipped: files that are not UTF-8 text.
    """

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()

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
        for side in (self.train, self.held_out, *([self.validation] if self.validation else [])):
            digest.update(b"side")
            for text in side:
                digest.update(_digest(text))
        return digest.hexdigest()


def load_corpus(
    name: str,
    *,
    held_out: float = 0.05,
    validation: float = 0.0,
    split: str = "train",
    field: str = "text",
    max_documents: int | None = None,
    streaming: bool = False,
) -> Corpus:
    """The documents called ``name``, split into training and held-out text.

    name: ``stdlib``; a file, folder or glob; or ``hf:dataset[:config]`` (see :func:`read_files`, :func:`read_hub`).
    held_out: share of the documents kept for evaluation, at least one. validation: share kept for choices between runs,
    none at 0; taken from the training documents, so that the held-out ones are the same with and without it. Documents
    are ordered by the hash of their text, so that order and split depend on nothing but the texts. A corpus of one
    document is cut at a line end.
    split, field: of a Hugging Face dataset; ``field`` also of JSON lines. max_documents: at most so many, the first by
    hash; with ``streaming`` the first that arrive, and nothing beyond them is downloaded.

    Raises: ValueError if there is no text, held_out is outside (0, 1), or validation outside [0, 1 - held_out);
    FileNotFoundError if no file matches.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    if not 0 <= validation < 1 - held_out:
        raise ValueError(f"validation must be in [0, 1 - held_out={1 - held_out:g}), got {validation}")
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
    kept: tuple[str, ...] = ()
    if validation:
        try:
            train, kept = split_documents(list(train), held_out=validation / (1 - held_out))
        except ValueError as error:
            raise ValueError(
                f"validation={validation:g} cannot be cut from what held_out={held_out:g} leaves of {len(documents)} "
                f"documents, one of {len(train[0])} characters with no line end: give more files, or a longer text"
            ) from error
    return Corpus(name=name, train=train, held_out=rest, skipped=tuple(skipped), validation=kept)


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
        raise ValueError(
            f"the corpus is one document of {len(text)} characters with no line end to "
            "split it at: give more files, or a longer text"
        )
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


def torch_headers() -> str:
    """A glob of the C++ headers that torch brings: text that shares nothing with the interpreter's library."""
    return str(Path(torch.__file__).parent / "include" / "c10" / "**" / "*.h")


def read_files(name: str, *, field: str = "text", skipped: list[str] | None = None) -> Iterator[str]:
    """One document a file, for a file, every file below a folder, or a glob; sorted by path.

    Below the folder, or the part of a glob without wildcards, hidden files and folders are left out, and the folders
    that this package wrote (see :mod:`training.folders`): runs, pruned models, caches.

    ``.gz`` is unpacked; in ``.jsonl`` each line is an object whose ``field`` is a document. Files that are not UTF-8
    are left out and named in ``skipped``. Raises: FileNotFoundError if no file matches; ValueError naming the file (and
    line) if a .gz or .jsonl is damaged, or the folder is itself one that this package writes to.
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
    Raises: ValueError if the dataset has no text in that field, is damaged, or names no files.
    """
    import datasets  # takes a second to import

    dataset_name, _, config = name.removeprefix(HUGGING_FACE).partition(":")
    if dataset_name in BUILDERS and not config:
        raise ValueError(f"corpus {name!r} names no files: give {HUGGING_FACE}{dataset_name}:FILES")
    where = {"data_files": config} if dataset_name in BUILDERS else {"name": config or None}
    try:
        for number, row in enumerate(datasets.load_dataset(dataset_name, split=split, streaming=streaming, **where)):
            yield _text_of_row(row, field=field, where=f"row {number} of dataset {name!r}")
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"dataset {name!r} is not readable: {error.__cause__ or error}") from error


def _text_of_row(row: Mapping[str, Any], *, field: str, where: str) -> str:
    if field not in row:
        raise ValueError(f"{where} has no field {field!r}, only {sorted(row)}: set data.text_field")
    if not isinstance(row[field], str):
        raise ValueError(f"{where} has {type(row[field]).__name__} in {field!r}, not text: set data.text_field")
    text: str = row[field]
    return text


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _matching(name: str) -> list[Path]:
    root = Path(name).expanduser()
    if root.is_file():
        return [root]
    if (root / MARKER).is_file():
        raise ValueError(f"corpus {name!r} is a folder that runs or caches are written to: give --out or cache another")
    candidates = root.rglob("*") if root.is_dir() else map(Path, glob.glob(str(root), recursive=True))
    base = root if root.is_dir() else _without_wildcards(root)
    files = sorted(path for path in candidates if path.is_file() and not _hidden(path, base) and not _ours(path, base))
    if not files:
        raise FileNotFoundError(f"no file for corpus {name!r}: give 'stdlib', 'hf:NAME', a file, a folder or a glob")
    return files


def _without_wildcards(pattern: Path) -> Path:
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _hidden(path: Path, base: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(base).parts)


def _ours(path: Path, base: Path) -> bool:
    below = path.relative_to(base).parents
    return any((base / parent / MARKER).is_file() for parent in below if parent != Path())


def _open_text(path: Path) -> str:
    if path.suffix != ".gz":
        return path.read_bytes().decode("utf-8")
    try:
        raw = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or not gzip ({error}): copy it again, or leave it out") from error
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
            yield _text_of_line(line, field=field, where=f"{path}:{number}")


def _text_of_line(line: str, *, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ValueError(f"{where} has no text in field {field!r}: set data.text_field")
    text: str = row[field]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half of a surrogate pair, which is not text: {error}") from error
    return text
