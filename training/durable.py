"""Files that are whole or absent: written aside, flushed to the disk, then renamed."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Write ``content`` and return once it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk: a rename lasts only once its folder is flushed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, content: bytes) -> None:
    """Give ``path`` new content in one step: a reader, or a crash, sees the old content or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_durably(aside, content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)
