"""How far a pass of `prune` is: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.progress import SECONDS_BETWEEN_LINES


class Passes:
    """Wraps what the passes of a run go over, one after the other."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def over(self, label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        """What `pruning` takes as progress=; label says what is done."""
        return partial(self._track, label)

    def _track(self, label: str, items: Iterable[Any]) -> Iterator[Any]:
        held = list(items)
        if self.console.is_terminal:
            yield from self._with_bar(label, held)
        else:
            yield from self._with_lines(label, held)

    def _with_bar(self, label: str, held: list[Any]) -> Iterator[Any]:
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[item]}"))
        with Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console
        ) as bar:
            task = bar.add_task(label, total=len(held), item="")
            for item in held:
                bar.update(task, item=_name(item))
                yield item
                bar.advance(task)

    def _with_lines(self, label: str, held: list[Any]) -> Iterator[Any]:
        started = last = time.monotonic()
        for index, item in enumerate(held):
            now = time.monotonic()
            if index and now - last > SECONDS_BETWEEN_LINES:
                last, left = now, (now - started) / index * (len(held) - index)
                done = ", ".join(filter(None, [f"{index} of {len(held)}", _name(item)]))
                self.console.print(f"{label}: {done}, about {left:.0f} s left", highlight=False)
            yield item


def _name(item: Any) -> str:
    """What `pruning` goes over: (layer, module) and (matrix, scores) have a name; batches and rounds have none."""
    first = item[0] if isinstance(item, tuple) and item else None
    if isinstance(first, int):
        return f"layer {first}"
    return first if isinstance(first, str) else ""
