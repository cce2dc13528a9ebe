"""Files that others wrote, read with a bound and named on one line; and our own, which appear whole."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from uuid import uuid4


def open_file(path: Path, most: int | None = None) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: a file, or a link to one.
        most: bytes that it may have.

    Raises:
        OSError: also for a FIFO, on which reading would wait for ever, and for a device, which may have no end.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    status = os.fstat(file.fileno())
    reason = None
    if not stat.S_ISREG(status.st_mode):
        reason = (errno.EINVAL, "not a regular file")
    elif most is not None and status.st_size > most:
        reason = (errno.EFBIG, f"{status.st_size} bytes are more than the {most} that it may have")
    if reason:
        file.close()
        raise OSError(*reason, str(path))
    return file


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name to write to that becomes `path` when all has been written, and vanishes on an error."""
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


def read_file(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file; arguments and errors as for `open_file`."""
    with open_file(path, most) as file:
        return file.read()
