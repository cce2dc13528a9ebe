"""The picture of one validation patch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt


def draw_picture(path: Path, rows: Mapping[str, npt.NDArray[Any]], title: str) -> None:
    """Save a picture of one patch in several states, a row each; columns axial, coronal, sagittal.

    Patches are (X, Y, Z), axes in RAS order; the first gives the range from black to white, and NaN is blue.
    """
    from matplotlib.figure import Figure  # rank 0 only, and only when a picture is due

    figure = Figure(figsize=(7.2, 0.4 + 2.4 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(rows), 3, squeeze=False)
    truth = next(iter(rows.values()))
    x, y, z = (side // 2 for side in truth.shape)
    for row, (name, patch) in enumerate(rows.items()):
        planes = {"axial": patch[:, :, z], "coronal": patch[:, y, :], "sagittal": patch[x, :, :]}
        for column, (plane, pixels) in enumerate(planes.items()):
            axis = axes[row][column]
            # Seen as radiologists do: the patient's right on the left, anterior and superior up.
            pixels = pixels[::-1] if plane != "sagittal" else pixels
            axis.set_facecolor("#a9c9e8")  # white and black are bone and air
            axis.imshow(pixels.T, cmap="gray", vmin=truth.min(), vmax=truth.max(), origin="lower")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(plane, fontsize=10)
            if column == 0:
                axis.set_ylabel(name, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
