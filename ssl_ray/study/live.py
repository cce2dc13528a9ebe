"""`report.html` while a study runs for the first time: how far it is, the newest picture, and scores so far."""

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from ssl_ray.config.schema import Study
from ssl_ray.report.page import TEMPLATES, literal, to_html
from ssl_ray.storage.files import write_file
from ssl_ray.storage.folders import Folders
from ssl_ray.study.status import render, state_of, status_of, steps_of
from ssl_ray.tracking.logged import read_logged

_SECONDS, _SHARE = 5.0, 50
"""Between two pages at least; or so many times what the last one took, as journals grow and training shares the CPU."""


class LivePage:
    """Writes the page from a thread until it is ended or left; after an error once more, as what was stopped.

    A study that has a report keeps that until the next is ready.
    """

    def __init__(self, study: Study, folders: Folders) -> None:
        self._study, self._folders, self._ended = study, folders, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if not (self._folders.study / "report.md").exists():
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end()
        there = {name for name in ("report.md", "report.html") if (self._folders.study / name).exists()}
        if kind is not None and self._thread.ident and there == {"report.html"}:
            self._write(stopped=True)

    def end(self) -> None:
        """Leave the page to the report, which is written next."""
        self._ended.set()
        if self._thread.ident:
            self._thread.join()

    def _watch(self) -> None:
        took = 0.0
        while not self._ended.wait(max(_SECONDS, _SHARE * took)):
            began = time.monotonic()
            self._write()
            took = time.monotonic() - began

    def _write(self, stopped: bool = False) -> None:
        with suppress(OSError, ValueError):  # a journal that is being written; the next time comes soon
            write_live(self._study, self._folders, stopped)


def write_live(study: Study, folders: Folders, stopped: bool = False) -> Path:
    """Write the page as things stand now; `stopped`: by an error or Ctrl-C, in a process that is about to end."""
    pictures = sorted(folders.study.glob("pretrain-*/pictures/*.png"), key=lambda path: path.stat().st_mtime)
    logged = read_logged(folders)
    facts = status_of(study, folders, logged) | {"report": None}
    if stopped:
        facts |= {"process": None, "stage": "interrupted"}
    state = "stopped" if stopped else "running"
    values = {
        "study": study,
        "state": state,
        "status": render(facts),
        "trials": [
            (run, state_of(run, 0.0), steps_of(run, study.finetune.steps)) for run in logged if run.kind == "trial"
        ],
        "picture": pictures[-1].relative_to(folders.study) if pictures else None,
        "now": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "literal": literal,
    }
    page = folders.study / "report.html"
    text = TEMPLATES.get_template("live.md.j2").render(values)
    write_file(page, to_html(text, folders.study, f"{study.name}: {state}", refresh=None if stopped else 10).encode())
    return page
