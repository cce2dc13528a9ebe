"""Reading files that others wrote, with a bound on their size; writing our own, so that each appears whole."""

import errno
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from uuid import uuid4

MANIFEST = "manifest.json"
"""Name of the file that is written last into a folder: a folder that should have one, and has not, is not complete."""

UNIQUE = "[0-9a-f]{32}"
"""What a name of something half written has of `uuid4`: nothing of a user's is called so."""


def open_file(path: Path, most: int | None = None) -> BufferedReader:
    """Open a regular file, or a link to one, for reading; `most` is the bytes that it may have.

    An OSError also for a FIFO, on which reading would wait for ever, and for a device, which may have no end.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and (most is None or status.st_size <= most):
        return file
    file.close()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    raise OSError(errno.EFBIG, f"{status.st_size} bytes are more than the {most} that it may have", str(path))


@contextmanager
def appearing(path: Path, replace: bool = True) -> Iterator[Path]:
    """A path beside `path` to write a file to: it is renamed to `path` at the end, and removed on an error.

    Without `replace`, a file that has appeared there meanwhile stays: it may be in use already.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        if replace:
            os.replace(part, path)
        else:
            _link(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


def _link(part: Path, path: Path) -> None:
    """Give a file a further name, unless it is taken: other than a look and a rename, that is one step."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass  # the first stays
    except OSError:  # a filesystem without hard links: a look and a rename it is
        if not path.exists():
            part.rename(path)


def read_file(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file; arguments and errors as for `open_file`."""
    with open_file(path, most) as file:
        return file.read()


def file_digest(path: Path) -> str:
    """What a file is known by in keys, metadata and MLflow: the first 16 digits of its content's SHA-256."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_file(path: Path, *parts: bytes | memoryview, replace: bool = True) -> None:
    """Write a file, in place of the one before, and wait until it is on the disk; missing folders are made.

    Without `replace`, the one before stays, and is what there is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path, replace) as part, part.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def settle(part: Path, folder: Path) -> None:
    """Rename the folder `part` to `folder`, so that all its files appear at once.

    Where `folder` exists already, its files are replaced one by one, the manifest last: a process that reads them never
    misses one. What was there must have been damaged, or equal to what comes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        for path in sorted(part.iterdir(), key=manifest_last):
            os.replace(path, folder / path.name)


def manifest_last(path: Path) -> tuple[bool, Path]:
    """Key for sorting the files of a folder in the order in which they are written."""
    return path.name == MANIFEST, path


def remove_stale(folder: Path, pattern: str, seconds: float) -> None:
    """Remove files and folders that killed processes left half written and that are `seconds` old.

    `pattern` is a regular expression for the whole name, with `UNIQUE` in it: the folder may be one that a user chose.
    """
    for path in folder.glob("*"):
        if not re.fullmatch(pattern, path.name):
            continue
        with suppress(OSError):  # most likely its process lives, and has just renamed it
            if time.time() - path.stat().st_mtime > seconds:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
