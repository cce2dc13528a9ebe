"""Segments prepared volumes with one model or several, as they were scored or in another manner."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl_ray.data.normalise import VERSION
from ssl_ray.errors import UserError
from ssl_ray.evaluate.scores import sided
from ssl_ray.evaluate.sliding_window import Weighting, Window, predict
from ssl_ray.networks.faster import place
from ssl_ray.networks.model_file import Metadata
from ssl_ray.predict.model import Model
from ssl_ray.text import shown
from ssl_ray.training.precision import autocast, resolve


@dataclass(frozen=True)
class Manner:
    """How whole volumes are segmented: sliding windows, and the axes along which they are also seen mirrored."""

    overlap: float
    weighting: Weighting
    batch: int
    flips: tuple[int, ...] = ()


def manner_of(
    told: Metadata, gaussian: bool = False, overlap: float | None = None, mirrored: bool = False
) -> tuple[Manner, list[str]]:
    """How to segment with a model, and in what this differs from how it was scored, in words.

    Raises:
        UserError: where no axis may be mirrored.
    """
    scored = told.inference
    weighting: Weighting = "gaussian" if gaussian else scored.weighting
    chosen = Manner(scored.overlap if overlap is None else overlap, weighting, scored.batch)
    notes = []
    if told.preparation_version != VERSION:
        notes.append(f"prepared by version {VERSION} of the preparation, scored by {told.preparation_version}")
    if chosen.weighting != scored.weighting:
        notes.append(f"windows are weighted {chosen.weighting}, scored {scored.weighting}")
    if chosen.overlap != scored.overlap:
        notes.append(f"windows overlap by {chosen.overlap:g}, scored by {scored.overlap:g}")
    if not mirrored:
        return chosen, notes
    if not told.flip_axes:
        raise UserError("--tta: the model was not trained on mirrored patches, so that it would see them wrongly")
    apart = sided(told.organs)
    # Axis 0 runs from left to right or back, unless the scans were left in whatever orientation they had.
    flips = tuple(axis for axis in told.flip_axes if not apart or (told.preparation.orientation and axis))
    why = f"left and right are different labels ({shown(apart[0], 60)})" if apart else ""
    if not flips:
        raise UserError(f"--tta: {why}, and along no other axis was the model trained on mirrored patches")
    kept_out = f", not along x, as {why}" if len(flips) < len(told.flip_axes) else ""
    axes = " and ".join("xyz"[axis] for axis in flips)
    notes.append(f"the mean of {2 ** len(flips)} views, mirrored along {axes}{kept_out}; scored by one")
    return replace(chosen, flips=flips), notes


def check_agree(models: Sequence[Model]) -> None:
    """A UserError, naming both, where models of an ensemble do not see the same or do not say the same."""
    first, *others = models
    for other in others:
        for key in ("organs", "preparation", "preparation_version", "patch_size"):
            ours, theirs = (getattr(model.metadata, key) for model in (first, other))
            if ours != theirs:
                raise UserError(
                    f"{first.path} and {other.path}: models of an ensemble must agree in {key}, "
                    f"got {shown(ours)} and {shown(theirs)}"
                )


def numbers_of(names: Sequence[str], organs: Sequence[str]) -> tuple[int, ...]:
    """The classes of organs; a UserError for a name that is none, with those that are."""
    for name in names:
        if name not in organs:
            has = shown(", ".join(organs), 1000)
            raise UserError(f"--keep-largest: {shown(name)} is no organ of this model, which has {has}")
    return tuple(sorted({organs.index(name) + 1 for name in names}))


class Segmenter:
    """One model or an ensemble on a device, ready for any number of volumes.

    Several models, or views, are one network whose outputs are the mean of their probabilities in each window.
    """

    def __init__(self, models: Sequence[Model], manner: Manner, device: torch.device) -> None:
        self.metadata, self.manner, self.device = models[0].metadata, manner, device
        networks = [model.network for model in models]
        dtypes = [_dtype(model.metadata, device) for model in models]
        for network in networks:
            place(network, device)
        self.averages = len(models) > 1 or bool(manner.flips)
        self.network = _Ensemble(networks, dtypes, manner.flips, device) if self.averages else networks[0]
        self.dtype = torch.float32 if self.averages else dtypes[0]
        self.one = Lock()  # a server's threads share the device

    def __call__(
        self, image: NDArray[Any], levels: int, keep: Callable[[Window, NDArray[np.float16]], None] | None = None
    ) -> NDArray[np.uint8]:
        """Labels (X, Y, Z) of a prepared image, (X, Y, Z) or (C, X, Y, Z), that holds `levels` where a network sees 1.

        `keep` is given the probabilities (classes, x, y, z) of every box of the volume once.
        """

        def kept(box: Window, means: Tensor) -> None:
            assert keep
            keep(box, (means if self.averages else means.softmax(0)).half().cpu().numpy())

        with self.one:
            labels = predict(
                self.network,
                torch.from_numpy(image).reshape(-1, *image.shape[-3:]).to(self.device),
                self.metadata.patch_size,
                sliding_window_batch=self.manner.batch,
                overlap=self.manner.overlap,
                dtype=self.dtype,
                levels=levels,
                weighting=self.manner.weighting,
                keep=kept if keep else None,
            )
            return labels.cpu().numpy()


class _Ensemble(nn.Module):
    """Windows (B, C, X, Y, Z) -> probabilities (B, classes, X, Y, Z), the mean over networks and mirrored views."""

    def __init__(
        self, networks: Sequence[nn.Module], dtypes: Sequence[torch.dtype], flips: Sequence[int], device: torch.device
    ) -> None:
        super().__init__()
        self.networks, self.dtypes, self.device = nn.ModuleList(networks), dtypes, device
        axes = [axis - 3 for axis in flips]
        self.views = list(chain.from_iterable(combinations(axes, count) for count in range(len(axes) + 1)))

    def forward(self, windows: Tensor) -> Tensor:
        total = torch.zeros((), device=self.device)
        for network, dtype in zip(self.networks, self.dtypes, strict=True):
            for axes in self.views:
                with autocast(self.device, dtype):
                    logits = network(windows.flip(axes)).flip(axes)
                total = total + logits.float().softmax(1)
        return total / (len(self.networks) * len(self.views))


def _dtype(told: Metadata, device: torch.device) -> torch.dtype:
    """What a model was scored in, where the device multiplies in it itself: else float32, of which no bit is worse."""
    return torch.float32 if told.inference.precision == "float32" else resolve("auto", device)
