"""How many volumes a study has, and how large they are in the store: from datalists, manifests and headers."""

import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from ssl_ray.config.schema import PhantomCohort, Preparation, Study
from ssl_ray.data.canonical import levels
from ssl_ray.data.datalist import Case, check_held_out, read_labelled, read_unlabelled
from ssl_ray.data.store import VOLUME_JSON, Store, Volume
from ssl_ray.phantom.cohort import synthesize, validation_share
from ssl_ray.storage.files import MANIFEST
from ssl_ray.storage.folders import Folders

_HEADERS = 200
"""Headers read a group: enough for the mean grid of CT to a few percent, and few for a slow share."""
_PHANTOMS = 2
"""Volumes drawn of a synthetic cohort that is not written yet, at about two seconds each."""
_UNREADABLE = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error, IndexError)


@dataclass(frozen=True)
class Group:
    """The volumes of one section of the datalists, all prepared alike.

    Attributes:
        volumes: their number.
        stored: how many of them the store has.
        stored_bytes: that those take there, exactly.
        missing_bytes: that the others will take at most: image and label before the crop to the body, by the mean of
            the headers read. Not in it: 8 bytes for each labelled voxel. None where no header could be read.
        headers: that could be read, of volumes that are not stored.
        shape: mean grid (X, Y, Z) in voxels of what is stored and of what the headers will become; None without any.
        bad: of the headers that could not be read, file and reason.
    """

    volumes: int
    stored: int
    stored_bytes: int
    missing_bytes: float | None
    headers: int
    shape: tuple[float, ...] | None
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """The volumes of a study; one that is in several splits counts once.

    Attributes:
        groups: by name, e.g. `unlabelled training` or `labelled test`.
        stored_bytes: of all groups.
        missing_bytes: of all groups; None where one is not known.
        to_make: the volumes are those of a synthetic cohort that is not written yet.
        remote_store: the store is not on a disk here and was not looked into: all volumes count as missing.
    """

    groups: dict[str, Group]
    stored_bytes: int
    missing_bytes: float | None
    to_make: bool
    remote_store: bool

    def volumes(self, name: str) -> int:
        """How many the group of this name has; 0 where there is none."""
        return self.groups[name].volumes if name in self.groups else 0


def survey(study: Study, folders: Folders) -> tuple[Survey, tuple[Volume, ...]]:
    """Read the datalists with all the checks of a run, then as little of the volumes as will do.

    Returns:
        What was found, and the pretraining's training volumes that the store has.

    Raises:
        UserError: for anything that is wrong with the lists.
    """
    manifests = _manifests(folders)
    readable: tuple[Volume, ...] = ()
    made = study.phantom if study.phantom and not (Path(study.phantom.root) / "unlabelled.json").is_file() else None
    if made:
        groups = _drawn(study, made)
    else:
        groups = {}
        for name, (cases, preparation) in _sections(study).items():
            found = [(manifests or {}).get(_key(case, preparation)) for case in cases]
            stored = tuple(volume for volume in found if volume)
            absent = [case.image for case, volume in zip(cases, found, strict=True) if not volume]
            order = np.random.default_rng(0).permutation(len(absent))[:_HEADERS]
            images = {str(absent[place]): _load(absent[place]) for place in order}
            groups[name] = _group(len(cases), stored, images, preparation, name.startswith("labelled"))
            readable = stored if name == "unlabelled training" else readable
    missing = [group.missing_bytes for group in groups.values()]
    known = None if None in missing else sum(size for size in missing if size)
    size = sum(group.stored_bytes for group in groups.values())
    return Survey(groups, size, known, made is not None, manifests is None), readable


def _sections(study: Study) -> dict[str, tuple[Sequence[Case], Preparation]]:
    """The cases of each group, and how they are prepared."""
    config = study.pretrain
    training, validation = read_unlabelled(config.sources) if study.pretrains else ((), ())
    splits = read_labelled(study.finetune.cohort, study.finetune.split_sizes)
    check_held_out((*training, *validation), splits)
    labelled = {case.image: case for cases in splits.training.values() for case in cases}
    groups: dict[str, tuple[Sequence[Case], Preparation]] = {
        "unlabelled training": (training, config.preparation),
        "unlabelled validation": (validation, config.preparation),
        "labelled training": (tuple(labelled.values()), study.finetune.preparation),
        "labelled validation": (splits.validation, study.finetune.preparation),
        "labelled test": (splits.test, study.finetune.preparation),
    }
    return {name: group for name, group in groups.items() if group[0]}


def _drawn(study: Study, made: PhantomCohort) -> dict[str, Group]:
    """The groups of a synthetic cohort that is not written yet, with the grids of its first volumes."""
    held_out = validation_share(made.unlabelled)
    images = {f"volume {index}": synthesize(made.seed, index)[0] for index in range(_PHANTOMS)}
    groups = {}
    if study.pretrains:
        for part, volumes in (("training", made.unlabelled - held_out), ("validation", held_out)):
            groups[f"unlabelled {part}"] = _group(volumes, (), images, study.pretrain.preparation, False)
    numbers = {"training": max(study.finetune.split_sizes), "validation": made.validation, "test": made.test}
    for part, volumes in numbers.items():
        groups[f"labelled {part}"] = _group(volumes, (), images, study.finetune.preparation, True)
    return groups


def _group(
    volumes: int, stored: Sequence[Volume], images: Mapping[str, Any], preparation: Preparation, labelled: bool
) -> Group:
    """A group of so many volumes; `images` has files that are not stored, with their image or what is wrong with it."""
    bad = tuple(f"{path}: {reason}" for path, reason in images.items() if isinstance(reason, str))
    grids = [prepared_shape(i.shape, i.affine, preparation) for i in images.values() if not isinstance(i, str)]
    shapes = [*grids, *(volume.shape for volume in stored)]
    voxel, absent = (1 if levels(preparation.hu_window) == 255 else 2) + labelled, volumes - len(stored)
    mean = voxel * sum(map(math.prod, grids)) / len(grids) if grids else None
    return Group(
        volumes=volumes,
        stored=len(stored),
        stored_bytes=sum(size for volume in stored for size, _ in volume.files.values()),
        missing_bytes=absent * mean if mean else None if absent else 0.0,
        headers=len(grids),
        shape=tuple(np.mean(shapes, axis=0).tolist()) if shapes else None,
        bad=bad,
    )


def prepared_shape(shape: Sequence[int], affine: npt.NDArray[np.float64], preparation: Preparation) -> tuple[int, ...]:
    """The grid (X, Y, Z) of a volume after orientation and MONAI's `Spacing`, before the crop to the foreground.

    Args:
        shape: of the file, in voxels.
        affine: (4, 4), from voxels to mm.
        preparation: orientation and spacing of the new grid.
    """
    axes = np.argsort(nib.io_orientation(affine)[:, 0]) if preparation.orientation else [0, 1, 2]
    between_centres = (np.array(shape[:3]) - 1) * nib.affines.voxel_sizes(affine)
    return tuple(int(side) for side in np.round(between_centres[axes] / preparation.spacing + 1))


def _load(path: Path) -> Any:
    """The image of a file, of which only the header is read, or in a line why it cannot be read."""
    try:
        image = nib.load(path)
        _ = image.affine
    except _UNREADABLE as error:
        return " ".join(str(error).split())[:200]
    return image


def _manifests(folders: Folders) -> dict[tuple[Any, ...], Volume] | None:
    """The store's volumes by `_key`; None for a store that is not on a disk here.

    They are found by the path of their source: the store's own keys would need its content. A source that was replaced
    since is prepared again, and its size may then differ.
    """
    store = Store(folders.cache, folders.scratch)
    if store.mirror.origin is not None:
        return None
    found = {}
    for path in store.folder.glob(f"??/*/{MANIFEST}"):
        with suppress(OSError, ValueError):  # a damaged volume counts as missing
            volume = VOLUME_JSON.validate_json(path.read_bytes())
            found[volume.image_source, volume.spacing, volume.hu_window, bool(volume.label_source)] = volume
    return found


def _key(case: Case, preparation: Preparation) -> tuple[Any, ...]:
    return str(case.image), preparation.spacing, preparation.hu_window, bool(case.label)
