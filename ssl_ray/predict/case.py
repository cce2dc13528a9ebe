"""One volume from its NIfTI files to its label map, its picture and the sizes of its organs."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import write_labels
from ssl_ray.data.normalise import CanonicalVolume
from ssl_ray.evaluate.metrics import to_original_grid
from ssl_ray.evaluate.overlay import draw
from ssl_ray.evaluate.planes import cut
from ssl_ray.evaluate.sliding_window import Window
from ssl_ray.predict.inputs import read_prepared
from ssl_ray.predict.segment import Segmenter
from ssl_ray.storage.files import appearing, write_file

LABELS, OVERLAYS, PROBABILITIES = "{}.nii.gz", "overlays/{}.png", "probabilities/{}.npz"
"""Where the files of a case lie in the output, by its name."""
_CONNECTED = np.ones((3, 3, 3), bool)
"""Voxels that share a corner are of one component, as for MONAI's `KeepLargestConnectedComponent`."""
Keep = Callable[[Window, NDArray[np.float16]], None]


@dataclass(frozen=True)
class Outputs:
    """What is written of each case; `largest`: classes of which the largest component alone is kept."""

    folder: Path
    probabilities: bool = False
    largest: tuple[int, ...] = ()


@dataclass(frozen=True)
class OrganSize:
    """An organ in a label map, `number` of the classes 1, 2, ..."""

    number: int
    voxels: int
    millilitres: float
    components: int


def predict_case(case: Case, segmenter: Segmenter, outputs: Outputs) -> tuple[list[OrganSize], float]:
    """Segment a volume and write its files, the label map last; sizes of all organs on its own grid, and seconds.

    What is in memory at full size at one time is the scan in float32 while it is prepared, and labels and the prepared
    image, integers both, afterwards.

    Raises:
        UserError: for a volume that cannot be read or is none of the model's kind.
        OSError: where the output cannot be written.
    """
    started, told = time.perf_counter(), segmenter.metadata
    prepared, header = read_prepared(case, told.preparation)
    with _kept(outputs, case.id, told.classes, prepared) as keep:
        labels = segmenter(prepared.image, prepared.levels, keep)
    affine = header.get_best_affine()
    original = to_original_grid(labels, prepared.affine, header.get_data_shape()[:3], affine)
    sizes = measure(original, told.classes, abs(float(np.linalg.det(affine[:3, :3]))), outputs.largest)
    if outputs.largest:  # the picture shows what is written
        labels = to_original_grid(original, affine, labels.shape, prepared.affine)
    first = prepared.image if prepared.image.ndim == 3 else prepared.image[0]
    planes = cut(first, labels, None, prepared.affine)
    write_file(outputs.folder / OVERLAYS.format(case.id), draw([planes], told.organs, [case.id]))
    path = outputs.folder / LABELS.format(case.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(path, original, header)
    return sizes, time.perf_counter() - started


def measure(labels: NDArray[np.uint8], classes: int, voxel: float, largest: Sequence[int] = ()) -> list[OrganSize]:
    """The size of every organ (X, Y, Z), voxels of `voxel` mm3; of those in `largest`, other components become 0."""
    found = []
    boxes = ndimage.find_objects(labels, max_label=classes - 1)
    for number, box in enumerate(boxes, 1):
        if box is None:
            found.append(OrganSize(number, 0, 0.0, 0))
            continue
        parts, count = ndimage.label(labels[box] == number, _CONNECTED)
        sizes = np.zeros(count + 1, np.int64)
        for plane in parts:  # `bincount` would make a copy of the volume in 64 bits
            sizes += np.bincount(plane.ravel(), minlength=count + 1)
        if number in largest and count > 1:
            kept = 1 + int(sizes[1:].argmax())
            labels[box][(parts > 0) & (parts != kept)] = 0
            sizes, count = sizes[[0, kept]], 1
        voxels = int(sizes[1:].sum())
        found.append(OrganSize(number, voxels, voxels * voxel / 1000, count))
    return found


@contextmanager
def _kept(outputs: Outputs, name: str, classes: int, prepared: CanonicalVolume) -> Iterator[Keep | None]:
    """Takes the probabilities, or None where they are not wanted: they grow in a file, as memory may not hold them."""
    if not outputs.probabilities:
        yield None
        return
    path = outputs.folder / PROBABILITIES.format(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as packed, TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        array = np.memmap(Path(folder, "plain"), np.float16, "w+", shape=(classes, *prepared.image.shape[-3:]))

        def keep(box: Window, values: NDArray[np.float16]) -> None:
            array[:, *box] = values

        yield keep
        with packed.open("wb") as file:
            np.savez_compressed(file, probabilities=array, affine=prepared.affine)
