"""Three planes of a segmented volume, small enough to keep: all that a picture of it needs. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

Pixels = NDArray[np.uint8]
PLANES = ("axial", "coronal", "sagittal")

FILE = "planes.npz"
"""In a trial's folder, and an artifact of its run: the planes of the volumes that it was scored on, by their ids."""


@dataclass(frozen=True, eq=False)
class Planes:
    """The planes of `PLANES`, as radiologists look at them: right is on the left, anterior is up or left."""

    layers: tuple[Pixels, ...]
    """A plane each, (2 or 3, rows, columns): image, prediction and, where it is known, truth."""
    spacing: tuple[float, float, float]
    """mm between voxels from left to right, posterior to anterior, inferior to superior."""

    def size(self, plane: int) -> tuple[float, float]:
        """Height and width of a plane in mm."""
        (x, y, z), (rows, columns) = self.spacing, self.layers[plane].shape[1:]
        return rows * (z if plane else y), columns * (y if plane == 2 else x)


def cut(image: NDArray[Any], prediction: Pixels, truth: Pixels | None, affine: ArrayLike) -> Planes:
    """Cut a volume where prediction and truth differ most; all (X, Y, Z) on one grid, 4x4 affine from voxels to mm.

    Each plane is the one that holds most of the largest connected part of what differs. Where nothing differs, or the
    truth is not known, it is the largest part of what was segmented; where nothing was, the planes are the middle ones.
    Voxel axes may have any order and direction.
    """
    orientation = io_orientation(np.asarray(affine, float))
    axes = orientation[:, 0].argsort()
    given = [image, prediction] if truth is None else [image, prediction, truth]
    volumes = [apply_orientation(volume, orientation) for volume in given]  # views: x to the right, y anterior, z up
    x, y, z = _place(volumes[1], volumes[2] if truth is not None else None)
    planes = [[volume[box][::-1, ::-1].T for volume in volumes] for box in (np.s_[:, :, z], np.s_[:, y], np.s_[x])]
    low, high = np.percentile(np.concatenate([found[0].ravel() for found in planes]), (0.5, 99.5))
    for found in planes:
        grey = (found[0].astype(np.float32) - low) * (255 / max(high - low, 1e-6))
        found[0] = grey.clip(0, 255).round()
    layers = tuple(np.stack(found).astype(np.uint8) for found in planes)
    x_mm, y_mm, z_mm = voxel_sizes(np.asarray(affine, float))[axes].tolist()
    return Planes(layers, (x_mm, y_mm, z_mm))


def _place(prediction: Pixels, truth: Pixels | None) -> list[int]:
    """Index of the plane along each axis."""
    shown = prediction > 0 if truth is None else prediction != truth
    if not shown.any():
        shown = prediction > 0
    if not shown.any():
        return [side // 2 for side in shown.shape]
    (box,) = ndimage.find_objects(shown.astype(np.uint8))  # a part of a large volume is labelled in less memory
    parts, count = ndimage.label(shown[box])
    sizes = np.zeros(count + 1, dtype=np.int64)
    for plane in parts:
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    largest = parts == sizes[1:].argmax() + 1
    along = [largest.sum(axes).argmax() for axes in ((1, 2), (0, 2), (0, 1))]
    return [int(side.start + index) for side, index in zip(box, along, strict=True)]


def to_npz(planes: Mapping[str, Planes]) -> bytes:
    """The planes of several volumes, by name, as one compressed file."""
    arrays: dict[str, NDArray[Any]] = {"names": np.array([*planes], dtype=np.str_)}
    for number, one in enumerate(planes.values()):
        arrays |= {f"{number}/{name}": layers for name, layers in zip(PLANES, one.layers, strict=True)}
        arrays[f"{number}/spacing"] = np.array(one.spacing)
    file = BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
    return file.getvalue()


def from_npz(content: bytes) -> dict[str, Planes]:
    """What `to_npz` wrote."""
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        return {
            str(name): Planes(
                tuple(arrays[f"{number}/{plane}"] for plane in PLANES), tuple(arrays[f"{number}/spacing"].tolist())
            )
            for number, name in enumerate(arrays["names"])
        }
