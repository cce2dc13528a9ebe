"""Segments a whole volume with a network that sees patches."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor, nn

from ssl_ray.training.precision import autocast

Window = tuple[slice, ...]
"""A box of voxels, one slice an axis."""
Weighting = Literal["constant", "gaussian"]
"""Of the voxels of a window where several overlap: all alike, or, as MONAI has it, those in its middle most."""


def predict(
    model: nn.Module,
    image: Tensor,
    patch_size: Sequence[int],
    *,
    sliding_window_batch: int,
    overlap: float,
    dtype: torch.dtype = torch.float32,
    levels: int = 1,
    weighting: Weighting = "constant",
    keep: Callable[[Window, Tensor], None] | None = None,
) -> Tensor:
    """Segment one volume as MONAI's `sliding_window_inference` and argmax do, without its sums over the whole volume.

    The windows are MONAI's. The mean of the logits of overlapping ones decides, and of equal classes the first. The
    model computes `sliding_window_batch` windows at a time on its own device, in eval mode, and is left in the mode it
    came in, unless it raises. Sums are kept on the image's device, and only one patch deep along the longest axis:
    about 4 * classes bytes for each voxel of that slab, however long the volume is. Of the image only windows are ever
    in float32.

    Where the longest axis is the first, the sums are MONAI's to the bit; else the same logits are added in another
    order, which can matter only to voxels whose two best classes are equal up to rounding.

    Args:
        model: (B, C, *patch_size) float32 -> (B, classes, *patch_size) logits, for at most 256 classes.
        image: (C, X, Y, Z), `levels` where the model sees 1; in the middle of zeros where it is smaller than the patch.
        overlap: of neighbouring windows, as a share of the patch side, 0 <= overlap < 1.
        keep: is given the mean logits (classes, x, y, z) of every box of the volume once; they are overwritten later.

    Returns:
        (X, Y, Z) uint8 on the image's device.
    """
    device, training = next(model.parameters()).device, model.training
    padded, own = centred(image, [max(sides) for sides in zip(patch_size, image.shape[1:], strict=True)])
    size = padded.shape[1:]
    axis = max(range(3), key=lambda axis: size[axis])
    windows = sorted(sliding_windows(size, patch_size, overlap), key=lambda window: window[axis].start)
    unit = torch.tensor(float(levels), device=device)  # by a number, CUDA would multiply with its rounded inverse

    def kept(planes: slice, means: Tensor) -> None:
        if keep:
            box = [slice(0, side) for side in image.shape[1:]]
            box[axis] = slice(planes.start, min(planes.stop, box[axis].stop))
            # `own` is less than these planes only where the volume is less than a window: then they are all there are.
            keep(tuple(box), means.movedim(1, axis + 1)[:, *own])

    slab = _Slab(size, axis, compute_importance_map(tuple(patch_size), weighting).to(image.device), kept)
    model.eval()
    with torch.inference_mode(), autocast(device, dtype):
        for first in range(0, len(windows), sliding_window_batch):
            some = windows[first : first + sliding_window_batch]
            seen = torch.stack([padded[:, *window] for window in some]).to(device).float()
            logits = model(seen.div_(unit))
            for window, one in zip(some, logits.to(image.device), strict=True):
                slab.add(window, one)
        slab.finish(size[axis])
    model.train(training)
    return slab.labels[own]


def centred(image: Tensor, size: Sequence[int]) -> tuple[Tensor, Window]:
    """An image (C, X, Y, Z) in the middle of zeros (C, *size), and its box there; itself where it has this size."""
    before = [(side - length) // 2 for side, length in zip(size, image.shape[1:], strict=True)]
    own = tuple(slice(first, first + length) for first, length in zip(before, image.shape[1:], strict=True))
    if image.shape[1:] == tuple(size):
        return image, own
    padded = image.new_zeros(len(image), *size)
    padded[:, *own] = image
    return padded, own


def sliding_windows(size: Sequence[int], patch_size: Sequence[int], overlap: float) -> list[Window]:
    """MONAI's windows over a volume that is no smaller than the patch, in its order: the last axis varies fastest."""
    steps = [p if p == s else max(int(p * (1 - overlap)), 1) for p, s in zip(patch_size, size, strict=True)]
    found: list[Window] = dense_patch_slices(size, patch_size, steps)
    return found


class _Slab:
    """Sums of weighted logits for the planes that windows still reach, and the labels of those before.

    It is as deep as a window and begins at plane `done` of the volume, as the window does that is added.
    `keep` is given planes along the axis and the mean logits there, (classes, planes, the other two axes).
    """

    def __init__(self, size: Sequence[int], axis: int, weights: Tensor, keep: Callable[[slice, Tensor], None]) -> None:
        self.axis, self.done, self.keep = axis, 0, keep
        self.weights, self.sums = self._front(weights), torch.zeros(0)
        self.labels = torch.zeros(size, dtype=torch.uint8, device=weights.device)

    def add(self, window: Window, logits: Tensor) -> None:
        """Add the logits (classes, *patch_size) of a window; later windows do not begin before it along the axis."""
        beside = window[: self.axis] + window[self.axis + 1 :]
        self.finish(window[self.axis].start)
        if not len(self.sums):  # the sums of the weights are kept behind those of the classes
            size = list(self.labels.shape)
            size[self.axis] = len(self.weights)
            self.sums = self._front(torch.zeros(len(logits) + 1, *size, device=logits.device))
        self.sums[:-1, :, *beside] += self._front(logits) * self.weights
        self.sums[-1][:, *beside] += self.weights

    def finish(self, stop: int) -> None:
        """Label the planes before `stop`, which no later window reaches, and move the others into their room."""
        if not (count := stop - self.done):
            return
        # The division matters where it makes two sums equal, of which the first then wins, as in MONAI.
        means = self.sums[:-1, :count].div_(self.sums[-1:, :count])
        # `max` takes a third of the time that `argmax` takes on a CPU.
        self._front(self.labels)[self.done : stop] = means.max(0).indices
        self.keep(slice(self.done, stop), means)
        for sums in self.sums:  # one after the other, as a copy of all of them would be as large as the slab
            sums[:-count] = sums[count:].clone()
            sums[-count:] = 0
        self.done = stop

    def _front(self, volume: Tensor) -> Tensor:
        """The volume, the last three axes, with the axis of the planes as its first."""
        return volume.movedim(self.axis - 3, -3)
