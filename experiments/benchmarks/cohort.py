"""Synthetic volumes for the benchmarks: files as scanners write them, and stores as `ssl-ray prepare` leaves them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti
from ssl_ray.data.normalisations.window.settings import Window
from ssl_ray.data.normalise import prepare
from ssl_ray.data.store import Store, Volume

WINDOW = Window(hu_window=(-57, 164))
PREPARATION = Preparation(spacing=2, normalise=WINDOW)
"""That of the reference recipe's pretraining."""


def ct(shape: tuple[int, int, int], seed: int) -> Any:
    """int16 HU: an elliptic body with soft structures and noise, in air."""
    random = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(random.normal(size=[side // 4 + 2 for side in shape]), 1.5)
    x, y, z = shape
    soft = ndimage.zoom(coarse, 4, order=1)[:x, :y, :z]
    across = np.linspace(-1.15, 1.15, x)[:, None, None] ** 2 + np.linspace(-1.4, 1.4, y)[:, None] ** 2
    hu = np.where(across < 1, 40 + 1500 * soft, -1000) + random.normal(size=shape) * 12
    return np.clip(hu, -1024, 3071).astype(np.int16)


def labels(shape: tuple[int, int, int], classes: int, seed: int) -> Any:
    """uint8: blobs of the classes 1 and up, on background."""
    random = np.random.default_rng(seed)
    found = np.zeros(shape, np.uint8)
    for value in range(1, classes):
        side = [max(3, int(length * random.uniform(0.1, 0.25))) for length in shape]
        start = [int(random.integers(0, length - width)) for length, width in zip(shape, side, strict=True)]
        found[tuple(slice(a, a + w) for a, w in zip(start, side, strict=True))] = value
    return found


def write_scan(
    path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int, classes: int = 0
) -> Path:
    """A .nii.gz in the axes of most scanners (LPS); with `classes` its label map, in the same place."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = [shape[0] * spacing[0] / 2, shape[1] * spacing[1] / 2, 0]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels(shape, classes, seed) if classes else ct(shape, seed), affine), path)
    return path


def write_cohort(root: Path, training: int, validation: int, shape: tuple[int, int, int]) -> None:
    """Unlabelled volumes at 2 mm and their datalist, `unlabelled.json`; a study wants labelled ones as well: two."""
    side = (2.0, 2.0, 2.0)
    for index in range(training + validation):
        write_scan(root / f"images/v{index:03d}.nii.gz", shape, side, index)
    entries = [{"image": f"images/v{index:03d}.nii.gz"} for index in range(training + validation)]
    for index in range(2):
        write_scan(root / f"images/l{index}.nii.gz", (40, 40, 40), side, index)
        write_scan(root / f"labels/l{index}.nii.gz", (40, 40, 40), side, index, classes=3)
    labelled = [{"image": f"images/l{index}.nii.gz", "label": f"labels/l{index}.nii.gz"} for index in range(2)]
    lists = {"unlabelled": (entries[:training], entries[training:]), "labelled_1": (labelled[:1], labelled[1:])}
    for name, (first, second) in lists.items():
        (root / f"{name}.json").write_text(json.dumps({"training": first, "validation": second}))


def fill(
    store: Store,
    count: int,
    shape: tuple[int, int, int],
    preparation: Preparation = PREPARATION,
    classes: int = 0,
) -> list[Volume]:
    """Stored volumes of about a shape in voxels, of synthetic ones, labelled where there are `classes`; `id`: seed."""
    volumes = []
    affine = np.diag([*preparation.spacing, 1.0])
    for seed in range(count):
        scan = Nifti(ct(shape, seed).astype(np.float32), affine)
        truth = Nifti(labels(shape, classes, seed).astype(np.float32), affine) if classes else None
        prepared = prepare(scan, truth, preparation)
        counts = np.bincount(prepared.label.ravel()) if prepared.label is not None else np.zeros(0, np.int64)
        volume = Volume(
            key=f"{seed:032x}",
            id=str(seed),
            image_source=f"{seed}.nii.gz",
            label_source=f"{seed}.nii.gz" if classes else None,
            content=f"{seed:064x}",
            shape=prepared.image.shape,
            spacing=preparation.spacing,
            affine=tuple(map(tuple, prepared.affine.tolist())),
            dtype=str(prepared.image.dtype),
            levels=prepared.levels,
            channels=1,
            normalise=preparation.normalise.model_dump(mode="json"),
            intensities=prepared.intensities,
            body=prepared.body,
            original_shape=shape,
            label_voxels={str(value): int(number) for value, number in enumerate(counts) if number},
            largest_label=max(0, classes - 1),
            files={},
        )
        volumes.append(store.put(volume, prepared))
    return volumes


def spread(store: Store, real: list[Volume], count: int) -> list[Volume]:
    """A cohort of `count` volumes, each of a key and a folder of its own, which are links to a few real ones."""
    found = []
    for index in range(count):
        source = real[index % len(real)]
        key = f"{((index + 1) * 2654435761) % 2**32:08x}{index:024x}"
        home = store.path(key)
        home.parent.mkdir(parents=True, exist_ok=True)
        if not home.is_symlink():
            home.symlink_to(store.path(source.key), target_is_directory=True)
        found.append(replace(source, key=key, id=f"volume{index:06d}", image_source=f"images/volume{index:06d}.nii.gz"))
    return found
