"""Folders that this package writes to: marked, so that no corpus takes them for text, and used by one process."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = ".sparse-transformers"


def mark(folder: Path) -> None:
    """Make ``folder`` and say that it is this package's own: :func:`training.corpora.read_files` leaves it out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{folder} cannot be made a folder ({error.strerror}): give another --out"
        raise OSError(error.errno, message) from error
    (folder / MARKER).touch()


@contextmanager
def only_user(folder: Path) -> Iterator[None]:
    """Mark ``folder`` and hold it until the block ends; the system lets go of it when the process dies.

    Raises: OSError naming the folder and the other process if one holds it.
    """
    mark(folder)
    with (folder / MARKER).open("r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = file.read().strip() or "unknown"
            message = f"{folder} is in use by process {other}: wait for it or end it, or give another --out"
            raise OSError(errno.EWOULDBLOCK, message) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
