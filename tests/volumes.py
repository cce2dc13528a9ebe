"""Small NIfTI volumes for the tests, and a small disk to put them on."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ssl_ray.config.schema import Preparation
from ssl_ray.data.datalist import Case
from ssl_ray.data.store import Store, Volume

Array = npt.NDArray[Any]
REAL = Path(os.environ.get("SSL_RAY_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Where real volumes lie, if they do."""


def oblique_affine(spacing: tuple[float, float, float], degrees: float, flip: bool = False) -> Array:
    """Voxel-to-world affine (4, 4), rotated about no anatomical axis; `flip` reverses the first voxel axis (LAS)."""
    axis = np.array([0.3, -0.5, 0.8]) / np.linalg.norm([0.3, -0.5, 0.8])
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(np.deg2rad(degrees) * axis).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = (-17.0, 23.5, 101.25)
    if flip:
        affine[:, 0] *= -1
    return affine


def write_nifti(path: Path, array: Array, affine: Array) -> Path:
    """Write one volume, making its folder, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def smooth_ct(shape: tuple[int, int, int], seed: int = 0) -> Array:
    """Smooth structures from about -1000 to 700 HU inside a rim of air, int16."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    body = ndimage.distance_transform_edt(np.pad(np.ones([side - 4 for side in shape]), 2)) > 0
    return np.where(body, np.clip(40 + 2000 * noise, -1000, 700), -1000).round().astype(np.int16)


def organ_labels(shape: tuple[int, int, int], classes: int = 4, seed: int = 0) -> Array:
    """Blobs of the labels 0..classes-1, uint8."""
    noise = [ndimage.gaussian_filter(np.random.default_rng([seed, i]).normal(size=shape), 2) for i in range(classes)]
    return np.asarray(np.argmax(noise, axis=0), np.uint8)


SHAPE = (12, 14, 9)
AFFINE = oblique_affine((0.8, 1.1, 2.5), 25)
PREPARATION = Preparation(spacing=(1.5, 1.5, 2), hu_window=(-175, 250))


def touch(root: Path, *names: str) -> None:
    """Empty files: the lists are checked without reading a volume."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def make_case(folder: Path, name: str = "one", seed: int = 0, labelled: bool = True) -> Case:
    """A volume in `folder`, with its label where it is `labelled`."""
    image = write_nifti(folder / "images" / f"{name}.nii.gz", smooth_ct(SHAPE, seed), AFFINE)
    label = folder / "labels" / f"{name}.nii.gz"
    return Case(name, image, write_nifti(label, organ_labels(SHAPE, 4, seed), AFFINE) if labelled else None)


def files(store: Store) -> list[str]:
    """Paths of all files below a store."""
    return sorted(path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file())


def stored(store: Store, volume: Volume) -> dict[str, Array]:
    """The arrays of a volume, read without the cache of open files."""
    return {name: np.load(store.path(volume.key, f"{name}.npy")) for name in ("image", "label", "foreground")}


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of a given size, writable or not; a test without the right to mount is skipped."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
