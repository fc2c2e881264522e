"""Numbers of a run as they come: JSON lines, and TensorBoard if asked for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from training.durable import replace_durably

FILE_NAME = "metrics.jsonl"


class Metrics:
    """Writes ``metrics.jsonl``, each line flushed as it is written, and TensorBoard scalars beside it.

    A run that resumes at ``step`` first removes the lines after that step (and a line cut short by a kill), so that
    every step is there once.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = False) -> None:
        """Raises: ImportError naming the install line if tensorboard is asked for and absent."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        replace_durably(path, "".join(lines_up_to(path, step)).encode())
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder, step) if tensorboard else None

    def write(self, line: Mapping[str, Any]) -> None:
        """Add one line; ``line["step"]`` is its step."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(line):
                self._board.add_scalar(name, value, line["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class NoMetrics:
    """Takes what :class:`Metrics` takes and writes nothing: for every process but the first."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line by name; those that come one for each layer as name/0, name/1, …"""
    for name, value in line.items():
        values = (
            {f"{name}/{layer}": item for layer, item in enumerate(value)} if isinstance(value, list) else {name: value}
        )
        yield from ((key, item) for key, item in values.items() if isinstance(item, int | float) and name != "step")


def lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of a metrics file that belong to steps up to ``step``.

    Raises: ValueError naming the line if one is not JSON with a step.
    """
    if step == 0 or not path.is_file():  # a run that starts anew keeps none, whole or not
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [line for number, line in enumerate(whole, start=1) if _step_of(line, where=f"{path}:{number}") <= step]


def _step_of(line: str, *, where: str) -> int:
    try:
        step: int = json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no line of metrics ({error!r}): remove that line") from error
    return step


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard is not installed: pip install 'sparse-transformers[tensorboard]'") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
