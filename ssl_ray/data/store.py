"""Content-addressed store of canonical arrays, in a local folder or an object store.

    <cache>/<2 hex digits>/<key>/image.npy       (X, Y, Z) uint8, uint16 or int16; (C, X, Y, Z) of several channels
                                 label.npy       (X, Y, Z) uint8, labelled volumes only
                                 foreground.npy  flat indices of labelled voxels, organ by organ
                                 manifest.json   what the volume is, size and digest of each array
    <cache>/sources/<digest of path, size, time>  SHA-256 of a source file, so that it is not read again

The key covers the source bytes, every preparation parameter and the preparation's version, so whatever is found under a
key is right, and runs that prepare at the same time can only write the same thing. A local volume appears by one
`rename`; in an object store the manifest is uploaded last, and what has none does not exist: an interrupted run leaves
no half volume. What was damaged since counts as absent and is prepared again. Out of an object store, every machine
fills a local mirror with the files that it opens, as patches are read from memory-mapped files.
"""

import hashlib
import io
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from ssl_ray.data.normalise import CanonicalVolume
from ssl_ray.storage.files import MANIFEST, settle, write_file
from ssl_ray.storage.mirror import Mirror


@dataclass(frozen=True)
class Volume:
    """Manifest of one stored volume. Lengths in voxels, spacing in mm, the affine (4, 4) maps voxels to mm (RAS+).

    `content` is the digest of the first channel's voxels. `dtype`, `levels` (what a network sees as 1) and `channels`
    (1: the image has no axis for them) say what the normalisation stored, `normalise` has its settings; `intensities`
    and `body` are as in `CanonicalVolume`. `largest_label` is that of the file, where a structure may be too small to
    survive the resampling, but is still part of the evaluation. `files` has bytes and sha256 of each. `subject` is the
    patient in the lists of a study, or empty; it is not stored, as another study's lists may say something else.
    """

    key: str
    id: str
    image_source: str
    label_source: str | None
    content: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    dtype: str
    levels: int
    channels: int
    normalise: dict[str, Any]
    intensities: tuple[tuple[float, float], ...]
    body: tuple[int, ...]
    original_shape: tuple[int, int, int]
    label_voxels: dict[str, int]
    largest_label: int
    files: dict[str, tuple[int, str]]
    subject: str = ""


VOLUME_JSON = TypeAdapter(Volume)
"""Reads and writes the manifest of a volume."""


@dataclass(frozen=True)
class Store:
    """The store at one place, shared by all ranks, trials and reruns.

    `place` is a folder that all machines share, or a URI (`storage/object_store.py`). For a URI, the mirror lies under
    the folder `scratch` on this machine's disk, which needs room for every volume that is read on the machine.
    """

    place: str | Path = field(repr=False)  # it may hold a password
    scratch: str | Path | None = None

    @cached_property
    def mirror(self) -> Mirror:
        """The store itself if it is a folder, else its copy on this machine."""
        return Mirror.of(self.place, self.scratch, "cache")

    @property
    def folder(self) -> Path:
        """Where this machine reads the arrays."""
        return self.mirror.folder

    def __str__(self) -> str:
        return str(self.mirror.origin or self.folder)

    def path(self, key: str, name: str = "") -> Path:
        """Folder of a volume below `folder`, or one of its files."""
        return self.folder / key[:2] / key / name

    def get(self, key: str, verify: bool = False) -> Volume | None:
        """The manifest under a key, or None where the volume is absent or damaged.

        All files must be there in their size. Their digests are compared where `verify` says so and, in a local store,
        where a file was written to since the manifest, which is written last.
        """
        home = self.mirror.kept(self.path(key))
        try:
            volume = VOLUME_JSON.validate_json((home / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        sizes = home.list()
        if any(sizes.get(name) != size for name, (size, _) in volume.files.items()):
            return None
        if home.local:
            written = [(home.local / name).stat().st_mtime_ns for name in (MANIFEST, *volume.files)]
            verify |= max(written) > written[0]
        if verify and any((home / name).sha256() != sha256 for name, (_, sha256) in volume.files.items()):
            return None
        if verify and home.local:
            with suppress(OSError):  # a store that we may only read: its files are read each time
                os.utime(home.local / MANIFEST)
        elif verify:  # the mirror may hold damaged files, or those of a volume that was damaged: download them again
            shutil.rmtree(self.path(key), ignore_errors=True)
        return volume

    def put(self, volume: Volume, prepared: CanonicalVolume) -> Volume:
        """Write the arrays of a volume, in place of a damaged one or of the equal one of a run that was faster.

        Returns the volume with its `files`. An OSError names the place; nothing of the volume is left then.
        """
        scratch = self.folder / f"tmp-{uuid.uuid4().hex}"
        arrays: dict[str, npt.NDArray[Any]] = {"image": prepared.image}
        if prepared.label is not None:
            arrays |= {"label": prepared.label, "foreground": foreground_index(prepared.label)}
        try:
            scratch.mkdir(parents=True)
            files = {f"{name}.npy": _write_array(scratch / f"{name}.npy", array) for name, array in arrays.items()}
            volume = replace(volume, files=files)
            write_file(scratch / MANIFEST, VOLUME_JSON.dump_json(volume, indent=1, exclude={"subject"}))
            if self.mirror.origin:
                self.mirror.kept(self.path(volume.key)).upload(scratch)
            else:
                settle(scratch, self.path(volume.key))
        except OSError as error:
            reason = f"{self.folder}: cannot write a volume: {error.strerror}" if error.strerror else str(error)
            raise OSError(reason) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return volume

    def fetch(self, key: str, name: str) -> Path:
        """A file of a volume on this machine; out of an object store, its copy in the mirror, checked by its digest."""
        path = self.path(key, name)
        if self.mirror.origin and not path.is_file():
            home = self.mirror.kept(self.path(key))
            _, sha256 = VOLUME_JSON.validate_json((home / MANIFEST).read_bytes()).files[name]
            (home / name).download(path, sha256)
        return path


def foreground_index(label: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Flat indices of all labelled voxels, sorted by label value; `Volume.label_voxels` has the counts."""
    found = np.flatnonzero(label)
    return found[np.argsort(label.ravel()[found], kind="stable")].astype(np.int64)


def _write_array(path: Path, array: npt.NDArray[Any]) -> tuple[int, str]:
    """Bytes and SHA-256 of the file; `np.save` to a full disk would not give the operating system's own error."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    content = buffer.getbuffer()
    write_file(path, content)
    return len(content), hashlib.sha256(content).hexdigest()
