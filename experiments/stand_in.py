"""Small synthetic CT under the names that published datalists give: a recipe is seen to run before its data are there.

    python experiments/stand_in.py LIST.json... FOLDER

The lists are copied into the folder, beside the volumes that they name: blocks of about 110 mm out of the middle of the
synthetic bodies of `ssl_ray.phantom`, with the organs of BTCV as labels. No number that comes of them means anything.
"""

import argparse
import json
import shutil
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib

from ssl_ray.phantom.cohort import synthesize

_SPACING, _SIDE = 8.0, 14
"""Of the blocks: mm, and voxels."""


def write(root: Path, entry: dict[str, str]) -> None:
    """Write the image of a case, and its label where it has one. Its name is the seed: no two lists share a patient."""
    image, label = synthesize(zlib.crc32(entry["image"].encode()), 0, spacing=_SPACING)
    middle = tuple(slice((side - _SIDE) // 2, (side + _SIDE) // 2) for side in image.shape)
    for volume, name in ((image, entry["image"]), (label, entry.get("label"))):
        if name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            nib.save(volume.slicer[middle], root / name)


def main() -> None:
    """Read the lists, write the volumes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", type=Path, nargs="+", metavar="LIST.json")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    cases: dict[str, dict[str, str]] = {}
    for path in options.lists:
        content = json.loads(path.read_text())
        cases |= {entry["image"]: entry for part in ("training", "validation") for entry in content[part]}
        shutil.copy(path, options.folder)
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(partial(write, options.folder), cases.values(), chunksize=8):
            pass
    print(f"{len(cases)} volumes in {options.folder}")


if __name__ == "__main__":
    main()
