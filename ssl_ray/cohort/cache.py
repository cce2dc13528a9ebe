"""Content-addressed store of canonical arrays.

    <cache>/<2 hex digits>/<key>/image.npy       (X, Y, Z) uint8 or uint16
                                 label.npy       (X, Y, Z) uint8, labelled volumes only
                                 foreground.npy  flat indices of labelled voxels, organ by organ
                                 manifest.json

The key covers the source bytes, every preparation parameter and the preparation's version, so whatever is found under a
key is right, and runs that prepare at the same time can only write the same thing. A volume appears by one `rename`:
an interrupted run leaves no half volume.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ssl_ray.cohort.datalist import Case
from ssl_ray.cohort.volume import VERSION, Prepared, check_same_grid, prepare, read_label, read_nifti
from ssl_ray.config import Preparation

_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Volume:
    """Manifest of one stored volume. Lengths in voxels, spacing in mm, affines map voxels to mm (RAS+).

    `label_voxels` counts the stored label; `largest_label` is that of the file, where a structure may be too small to
    survive the resampling, but is still part of the evaluation.
    """

    key: str
    id: str
    image_source: str
    label_source: str | None
    image_sha256: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    dtype: str
    levels: int
    window: tuple[float, float]
    box: tuple[tuple[int, ...], tuple[int, ...]]
    original_shape: tuple[int, int, int]
    original_affine: tuple[tuple[float, ...], ...]
    label_voxels: dict[str, int]
    largest_label: int
    digest: str


@dataclass(frozen=True)
class BadVolume:
    """A volume that could not be prepared, and why."""

    id: str
    reason: str


class Store:
    """The store under one folder, shared by all ranks, trials and reruns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str, name: str = "") -> Path:
        """Folder of a volume, or one of its files."""
        return self.folder / key[:2] / key / name

    def get(self, key: str) -> Volume | None:
        """The manifest under a key, or None."""
        try:
            tree = json.loads(self.path(key, "manifest.json").read_text())
        except FileNotFoundError:
            return None
        for field in ("shape", "spacing", "window", "original_shape"):
            tree[field] = tuple(tree[field])
        for field in ("affine", "box", "original_affine"):
            tree[field] = tuple(tuple(row) for row in tree[field])
        return Volume(**tree)

    def put(self, volume: Volume, prepared: Prepared) -> None:
        """Write a volume; where another run was faster, its equal result stays."""
        scratch = self.folder / f"tmp-{uuid.uuid4().hex}"
        scratch.mkdir(parents=True)
        try:
            arrays: dict[str, npt.NDArray[Any]] = {"image": prepared.image}
            if prepared.label is not None:
                arrays["label"] = prepared.label
                arrays["foreground"] = foreground_index(prepared.label)
            for name, array in arrays.items():
                with (scratch / f"{name}.npy").open("wb") as file:
                    np.save(file, array)
                    _sync(file)
            with (scratch / "manifest.json").open("w") as text:
                json.dump(asdict(volume), text, indent=1)
                _sync(text)
            target = self.path(volume.key)
            target.parent.mkdir(exist_ok=True)
            try:
                scratch.rename(target)
            except OSError:
                if self.get(volume.key) is None:
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def remove_stale(self) -> None:
        """Remove what runs that were killed a day or more ago had begun to write."""
        for scratch in self.folder.glob("tmp-*"):
            with suppress(FileNotFoundError):  # another run has just finished it
                if time.time() - scratch.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(scratch, ignore_errors=True)


def foreground_index(label: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Flat indices of all labelled voxels, sorted by label value; `Volume.label_voxels` has the counts."""
    found = np.flatnonzero(label)
    return found[np.argsort(label.ravel()[found], kind="stable")].astype(np.int64)


def prepare_case(case: Case, preparation: Preparation, store: Store) -> tuple[Volume, bool]:
    """The stored volume of a case, and whether it had to be prepared now.

    Raises:
        ValueError: naming file and rule, for a volume that cannot be used.
    """
    files = {"image": case.image} | ({"label": case.label} if case.label else {})
    try:
        content = {name: file.read_bytes() for name, file in files.items()}
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot read: {error.strerror}") from error
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    recipe = {"version": VERSION, "preparation": preparation.model_dump(mode="json"), **hashes}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
    if found := store.get(key):
        return _named(found, case), False
    image = read_nifti(case.image, content["image"])
    label = None
    if case.label:
        label = read_label(case.label, content["label"])
        check_same_grid(image, label, case.label)
    try:
        prepared = prepare(image, label, preparation)
    except ValueError as error:
        raise ValueError(f"{case.image}: {error}") from error
    counts = np.bincount(prepared.label.ravel()) if prepared.label is not None else np.zeros(0, np.int64)
    volume = Volume(
        key=key,
        id=case.id,
        image_source=str(case.image),
        label_source=str(case.label) if case.label else None,
        image_sha256=hashes["image"],
        shape=prepared.image.shape,
        spacing=preparation.spacing,
        affine=tuple(map(tuple, prepared.affine.tolist())),
        dtype=str(prepared.image.dtype),
        levels=prepared.levels,
        window=preparation.window,
        box=prepared.box,
        original_shape=(prepared.original_shape[0], prepared.original_shape[1], prepared.original_shape[2]),
        original_affine=tuple(map(tuple, prepared.original_affine.tolist())),
        label_voxels={str(value): int(count) for value, count in enumerate(counts) if count},
        largest_label=int(label.voxels.max()) if label else 0,
        digest=hashlib.sha256(prepared.image.tobytes()).hexdigest(),
    )
    store.put(volume, prepared)
    return volume, True


def prepare_cohort(
    cases: Sequence[Case],
    preparation: Preparation,
    store: Store,
    classes: int | None = None,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None,
) -> tuple[dict[str, Volume], list[BadVolume], int]:
    """Prepare all cases in parallel on the Ray cluster, one volume a CPU at a time.

    Args:
        cases: with or without labels; ids may repeat between cohorts but not within `cases`.
        preparation: parameters of the canonical array.
        store: where it goes; a folder that all nodes share.
        classes: for labelled cases, labels must be in 0..classes-1.
        progress: wraps the iterator over finished volumes, e.g. into a progress bar.

    Returns:
        Volumes by image path, the volumes that cannot be used, and how many were prepared now.
    """
    import ray  # the data workers read this module's patches without the driver's half of Ray

    store.remove_stale()
    rows = [
        {"place": place, "id": case.id, "image": str(case.image), "label": str(case.label or "")}
        for place, case in enumerate(cases)
    ]

    def work(row: dict[str, Any]) -> dict[str, Any]:
        case = Case(row["id"], Path(row["image"]), Path(row["label"]) if row["label"] else None)
        try:
            volume, fresh = prepare_case(case, preparation, store)
        except (ValueError, RuntimeError, MemoryError) as error:  # the last two: torch, on a volume beyond its means
            reason = (
                str(error) if isinstance(error, ValueError) else f"{case.image}: {' '.join(str(error).split())[:200]}"
            )
            return {"place": row["place"], "key": "", "fresh": False, "reason": reason}
        return {"place": row["place"], "key": volume.key, "fresh": fresh, "reason": ""}

    blocks = min(len(rows), 1000)
    dataset = ray.data.from_items(rows, override_num_blocks=blocks).map(work, num_cpus=1)
    finished: Iterator[Any] = iter(dataset.iter_rows())
    volumes: dict[str, Volume] = {}
    bad: list[BadVolume] = []
    prepared = 0
    for row in progress(finished, len(rows)) if progress else finished:
        case = cases[row["place"]]
        volume = store.get(row["key"]) if row["key"] else None
        prepared += row["fresh"]
        reason = row["reason"]
        if volume and classes and volume.largest_label >= classes:
            reason = f"{case.label}: label {volume.largest_label} is beyond the {classes} classes (0..{classes - 1})"
        if reason:
            bad.append(BadVolume(case.id, reason))
        elif volume:
            volumes[str(case.image)] = _named(volume, case)
    return volumes, sorted(bad, key=lambda one: one.id), prepared


def _named(volume: Volume, case: Case) -> Volume:
    """A stored volume under the name and place that it has in this study; the key knows only its content."""
    return replace(
        volume, id=case.id, image_source=str(case.image), label_source=str(case.label) if case.label else None
    )


@lru_cache(maxsize=512)
def open_array(folder: Path, key: str, name: Literal["image", "label", "foreground"] = "image") -> npt.NDArray[Any]:
    """Memory-mapped array of a stored volume; only the pages that a patch touches are read."""
    array: npt.NDArray[Any] = np.load(Store(folder).path(key, f"{name}.npy"), mmap_mode="r", allow_pickle=False)
    return array


def read_patch(
    array: npt.NDArray[Any], origin: Sequence[int], size: Sequence[int], out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """One patch, without loading its volume.

    A volume shorter than the patch counts as padded with zeros on both sides, the smaller half first, like MONAI's
    `SpatialPad`; `origin` (3 voxels) is meant in the padded volume.

    Raises:
        ValueError: where the patch leaves the padded volume.
    """
    if out is None:
        out = np.empty(tuple(size), dtype=array.dtype)
    source, target = [], []
    for start, side, length in zip(origin, size, array.shape, strict=True):
        before = max(side - length, 0) // 2
        if not 0 <= start <= max(length - side, 0):
            raise ValueError(f"origin {tuple(origin)} of a {tuple(size)} patch leaves the volume of {array.shape}")
        source.append(slice(start, start + min(side, length)))
        target.append(slice(before, before + min(side, length)))
    if any(length < side for side, length in zip(size, array.shape, strict=True)):
        out.fill(0)
    out[tuple(target)] = array[tuple(source)]
    return out


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
