"""The corrupted view of every patch: boxes of noise, then small boxes whose voxels change places; on the device.

The noise of a voxel is a hash of the view's key and the voxel's place, so that it is the same on any device, with or
without the kernel, and whichever voxels are computed.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ssl_ray.config.schema import Corruption
from ssl_ray.pretrain.tasks.restoration.draws import Draws, draw
from ssl_ray.text import reason


def corrupt(patches: Tensor, draws: Draws) -> Tensor:
    """Corrupted view of every patch, on the patches' device; the input stays as it is.

    In-painting replaces the voxels inside the boxes, out-painting those outside all of them, by uniform noise between
    the patch's minimum and maximum. Where the sample has `shuffle`, the voxels inside each shuffle box are then
    permuted, one box after the other. On a GPU nothing waits for the device.

    Args:
        patches: (B, 1, X, Y, Z), float32.
        draws: of the same B samples and the same patch size, on any device.

    Returns:
        A new tensor of the patches' shape.
    """
    volumes = patches.squeeze(1).contiguous()
    draws = draws.to(patches.device)
    if volumes.is_cpu:
        views = _paint_boxes(volumes, draws)
    else:
        paint = (fused_paint() if volumes.is_cuda else None) or _paint_masks
        views = paint(volumes, draws)
    _shuffle_(views, draws)
    return views.unsqueeze(1)


def _paint_boxes(volumes: Tensor, draws: Draws) -> Tensor:
    """In- and out-painting box by box: on a CPU it is faster to make no mask, and only the noise that is used."""
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
    """The same views for all samples at once: noise everywhere and a mask, whose shapes do not depend on the draws."""
    inside = []
    for axis, side in enumerate(volumes.shape[1:]):
        voxel = torch.arange(side, device=volumes.device)
        inside.append((draws.start[..., axis, None] <= voxel) & (voxel < draws.stop[..., axis, None]))  # (B, K, side)
    # Boxes that hold the voxel; a matrix product keeps the K boxes out of the (B, X, Y, Z) arrays.
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
    used = side_x * side_y * _row(side_z)
    counters = used + torch.arange(voxels[0].numel(), device=views.device).view_as(voxels[0])
    order = _words(draws.key[:, None, None], counters).argsort(dim=2)
    sources = torch.where(draws.shuffle[:, None, None], voxels.gather(2, order), voxels)
    flat = views.view(batch, -1)
    for box in range(voxels.shape[1]):
        flat.scatter_(1, voxels[:, box], flat.gather(1, sources[:, box]))


@lru_cache(maxsize=1)
def fused_paint() -> Callable[[Tensor, Draws], Tensor] | None:
    """`_paint_masks` as one kernel, which reads and writes every voxel once; None where Triton cannot build it."""
    try:
        from ssl_ray.pretrain.tasks.restoration.kernel import paint

        volumes = torch.rand(2, 8, 8, 10, device="cuda")
        config = Corruption(inpaint_size=(2, 5), outpaint_size=(2, 5), shuffle_size=2)
        paint(volumes, draw(config, (8, 8, 10), 0, np.arange(2)).to(volumes.device))
    except Exception as error:  # no Triton, no compiler for its launcher, an architecture that it does not know
        logging.getLogger(__name__).warning("painting without a kernel of its own: %s", reason(error))
        return None
    return paint


def _noise(key: Tensor, counters: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Uniform noise from low to high in 2¹⁶ steps, four voxels a counter: (..., n) -> (..., 4 n), float32.

    CT windows have a few hundred levels, and every bit more would cost time.
    """
    steps = _words(key, counters).view(torch.uint16).float()
    return steps.mul_((high - low) * 2.0**-16).add_(low)


def _row(side: int) -> int:
    """Noise words that it takes to fill a row of `side` voxels along z."""
    return (side + 3) // 4


def _counters(start: Sequence[int], stop: Sequence[int], volumes: Tensor) -> Tensor:
    """Noise counters (x, y, words) of a box in (B, X, Y, Z) volumes; along z from the last multiple of 4 on."""
    _, _, side_y, side_z = volumes.shape
    ends = ((start[0], stop[0]), (start[1], stop[1]), (start[2] // 4, _row(stop[2])))
    x, y, z = (torch.arange(first, last, device=volumes.device) for first, last in ends)
    return (x[:, None, None] * side_y + y[:, None]) * _row(side_z) + z


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
