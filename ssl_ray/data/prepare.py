"""Bring cohorts into the store: every volume is prepared once, wherever and however often it is asked for."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssl_ray.config.schema import Preparation
from ssl_ray.data.canonical import VERSION, prepare
from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import check_same_grid, read_label, read_nifti
from ssl_ray.data.store import Store, Volume
from ssl_ray.storage.files import appearing, read_file

Stamps = dict[str, tuple[int, int, str]]
"""Of source files, by path: bytes, time of modification in ns, and SHA-256 as of then."""

_SETTLED_NS = 2 * 10**9
"""A file this young may yet be written to without a change of its time."""


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
        verify: compare the digests of all that is stored, and read the sources whatever is known of them.
        stamps: sources that have not changed since need not be read; gets those that were.

    Raises:
        ValueError: naming file and rule, for a volume that cannot be used.
        OSError: naming the place, where the store cannot be read or written.
    """
    files = {"image": case.image} | ({"label": case.label} if case.label else {})
    stamps = {} if stamps is None else stamps
    hashes: dict[str, str] = {}
    content: dict[str, bytes] = {}
    for name, file in files.items():
        try:
            status = file.stat()
            if verify or stamps.get(str(file), ())[:2] != (status.st_size, status.st_mtime_ns):
                content[name] = read_file(file)
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot read: {error.strerror}") from error
        if name in content:
            digest = hashlib.sha256(content[name]).hexdigest()
            stamps[str(file)] = (status.st_size, status.st_mtime_ns, digest)
        hashes[name] = stamps[str(file)][2]
        if time.time_ns() - status.st_mtime_ns < _SETTLED_NS:
            del stamps[str(file)]
    recipe = {"version": VERSION, "preparation": preparation.model_dump(mode="json"), **hashes}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
    if found := store.get(key, verify):
        return _named(found, case), False
    if content.keys() < files.keys():  # known, but of another preparation, or no longer in the store
        for file in files.values():
            stamps.pop(str(file), None)
        return prepare_case(case, preparation, store, verify, stamps)
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
        hu_window=preparation.hu_window,
        box=prepared.box,
        original_shape=(prepared.original_shape[0], prepared.original_shape[1], prepared.original_shape[2]),
        original_affine=tuple(map(tuple, prepared.original_affine.tolist())),
        label_voxels={str(value): int(count) for value, count in enumerate(counts) if count},
        largest_label=int(label.voxels.max()) if label else 0,
        files={},
    )
    return store.put(volume, prepared), True


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
        verify: compare the digests of all that is stored and of all sources, whatever is known of them.

    Returns:
        Volumes by image path, the volumes that cannot be used, and how many were prepared now.

    Raises:
        ValueError: when the store cannot be read or written; the volumes that it has already are kept.
    """
    import ray  # the data workers read this module's patches without the driver's half of Ray

    store.remove_stale()
    known = _load(store)
    rows = [_row(place, case, known) for place, case in enumerate(cases)]

    def work(row: dict[str, Any]) -> dict[str, Any]:
        return _prepare_row(row, preparation, store, verify)

    blocks = min(len(rows), 1000)
    dataset = ray.data.from_items(rows, override_num_blocks=blocks).map(work, num_cpus=1)
    finished: Iterator[Any] = iter(dataset.iter_rows())
    volumes: dict[str, Volume] = {}
    bad: list[BadVolume] = []
    prepared = 0
    stamps: Stamps = {}
    try:
        for row in progress(finished, len(rows)) if progress else finished:
            case = cases[row["place"]]
            if row["fault"]:
                raise ValueError(row["fault"])
            volume = Volume.from_json(row["volume"]) if row["volume"] else None
            prepared += row["fresh"]
            stamps.update(json.loads(row["stamps"]))
            reason = row["reason"]
            if volume and classes and volume.largest_label >= classes:
                beyond = f"label {volume.largest_label} is beyond the {classes} classes (0..{classes - 1})"
                reason = f"{case.label}: {beyond}"
            if reason:
                bad.append(BadVolume(case.id, reason))
            elif volume:
                volumes[str(case.image)] = _named(volume, case)
    finally:  # also of a preparation that was cut off
        _save(store, stamps)
    return volumes, sorted(bad, key=lambda one: one.id), prepared


def _row(place: int, case: Case, known: Stamps) -> dict[str, Any]:
    """A case as Ray Data carries it, with what is known of its files."""
    stamps = {name: known[name] for name in map(str, (case.image, case.label)) if name in known}
    files = {"image": str(case.image), "label": str(case.label or "")}
    return {"place": place, "id": case.id, "stamps": json.dumps(stamps), **files}


def _prepare_row(row: dict[str, Any], preparation: Preparation, store: Store, verify: bool) -> dict[str, Any]:
    """In a task: `prepare_case`, whose errors are results, so that one bad volume does not end the others."""
    case = Case(row["id"], Path(row["image"]), Path(row["label"]) if row["label"] else None)
    stamps: Stamps = {name: tuple(stamp) for name, stamp in json.loads(row["stamps"]).items()}
    found = {"place": row["place"], "volume": "", "fresh": False, "reason": "", "fault": "", "stamps": "{}"}
    try:
        volume, fresh = prepare_case(case, preparation, store, verify, stamps)
    except ValueError as error:
        return found | {"reason": str(error)}
    except (RuntimeError, MemoryError) as error:  # torch, on a volume beyond its means
        return found | {"reason": f"{case.image}: {' '.join(str(error).split())[:200]}"}
    except OSError as error:  # of the store, not of the volume
        return found | {"fault": str(error)}
    return found | {"volume": volume.to_json(), "fresh": fresh, "stamps": json.dumps(stamps)}


def _load(store: Store) -> Stamps:
    """What earlier runs found of sources; without it, all are read."""
    try:
        found = json.loads(_book(store).read_bytes()).items()
        return {name: (int(size), int(modified), str(sha256)) for name, (size, modified, sha256) in found}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save(store: Store, stamps: Stamps) -> None:
    merged = _load(store) | stamps
    with suppress(OSError), appearing(_book(store)) as part:
        part.write_text(json.dumps(merged))


def _book(store: Store) -> Path:
    return store.folder / "sources.json"


def _named(volume: Volume, case: Case) -> Volume:
    """A stored volume under the name and place that it has in this study; the key knows only its content."""
    return replace(
        volume, id=case.id, image_source=str(case.image), label_source=str(case.label) if case.label else None
    )
