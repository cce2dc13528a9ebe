"""The picture of one restored patch."""

from pathlib import Path
from typing import Any

import numpy.typing as npt


def draw_restoration(
    path: Path, truth: npt.NDArray[Any], corrupted: npt.NDArray[Any], restored: npt.NDArray[Any], title: str
) -> None:
    """Save a picture of one patch: rows ground truth, corrupted, restored; columns axial, coronal, sagittal.

    Patches are (X, Y, Z), axes in RAS order; 0 is black and 1 white, or what lies beyond that in the truth.
    """
    from matplotlib.figure import Figure  # rank 0 only, and only when a picture is due

    figure = Figure(figsize=(7.2, 7.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(3, 3)
    x, y, z = (side // 2 for side in truth.shape)
    black, white = min(0.0, float(truth.min())), max(1.0, float(truth.max()))
    for row, (name, patch) in enumerate({"ground truth": truth, "corrupted": corrupted, "restored": restored}.items()):
        planes = {"axial": patch[:, :, z], "coronal": patch[:, y, :], "sagittal": patch[x, :, :]}
        for column, (plane, pixels) in enumerate(planes.items()):
            axis = axes[row][column]
            # Seen as radiologists do: the patient's right on the left, anterior and superior up.
            pixels = pixels[::-1] if plane != "sagittal" else pixels
            axis.imshow(pixels.T, cmap="gray", vmin=black, vmax=white, origin="lower")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(plane, fontsize=10)
            if column == 0:
                axis.set_ylabel(name, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
