"""The command line's frame: one message and an exit code for whatever a verb raises."""

import logging
import os
import sys
import traceback
from importlib.metadata import version as installed
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ssl_ray.console import Bar, console, say
from ssl_ray.errors import UserError
from ssl_ray.text import without_password

TRACEBACK = "SSL_RAY_TRACEBACK"
"""Environment variable: where it is set, an error shows where in the code it happened."""


class _Commands(TyperGroup):
    """Turns what a verb raises into one message and an exit code: 2 for what the user can mend, 1 for the rest."""

    def invoke(self, ctx: Any) -> None:
        try:
            super().invoke(ctx)
        except (typer.Exit, typer.TyperException):
            raise  # Typer's own: an exit code, or a wrong command line
        except (KeyboardInterrupt, typer.Abort) as error:  # Abort: the same at a question
            _tell("interrupted; what is finished is kept, and the same command goes on")
            raise typer.Exit(1) from error
        except Exception as error:
            if os.environ.get(TRACEBACK):
                print(without_password(traceback.format_exc()), file=sys.stderr)
            if isinstance(error, UserError):
                _tell(str(error))
                raise typer.Exit(2) from error
            _tell(f"{type(error).__name__}: {error}")
            frame = traceback.extract_tb(error.__traceback__)[-1]
            _tell(f"raised at {frame.filename}:{frame.lineno}; {TRACEBACK}=1 shows the way there")
            _tell("finished work is kept, the same command goes on")
            raise typer.Exit(1) from error
        finally:
            Bar.quiet = console.stderr = False


def _tell(message: str) -> None:
    print(f"ssl-ray: {without_password(message)}", file=sys.stderr)


class Formatter(logging.Formatter):
    """Log lines, of libraries too, without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return without_password(super().format(record))


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit code 0: done. 2: something to mend in the input, named in one message. 1: anything else.",
)


def _tell_version(asked: bool) -> None:
    if asked:
        say(f"ssl_ray {installed('ssl_ray')}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", metavar="", is_eager=True, callback=_tell_version, help="Tell it, and exit.")
    ] = False,
) -> None:
    """Does self-supervised pretraining on my unlabelled CT help my segmentation, and with how many labelled volumes?

    One YAML describes a study; [bold]ssl-ray run[/bold] carries it out and skips what is already done.
    """
