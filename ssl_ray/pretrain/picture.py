"""The picture of one patch: of a validation, or before a study begins."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Seen as radiologists do: the patient's right on the left, anterior and superior up; with their axes across and up.
_PLANES = {
    "axial": (lambda patch, x, y, z: patch[::-1, :, z], 0, 1),
    "coronal": (lambda patch, x, y, z: patch[::-1, y, :], 0, 2),
    "sagittal": (lambda patch, x, y, z: patch[x, :, :], 1, 2),
}


def draw_picture(
    path: Path,
    rows: Mapping[str, npt.NDArray[Any]],
    title: str,
    spacing: Sequence[float],
    labels: npt.NDArray[np.uint8] | None = None,
    organs: Sequence[str] = (),
) -> None:
    """Save a picture of one patch in several states, a row each and each channel; columns axial, coronal, sagittal.

    Patches are (X, Y, Z) or (C, X, Y, Z), axes in RAS order, of this spacing in mm; the first gives a channel's range
    from black to white, and NaN is blue. `labels` are drawn in colours over the last row; `organs` names the values 1,
    2, ...
    """
    from matplotlib import colormaps, rc_context  # rank 0 only, and only when a picture is due
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from ssl_ray.evaluate.overlay import STYLE, WIDTH, legend_columns

    states = {name: patch.reshape(-1, *patch.shape[-3:]) for name, patch in rows.items()}
    truth = next(iter(states.values()))
    lines = [
        (f"{name}\nchannel {number}" if len(patch) > 1 else name, one, of_truth)
        for name, patch in states.items()
        for number, (one, of_truth) in enumerate(zip(patch, truth, strict=False), 1)
    ]
    place = [side // 2 for side in truth.shape[1:]]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 1.5 * len(lines)), layout="constrained")
        figure.suptitle(title, fontsize=10)
        axes = figure.subplots(len(lines), 3, squeeze=False)
        for row, (name, patch, black_to_white) in enumerate(lines):
            lowest, highest = black_to_white.min(), black_to_white.max()
            for axis, (plane, (cut, across, up)) in zip(axes[row], _PLANES.items(), strict=True):
                axis.set_facecolor("#a9c9e8")  # white and black are bone and air
                shape: Any = {"origin": "lower", "aspect": spacing[up] / spacing[across]}
                axis.imshow(cut(patch, *place).T, cmap="gray", vmin=lowest, vmax=highest, **shape)
                if labels is not None and row == len(lines) - 1:
                    shown = np.ma.masked_equal(cut(labels, *place).T, 0)
                    axis.imshow((shown - 1) % 20, cmap="tab20", vmin=0, vmax=19, alpha=0.6, **shape)
                axis.set(xticks=[], yticks=[])
                if row == 0:
                    axis.set_title(plane, fontsize=10)
            axes[row][0].set_ylabel(name)
        if labels is not None and (values := [value for value in np.unique(labels).tolist() if value]):
            handles = [Patch(color=colormaps["tab20"]((value - 1) % 20), label=organs[value - 1]) for value in values]
            columns = legend_columns(organs[value - 1] for value in values)
            figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
