"""How many volumes a study has, and how many bytes they take in the store: from datalists, manifests and headers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from ssl_ray.config.schema import Preparation, Study
from ssl_ray.data.consistency import SECTIONS, read_lists, sections
from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import header_affine
from ssl_ray.data.prepare import known_volumes
from ssl_ray.data.resample import canonical_grid
from ssl_ray.data.store import Store
from ssl_ray.errors import UserError
from ssl_ray.phantom.cohort import validation_share
from ssl_ray.storage.folders import Folders
from ssl_ray.text import reason

_HEADERS = 1000
"""The most headers that are read of a group, evenly along its list: about a minute on a slow share."""


@dataclass(frozen=True)
class Group:
    """The volumes of one section of the datalists; None where no header could be read.

    `prepared` of them are in the store and take `stored_bytes`. The others will take `missing_bytes`: image and label
    before the crop to the body, without the 8 bytes for each labelled voxel. `shape` is the mean grid (X, Y, Z) in
    voxels.
    """

    volumes: int
    prepared: int = 0
    stored_bytes: int = 0
    missing_bytes: float | None = None
    shape: tuple[float, ...] | None = None


def survey(study: Study, folders: Folders) -> dict[str, Group]:
    """Read the datalists as a run does, then manifests and headers; counts alone of a cohort that is not made yet.

    What is wrong with the lists, and a header that cannot be read, is a UserError.
    """
    made, config = study.phantom, study.finetune
    if made and not (Path(made.root) / "unlabelled.json").is_file():
        held_out = validation_share(made.unlabelled)
        trained = made.labelled if config.cohort.pool else max(config.sizes)
        numbers = made.unlabelled - held_out, held_out, trained, made.validation, made.test
        return {name: Group(number) for name, number in zip(SECTIONS, numbers, strict=True)}
    store, groups = Store(folders.cache, folders.scratch), {}
    for name, cases in sections(*read_lists(study.pretrain if study.pretrains else None, config)).items():
        part = config if name.startswith("labelled") else study.pretrain
        groups[name] = _group(cases, part.preparation, store, study.on_bad_volume == "skip")
    return groups


def _group(cases: Sequence[Case], preparation: Preparation, store: Store, skip: bool) -> Group:
    found = known_volumes(cases, preparation, store)
    absent = [case.image for case, volume in zip(cases, found, strict=True) if not volume]
    prepared = [volume for volume in found if volume]
    grids = []
    for path in absent[:: 1 + len(absent) // _HEADERS]:
        try:
            image = nib.load(path)  # only its header
            grids.append(canonical_grid(image.shape[:3], header_affine(image.header), preparation).shape)
        except Exception as error:  # nibabel's, zlib's and the system's, of many types
            if not skip:
                raise UserError(f"{path}: {reason(error)}") from error
    image = preparation.channels * np.dtype(preparation.normalise.storage.dtype).itemsize
    voxel = image + any(case.label for case in cases)
    missing = len(absent) * voxel * sum(map(math.prod, grids)) / len(grids) if grids else None
    shapes = [*grids, *(volume.shape for volume in prepared)]
    return Group(
        volumes=len(cases),
        prepared=len(prepared),
        stored_bytes=sum(size for volume in prepared for size, _ in volume.files.values()),
        missing_bytes=missing if absent else 0,
        shape=tuple(np.mean(shapes, axis=0).tolist()) if shapes else None,
    )
