"""Segments a whole volume with a network that sees patches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor, nn
from torch.nn.functional import pad

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
    missing = [max(side - size, 0) for side, size in zip(patch_size, image.shape[1:], strict=True)]
    before = [voxels // 2 for voxels in missing]
    sides = [n for low, both in zip(before[::-1], missing[::-1], strict=True) for n in (low, both - low)]
    padded = pad(image, sides) if any(sides) else image  # `pad` always copies
    size, own = padded.shape[1:], tuple(slice(n, n + side) for n, side in zip(before, image.shape[1:], strict=True))
    axis = max(range(3), key=lambda axis: size[axis])
    windows = sorted(sliding_windows(size, patch_size, overlap), key=lambda window: window[axis].start)
    weights = compute_importance_map(tuple(patch_size), weighting) if weighting != "constant" else None
    unit = torch.tensor(float(levels), device=device)  # by a number, CUDA would multiply with its rounded inverse
    slab = _Slab(size, axis, windows, image.device, weights, keep and _inside(own, keep))
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


def _inside(own: Window, keep: Callable[[Window, Tensor], None]) -> Callable[[Window, Tensor], None]:
    """`keep` for boxes of the padded volume: it gets what of them lies in the volume itself, at `own`."""

    def cropped(box: Window, means: Tensor) -> None:
        pairs = list(zip(box, own, strict=True))
        ends = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs]
        if all(first < last for first, last in ends):
            part = (slice(first - a.start, last - a.start) for (first, last), (a, _) in zip(ends, pairs, strict=True))
            place = (slice(first - b.start, last - b.start) for (first, last), (_, b) in zip(ends, pairs, strict=True))
            keep(tuple(place), means[:, *part])

    return cropped


def sliding_windows(size: Sequence[int], patch_size: Sequence[int], overlap: float) -> list[Window]:
    """MONAI's windows over a volume that is no smaller than the patch, in its order: the last axis varies fastest."""
    steps = [p if p == s else max(int(p * (1 - overlap)), 1) for p, s in zip(patch_size, size, strict=True)]
    found: list[Window] = dense_patch_slices(size, patch_size, steps)
    return found


class _Slab:
    """Sums of logits for the planes that windows still reach, and the labels of those before.

    It is as deep as a window, and plane n of the volume is kept at n % depth: a window covers every kept plane once.
    """

    def __init__(
        self,
        size: Sequence[int],
        axis: int,
        windows: Sequence[Window],
        device: torch.device,
        weights: Tensor | None,
        keep: Callable[[Window, Tensor], None] | None,
    ) -> None:
        self.axis, self.depth, self.done = axis, windows[0][axis].stop - windows[0][axis].start, 0
        self.weights, self.keep = None if weights is None else weights.to(device), keep
        self.labels = torch.zeros(size, dtype=torch.uint8, device=device)
        self.sums = torch.zeros(0)
        # How many windows cover a voxel is the product of how many distinct intervals cover it along each axis.
        self.counts = [torch.zeros(length, device=device) for length in size]
        for along, counts in enumerate(self.counts):
            for start, stop in {(window[along].start, window[along].stop) for window in windows}:
                counts[start:stop] += 1

    def add(self, window: Window, logits: Tensor) -> None:
        """Add the logits (classes, *patch_size) of a window; later windows do not begin before it along the axis."""
        start = window[self.axis].start
        self.finish(start)
        if self.weights is not None:  # their sums are kept beside those of the classes
            logits = torch.cat([logits * self.weights, self.weights[None]])
        if not len(self.sums):
            size = list(self.labels.shape)
            size[self.axis] = self.depth
            self.sums = torch.zeros(len(logits), *size, device=logits.device)
        for planes, kept in self._kept(start, start + self.depth):
            own = slice(planes.start - start, planes.stop - start)
            self.sums[:, *self._at(kept, window)] += logits[:, *self._at(own)]

    def finish(self, stop: int) -> None:
        """Label the planes before `stop`, which no later window reaches, and make their room free."""
        x, y, z = self.counts
        for planes, kept in self._kept(self.done, stop):
            sums, here = self.sums[:, *self._at(kept)], self._at(planes)
            # The division matters where it makes two sums equal, of which the first then wins, as in MONAI.
            if self.weights is None:
                means = sums.div_(x[here[0], None, None] * y[here[1], None] * z[here[2]])
            else:
                means = sums[:-1].div_(sums[-1:])
            # `max` takes a third of the time that `argmax` takes on a CPU.
            self.labels[here] = means.max(0).indices.to(torch.uint8)
            if self.keep:
                self.keep(self._at(planes, tuple(slice(0, side) for side in self.labels.shape)), means)
            sums.zero_()
        self.done = stop

    def _at(self, planes: slice, window: Window = (slice(None),) * 3) -> Window:
        """The window with other planes along the axis."""
        return (*window[: self.axis], planes, *window[self.axis + 1 :])

    def _kept(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Planes of the volume, at most `depth`, and where they are kept; in two parts where the end lies between."""
        cut = min((start // self.depth + 1) * self.depth, stop)
        for first, last in ((start, cut), (cut, stop)):
            if first < last:
                yield slice(first, last), slice(first % self.depth, first % self.depth + last - first)
