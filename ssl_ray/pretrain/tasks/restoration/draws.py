"""Where the boxes of a corrupted view lie: drawn on the host, for (seed, sample, view) alone.

A view is therefore the same in any batch, on any worker and after a resume. The noise in the boxes is not drawn here:
it is a hash of the view's key and the voxel (`corruption`), never the state of a generator.

One departure from MONAI: there (seen in 0.8.1, 1.0.1 and 1.6.1) a box's size is the lower bound of the next one's, so
that the sixth in-painting box has a mean side of 31.6 voxels. Here every side is uniform over the whole range, mean
18.5, as the tutorial's parameters say, unless `growing` asks for MONAI's way.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_ray.config.schema import Corruption


@dataclass(frozen=True)
class Draws:
    """Everything random about the views of B samples.

    key: (B,) int64, any 64 bits; the noise is a hash of it.
    outpaint: (B,) bool, False is in-painting.
    start, stop: (B, K, 3) int64, voxels; box k covers start <= voxel < stop, and an unused one covers nothing.
    shuffle: (B,) bool, False leaves the shuffle boxes alone.
    shuffle_start: (B, S, 3) int64, voxels.
    shuffle_size: side of every shuffle box in voxels.
    """

    key: Tensor
    outpaint: Tensor
    start: Tensor
    stop: Tensor
    shuffle: Tensor
    shuffle_start: Tensor
    shuffle_size: int

    def tensors(self) -> list[Tensor]:
        """Everything but the size of the shuffle boxes."""
        return [self.key, self.outpaint, self.start, self.stop, self.shuffle, self.shuffle_start]

    def take(self, rows: slice) -> "Draws":
        """The draws of some of the samples."""
        return self.with_tensors(values[rows] for values in self.tensors())

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Draws":
        """Other draws, with shuffle boxes of the same size."""
        key, outpaint, start, stop, shuffle, shuffle_start = tensors
        return Draws(key, outpaint, start, stop, shuffle, shuffle_start, self.shuffle_size)

    def to(self, device: torch.device) -> "Draws":
        """The draws on a device: all in one copy from pinned memory, for which the host does not wait."""
        if device == self.key.device:
            return self
        flat = pack(self)
        flat = flat.pin_memory() if device.type == "cuda" else flat
        return unpack(flat.to(device, non_blocking=True), self)


def draw(
    config: Corruption, patch_size: tuple[int, int, int], seed: int, indices: NDArray[np.int64], view: int = 0
) -> Draws:
    """Draw, on the host, the corruption of the samples `indices` (B,), each from (seed, index, view) alone.

    A box's sides are uniform over the configured range, bounds included, and its corner over all positions where it
    fits. Two views of one sample are independent.
    """
    boxes = max(config.inpaint_boxes, config.outpaint_boxes)
    ends = 3 + np.cumsum([0, 3 * boxes, 3 * boxes, 3 * config.shuffle_boxes])
    words = np.empty((len(indices), ends[-1]), np.uint64)
    for row, index in zip(words, indices, strict=True):
        row[:] = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(int(index), view))).random_raw(len(row))
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
    sides, corners, shuffle_corners = (
        uniform[:, first:last].reshape(len(words), -1, 3) for first, last in pairwise(ends)
    )

    outpaint = uniform[:, 1] < config.outpaint_prob
    low, high = np.where(outpaint[:, None], config.outpaint_size, config.inpaint_size).T[..., None, None]
    used = np.arange(boxes) < np.where(outpaint, config.outpaint_boxes, config.inpaint_boxes)[:, None]
    size = low + _below(high - low + 1, sides)
    if config.growing:  # MONAI: the previous box's side is the lower bound
        for box in range(1, boxes):
            size[:, box] = size[:, box - 1] + _below(high[:, 0] - size[:, box - 1] + 1, sides[:, box])
    size = np.where(used[..., None], size, 0)
    start = _below(np.array(patch_size) - size + 1, corners)
    shuffle_start = _below(np.array(patch_size) - config.shuffle_size + 1, shuffle_corners)
    return Draws(
        key=torch.from_numpy(words[:, 0].view(np.int64)),
        outpaint=torch.from_numpy(outpaint),
        start=torch.from_numpy(start),
        stop=torch.from_numpy(start + size),
        shuffle=torch.from_numpy(uniform[:, 2] < config.shuffle_prob),
        shuffle_start=torch.from_numpy(shuffle_start),
        shuffle_size=config.shuffle_size,
    )


def pack(draws: Draws) -> Tensor:
    """All numbers of draws on the host in one int64 tensor; numpy takes a fifth of torch's time for it."""
    return torch.from_numpy(np.concatenate([values.numpy().ravel() for values in draws.tensors()], dtype=np.int64))


def unpack(flat: Tensor, like: Draws) -> Draws:
    """The draws in a tensor of `pack`, on that tensor's device; shapes and types are those of `like`."""
    parts = flat.split([values.numel() for values in like.tensors()])
    pairs = zip(parts, like.tensors(), strict=True)
    return like.with_tensors(part.view(values.shape).to(values.dtype) for part, values in pairs)


def _below(limit: NDArray[np.int64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    return (limit * uniform).astype(np.int64)
