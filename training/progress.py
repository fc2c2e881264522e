"""What a run shows while it goes: a bar on a terminal, a line now and then elsewhere; and its interruption."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Interruption:
    """Which signal asked the run to stop, if any: the step under way is finished first."""

    name: str | None = None


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Turn the first Ctrl-C or SIGTERM into a flag; a second Ctrl-C stops at once. Outside the main thread: no change.

    The handlers that were there are put back.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interruption.name is not None:
            raise KeyboardInterrupt
        interruption.name = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ProgressBar:
    """Steps done, loss, tokens a second and time left."""

    def __init__(self, console: Console, *, step: int, steps: int) -> None:
        self.console, self.steps = console, steps
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
            self._bar = Progress(
                *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console
            )
            self._task = self._bar.add_task("train", total=steps, completed=step, numbers="")

    def show(self, line: dict[str, Any]) -> None:
        """Take over the numbers of a step: ``step``, ``loss`` and ``tokens_per_s``."""
        numbers = f"loss {line['loss']:.3f}  {line['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], numbers=numbers)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.console.print(f"step {line['step']}/{self.steps}  {numbers}", highlight=False)

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
