"""Bring cohorts into the store: every volume is prepared once, wherever and however often it is asked for."""

import hashlib
import json
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssl_ray.config.schema import Preparation
from ssl_ray.data.canonical import VERSION, CanonicalVolume, prepare
from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import check_same_grid, read_label, read_nifti
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.storage.files import read_file, write_file

Stamps = dict[str, tuple[int, int, str]]
"""What is known of source files. Key: path. Value: bytes, time of modification in ns, and the SHA-256 at that time."""

_SETTLED_NS = 2 * 10**9
"""A younger file could be written to again within the grain of its time of modification, so its stamp is not kept."""


@dataclass(frozen=True)
class BadVolume:
    """A volume that could not be prepared, and why."""

    id: str
    reason: str


def prepare_case(
    case: Case, preparation: Preparation, store: Store, verify: bool = False, stamps: Stamps | None = None
) -> tuple[Volume, bool]:
    """The stored volume of a case, and whether it had to be prepared now, for the first time or because of damage.

    Args:
        case: the volume.
        preparation: parameters of the canonical array.
        store: where it goes.
        verify: compare the digests of all that is stored, and read the sources even where their stamps hold.
        stamps: a source whose stamp still holds is not read; stamps of those that were read are added.

    Raises:
        UserError: naming file and rule, for a volume that cannot be used.
        OSError: naming the place, where the store cannot be read or written.
    """
    stamps = {} if stamps is None else stamps
    files = {"image": case.image} | ({"label": case.label} if case.label else {})
    digests, content = _read_sources(files, stamps, verify)
    recipe = {"version": VERSION, "preparation": preparation.model_dump(mode="json"), **digests}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
    if found := store.get(key, verify):
        return _named(found, case), False
    if content.keys() < files.keys():  # the stamps were right, but the store has no volume of these sources
        for file in files.values():
            stamps.pop(str(file), None)
        return prepare_case(case, preparation, store, verify, stamps)
    image, label = read_nifti(case.image, content["image"]), None
    if case.label:
        label = read_label(case.label, content["label"])
        check_same_grid(image, label, case.label)
    try:
        canonical = prepare(image, label, preparation)
    except ValueError as error:
        raise UserError(f"{case.image}: {error}") from error
    largest = int(label.voxels.max()) if label else 0
    return store.put(_manifest(key, case, digests["image"], canonical, preparation, largest), canonical), True


def prepare_cohort(
    cases: Sequence[Case],
    preparation: Preparation,
    store: Store,
    classes: int | None = None,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None,
    verify: bool = False,
) -> tuple[dict[str, Volume], list[BadVolume], int]:
    """Prepare all cases in parallel on the Ray cluster, one volume a CPU at a time.

    Args:
        cases: with or without labels; ids may repeat between cohorts but not within `cases`.
        preparation: parameters of the canonical array.
        store: where it goes; a folder that all nodes share, or an object store.
        classes: for labelled cases, labels must be in 0..classes-1.
        progress: wraps the iterator over finished volumes, e.g. into a progress bar.
        verify: compare the digests of all that is stored and of all sources.

    Returns:
        Volumes by image path, the volumes that cannot be used, and how many were prepared now.

    Raises:
        UserError: when the store cannot be read or written; the volumes that it has already are kept.
    """
    import ray  # not above: it takes a second, and `prepare_case` does without

    store.remove_stale()
    known = _load(store)
    rows = [{"place": place, "case": pickle.dumps((case, _of(case, known)))} for place, case in enumerate(cases)]

    def work(row: dict[str, Any]) -> dict[str, Any]:
        case, stamps = pickle.loads(row["case"])
        return {"place": row["place"], "outcome": pickle.dumps(_attempt(case, preparation, store, verify, stamps))}

    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000)).map(work, num_cpus=1)
    finished: Iterator[Any] = iter(dataset.iter_rows())
    volumes: dict[str, Volume] = {}
    bad: list[BadVolume] = []
    prepared = 0
    learnt: Stamps = {}
    try:
        for row in progress(finished, len(rows)) if progress else finished:
            case, outcome = cases[row["place"]], pickle.loads(row["outcome"])
            if isinstance(outcome, OSError):  # of the store, not of the volume
                raise UserError(str(outcome))
            if isinstance(outcome, Exception):
                bad.append(BadVolume(case.id, str(outcome)))
                continue
            volume, fresh, stamps = outcome
            prepared += fresh
            learnt |= stamps
            if classes and volume.largest_label >= classes:
                beyond = f"label {volume.largest_label} is beyond the {classes} classes (0..{classes - 1})"
                bad.append(BadVolume(case.id, f"{case.label}: {beyond}"))
            else:
                volumes[str(case.image)] = volume
    finally:  # a preparation that is cut off keeps what it has learnt, too
        _save(store, learnt)
    return volumes, sorted(bad, key=lambda one: one.id), prepared


def _attempt(
    case: Case, preparation: Preparation, store: Store, verify: bool, stamps: Stamps
) -> tuple[Volume, bool, Stamps] | Exception:
    """`prepare_case` in a Ray task, which gives its error back: one bad volume must not end the others."""
    try:
        return (*prepare_case(case, preparation, store, verify, stamps), stamps)
    except (OSError, ValueError) as error:
        return error
    except (RuntimeError, MemoryError) as error:  # torch's, for a volume that is too large for this machine
        return UserError(f"{case.image}: {' '.join(str(error).split())[:200]}")


def _read_sources(files: dict[str, Path], stamps: Stamps, verify: bool) -> tuple[dict[str, str], dict[str, bytes]]:
    """The SHA-256 of each source, and the content of those whose stamp does not hold; brings `stamps` up to date."""
    digests: dict[str, str] = {}
    content: dict[str, bytes] = {}
    for name, file in files.items():
        try:
            status = file.stat()
            stamp = stamps.pop(str(file), None)
            if verify or not stamp or stamp[:2] != (status.st_size, status.st_mtime_ns):
                content[name] = read_file(file)
                stamp = (status.st_size, status.st_mtime_ns, hashlib.sha256(content[name]).hexdigest())
        except OSError as error:
            raise UserError(f"{error.filename}: cannot read: {error.strerror}") from error
        digests[name] = stamp[2]
        if time.time_ns() - status.st_mtime_ns >= _SETTLED_NS:
            stamps[str(file)] = stamp
    return digests, content


def _manifest(
    key: str, case: Case, sha256: str, canonical: CanonicalVolume, preparation: Preparation, largest_label: int
) -> Volume:
    x, y, z = canonical.original_shape
    counts = np.bincount(canonical.label.ravel()) if canonical.label is not None else np.zeros(0, np.int64)
    return Volume(
        key=key,
        id=case.id,
        image_source=str(case.image),
        label_source=str(case.label) if case.label else None,
        image_sha256=sha256,
        shape=canonical.image.shape,
        spacing=preparation.spacing,
        affine=tuple(map(tuple, canonical.affine.tolist())),
        dtype=str(canonical.image.dtype),
        levels=canonical.levels,
        hu_window=preparation.hu_window,
        box=canonical.box,
        original_shape=(x, y, z),
        original_affine=tuple(map(tuple, canonical.original_affine.tolist())),
        label_voxels={str(value): int(count) for value, count in enumerate(counts) if count},
        largest_label=largest_label,
        files={},
    )


def _named(volume: Volume, case: Case) -> Volume:
    """A stored volume under the name and place that it has in this study, which its key does not cover."""
    label = str(case.label) if case.label else None
    return replace(volume, id=case.id, image_source=str(case.image), label_source=label)


def _of(case: Case, stamps: Stamps) -> Stamps:
    return {file: stamps[file] for file in map(str, (case.image, case.label)) if file in stamps}


def _load(store: Store) -> Stamps:
    """The stamps that earlier runs left; none where their file is missing or damaged, and then all sources are read."""
    try:
        found = json.loads((store.folder / "sources.json").read_bytes()).items()
        return {name: (int(size), int(modified), str(sha256)) for name, (size, modified, sha256) in found}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save(store: Store, stamps: Stamps) -> None:
    merged = _load(store) | stamps
    with suppress(OSError):  # without the stamps, the next run reads all sources again
        write_file(store.folder / "sources.json", json.dumps(merged).encode())
