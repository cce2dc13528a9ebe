"""Arguments that verbs share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ssl_ray.console import Bar, console
from ssl_ray.errors import UserError
from ssl_ray.text import without_password

Experiment = Annotated[Path, typer.Argument(help="The study's YAML, e.g. experiments/demo.yaml.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", default_factory=list, show_default=False, help="Replace one value."),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", file_okay=False)]


def _be_quiet(value: bool) -> bool:
    Bar.quiet |= value
    return value


def _leave_stdout(value: bool) -> bool:
    console.stderr |= value
    return _be_quiet(value)


AsJson = Annotated[bool, typer.Option("--json", metavar="", callback=_leave_stdout, help="Everything, for programs.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", metavar="", callback=_be_quiet, help="No progress: results, warnings and errors."),
]


def print_json(tree: Any) -> None:
    """One line of JSON without passwords; with `--json`, all that `say` has to tell goes to stderr."""
    print(without_password(json.dumps(tree, default=str)))


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """What cannot be read or written in the folder that the user named is the user's to mend, e.g. a missing right."""
    try:
        yield
    except OSError as error:
        if not error.filename or not Path(error.filename).absolute().is_relative_to(folder.absolute()):
            raise  # also a full disk, where Python often names no file
        raise UserError(f"{error.filename}: {error.strerror}") from error
