"""The corrupted view of every patch: boxes of noise, then small boxes whose voxels change places.

Where the boxes lie is drawn on the host, for (seed, sample, view) alone: a view is the same in any batch, on any worker
and after a resume. The device paints them. The noise of a voxel is a hash of the view's key and the voxel's place, not
the state of a generator, so that it is the same on any device, with or without the kernel.

One departure from MONAI: there (seen in 0.8.1, 1.0.1 and 1.6.1) a box's size is the lower bound of the next one's, so
that the sixth in-painting box has a mean side of 31.6 voxels. Here every side is uniform over the whole range, mean
18.5, as the tutorial's parameters say, unless `growing` asks for MONAI's way.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_ray.pretrain.tasks.restoration.settings import Corruption
from ssl_ray.random import words_of
from ssl_ray.text import reason


class Draws(NamedTuple):
    """All that is random about the views of B samples: K painted boxes and S shuffle boxes each, corners in voxels.

    table: (B, 3 + 6 K + 3 S) int64, the parts below as one tensor, which travels to the device as a whole.
    key: (B,) int64, any 64 bits; the noise is a hash of it.
    outpaint, shuffle: (B,) bool. False is in-painting, and leaves the shuffle boxes alone.
    start, stop: (B, K, 3); box k covers start <= voxel < stop, and an unused one covers nothing.
    shuffle_start: (B, S, 3), of boxes with sides of `shuffle_size`.
    """

    table: Tensor
    key: Tensor
    outpaint: Tensor
    shuffle: Tensor
    start: Tensor
    stop: Tensor
    shuffle_start: Tensor
    shuffle_size: int


def draw(config: Corruption, patch_size: Sequence[int], seed: int, indices: NDArray[np.int64], view: int = 0) -> Draws:
    """Draw, on the host, the corruption of the samples `indices` (B,), each from (seed, index, view) alone.

    A box's sides are uniform over the configured range, bounds included, and its corner over all positions where it
    fits. Two views of one sample are independent.
    """
    boxes = max(config.inpaint_boxes, config.outpaint_boxes)
    ends = 3 + np.cumsum([0, 3 * boxes, 3 * boxes, 3 * config.shuffle_boxes])
    words = words_of(seed, indices, view, int(ends[-1]))
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
    columns = [words[:, :1].view(np.int64), outpaint[:, None], uniform[:, 2:3] < config.shuffle_prob]
    columns += [corners.reshape(len(words), -1) for corners in (start, start + size, shuffle_start)]
    return draws_of(config, torch.from_numpy(np.hstack(columns, dtype=np.int64)))


def draws_of(config: Corruption, table: Tensor) -> Draws:
    """What `draw` put into this table, or into some of its rows, on whatever device it is now."""
    boxes = max(config.inpaint_boxes, config.outpaint_boxes)
    key, outpaint, shuffle = table[:, :3].unbind(1)
    start, stop, shuffle_start = table[:, 3:].unflatten(1, (-1, 3)).split([boxes, boxes, config.shuffle_boxes], 1)
    flags = outpaint != 0, shuffle != 0
    return Draws(table, key.contiguous(), *flags, start, stop, shuffle_start, config.shuffle_size)


def _below(limit: NDArray[np.int64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    return (limit * uniform).astype(np.int64)


def corrupt(patches: Tensor, draws: Draws) -> Tensor:
    """Corrupted view of every patch, on the patches' device; the input stays as it is.

    In-painting replaces the voxels inside the boxes, out-painting those outside all of them, by uniform noise between
    the patch's minimum and maximum. Then the voxels inside each shuffle box are permuted, one box after the other.

    `patches` are (B, C, X, Y, Z) float32, `draws` those of the same samples and patch size, on the same device. All
    channels have the same boxes, and noise of their own. On a GPU nothing waits for the device.
    """
    channels, volumes = patches.shape[1], patches.flatten(0, 1).contiguous()
    if channels > 1:
        wide = {name: getattr(draws, name).repeat_interleave(channels, 0) for name in Draws._fields[:-1]}
        offsets = torch.arange(channels, device=patches.device) * _signed(0xD1B54A32D192ED03)  # any odd number
        draws = draws._replace(**wide | {"key": wide["key"] + offsets.repeat(len(patches))})
    if volumes.is_cuda and (paint := fused_paint()):
        views = paint(volumes, draws.key, draws.outpaint, draws.start, draws.stop)
    else:
        views = (_paint_boxes if volumes.is_cpu else _paint_masks)(volumes, draws)
    _shuffle_(views, draws)
    return views.view_as(patches)


def _paint_boxes(volumes: Tensor, draws: Draws) -> Tensor:
    """In- and out-painting box by box: on a CPU the least work, but a GPU would have its host wait for every box."""
    views = torch.empty_like(volumes)
    everywhere = _counters((0, 0, 0), volumes.shape[1:], volumes)
    corners = torch.stack([draws.start, draws.stop], dim=2).tolist()
    samples = zip(volumes, views, draws.key, draws.outpaint.tolist(), corners, strict=True)
    for volume, view, key, outpaint, placed in samples:
        low, high = volume.aminmax()
        boxes = [(start, stop) for start, stop in placed if start[0] < stop[0]]
        if outpaint:
            view.copy_(_noise(key, everywhere, low, high)[..., : volume.shape[2]])
            for start, stop in boxes:
                box = tuple(map(slice, start, stop))
                view[box] = volume[box]
        else:
            view.copy_(volume)
            for start, stop in boxes:
                noise = _noise(key, _counters(start, stop, volumes), low, high)
                view[tuple(map(slice, start, stop))] = noise[..., start[2] % 4 :][..., : stop[2] - start[2]]
    return views


def _paint_masks(volumes: Tensor, draws: Draws) -> Tensor:
    """The same for all samples at once, for a GPU without the kernel: no shape depends on the draws, nothing waits."""
    inside = []
    for axis, side in enumerate(volumes.shape[1:]):
        voxel = torch.arange(side, device=volumes.device)
        inside.append((draws.start[..., axis, None] <= voxel) & (voxel < draws.stop[..., axis, None]))  # (B, K, side)
    # How many boxes hold a voxel: a matrix product keeps the K boxes out of the (B, X, Y, Z) arrays.
    boxes = torch.einsum("bkx,bky,bkz->bxyz", *(axis.float() for axis in inside))
    low, high = (bound[:, None, None, None] for bound in volumes.flatten(1).aminmax(dim=1))
    everywhere = _counters((0, 0, 0), volumes.shape[1:], volumes)
    noise = _noise(draws.key[:, None, None, None], everywhere, low, high)[..., : volumes.shape[3]]
    return torch.where((boxes > 0) ^ draws.outpaint[:, None, None, None], noise, volumes)


def _shuffle_(views: Tensor, draws: Draws) -> None:
    """Permute the voxels inside the shuffle boxes of (B, X, Y, Z) views, in place."""
    batch, side_x, side_y, side_z = views.shape
    cell = torch.arange(draws.shuffle_size, device=views.device)
    grid = ((cell[:, None, None] * side_y + cell[:, None]) * side_z + cell).flatten()
    x, y, z = draws.shuffle_start.unbind(2)
    voxels = ((x * side_y + y) * side_z + z)[..., None] + grid  # (B, S, cells), in the flat volume

    # Counters that the painting has not used. SplitMix64 gives no word twice to one key: the order has no ties.
    used = side_x * side_y * -(-side_z // 4)
    counters = used + torch.arange(voxels[0].numel(), device=views.device).view_as(voxels[0])
    order = _words(draws.key[:, None, None], counters).argsort(dim=2)
    sources = torch.where(draws.shuffle[:, None, None], voxels.gather(2, order), voxels)
    flat = views.view(batch, -1)
    for box in range(voxels.shape[1]):
        flat.scatter_(1, voxels[:, box], flat.gather(1, sources[:, box]))


@lru_cache(maxsize=1)
def fused_paint() -> Callable[..., Tensor] | None:
    """`_paint_masks` as one kernel, which reads and writes every voxel once; None where Triton cannot build it."""
    try:
        from ssl_ray.pretrain.tasks.restoration.kernel import paint

        some = torch.ones(1, 1, 3, dtype=torch.int64, device="cuda")
        paint(torch.rand(1, 8, 8, 10, device="cuda"), some[0, 0, :1], some[0, 0, :1] > 0, some, some)
    except Exception as error:  # no Triton, no compiler for its launcher, an architecture that it does not know
        logging.getLogger(__name__).warning("painting without a kernel of its own, more slowly: %s", reason(error))
        return None
    return paint


def _noise(key: Tensor, counters: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Uniform noise from low to high in 2¹⁶ steps, four voxels a counter: (..., n) -> (..., 4 n), float32.

    CT windows have a few hundred levels, and every bit more would cost time.
    """
    steps = _words(key, counters).view(torch.uint16).float()
    return steps.mul_((high - low) * 2.0**-16).add_(low)


def _counters(start: Sequence[int], stop: Sequence[int], volumes: Tensor) -> Tensor:
    """Noise counters (x, y, words) of a box in (B, X, Y, Z) volumes; along z from the last multiple of 4 on."""
    _, _, side_y, side_z = volumes.shape
    ends = ((start[0], stop[0]), (start[1], stop[1]), (start[2] // 4, -(-stop[2] // 4)))
    x, y, z = (torch.arange(first, last, device=volumes.device) for first, last in ends)
    return (x[:, None, None] * side_y + y[:, None]) * -(-side_z // 4) + z


def _words(key: Tensor, counters: Tensor) -> Tensor:
    """Output number `counters` of SplitMix64 seeded with `key`, int64.

    Steele et al. 2014, "Fast splittable pseudorandom number generators", doi:10.1145/2660193.2660195.
    """
    word = (counters + 1).mul_(_signed(0x9E3779B97F4A7C15)) + key
    _xor_shift_(word, 30).mul_(_signed(0xBF58476D1CE4E5B9))
    _xor_shift_(word, 27).mul_(_signed(0x94D049BB133111EB))
    return _xor_shift_(word, 31)


def _xor_shift_(word: Tensor, shift: int) -> Tensor:
    # `>>` of int64 copies the sign bit, which the mask takes off again.
    return word.bitwise_xor_((word >> shift).bitwise_and_(2 ** (64 - shift) - 1))


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
