"""A mask for each organ, as TotalSegmentator has them -> one label map, in a folder of our own."""

import gzip
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from ssl_ray.console import track
from ssl_ray.data.layout_files import OWN
from ssl_ray.data.nifti import read_label
from ssl_ray.errors import UserError
from ssl_ray.storage.files import write_file


def merge_masks(folder: Path, masks: Mapping[str, Mapping[int, str]], organs: Mapping[int, str]) -> dict[str, str]:
    """Write each label map of `masks` that is not there yet: its path below `folder` -> the mask of each value.

    A voxel of several organs gets the largest value. Returns why a label map could not be made, by its path. A
    UserError where the folder of label maps has those of other organs, or a byte cannot hold all values.
    """
    if max(organs) > 255:
        raise UserError(f"{folder}: {max(organs)} masks a scan, but a label map holds at most 255 organs")
    record, names = folder / OWN / "organs.json", json.dumps(organs, indent=1)
    if (folder / OWN).exists() and (not record.is_file() or record.read_text(encoding="utf-8") != names):
        raise UserError(f"{record.parent}: has label maps of other organs, or of another program; move it away first")
    write_file(record, names.encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(lambda label: _merge(folder, label, masks[label]), masks)
        failed = dict(zip(masks, track("merging masks", outcomes, len(masks)), strict=True))
    return {label: why for label, why in failed.items() if why}


def _merge(folder: Path, label: str, masks: Mapping[int, str]) -> str | None:
    """Make one label map, unless it is there and newer than its masks -> why that is not possible."""
    path = folder / label
    if path.is_file():
        newer = [mask for mask in masks.values() if (folder / mask).stat().st_mtime_ns > path.stat().st_mtime_ns]
        return f"older than {newer[0]}; move it away" if newer else None
    merged: npt.NDArray[np.uint8] | None = None
    for value, mask in masks.items():
        try:
            found = read_label(folder / mask)
        except UserError as error:
            return str(error)
        if merged is None:
            merged, affine, first = np.zeros(found.voxels.shape, np.uint8), found.affine, mask
        if found.voxels.shape != merged.shape or not np.allclose(found.affine, affine, atol=1e-3):
            return f"{mask} is on another grid than {first}"
        if not np.isin(found.voxels, (0, found.voxels.max())).all():
            return f"{mask} has several values, so it is no mask of one organ"
        merged[found.voxels > 0] = value
    write_file(path, gzip.compress(nib.Nifti1Image(merged, affine).to_bytes(), 6, mtime=0))
    return None
