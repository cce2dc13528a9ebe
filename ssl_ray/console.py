"""What a person sees in the terminal: progress, and lines that read well in a log file too."""

import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

_LOG_SECONDS = 20.0
"""Shortest time between two lines of progress where there is no terminal, e.g. under `ray job submit`."""

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the user."""
    console.print(text, markup=False)


class Bar:
    """Progress of one long piece of work: a bar on a terminal, now and then a line in a log."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._facts = ""
        self._printed = self._started = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                # On a narrow terminal these are cut, not the numbers before them.
                TextColumn("{task.fields[facts]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                console=console,
                expand=True,
            )
            self._task = self._progress.add_task(title, total=total, left="", facts="")

    def __enter__(self) -> "Bar":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        elif kind is None:
            self._line()

    def update(self, done: int, facts: str = "", again: bool = False) -> None:
        """Set how much is done, and what else is worth knowing, e.g. `loss 0.031, 210 patches/s`.

        The time left follows from the speed since the first update, or since the last one with `again`: work that was
        cut off does not start at 0, and may go back to a checkpoint.
        """
        self._done, self._facts = done, facts or self._facts
        if again or self._first is None:
            self._first = done, time.monotonic()
        if self._progress:
            self._progress.update(self._task, completed=done, left=self._left(), facts=self._facts)
        elif time.monotonic() - self._printed > _LOG_SECONDS:
            self._line()

    def _left(self) -> str:
        done, start = self._first or (0, self._started)
        if not done < self._done < self._total:
            return ""
        return f"{_clock((time.monotonic() - start) / (self._done - done) * (self._total - self._done))} left"

    def _line(self) -> None:
        self._printed = time.monotonic()
        times = ", ".join(filter(None, (_clock(self._printed - self._started), self._left())))
        facts = f": {self._facts}" if self._facts else ""
        say(f"{self._title} {self._done}/{self._total}, {times}{facts}")


def track(title: str) -> Callable[..., Iterator[Any]]:
    """A function `progress(items, total)` that shows a `Bar` while the items pass; a sequence needs no total."""

    def progress(items: Any, total: int | None = None) -> Iterator[Any]:
        with Bar(title, len(items) if total is None else total) as bar:
            for done, item in enumerate(items, 1):
                yield item
                bar.update(done)

    return progress


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
