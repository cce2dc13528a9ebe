"""`ssl-ray`: all verbs, and how one is run.

The rooms that load torch, Ray or MLflow are imported inside the verbs, after the experiment is read, so that a typo in
the YAML is told at once.
"""

import logging
import signal
from collections.abc import Sequence

import typer

from ssl_ray.cli import studies as studies

# isort: split
# In this order does the help list their verbs.
from ssl_ray.cli import models as models

# isort: split
from ssl_ray.cli import cohorts as cohorts
from ssl_ray.cli.app import Formatter, app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process's command line -> exit code, as the `epilog` has it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` then ends it as Ctrl-C does
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        typer.main.get_command(app).main(arguments, prog_name="ssl-ray")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0
