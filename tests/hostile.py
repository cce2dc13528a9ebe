"""Tables of broken and hostile input: a clear error or the right result, in bounded time and memory, no code run.

Each row of a table is one file. All rows of a test module are read by one process (`hostile_probe.py`); a row that
crashes it, hangs or takes too much memory fails by itself, and the next row gets a new process.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Build = Callable[[Path], Path | bytes | None]
"""Makes the file at a path; or gives back its content, or the path of another one that it has made."""


@dataclass(frozen=True)
class Row:
    """One file: the reader of `hostile_probe.READERS`, and the rule in its error or a part of the right result.

    Reading it may take `times` the file in memory besides 48 MB, and its error have as many `lines`.
    """

    reader: str
    file: str
    build: Build
    expected: str | dict[str, Any]
    errors: tuple[str, ...]
    times: int
    lines: int


class Rows(dict[str, Row]):
    """Rows by name."""

    def __init__(self, reader: str, ending: str, error: str = "", times: int = 10, lines: int = 1) -> None:
        self.reader, self.file, self.times, self.lines = reader, f"hostile{ending}", times, lines
        self.errors = (error,) if error else ("UserError", "ValueError")

    def add(self, name: str, content: bytes | Build, expected: str | dict[str, Any], reader: str = "") -> None:
        assert name not in self
        build = (lambda path: content) if isinstance(content, bytes) else content
        row = Row(reader or self.reader, self.file, build, expected, self.errors, self.times, self.lines)
        self[name] = row

    def add_no_files(self, prefix: str = "file is", name: str = "") -> None:
        """What is no file at all; `name` is another one than that of the table."""
        for what, (make, rule) in NO_FILES.items():
            self.add(f"{prefix} {what}", other(name or self.file, make), rule)


class Probe:
    """The process that reads; it starts with the first row and after each one that ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, reader: str, path: Path) -> dict[str, Any]:
        """What became of reading a file."""
        if self.process is None:
            command = [sys.executable, str(Path(__file__).with_name("hostile_probe.py"))]
            self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
            self.process = subprocess.Popen(command, text=True, **pipes)
        process = self.process
        assert process.stdin
        assert process.stdout
        print(json.dumps({"reader": reader, "path": os.fsencode(path).hex()}), file=process.stdin, flush=True)
        if line := process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self.close()
        self.log.seek(0)
        how = "a hang" if status == -signal.SIGALRM else f"a crash with status {status}"
        return {"error": how, "log": self.log.read()[-1000:]}

    def close(self) -> int:
        """End the process."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.communicate()
        return process.wait()


def check(row: Row, probe: Probe, folder: Path) -> None:
    """One line that names file and rule, or the right result; no hang, no code run, memory in proportion."""
    root = folder / "root"
    root.mkdir()
    path = root / row.file
    with chdir(root):
        built = row.build(path)
    if isinstance(built, Path):
        path = built
    elif built is not None:
        path.write_bytes(built)
    answer = probe.ask(row.reader, path)
    assert answer["error"] in (None, *row.errors), answer
    if isinstance(row.expected, dict):
        assert {key: answer.get(key) for key in row.expected} == row.expected, answer
    else:
        assert answer["error"], answer
        lines = answer["message"].splitlines()
        shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(path))
        assert 1 <= len(lines) <= row.lines, answer
        assert all(line.startswith(f"{shown}: ") for line in lines), answer
        assert row.expected in answer["message"]
        assert max(map(len, lines)) < len(shown) + 2000
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    assert answer["megabytes"] < 48 + row.times * size / 2**20, answer
    assert not list(folder.rglob("owned"))


def made(make: Callable[[Path], object]) -> Build:
    """A file that `make` writes."""

    def build(path: Path) -> None:
        make(path)

    return build


def other(name: str, make: Callable[[Path], object]) -> Build:
    """A file of another name, beside the one of the row."""

    def build(path: Path) -> Path:
        make(path.parent / name)
        return path.parent / name

    return build


class Attack:
    """Pickles to a call that makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)  # relative, as a socket's path is short


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.touch(), ""),
    "one byte": (lambda path: path.write_bytes(b"\0"), ""),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "a FIFO": (lambda path: os.mkfifo(path), "not a regular file"),
    "a device without end": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "the null device": (lambda path: path.symlink_to("/dev/null"), "not a regular file"),
    "a socket": (_socket, ""),
    "a link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "random bytes": (lambda path: path.write_bytes(np.random.default_rng(5).bytes(5000)), ""),
}
