"""Training patches of a trial: each a function of (seed, index), as in pretraining, and augmented."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai import transforms as mt
from torch import Tensor

from ssl_ray.config.schema import Augmentation, Finetune
from ssl_ray.data.patch import crop_origin, open_array, read_patch
from ssl_ray.data.store import Store, Volume
from ssl_ray.random import generator

_ORDER, _PATCH = 11, 12
"""Streams of random numbers: for the order of the volumes, and for what a patch draws."""
_TRIES = 200
"""Draws of a background voxel before any voxel is taken, as a volume may have none."""
_ALIKE = 1.5
"""How many times as long one side of a voxel may be as the other for `vary` to turn it in their plane. A rotation of 30
degrees then stretches by 1.3 at most, less than `vary` scales by."""


@dataclass(frozen=True)
class PatchSampler:
    """Draws patch *i* of a trial out of `(seed, i)` alone: which volume, which centre, which augmentation."""

    volumes: tuple[Volume, ...]
    store: Store
    config: Finetune
    seed: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, X, Y, Z) float32 and labels (B, 1, X, Y, Z) uint8 of one step, augmented.

        A step takes the next `volumes_per_step` volumes of an endless sequence of shuffled epochs, and
        `patches_per_volume` patches of each.
        """
        images, labels = zip(*(self._patch(index, volume) for index, volume in self.patches(step)), strict=True)
        return torch.stack(images), torch.stack(labels)

    def patches(self, step: int) -> Iterator[tuple[int, Volume]]:
        """The index of each patch of a step, and the volume that it is cut from."""
        count = self.config.patches_per_volume
        for place in range(step * self.config.volumes_per_step, (step + 1) * self.config.volumes_per_step):
            epoch, index = divmod(place, len(self.volumes))
            order = generator(self.seed, _ORDER, epoch).permutation(len(self.volumes))
            for patch in range(place * count, (place + 1) * count):
                yield patch, self.volumes[order[index]]

    def _patch(self, index: int, volume: Volume) -> tuple[Tensor, Tensor]:
        random, size = generator(self.seed, _PATCH, index), self.config.patch_size
        image, label = (open_array(self.store, volume.key, name) for name in ("image", "label"))
        origin = crop_origin(self._centre(volume, image, label, random), volume.shape, size)
        seen = read_patch(image, origin, size).astype(np.float32) / np.float32(volume.levels)
        both = torch.from_numpy(seen.reshape(-1, *size)), torch.from_numpy(read_patch(label, origin, size)[None])
        return augment(*both, self.config.augmentation, self.config.preparation.spacing, random)

    def _centre(
        self, volume: Volume, image: Any, label: npt.NDArray[np.uint8], random: np.random.Generator
    ) -> tuple[int, ...]:
        """A voxel of an organ, or of the body outside all organs, as with MONAI's `RandCropByPosNegLabel`."""
        counts = [count for value, count in volume.label_voxels.items() if value != "0"]
        if counts and random.random() < self.config.foreground_prob:
            first, last = 0, sum(counts)
            if self.config.balance_organs:
                organ = int(random.integers(len(counts)))
                first, last = sum(counts[:organ]), sum(counts[: organ + 1])
            chosen = open_array(self.store, volume.key, "foreground")[random.integers(first, last)]
            return tuple(int(v) for v in np.unravel_index(chosen, volume.shape))
        for _ in range(_TRIES):  # rejection has the distribution of a draw from all such voxels, without a list of them
            voxel = tuple(int(v) for v in random.integers(0, volume.shape))
            if label[voxel] == 0 and np.any(image[(..., *voxel)] > np.array(volume.body)):
                break
        return voxel


def augment(
    image: Tensor, label: Tensor, config: Augmentation, spacing: Sequence[float], random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Flip (C, X, Y, Z), rotate by a multiple of 90° in the axial plane, and shift the intensity; then `vary`."""
    axes = [axis - 3 for axis in config.flip_axes if random.random() < config.flip_prob]
    turns = int(random.integers(1, 4)) if random.random() < config.rotate_prob else 0
    shift = random.uniform(-config.shift, config.shift) if random.random() < config.shift_prob else 0.0
    if image.shape[-3] != image.shape[-2] or spacing[0] != spacing[1]:
        turns = turns // 2 * 2  # a quarter turn would exchange unequal sides, of the patch or of its voxels
    image, label = (torch.rot90(torch.flip(volume, axes), turns, (-3, -2)) for volume in (image, label))
    image = image + shift
    return vary(image, label, spacing, int(random.integers(2**32))) if config.vary else (image, label)


def vary(
    image: Tensor,
    label: Tensor,
    spacing: Sequence[float],
    seed: int,
    odds: Sequence[float] = (0.2, 0.1, 0.2, 0.3),
) -> tuple[Tensor, Tensor]:
    """Rotate and scale image and label; then noise, blur, and another contrast, each by its `odds`; by MONAI.

    Odds, ranges and order are nnU-Net's (Isensee et al. 2021). What comes in from outside the patch is the patch,
    reflected at its faces. Voxel indices are rotated, which is a rotation in mm only where the sides of a voxel,
    `spacing` in mm, are equal. So thick slices are turned within their plane alone, as nnU-Net does, too: between them
    there is little to interpolate.
    """
    both, modes = ("image", "label"), ("bilinear", "nearest")
    planes = [[side for axis, side in enumerate(spacing) if axis != normal] for normal in range(3)]
    angles = [math.radians(30) if max(plane) <= _ALIKE * min(plane) else 0.0 for plane in planes]
    scales = ((1 / 1.4 - 1, 1 / 0.7 - 1),) * 3  # MONAI scales the grid that is sampled, by 1 + this
    affine, noise, blur, gamma = odds
    steps = mt.Compose(
        [
            mt.RandAffined(both, None, affine, angles, scale_range=scales, mode=modes),
            mt.RandGaussianNoised("image", noise, std=0.1),
            mt.RandGaussianSmoothd("image", *[(0.5, 1.0)] * 3, prob=blur),
            mt.RandAdjustContrastd("image", gamma, (0.7, 1.5)),
        ]
    ).set_random_state(seed)
    varied = steps({"image": image, "label": label.float()})
    return varied["image"].as_tensor(), varied["label"].as_tensor().to(label.dtype)
