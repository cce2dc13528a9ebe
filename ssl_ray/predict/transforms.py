"""MONAI transforms of a bundle for scans without a unit, whose normalisation is measured of each scan by itself."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import CropForeground, MapTransform

from ssl_ray.config.preparation import Normalise
from ssl_ray.data.normalisations.intensities import measure


class MeasureIntensitiesd(MapTransform):
    """Notes in an image's metadata, for each channel, what becomes 0 and 1 and what the body lies above."""

    def __init__(self, keys: Any, settings: Normalise) -> None:
        super().__init__(keys)
        self.settings = settings

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Of the scan as it was read."""
        for key in self.key_iterator(data):
            image = data[key]  # (C, X, Y, Z)
            found = [measure(channel, self.settings) for channel in image.numpy()]
            image.meta["intensities"] = torch.tensor(found, dtype=torch.float64)
        return dict(data)


class ApplyIntensitiesd(MapTransform):
    """Crops an image to the body, if it shall, and brings it to the levels that were stored for training."""

    def __init__(self, keys: Any, settings: Normalise, crop: bool) -> None:
        super().__init__(keys)
        self.kept, self.crop = settings.storage, crop

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Of the resampled scan."""
        return {**data, **{key: self._apply(data[key]) for key in self.key_iterator(data)}}

    def _apply(self, image: Any) -> Any:
        zero, one, floor = image.meta.pop("intensities").T[..., None, None, None]  # each (C, 1, 1, 1)
        if self.crop:
            image = CropForeground(select_fn=lambda voxels: voxels > floor.float())(image)
        scaled = ((image - zero.float()) / (one - zero).float()).clip(*self.kept.ends)
        return torch.round(scaled * self.kept.levels) / self.kept.levels
