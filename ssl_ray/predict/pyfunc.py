"""What `mlflow.pyfunc.load_model` gives: a trained network that takes the array of a scan as any program has it.

MLflow keeps this package beside the weights and loads it from there: no installation of ours is needed, and no version.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti, checked_affine
from ssl_ray.data.normalise import CanonicalVolume, prepare
from ssl_ray.errors import UserError
from ssl_ray.evaluate.metrics import to_original_grid
from ssl_ray.predict.embed import read_embedder
from ssl_ray.predict.model import read_model
from ssl_ray.predict.segment import Segmenter, manner_of

Compute = Callable[[CanonicalVolume, Sequence[int], NDArray[np.float64]], NDArray[Any]]
"""Of a prepared volume, and the shape and affine (4, 4) of the scan."""


class Scanner:
    """A trained network: how its volumes are prepared, and what it computes of them."""

    def __init__(self, preparation: Preparation, compute: Compute) -> None:
        self.preparation, self.compute = preparation, compute

    def predict(self, scan: NDArray[np.float32], params: Mapping[str, Any] | None = None) -> NDArray[Any]:
        """The labels (X, Y, Z) of a scan, uint8, as the network was scored; of an encoder the mean of its tokens.

        `scan`: (X, Y, Z), or (C, X, Y, Z), of intensities as scanned, like HU. `params`: `affine`, the sixteen numbers
        of the 4 x 4 matrix from voxels to mm in RAS+, row by row; without it the scan has the network's own spacing,
        along the axes of RAS.
        """
        channels, axes = self.preparation.channels, np.diag([*self.preparation.spacing, 1.0])
        affine = np.array((params or {}).get("affine", axes), float)
        if affine.size != 16 or (affine.reshape(4, 4)[3] != [0, 0, 0, 1]).any():
            rule = "affine must be the sixteen numbers of a matrix row by row, of which the last are 0, 0, 0, 1"
            raise UserError(f"{rule}, got {affine.tolist()}")
        try:
            affine = checked_affine(affine.reshape(4, 4))
        except ValueError as error:
            raise UserError(str(error)) from error
        shape = ("X", "Y", "Z") if channels == 1 else (channels, "X", "Y", "Z")
        if scan.ndim != len(shape) or scan.shape[:-3] != shape[:-3] or not np.isfinite(scan).all():
            raise UserError(f"a scan must have shape ({', '.join(map(str, shape))}) and be finite, got {scan.shape}")
        # In the order of a NIfTI file's voxels, as those who read them expect it.
        images = [Nifti(np.asfortranarray(one, np.float32), affine) for one in scan.reshape(-1, *scan.shape[-3:])]
        return self.compute(prepare(images[0], None, self.preparation, images[1:]), scan.shape[-3:], affine)


def _load_pyfunc(path: str) -> Scanner:
    """MLflow's hook: the network whose file this is, of a trial or, by its name, of a pretraining."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path.endswith("best.safetensors"):
        embedder = read_embedder(path)[0].on(device)
        return Scanner(embedder.preparation, lambda canonical, *_: embedder.tokens(canonical).features.mean(0))
    model = read_model(path)
    segmenter = Segmenter([model], manner_of(model.metadata)[0], device)

    def labels(canonical: CanonicalVolume, shape: Sequence[int], affine: NDArray[np.float64]) -> NDArray[np.uint8]:
        return to_original_grid(segmenter(canonical.image, canonical.levels), canonical.affine, shape, affine)

    return Scanner(model.metadata.preparation, labels)
