"""The self-supervised tasks: a corrupted view of every patch, which the network learns to restore.

In- or out-painting (Pathak et al. 2016, arXiv:1604.07379), then the shuffling of small boxes (Chen et al. 2019,
doi:10.1016/j.media.2019.101539), with the numbers and the order of MONAI's self-supervised tutorial
(Project-MONAI/tutorials, `self_supervised_pretraining/vit_unetr_ssl`) and the meaning of MONAI's `RandCoarseDropout`
and `RandCoarseShuffle`. One departure: in MONAI (seen in 0.8.1, 1.0.1 and 1.6.1) a box's size is the lower bound of
the next one's, so that the sixth in-painting box has a mean side of 31.6 voxels. Here every side is uniform over the
whole range, mean 18.5, as the tutorial's parameters say, unless `growing` asks for MONAI's way.

Every random number is a function of (seed, sample, view) alone, so that a view is the same in any batch, on any worker
and after a resume. The bulk noise is therefore a hash of a key and a counter, never the state of a generator.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ssl_ray.config.schema import Corruption
from ssl_ray.text import reason


@dataclass(frozen=True)
class Draws:
    """Everything random about the views of B samples, on the host; the noise follows from the key.

    key: (B,) int64, any 64 bits.
    outpaint: (B,) bool, False is in-painting.
    start, stop: (B, K, 3) int64, voxels; box k covers start <= voxel < stop, and an unused one covers nothing.
    shuffle: (B,) bool, False leaves the shuffle boxes alone.
    shuffle_start: (B, S, 3) int64, voxels.
    shuffle_size: side of every shuffle box in voxels.
    """

    key: NDArray[np.int64]
    outpaint: NDArray[np.bool_]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    shuffle: NDArray[np.bool_]
    shuffle_start: NDArray[np.int64]
    shuffle_size: int


def draw(
    config: Corruption, patch_size: tuple[int, int, int], seed: int, indices: NDArray[np.int64], view: int = 0
) -> Draws:
    """Draw the corruption of the samples `indices` (B,), each from (seed, index, view) alone.

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
    return Draws(
        key=words[:, 0].view(np.int64),
        outpaint=outpaint,
        start=start,
        stop=start + size,
        shuffle=uniform[:, 2] < config.shuffle_prob,
        shuffle_start=_below(np.array(patch_size) - config.shuffle_size + 1, shuffle_corners),
        shuffle_size=config.shuffle_size,
    )


def corrupt(patches: Tensor, draws: "Draws | DeviceDraws") -> Tensor:
    """Corrupted view of every patch, on the patches' device; the input stays as it is.

    In-painting replaces the voxels inside the boxes, out-painting those outside all of them, by uniform noise between
    the patch's minimum and maximum. Where the sample has `shuffle`, the voxels inside each shuffle box are then
    permuted, one box after the other. On a GPU nothing waits for the device.

    Args:
        patches: (B, 1, X, Y, Z), float32.
        draws: of the same B samples and the same patch size; on a GPU they may lie there already.

    Returns:
        A new tensor of the patches' shape.
    """
    volumes = patches.squeeze(1).contiguous()
    there = upload(draws, patches.device) if isinstance(draws, Draws) else draws
    if volumes.is_cuda and (paint := fused_paint()):
        views = paint(volumes, there)
    else:
        boxes = volumes.is_cpu and isinstance(draws, Draws)
        views = _paint_boxes(volumes, draws) if boxes else _paint_masks(volumes, there)  # type: ignore[arg-type]
    _shuffle_(views, there)
    return views.unsqueeze(1)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, arXiv:2002.05709) between the restorations of two views, both (B, D).

    The same number as MONAI's `ContrastiveLoss`, which broadcasts to (2 B, 2 B, D): on flattened 96³ restorations that
    is 0.9 GB an intermediate result at B = 8, and 58 GB at B = 64. Negatives come from this batch only, also in a group
    of workers, as in the published script.
    """
    with torch.autocast(first.device.type, enabled=False):  # bfloat16 rounds a cosine by up to 0.002, a logit by 0.04
        units = functional.normalize(torch.cat([first, second]).float(), dim=1)  # (2 B, D)
        logits = (units @ units.T / temperature).fill_diagonal_(-torch.inf)
        partner = torch.arange(len(logits), device=logits.device).roll(len(first))
        return functional.cross_entropy(logits, partner)


def _paint_boxes(volumes: Tensor, draws: Draws) -> Tensor:
    """In- and out-painting box by box: on a CPU it pays to make no mask, and no noise that is not used."""
    views = torch.empty_like(volumes)
    everywhere = _counters((0, 0, 0), volumes.shape[1:], volumes)
    keys = torch.tensor(draws.key)
    for sample, (volume, view, key) in enumerate(zip(volumes, views, keys, strict=True)):
        low, high = volume.aminmax()
        corners = np.stack([draws.start[sample], draws.stop[sample]], axis=1)
        boxes = corners[corners[:, 0, 0] < corners[:, 1, 0]].tolist()
        if draws.outpaint[sample]:
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


def _paint_masks(volumes: Tensor, draws: "DeviceDraws") -> Tensor:
    """The same for all samples at once: noise everywhere and a mask, whose shapes do not depend on the draws."""
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


def _shuffle_(views: Tensor, draws: "DeviceDraws") -> None:
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


@dataclass(frozen=True)
class DeviceDraws:
    """`Draws` as tensors on the patches' device; fields and shapes are the same."""

    key: Tensor
    outpaint: Tensor
    start: Tensor
    stop: Tensor
    shuffle: Tensor
    shuffle_start: Tensor
    shuffle_size: int


def take(draws: Draws | DeviceDraws, rows: slice) -> Draws | DeviceDraws:
    """The draws of some of the samples."""
    names = [field.name for field in fields(draws) if field.name != "shuffle_size"]
    return replace(draws, **{name: getattr(draws, name)[rows] for name in names})


def pack(draws: Draws) -> Tensor:
    """All numbers in one int64 tensor on the host: for one copy to the device."""
    return torch.from_numpy(np.concatenate([array.ravel() for array in _arrays(draws)], dtype=np.int64))


def unpack(flat: Tensor, like: Draws) -> DeviceDraws:
    """What `pack` has packed, on the tensor's device; the shapes are those of `like`."""
    arrays = _arrays(like)
    parts = flat.split([array.size for array in arrays])
    key, outpaint, start, stop, shuffle, shuffle_start = (
        part.view(array.shape) for part, array in zip(parts, arrays, strict=True)
    )
    return DeviceDraws(key, outpaint.bool(), start, stop, shuffle.bool(), shuffle_start, like.shuffle_size)


def upload(draws: Draws, device: torch.device) -> DeviceDraws:
    """Everything in one copy, which from pinned memory no GPU has to be waited for."""
    flat = pack(draws)
    flat = flat.pin_memory() if device.type == "cuda" else flat
    return unpack(flat.to(device, non_blocking=True), draws)


def _arrays(draws: Draws) -> list[NDArray[np.int64] | NDArray[np.bool_]]:
    return [draws.key, draws.outpaint, draws.start, draws.stop, draws.shuffle, draws.shuffle_start]


@lru_cache(maxsize=1)
def fused_paint() -> "Callable[[Tensor, DeviceDraws], Tensor] | None":
    """`_paint_masks` as one kernel, which reads and writes every voxel once; None where Triton cannot build it."""
    try:
        from ssl_ray.pretrain.gpu.paint import paint

        volumes = torch.rand(2, 8, 8, 10, device="cuda")
        config = Corruption(inpaint_size=(2, 5), outpaint_size=(2, 5), shuffle_size=2)
        draws = upload(draw(config, (8, 8, 10), 0, np.arange(2)), volumes.device)
        paint(volumes, draws)
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


def _below(limit: NDArray[np.int64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    return (limit * uniform).astype(np.int64)
