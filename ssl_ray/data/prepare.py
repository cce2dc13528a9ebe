"""Bring cohorts into the store: every volume is prepared once, wherever and however often it is asked for."""

import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ssl_ray.config import depends
from ssl_ray.config.schema import Preparation
from ssl_ray.console import track
from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import Nifti, content_digest, on_image_grid, read_label, read_nifti
from ssl_ray.data.normalise import VERSION, prepare
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.storage.files import UNIQUE, read_file, remove_stale
from ssl_ray.storage.object_store import Place

_STALE_SECONDS = 24 * 3600
_LOOKED_UP, _AT_ONCE = 2000, 32
"""Volumes that are looked up in the store without Ray, whose processes are worth their start for more of them; and how
many at once, as the store may lie on a network."""
_TRIES = 5
"""Of a volume whose process is killed meanwhile; where memory is short, another one's may have taken it."""
_SETTLED_NS = 2 * 10**9
"""A younger file could be written to again within the grain of its time of modification, so it is not remembered."""


@dataclass(frozen=True)
class BadVolume:
    """A volume that could not be prepared, and why; `image` is its path, as ids may repeat between cohorts."""

    id: str
    image: str
    reason: str


def prepare_case(case: Case, preparation: Preparation, store: Store, verify: bool = False) -> tuple[Volume, bool]:
    """The stored volume of a case, and whether it had to be prepared now, for the first time or because of damage.

    With `verify`, the digests of all that is stored are compared, and the sources are read even where their size and
    time have not changed. A volume that cannot be used is a UserError, a store that cannot be read or written an
    OSError.
    """
    if not verify and (known := known_volume(case, preparation, store)):
        return known, False
    digests, content = {}, {}
    for name, file in _files(case).items():
        try:
            digests[name], content[file] = _read_source(file, store)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot read: {error.strerror}") from error
    key, named = _key(preparation, digests), _named(case)
    if found := store.get(key, verify):
        return replace(found, **named), False
    image, label, others = read_case(case, content)
    try:
        canonical = prepare(image, label, preparation, others)
    except ValueError as error:
        raise UserError(f"{' and '.join(map(str, case.images))}: {error}") from error
    counts = np.bincount(canonical.label.ravel()) if canonical.label is not None else ()
    volume = Volume(
        key=key,
        **named,
        content=content_digest(image),
        shape=canonical.image.shape[-3:],
        spacing=preparation.spacing,
        affine=tuple(map(tuple, canonical.affine.tolist())),
        dtype=str(canonical.image.dtype),
        levels=canonical.levels,
        channels=1 + len(others),
        normalise=preparation.normalise.model_dump(mode="json"),
        intensities=canonical.intensities,
        body=canonical.body,
        original_shape=image.voxels.shape,
        label_voxels={str(value): int(count) for value, count in enumerate(counts) if count},
        largest_label=int(label.voxels.max()) if label else 0,
        files={},
    )
    return store.put(volume, canonical), True


def known_volume(case: Case, preparation: Preparation, store: Store) -> Volume | None:
    """What `prepare_case` finds where sizes and times say that nothing has changed; no source or array is read.

    A store that cannot be read is an OSError, as there.
    """
    try:
        known = {name: _remembered(file, file.stat(), store) for name, file in _files(case).items()}
        digests = {name: place.read_bytes().decode() for name, place in known.items()}
    except OSError:  # the source was never read, or cannot be now, which `prepare_case` tells
        return None
    found = store.get(_key(preparation, digests))
    return replace(found, **_named(case)) if found else None


def known_volumes(cases: Sequence[Case], preparation: Preparation, store: Store) -> list[Volume | None]:
    """`known_volume` of each case; a store that cannot be read is a UserError."""
    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # at the first error `map` gives up what has not begun
            return list(pool.map(lambda case: known_volume(case, preparation, store), cases))
    except OSError as error:
        raise UserError(str(error)) from error


def prepare_cohort(
    cases: Sequence[Case], preparation: Preparation, store: Store, classes: int | None = None, verify: bool = False
) -> tuple[dict[str, Volume], list[BadVolume], int]:
    """Prepare all cases in parallel on the Ray cluster, one volume a CPU at a time, as `prepare_case` does.

    What is known is not sent there, unless it is thousands: a study that goes on need not wait for processes to start.

    `classes` is None for unlabelled cases; labels must be in 0..classes-1. Returns volumes by image path, those that
    cannot be used, and how many were prepared now. A store that cannot be read or written is a UserError.
    """
    remove_stale(store.folder, f"tmp-{UNIQUE}", _STALE_SECONDS)
    few = not verify and len(cases) <= _LOOKED_UP
    known = known_volumes(cases, preparation, store) if few else [None] * len(cases)
    found = list(zip(cases, known, strict=True))
    rest = [case for case, volume in found if not volume]
    volumes: dict[str, Volume] = {}
    bad: list[BadVolume] = []
    prepared = 0
    outcomes: Iterable[tuple[Case, Any]] = ((case, (volume, False)) for case, volume in found if volume)
    if rest:
        outcomes = chain(outcomes, _prepared_on_cluster(rest, preparation, store, verify))
    for case, outcome in track(f"preparing {'labelled' if classes else 'unlabelled'} volumes", outcomes, len(cases)):
        if isinstance(outcome, OSError):  # of the store, not of the volume
            raise UserError(str(outcome))
        if not isinstance(outcome, Exception):
            volume, fresh = outcome
            prepared += fresh
            if not classes or volume.largest_label < classes:
                volumes[str(case.image)] = volume
                continue
            beyond = f"label {volume.largest_label} is beyond the {classes} classes (0..{classes - 1})"
            outcome = f"{case.label}: {beyond}"
        bad.append(BadVolume(case.id, str(case.image), str(outcome)))
    return volumes, sorted(bad, key=lambda one: one.id), prepared


def _prepared_on_cluster(
    cases: Sequence[Case], preparation: Preparation, store: Store, verify: bool
) -> Iterator[tuple[Case, Any]]:
    """Each case with what `prepare_case` gives or raises, in the order in which they get ready."""
    import ray  # not above: it takes a second, and `prepare_case` does without

    from ssl_ray.cluster.worker import begun, count_tries

    rows, tries = [{"case": pickle.dumps(case)} for case in cases], count_tries()

    def work(row: dict[str, Any]) -> dict[str, Any]:
        case = pickle.loads(row["case"])
        outcome: Any
        try:
            if begun(tries, f"{case.image} {case.label}") > _TRIES:
                killed = f"its process was killed {_TRIES} times: is it too large for this machine's memory?"
                raise UserError(f"{case.image}: {killed}")
            outcome = prepare_case(case, preparation, store, verify)
        except (OSError, ValueError) as error:  # given back, as one bad volume must not end the others
            outcome = error
        except (RuntimeError, MemoryError) as error:  # torch's, for a volume that is too large for this machine
            outcome = UserError(f"{case.image}: {' '.join(str(error).split())[:200]}")
        return {"outcome": pickle.dumps((case, outcome))}

    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000)).map(work, num_cpus=1)
    try:
        for row in dataset.iter_rows():
            yield pickle.loads(row["outcome"])
    finally:
        ray.kill(tries)


def usable(cases: Sequence[Case], volumes: Mapping[str, Volume]) -> tuple[Volume, ...]:
    """The prepared volumes of cases, by image path as `prepare_cohort` gives them; bad ones are left out."""
    return tuple(volumes[str(case.image)] for case in cases if str(case.image) in volumes)


def read_case(case: Case, content: Mapping[Path, bytes] | None = None) -> tuple[Nifti, Nifti | None, list[Nifti]]:
    """Image, label and further channels of a case on the grid of its image; a UserError for what cannot be used.

    `content` has the bytes of files that were read already.
    """
    known = content or {}
    image, label = read_nifti(case.image, known.get(case.image)), None
    others = [on_image_grid(image, read_nifti(path, known.get(path)), path, "channel") for path in case.others]
    if case.label:
        label = on_image_grid(image, read_label(case.label, known.get(case.label)), case.label)
    return image, label, others


def _files(case: Case) -> dict[str, Path]:
    """The files of a case: `image`, `image.1`, ... for further channels, `label`."""
    further = {f"image.{number}": path for number, path in enumerate(case.others, 1)}
    return {"image": case.image, **further, **({"label": case.label} if case.label else {})}


def _read_source(file: Path, store: Store) -> tuple[str, bytes]:
    """The SHA-256 of a source, and its content.

    The store remembers the digest under path, size and time of modification: a cohort is read in full only once.
    """
    status, content = file.stat(), read_file(file)
    digest = hashlib.sha256(content).hexdigest()
    if time.time_ns() - status.st_mtime_ns >= _SETTLED_NS:
        with suppress(OSError):  # without it, the next run reads the source again
            _remembered(file, status, store).write_bytes(digest.encode())
    return digest, content


def _remembered(file: Path, status: os.stat_result, store: Store) -> Place:
    """Where the store has the digest of a source of this path, size and time of modification, if it was read once."""
    stamp = os.fsencode(f"{file} {status.st_size} {status.st_mtime_ns}")
    return store.mirror.kept(store.folder / "sources" / hashlib.sha256(stamp).hexdigest())


def _key(preparation: Preparation, digests: Mapping[str, str]) -> str:
    """Key in the store, of the sources' digests and all that is done to them."""
    recipe = depends.preparation(preparation, VERSION, digests)
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]


def _named(case: Case) -> dict[str, Any]:
    """The name and place that a volume has in this study, which its key does not cover."""
    label = str(case.label) if case.label else None
    return {"id": case.id, "image_source": str(case.image), "label_source": label, "subject": case.subject}
