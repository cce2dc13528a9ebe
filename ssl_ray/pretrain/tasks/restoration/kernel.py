"""In- and out-painting as one Triton kernel; bit for bit the views that `corruption` paints in torch."""

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

_BLOCK = 1024
"""Voxels that one program of the kernel paints."""


def paint(volumes: Tensor, key: Tensor, outpaint: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """A painted copy of (B, X, Y, Z) float32 volumes on a GPU; the rest is from `Draws`, on the same GPU."""
    volumes = volumes.contiguous()
    views = torch.empty_like(volumes)
    low, high = volumes.flatten(1).aminmax(dim=1)
    batch, *sides = volumes.shape
    grid = (triton.cdiv(volumes[0].numel(), _BLOCK), batch)
    # No fused multiply-add: the CPU rounds twice, and the noise must be the same.
    _paint[grid](
        *(volumes, views, key, outpaint, start.contiguous(), stop.contiguous(), low, high, *sides),
        boxes=start.shape[1],
        block=_BLOCK,
        enable_fp_fusion=False,
    )
    return views


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _paint(  # type: ignore[no-untyped-def]
    volumes,
    views,
    keys,
    outpaint,
    start,
    stop,
    low,
    high,
    side_x,
    side_y,
    side_z,
    boxes: tl.constexpr,
    block: tl.constexpr,
):
    sample = tl.program_id(1)
    voxel = tl.program_id(0) * block + tl.arange(0, block)
    count = side_x * side_y * side_z
    z = voxel % side_z
    column = voxel // side_z
    y = column % side_y
    x = column // side_y

    painted = tl.full((block,), 0, tl.int32) + tl.load(outpaint + sample).to(tl.int32)
    inside = tl.full((block,), 0, tl.int32)
    for box in tl.static_range(boxes):
        corner = (sample * boxes + box) * 3
        in_x = (x >= tl.load(start + corner)) & (x < tl.load(stop + corner))
        in_y = (y >= tl.load(start + corner + 1)) & (y < tl.load(stop + corner + 1))
        in_z = (z >= tl.load(start + corner + 2)) & (z < tl.load(stop + corner + 2))
        inside = inside | (in_x & in_y & in_z).to(tl.int32)

    # SplitMix64; a word is the noise of four voxels along z.
    counter = (column * ((side_z + 3) // 4) + z // 4 + 1).to(tl.uint64)
    word = counter * 0x9E3779B97F4A7C15 + tl.load(keys + sample).to(tl.uint64, bitcast=True)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = word ^ (word >> 31)
    steps = ((word >> (z % 4 * 16).to(tl.uint64)) & 0xFFFF).to(tl.int32).to(tl.float32)
    least = tl.load(low + sample)
    noise = steps * ((tl.load(high + sample) - least) * 1.52587890625e-05) + least

    at = sample.to(tl.int64) * count + voxel
    inner = voxel < count
    value = tl.load(volumes + at, mask=inner)
    tl.store(views + at, tl.where((inside ^ painted) != 0, noise, value), mask=inner)
