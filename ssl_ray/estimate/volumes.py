"""How many volumes a study has, and how large they will be in the store: from datalists, manifests and headers."""

import math
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from ssl_ray.config.schema import Preparation, Study
from ssl_ray.data.canonical import levels
from ssl_ray.data.datalist import Case, check_held_out, read_datalist, read_labelled, read_unlabelled
from ssl_ray.data.store import VOLUME_JSON, Store
from ssl_ray.phantom.cohort import validation_share
from ssl_ray.storage.files import MANIFEST
from ssl_ray.storage.folders import Folders

_SAMPLE = 200
"""Headers read a group: the mean of CT grids is within a few percent, and a slow share is not asked 100,000 times."""
_SECONDS = 15.0
"""For the headers of a group, and for the manifests in the store."""
_LABEL_BYTES = 1.8
"""A voxel of a labelled volume, beside its image: the label, and 8 bytes for each tenth voxel that belongs to an organ
(`Store` keeps their indices)."""
_PREPARE_SECONDS = 1.4 / (320 * 320 * 100)
"""Of one core, for a voxel of a gzipped file."""
_PHANTOM_MM = (345.0, 295.0, 310.0)
"""Mean field of view that `phantom.synthesize` draws, left to right, back to front and along the body."""
_PHANTOM_VOXELS = 500_000.0

Shape = tuple[float, float, float]


@dataclass(frozen=True)
class Group:
    """Volumes of one list and section, all with the same preparation.

    `bytes` is what they take in the store. It is exact where all of them are in the store (`stored`), else that of
    those in the store and an estimate for the others, from `sampled` headers. `shape` is the mean prepared grid in
    voxels, `source_voxels` the mean of the files; None where no header could be read.
    """

    name: str
    volumes: int
    labelled: bool
    stored: int = 0
    sampled: int = 0
    bytes: float | None = None
    shape: Shape | None = None
    source_voxels: float | None = None
    bad: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """All groups of a study; a volume that stands in several splits is counted in the largest one alone.

    `to_make`: the volumes are those of a synthetic cohort that is still to be written.
    """

    groups: tuple[Group, ...]
    splits: dict[int, int]
    training: int
    validation: int
    to_make: bool
    looked_into_store: bool

    @property
    def volumes(self) -> int:
        """All of them."""
        return sum(group.volumes for group in self.groups)

    @property
    def bytes(self) -> float | None:
        """What they take in the store; None where that cannot be told."""
        sizes = [group.bytes for group in self.groups]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def group(self, name: str) -> Group | None:
        """The group of a name."""
        return next((group for group in self.groups if group.name == name), None)


def survey(study: Study, folders: Folders, pretrains: bool) -> Survey:
    """Read the datalists with all the checks of a run, then as little of the volumes as will do.

    Raises:
        ValueError: for anything that the lists get wrong.
    """
    made = study.phantom
    if made and not (Path(made.root) / "unlabelled.json").is_file():
        return _phantom(study, pretrains)
    training, validation = read_unlabelled(study.pretrain.sources) if pretrains else ((), ())
    labelled = read_labelled(study.finetune.cohort, study.finetune.split_sizes)
    check_held_out((*training, *validation), labelled)
    stored = _stored(folders)
    groups = []
    if pretrains:
        for source in study.pretrain.sources:
            parts = {"training": training, "validation": validation}
            if len(study.pretrain.sources) > 1:  # to read a list of 100,000 again takes seconds
                listed = read_datalist(source.root, source.datalist, labelled=False)
                parts = {"training": listed.training, "validation": listed.validation}
            path = Path(source.root).absolute() / source.datalist
            for section, cases in parts.items():
                name = f"{path.parent.name}/{path.name} {section}"
                groups.append(_group(name, cases, study.pretrain.preparation, stored))
    trained = {case.image: case for cases in labelled.training.values() for case in cases}
    parts = {"training": tuple(trained.values()), "validation": labelled.validation, "test": labelled.test}
    for section, cases in parts.items():
        groups.append(_group(f"labelled {section}", cases, study.finetune.preparation, stored))
    splits = {size: len(cases) for size, cases in labelled.training.items()}
    kept = tuple(group for group in groups if group.volumes)
    return Survey(kept, splits, len(training), len(validation), False, stored is not None)


def preparation_seconds(found: Survey) -> float | None:
    """Seconds of one core for the volumes that the store does not have; None where no header could be read."""
    seconds = 0.0
    for group in found.groups:
        if group.source_voxels is None:
            return None
        seconds += (
            (group.volumes - group.stored) * group.source_voxels * _PREPARE_SECONDS * (1.5 if group.labelled else 1)
        )
    return seconds


def prepared_shape(shape: Sequence[int], affine: Any, preparation: Preparation) -> Shape:
    """The grid of a volume after orientation and resampling, before the crop to the foreground; as MONAI's `Spacingd`.

    Args:
        shape: (X, Y, Z) voxels of the file.
        affine: (4, 4), voxels to mm.
        preparation: of the canonical array.
    """
    sides = [round((n - 1) * mm / to + 1) for n, mm, to in zip(*_turned(shape, affine, preparation), strict=True)]
    return float(sides[0]), float(sides[1]), float(sides[2])


def _turned(shape: Sequence[int], affine: Any, preparation: Preparation) -> tuple[list[int], list[float], Any]:
    zooms = nib.affines.voxel_sizes(affine).tolist()
    axes = [0, 1, 2]
    if preparation.orientation:
        axes = np.argsort(nib.io_orientation(affine)[:, 0]).tolist()
    return [int(shape[axis]) for axis in axes], [zooms[axis] for axis in axes], preparation.spacing


def _group(name: str, cases: Sequence[Case], preparation: Preparation, stored: dict[Any, Any] | None) -> Group:
    labelled = any(case.label for case in cases)
    window = (preparation.spacing, preparation.hu_window, labelled)
    there = [found for case in cases if (found := (stored or {}).get((str(case.image), *window)))]
    absent = [case for case in cases if (str(case.image), *window) not in (stored or {})]
    sizes, shapes, sources, bad = [], [shape for _, shape, _ in there], [voxels for *_, voxels in there], []
    order = np.random.default_rng(0).permutation(len(absent))[:_SAMPLE]
    until = time.monotonic() + _SECONDS
    for place in order:
        if time.monotonic() > until:
            break
        case = absent[place]
        try:
            image = nib.load(case.image)
            shape = prepared_shape(image.shape[:3], image.affine, preparation)
        except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error, IndexError) as error:
            bad.append(f"{case.image}: {' '.join(str(error).split())[:200]}")
            continue
        sources.append(math.prod(image.shape[:3]))
        shapes.append(shape)
        sizes.append(math.prod(shape) * _voxel_bytes(preparation, labelled))
    size = float(sum(found for found, *_ in there))
    known = not absent or bool(sizes)
    return Group(
        name,
        len(cases),
        labelled,
        stored=len(there),
        sampled=len(sizes) + len(bad),
        bytes=size + (float(np.mean(sizes)) * len(absent) if sizes else 0.0) if known else None,
        shape=_mean(shapes),
        source_voxels=float(np.mean(sources)) if sources else None,
        bad=tuple(bad),
    )


def _voxel_bytes(preparation: Preparation, labelled: bool) -> float:
    return (1 if levels(preparation.hu_window) == 255 else 2) + (_LABEL_BYTES if labelled else 0)


def _mean(shapes: Sequence[Shape]) -> Shape | None:
    if not shapes:
        return None
    x, y, z = np.mean(shapes, axis=0)
    return float(x), float(y), float(z)


def _stored(folders: Folders) -> dict[Any, Any] | None:
    """Bytes, shape and source voxels by source, spacing, window and kind; None for a store that is not on a disk here.

    By the path of the source: the key of a volume would need its content. A file that has changed since is prepared
    anew, to the same size within what a plan is good for.
    """
    store = Store(folders.cache, folders.scratch)
    if store.mirror.origin is not None:
        return None
    found: dict[Any, Any] = {}
    until = time.monotonic() + _SECONDS
    for path in store.folder.glob(f"??/*/{MANIFEST}"):
        if time.monotonic() > until:
            break
        with suppress(OSError, ValueError):  # a damaged one is as good as none
            volume = VOLUME_JSON.validate_json(path.read_bytes())
            key = volume.image_source, volume.spacing, volume.hu_window, bool(volume.label_source)
            size = sum(size for size, _ in volume.files.values())
            found[key] = size, volume.shape, math.prod(volume.original_shape)
    return found


def _phantom(study: Study, pretrains: bool) -> Survey:
    made = study.phantom
    assert made is not None
    held_out = validation_share(made.unlabelled)
    training, validation = (made.unlabelled - held_out, held_out) if pretrains else (0, 0)

    def group(name: str, volumes: int, preparation: Preparation, labelled: bool) -> Group:
        x, y, z = (mm / to for mm, to in zip(_PHANTOM_MM, preparation.spacing, strict=True))
        size = x * y * z * _voxel_bytes(preparation, labelled)
        return Group(name, volumes, labelled, 0, 0, size * volumes, (x, y, z), _PHANTOM_VOXELS)

    own, cohort = study.pretrain.preparation, study.finetune.preparation
    sizes = study.finetune.split_sizes
    groups = [group("unlabelled training", training, own, False)] if training else []
    groups += [group("unlabelled validation", validation, own, False)] if training else []
    groups.append(group("labelled training", max(sizes), cohort, True))
    groups.append(group("labelled validation", made.validation, cohort, True))
    groups.append(group("labelled test", made.test, cohort, True))
    return Survey(tuple(groups), {size: size for size in sizes}, training, validation, True, True)
