"""Where a study keeps things: a local folder, or a prefix of an S3 object store through pyarrow's filesystem.

A URI is what Ray's `storage_path` takes: `s3://bucket/prefix?endpoint_override=http://host:port&region=…&scheme=…`.
What it leaves out comes from the environment, as the AWS tools read it: credentials, AWS_ENDPOINT_URL_S3 or
AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION. Any store that speaks S3 will do.
"""

import errno
import hashlib
import mmap
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from ssl_ray.storage.files import appearing

MANIFEST = "manifest.json"
_CHUNK = 2**25
_CONNECT_SECONDS, _REQUEST_SECONDS = 3, 10
QUICK, PATIENT = 3, 8
"""Attempts at a request: where nobody listens, 3 fail after about 2 s, 8 after half a minute to a minute."""

_REASONS = {
    "NO_SUCH_BUCKET": "there is no such bucket",
    "ACCESS_DENIED": "no permission",
    "INVALID_ACCESS_KEY_ID": "the access key is not known there",
    "INVALID_CLIENT_TOKEN_ID": "the access key is not known there",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong",
}


def is_uri(text: str | Path) -> bool:
    """Whether this names an object store and not a local path."""
    return isinstance(text, str) and bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text))


def default_scratch() -> Path:
    """The user's own folder among this machine's temporary files; what is kept there can be got again."""
    folder = Path(tempfile.gettempdir()) / f"ssl_ray-{os.getuid()}"
    with _naming(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # or another user could slip in what is trained on
            raise PermissionError("belongs to another user; name another folder in `scratch`")
    return folder


@dataclass(frozen=True)
class Place:
    """A file or a folder, local or in an object store; only a string goes into Ray's tasks, so it is cheap to send.

    Every method raises `OSError` (`FileNotFoundError`, `PermissionError` where it is one) with a message of one line
    that names place and reason. A file appears whole or not at all.
    """

    uri: str
    attempts: int = PATIENT

    @classmethod
    def parse(cls, text: str | Path, attempts: int = PATIENT) -> "Place":
        """A place from a path or URI; relative paths become absolute.

        Raises:
            ValueError: for a URI of another scheme, without a bucket, or with a parameter that is not known.
        """
        if not is_uri(text):
            return cls(str(Path(text).absolute()), attempts)
        parts = urlsplit(str(text))
        if parts.scheme != "s3":
            raise ValueError(f"{parts.scheme}://…: must be a local path or s3://bucket/prefix")
        place = cls(str(text), attempts)
        if not parts.hostname:
            raise ValueError(f"{place}: the bucket is missing: s3://bucket/prefix")
        if unknown := set(parse_qs(parts.query)) - {"endpoint_override", "region", "scheme"}:
            raise ValueError(f"{place}: parameters are endpoint_override, region and scheme, got {sorted(unknown)}")
        return place

    def __str__(self) -> str:
        """Without credentials."""
        parts = urlsplit(self.uri)
        return f"s3://{parts.netloc.rpartition('@')[2]}{unquote(parts.path)}" if is_uri(self.uri) else self.uri

    def __truediv__(self, name: str) -> "Place":
        if not is_uri(self.uri):
            return Place(str(Path(self.uri) / name), self.attempts)
        parts = urlsplit(self.uri)
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        return Place(parts._replace(path=path).geturl(), self.attempts)

    @property
    def local(self) -> Path | None:
        """The path of a local place, else None."""
        return None if is_uri(self.uri) else Path(self.uri)

    @property
    def path(self) -> str:
        """The path within `filesystem`."""
        parts = urlsplit(self.uri)
        return f"{parts.hostname}{unquote(parts.path)}".rstrip("/") if is_uri(self.uri) else self.uri

    @property
    def filesystem(self) -> Any:
        """Of pyarrow, with bounded retries and timeouts; for Ray's `storage_filesystem`, with `path`.

        Pickled it keeps its credentials and timeouts, but not its number of attempts.
        """
        if not is_uri(self.uri):
            from pyarrow.fs import LocalFileSystem

            return LocalFileSystem()
        return _s3(urlsplit(self.uri)._replace(path="").geturl(), self.attempts)

    def read_bytes(self) -> bytes:
        """The content of a file."""
        with _naming(self):
            if self.local:
                return self.local.read_bytes()
            with self.filesystem.open_input_file(self.path) as file:
                return bytes(file.read())

    def write_bytes(self, content: bytes | mmap.mmap) -> None:
        """Write a file, in place of the one before."""
        with _naming(self):
            if self.local:
                self.local.parent.mkdir(parents=True, exist_ok=True)
                with appearing(self.local) as temporary, temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                return
            # One call: pyarrow completes an upload even where an error ends the `with` between two of them.
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)

    def upload(self, source: Path) -> None:
        """Write a local file here, or all files of a local folder below here, each `manifest.json` last.

        What has no manifest does not exist, so that a checkpoint or a volume appears whole here as well.
        """
        if source.is_dir():
            files = [path for path in source.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: (path.name == MANIFEST, path)):
                (self / path.relative_to(source).as_posix()).upload(path)
            return
        if source.stat().st_size == 0:  # cannot be mapped
            self.write_bytes(b"")
            return
        with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self.write_bytes(content)

    def download(self, target: Path, sha256: str | None = None) -> None:
        """Write this file to a local one, or all files below here into a local folder.

        Args:
            target: replaced in one step, so that processes may do this at once.
            sha256: hex digest that a file must have, else `OSError`.
        """
        files = [] if sha256 else self.list()
        for name in files:
            (self / name).download(target / name)
        if files:
            return
        with _naming(self, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with appearing(target) as temporary:
                with temporary.open("wb") as file:
                    digest = self._read_through(file)
                    file.flush()
                    os.fsync(file.fileno())
                if sha256 and digest != sha256:
                    raise OSError(f"does not match its digest: the content was changed after it was written ({self})")

    def sha256(self) -> str:
        """Hex digest of a file's content."""
        with _naming(self):
            return self._read_through(None)

    def list(self) -> dict[str, int]:
        """Bytes of all files below here, by their path relative to it; empty where there is nothing."""
        from pyarrow.fs import FileSelector, FileType

        with _naming(self):
            selector = FileSelector(self.path, recursive=True, allow_not_found=True)
            try:
                found = self.filesystem.get_file_info(selector)
            except NotADirectoryError:
                return {}
            prefix = len(self.path) + 1
            return {info.path[prefix:]: int(info.size) for info in found if info.type == FileType.File}

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        from pyarrow.fs import FileType

        with _naming(self):
            return bool(self.filesystem.get_file_info(self.path).type != FileType.NotFound)

    def remove(self) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is nothing."""
        from pyarrow.fs import FileType

        with _naming(self):
            kind = self.filesystem.get_file_info(self.path).type
            with suppress(FileNotFoundError):  # another process was faster
                if kind == FileType.Directory:
                    self.filesystem.delete_dir(self.path)
                elif kind == FileType.File:
                    self.filesystem.delete_file(self.path)

    def move(self, target: "Place") -> None:
        """Move a file or folder; in an object store every file is copied, and removed when all of them are there."""
        with _naming(self, target):
            if self.local and target.local:
                target.local.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(self.local, target.local)
                return
            pairs = [(self / name, target / name) for name in self.list()] or [(self, target)]
            for old, new in pairs:
                self.filesystem.copy_file(old.path, new.path)
        self.remove()

    def check_writable(self) -> None:
        """Write, read and remove a small file below here; before anything expensive starts.

        Raises:
            ValueError: naming place and reason, within seconds.
        """
        probe = Place(self.uri, QUICK) / f".ssl_ray-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"ssl_ray")
            if probe.read_bytes() != b"ssl_ray":
                raise OSError("what was written does not come back")
            probe.remove()
        except OSError as error:
            reason = str(error).removeprefix(f"{probe}: ")
            raise ValueError(f"{self}: cannot be written to: {reason}") from error

    def scratch(self, root: Path) -> Path:
        """A folder of its own for this place under `root`, on this machine's disk."""
        parts = urlsplit(self.uri)
        plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/")).geturl()
        return root / hashlib.sha256(plain.encode()).hexdigest()[:16]

    def _read_through(self, copy: Any) -> str:
        digest = hashlib.sha256()
        with self.filesystem.open_input_file(self.path) as file:
            while part := file.read(_CHUNK):
                digest.update(part)
                if copy:
                    copy.write(part)
        return digest.hexdigest()


@lru_cache
def _s3(root: str, attempts: int) -> Any:
    """The filesystem of a URI without path; `FileSystem.from_uri` would leave timeouts and retries to Arrow."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    parts = urlsplit(root)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = query.get("endpoint_override") or next(
        (os.environ[name] for name in variables if name in os.environ), ""
    )
    region = query.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        with _naming(Place(root)):
            region = "us-east-1" if endpoint else resolve_s3_region(parts.hostname)
    return S3FileSystem(
        access_key=unquote(parts.username) if parts.username else None,
        secret_key=unquote(parts.password) if parts.password else None,
        region=region,
        endpoint_override=endpoint or None,
        scheme=query.get("scheme"),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=attempts),
        allow_delayed_open=True,  # one request for a small file instead of three
    )


@contextmanager
def _naming(*places: "Place | Path") -> Iterator[None]:
    """Turn what a filesystem raises into one line that names the place."""
    try:
        yield
    except OSError as error:
        kind = next((kind for kind in (FileNotFoundError, PermissionError) if isinstance(error, kind)), OSError)
        reason = _reason(error)
        names = " -> ".join(map(str, places))
        raise kind(reason if names in reason else f"{names}: {reason}") from error


def _reason(error: OSError) -> str:
    text = " ".join(str(error).split())
    if found := re.search(r"AWS Error (\w+) during (\w+) operation: (.*)", text):
        code, operation, detail = found.groups()
        if code == "NETWORK_CONNECTION":
            return f"no connection: {detail.rpartition('Details: ')[2]}"
        return f"{_REASONS.get(code, f'{code}: {detail[:200]}')} ({operation})"
    # pyarrow puts its whole story into `strerror`; the number says it shorter.
    return os.strerror(error.errno) if error.errno and error.errno in errno.errorcode else text[:300]
