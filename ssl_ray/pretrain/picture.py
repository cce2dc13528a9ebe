"""The picture of one validation patch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt


def draw_picture(path: Path, rows: Mapping[str, npt.NDArray[Any]], title: str) -> None:
    """Save a picture of one patch in several states, a row each; columns axial, coronal, sagittal.

    Patches are (X, Y, Z), axes in RAS order; the first gives the range from black to white, and NaN is blue.
    """
    from matplotlib import rc_context  # rank 0 only, and only when a picture is due
    from matplotlib.figure import Figure

    from ssl_ray.evaluate.overlay import STYLE, WIDTH

    truth = next(iter(rows.values()))
    x, y, z = (side // 2 for side in truth.shape)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 1.5 * len(rows)), layout="constrained")
        figure.suptitle(title, fontsize=10)
        axes = figure.subplots(len(rows), 3, squeeze=False)
        for number, (name, patch) in enumerate(rows.items()):
            planes = {"axial": patch[:, :, z], "coronal": patch[:, y, :], "sagittal": patch[x, :, :]}
            for axis, (plane, pixels) in zip(axes[number], planes.items(), strict=True):
                axis.set_facecolor("#a9c9e8")  # white and black are bone and air
                # Seen as radiologists do: the patient's right on the left, anterior left or up, superior up.
                axis.imshow(pixels[::-1].T, cmap="gray", vmin=truth.min(), vmax=truth.max(), origin="lower")
                axis.set(xticks=[], yticks=[])
                if number == 0:
                    axis.set_title(plane, fontsize=10)
            axes[number][0].set_ylabel(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
