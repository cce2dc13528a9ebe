"""What `mlflow.pyfunc.load_model` gives: a trained network that takes the array of a scan as any program has it.

MLflow keeps this package beside the weights and loads it from there: no installation of ours is needed, and no version.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti
from ssl_ray.data.normalise import CanonicalVolume, prepare
from ssl_ray.errors import UserError
from ssl_ray.evaluate.metrics import to_original_grid
from ssl_ray.predict.embed import Embedder, read_embedder
from ssl_ray.predict.model import Model, read_model
from ssl_ray.predict.segment import Segmenter, manner_of


class ScanSegmenter:
    """The network of a trial, as it was scored."""

    def __init__(self, model: Model) -> None:
        self.preparation = model.metadata.preparation
        self.segment = Segmenter([model], manner_of(model.metadata)[0], _device())

    def predict(self, scan: NDArray[np.float32], params: Mapping[str, Any] | None = None) -> NDArray[np.uint8]:
        """Segment a scan (X, Y, Z), or (C, X, Y, Z), of intensities as scanned, like HU -> its labels (X, Y, Z).

        `params`: `affine`, the sixteen numbers of the 4 x 4 matrix from voxels to mm in RAS+, row by row; without it
        the scan has the network's own spacing, along the axes of RAS.
        """
        canonical, affine = _prepared(scan, params, self.preparation)
        labels = self.segment(canonical.image, canonical.levels)
        return to_original_grid(labels, canonical.affine, scan.shape[-3:], affine)


class ScanEmbedder:
    """The encoder of a pretraining."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = Embedder(embedder.encoder.to(_device()), embedder.preparation)

    def predict(self, scan: NDArray[np.float32], params: Mapping[str, Any] | None = None) -> NDArray[np.float32]:
        """The mean of a scan's tokens, (width,); `params` as those of a segmentation."""
        canonical, _ = _prepared(scan, params, self.embedder.preparation)
        mean: NDArray[np.float32] = self.embedder.tokens(canonical).features.mean(0)
        return mean


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _prepared(
    scan: NDArray[np.float32], params: Mapping[str, Any] | None, preparation: Preparation
) -> tuple[CanonicalVolume, NDArray[np.float64]]:
    """The scan as the network's own volumes are, and its affine (4, 4)."""
    channels, axes = preparation.channels, np.diag([*preparation.spacing, 1.0])
    affine = np.array((params or {}).get("affine", axes), float).reshape(4, 4)
    shape = ("X", "Y", "Z") if channels == 1 else (channels, "X", "Y", "Z")
    if scan.ndim != len(shape) or scan.shape[:-3] != shape[:-3] or not np.isfinite(scan).all():
        raise UserError(f"a scan must have shape ({', '.join(map(str, shape))}) and be finite, got {scan.shape}")
    # In the order of a NIfTI file's voxels, as those who read them expect it.
    images = [Nifti(np.asfortranarray(one, np.float32), affine) for one in scan.reshape(-1, *scan.shape[-3:])]
    return prepare(images[0], None, preparation, images[1:]), affine


def _load_pyfunc(path: str) -> ScanSegmenter | ScanEmbedder:
    """MLflow's hook: the model whose file this is."""
    if path.endswith("best.safetensors"):
        return ScanEmbedder(read_embedder(path)[0])
    return ScanSegmenter(read_model(path))
