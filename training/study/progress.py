"""What a running study shows, and whether its budget holds."""

import statistics
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from training.records import Line
from training.study.records import DONE, cells_by_key
from training.study.spec import Study, cell_key, sweep_cells
from training.study.summary import missing


class Progress:
    """A bar on a terminal, a line for each finished cell everywhere, and the time left from what cells took so far."""

    def __init__(self, study: Study, lines: list[Line], *, jobs: int, console: Console) -> None:
        self.study, self.jobs, self.console = study, jobs, console
        self.lines, self.started, self.warned = list(lines), time.monotonic(), False
        self.new = 0
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
            self._bar = Bar(*columns, TimeElapsedColumn(), console=console)
            self._task = self._bar.add_task("cells", total=self._total(), completed=self._done(), left="")

    def finished(self, line: Line) -> None:
        """Take over a cell's record.

        Raises: ValueError if it is the first of this session and says that the budget is too small.
        """
        if line["kind"] == "regime":
            said = f"{line['arm']}, {line['regime']}, rate {line['lr']:g}, seed {line['seed']}: {line['score']}"
            self.console.print(said, highlight=False, soft_wrap=True)
            return
        self.lines.append(line)
        self.new += 1
        left = seconds_left(self.study, self.lines) / self.jobs / 60
        result = f"{line['bits_per_byte']:.4f} bits per byte" if line["status"] == DONE else line["status"]
        self.console.print(
            f"{line['arm']}, rate {line['lr']:g}, seed {line['seed']}: {result}, {line['wall_seconds']:.0f} s;"
            f" {self._done()} of {self._total()} cells, about {left:.0f} min left",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done(), total=self._total(), left=f"about {left:.0f} min left")
        self._check_budget(left)

    def _check_budget(self, left: float) -> None:
        needed = (time.monotonic() - self.started) / 60 + left
        if needed <= self.study.budget_minutes or self.warned:
            return
        text = (
            f"budget is {self.study.budget_minutes:g} minutes, the cells so far say about {needed:.0f} with"
            f" {self.jobs} at once: give --budget {needed * 1.2:.0f}, or declare less"
        )
        if self.new == 1:
            raise ValueError(f"{text}; the finished cell is kept")
        self.warned = True
        self.console.print(f"warning: {text}", highlight=False, soft_wrap=True)

    def _done(self) -> int:
        return self._total() - cells_left(self.study, self.lines)

    def _total(self) -> int:
        return len(sweep_cells(self.study, self.lines)) + _after_sweep(self.study)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def cells_left(study: Study, lines: list[Line]) -> int:
    """Cells with no record; until the sweep has ended, with all seeds that will follow it."""
    known = cells_by_key(lines)
    sweep = [cell for cell in sweep_cells(study, lines) if cell_key(study, cell) not in known]
    return len(sweep) + _after_sweep(study) if sweep else len(missing(study, lines))


def _after_sweep(study: Study) -> int:
    """Cells still to run when the sweep has ended, of which an arm's best run counts if it had full length."""
    full = study.sweep_steps in (None, study.steps) and not study.validation
    counted = sum(arm.rate_of is None for arm in study.arm) if full else 0
    return len(study.arm) * len(study.seeds) - counted


def seconds_left(study: Study, lines: list[Line]) -> float:
    """Seconds that the cells left take one after another, at the mean of those that ended."""
    return cells_left(study, lines) * statistics.fmean(line["wall_seconds"] for line in cells_by_key(lines).values())
