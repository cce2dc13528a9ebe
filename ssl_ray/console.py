"""What a person sees in the terminal: progress, and lines that read well in a log file too."""

from collections.abc import Iterable, Iterator
from typing import ClassVar, TypeVar

from rich import progress as bars
from rich.console import Console
from rich.table import Column

from ssl_ray.text import without_password

_Item = TypeVar("_Item")
_LOG_SECONDS = 20.0
"""Shortest time between two lines of progress where there is no terminal, e.g. under `ray job submit`."""

console = Console(highlight=False, soft_wrap=True, emoji=False)


def say(text: str) -> None:
    """One line for the user, without passwords."""
    console.print(without_password(text), markup=False)


class Bar:
    """Progress of one long piece of work: a bar on a terminal, now and then a line in a log, nothing where `quiet`."""

    quiet: ClassVar[bool] = False

    def __init__(self, title: str, total: int) -> None:
        self._columns: list[bars.ProgressColumn] = [
            bars.TextColumn("{task.description}", markup=False),
            *([bars.BarColumn(bar_width=10)] if console.is_terminal else []),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(compact=True),
            bars.TextColumn("left"),
            # On a narrow terminal these are cut, not the numbers before them.
            bars.TextColumn(
                "{task.fields[facts]}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
        ]
        self._progress = bars.Progress(*self._columns, console=console, expand=True, speed_estimate_period=3600)
        self._progress.add_task(title, start=False, total=total, facts="")
        [self._task] = self._progress.tasks
        self._printed = self._progress.get_time()

    def __enter__(self) -> "Bar":
        if console.is_terminal and not self.quiet:
            self._progress.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if console.is_terminal:
            self._progress.stop()
        elif kind is None:
            self._line()

    def update(self, done: int, facts: str = "", again: bool = False) -> None:
        """Set how much is done, and what else is worth knowing, e.g. `loss 0.031, 210 patches/s`.

        Times count from the first update, or from the last one with `again`: work that was cut off does not start at 0,
        and may go back to a checkpoint.
        """
        if again or not self._task.started:
            self._progress.reset(self._task.id, completed=done)
            self._progress.advance(self._task.id, 0)  # from here on speed is measured
        self._progress.update(self._task.id, completed=done, facts=facts or self._task.fields["facts"])
        if not console.is_terminal and self._progress.get_time() - self._printed > _LOG_SECONDS:
            self._line()

    def _line(self) -> None:
        self._printed = self._progress.get_time()
        if not self.quiet:
            say(" ".join(str(column.render(self._task)).strip() for column in self._columns).rstrip())


def track(title: str, items: Iterable[_Item], total: int) -> Iterator[_Item]:
    """The items, with a `Bar` of how many have passed."""
    with Bar(title, total) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.update(done)
