"""Where a study keeps things: a local folder, or a prefix of an S3 object store through pyarrow's filesystem.

A URI is what Ray's `storage_path` takes: `s3://bucket/prefix?endpoint_override=http://host:port&region=…&scheme=…`.
What it leaves out comes from the environment, as the AWS tools read it: credentials, AWS_ENDPOINT_URL_S3 or
AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION. Any store that speaks S3 will do.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit
from uuid import uuid4

import pyarrow
from pyarrow import fs

from ssl_ray.errors import UserError
from ssl_ray.storage.files import appearing, manifest_last, write_file

_CHUNK = 2**25
"""Bytes that are read at once; in an object store each chunk is a request."""


def default_scratch() -> Path:
    """The user's own folder among this machine's temporary files, for copies of what is kept elsewhere.

    It is refused where another user has made a folder or link of that name and could slip in what is trained on.
    """
    folder = Path(tempfile.gettempdir()) / f"ssl_ray-{os.getuid()}"
    with _naming(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        there = folder.lstat()
        if there.st_uid != os.getuid() or not stat.S_ISDIR(there.st_mode):
            raise UserError(
                f"{folder}: is a link or belongs to another user; name another folder in `scratch`, or set TMPDIR"
            )
        folder.chmod(0o700)
    return folder


@dataclass(frozen=True)
class Place:
    """A file or a folder, local or in an object store. It holds strings alone, so it is cheap to send to Ray's tasks.

    `path` is a local path, or bucket and key; `store` is the URI without its path, empty for a local place.

    Every method raises `OSError`, or the subclass that fits (`FileNotFoundError`, …), with a message of one line that
    names place and reason. A file appears whole or not at all.
    """

    path: str
    store: str = field(default="", repr=False)  # it may hold a password

    @classmethod
    def parse(cls, text: str | Path) -> "Place":
        """A place from a path or URI; relative paths become absolute, and a URI that is none of ours is refused."""
        if "://" not in str(text):  # a path has single slashes
            return cls(str(Path(text).absolute()))
        try:
            parts = urlsplit(str(text))
        except ValueError:  # whose text has the part with the password
            raise UserError("not a valid URI: user and password must be percent-encoded") from None
        if ":" in parts.netloc and "@" in parts.path:
            raise UserError(f"{parts.scheme}://: a slash in user or password must be percent-encoded, as %2F")
        place = cls(str(PurePosixPath((parts.hostname or "") + unquote(parts.path))), parts._replace(path="").geturl())
        unknown = dict(parse_qsl(parts.query)).keys() - {"endpoint_override", "region", "scheme"}
        if parts.scheme != "s3" or not parts.hostname or unknown:
            rule = "must be a local path or s3://bucket/prefix with the parameters endpoint_override, region, scheme"
            raise UserError(f"{parts.scheme}://{place.path}{' '.join(['', *sorted(unknown)])}: {rule}")
        return place

    def __str__(self) -> str:
        """Without credentials and parameters."""
        return f"s3://{self.path}" if self.store else self.path

    def __truediv__(self, name: str) -> "Place":
        return replace(self, path=str(PurePosixPath(self.path) / name))

    @property
    def local(self) -> Path | None:
        """The path of a local place, else None."""
        return None if self.store else Path(self.path)

    @property
    def uri(self) -> str:
        """What `parse` makes this place in an object store of, with credentials and parameters."""
        return urlsplit(self.store)._replace(path=quote(self.path.partition("/")[2])).geturl()

    @property
    def anonymous(self) -> "Place":
        """The same place without user and password: what may be written down."""
        parts = urlsplit(self.store)
        return replace(self, store=parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())

    @property
    def digest(self) -> str:
        """16 hex digits that tell this place from every other, whoever's credentials reach it."""
        return hashlib.sha256(f"{self.path}?{urlsplit(self.store).query}".encode()).hexdigest()[:16]

    @property
    def filesystem(self) -> Any:
        """Of pyarrow; for Ray's `storage_filesystem`, with `path`."""
        return _s3(self.store) if self.store else fs.LocalFileSystem()

    def read_bytes(self) -> bytes:
        """The content of a file."""
        with _naming(self):
            if self.local:  # pyarrow would wait for ever in a process that was forked after S3 was used
                return self.local.read_bytes()
            with self.filesystem.open_input_file(self.path) as file:
                return bytes(file.readall())

    def write_bytes(self, content: bytes | pyarrow.Buffer) -> None:
        """Write a file, in place of the one before."""
        with _naming(self):
            if self.local:
                write_file(self.local, content)
                return
            # One call: pyarrow completes an upload even where an error ends the `with` between two of them.
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)

    def upload(self, source: Path) -> None:
        """Write a local file here, or all files of a local folder below here, each `manifest.json` last.

        What has no manifest does not exist, so that a checkpoint or a volume appears whole here as well.
        """
        files = [path for path in (source, *source.rglob("*")) if path.is_file()]
        for path in sorted(files, key=manifest_last):
            with pyarrow.memory_map(str(path)) as file:
                (self / path.relative_to(source).as_posix()).write_bytes(file.read_buffer())

    def download(self, target: Path, sha256: str | None = None) -> None:
        """Write this file to a local one, which is replaced in one step: several processes may do this at once.

        Content that does not have the hex digest `sha256` is an `OSError`.
        """
        with _naming(self, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with appearing(target) as part:
                fs.copy_files(self.path, str(part), self.filesystem, fs.LocalFileSystem(), chunk_size=_CHUNK)
                with part.open("rb+") as file:  # after a power cut nobody compares it with its digest again
                    os.fsync(file.fileno())
                if sha256 and Place(str(part)).sha256() != sha256:
                    raise OSError(f"does not match its digest: the content was changed after it was written ({self})")

    def sha256(self) -> str:
        """Hex digest of a file's content."""
        with _naming(self), self.filesystem.open_input_stream(self.path, buffer_size=_CHUNK) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def list(self) -> dict[str, int]:
        """Bytes of all files below here, by their path relative to it; a file is listed as `.`, and nothing as {}."""
        with _naming(self):
            try:
                selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
                found = self.filesystem.get_file_info(selector)
            except NotADirectoryError:  # a local file; an object store lists nothing below one
                found = []
            found = found or [self.filesystem.get_file_info(self.path)]
        files = [info for info in found if info.type == fs.FileType.File]
        return {PurePosixPath(info.path).relative_to(self.path).as_posix(): int(info.size) for info in files}

    def names(self) -> set[str]:
        """Names of the files and folders that are right below here; none where there is nothing."""
        with _naming(self):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return {info.base_name for info in found}

    def remove(self) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is nothing."""
        with _naming(self), suppress(FileNotFoundError):  # another process may be faster
            kind = self.filesystem.get_file_info(self.path).type
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            elif kind == fs.FileType.File:
                self.filesystem.delete_file(self.path)

    def move(self, target: "Place") -> None:
        """Move to a place in the same filesystem; an object store copies every file, then removes the old ones."""
        with _naming(self, target):
            if self.local:
                self.filesystem.move(self.path, target.path)
                return
            fs.copy_files(self.path, target.path, self.filesystem, target.filesystem)
        self.remove()

    def check_writable(self) -> None:
        """Write, read and remove a small file below here, before anything expensive starts.

        A UserError names place and reason; where no server answers, after half a minute at most.
        """
        probe = self / f".ssl_ray-{uuid4().hex}"
        try:
            probe.write_bytes(b"ssl_ray")  # an empty file would find room on a full disk
            if probe.read_bytes() != b"ssl_ray":
                raise OSError("what was written does not come back")
            probe.remove()
        except OSError as error:
            raise UserError(f"{self}: cannot be written to: {str(error).removeprefix(f'{probe}: ')}") from error


@lru_cache
def _s3(store: str) -> Any:
    """The filesystem of a URI without path, with the retries and timeouts of Arrow."""
    parts, known = urlsplit(store), os.environ.get
    query = {
        "allow_delayed_open": "true",  # one request for a small file instead of three
        "endpoint_override": known("AWS_ENDPOINT_URL_S3") or known("AWS_ENDPOINT_URL"),
        "region": known("AWS_REGION") or known("AWS_DEFAULT_REGION"),
        **dict(parse_qsl(parts.query)),
    }
    given = urlencode({name: value for name, value in query.items() if value})
    with _naming(Place(parts.hostname or "", store)):
        try:
            return fs.FileSystem.from_uri(parts._replace(path="/", query=given).geturl())[0]
        except pyarrow.ArrowInvalid:  # whose text has the whole URI, credentials included
            rule = "user and password must be percent-encoded, scheme http or https, endpoint_override host:port"
            raise UserError(f"s3://{parts.hostname}: {rule}") from None


@contextmanager
def _naming(*places: "Place | Path") -> Iterator[None]:
    """Give what a filesystem raises a message of one line that names the places."""
    try:
        yield
    except OSError as error:
        # pyarrow puts its whole story into the message; the number, or what the store answered, says it shorter.
        told = " ".join(str(error).split()).rpartition("AWS Error ")[2].partition(" (Request ID")[0][:200]
        text, names = os.strerror(error.errno) if error.errno else told, " -> ".join(map(str, places))
        raise type(error)(text if names in text else f"{names}: {text}") from error
