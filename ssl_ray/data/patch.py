"""Where a patch is cut out of a stored volume."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ssl_ray.data.store import Store
from ssl_ray.errors import UserError


@lru_cache(maxsize=512)
def open_array(store: Store, key: str, name: Literal["image", "label", "foreground"] = "image") -> npt.NDArray[Any]:
    """Memory-mapped array of a stored volume; only the pages that a patch touches are read.

    A file that cannot be had is an OSError, one that is not a whole array a UserError.
    """
    path = store.fetch(key, f"{name}.npy")
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); `ssl-ray prepare --verify` mends it") from error
    return array


def crop_origin(centre: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> tuple[int, int, int]:
    """Origin (3 voxels) of the patch around a centre voxel, moved inside the volume as MONAI does."""
    along = zip(centre, shape, size, strict=True)
    x, y, z = (max(0, min(middle - side // 2, length - side)) for middle, length, side in along)
    return x, y, z


def read_patch(
    array: npt.NDArray[Any], origin: Sequence[int], size: Sequence[int], out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """One patch of a volume (X, Y, Z) or (C, X, Y, Z), without loading it.

    A volume shorter than the patch counts as padded with zeros on both sides, the smaller half first, like MONAI's
    `SpatialPad`; `origin` (3 voxels) is meant in the padded volume, which the patch may not leave.
    """
    *channels, x, y, z = array.shape
    if out is None:
        out = np.empty((*channels, *size), dtype=array.dtype)
    source: list[Any] = [...]
    target: list[Any] = [...]
    for start, side, length in zip(origin, size, (x, y, z), strict=True):
        before = max(side - length, 0) // 2
        if not 0 <= start <= max(length - side, 0):
            raise ValueError(f"origin {tuple(origin)} of a {tuple(size)} patch leaves the volume of {array.shape}")
        source.append(slice(start, start + min(side, length)))
        target.append(slice(before, before + min(side, length)))
    if any(length < side for side, length in zip(size, (x, y, z), strict=True)):
        out.fill(0)
    out[tuple(target)] = array[tuple(source)]
    return out
