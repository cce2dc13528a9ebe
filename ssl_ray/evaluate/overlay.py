"""Draws planes of segmented volumes, with what was predicted and what is true as outlines."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssl_ray.evaluate.planes import Pixels, Planes

_MARGIN = 30.0
"""Millimetres around what is outlined: of a scan from the skull to the shoulders, parotids would be a few pixels."""
WIDTH = 4.8
"""Inches. A picture of this width has letters of 11 pixels where it is shown 380 pixels wide, as on a telephone."""
STYLE = {
    "font.size": 10,
    "text.color": "white",
    "axes.labelcolor": "white",
    "figure.facecolor": "#101418",  # as on a radiologist's screen: it is read on a light page and on a dark one
    "savefig.facecolor": "#101418",
    "text.parse_math": False,  # a name may hold a dollar
}


def draw(planes: Sequence[Planes], organs: Sequence[str], titles: Sequence[str]) -> bytes:
    """PNG of several volumes, a row each under its title; columns axial, coronal, sagittal.

    The truth, where it is known, is outlined in white, and over it the prediction in the colour of its organ, a name of
    the classes 1, 2, ...: what has only the white line was missed. Planes are cut to what is outlined, and a margin.
    """
    planes = [_around_outlines(one) for one in planes]
    gap, heading = 0.06, 0.3
    widths = [max(one.size(plane)[1] for one in planes) for plane in range(3)]
    scale = (WIDTH - 4 * gap) / sum(widths)  # inches a mm
    heights = [scale * max(one.size(plane)[0] for plane in range(3)) for one in planes]
    shown = sorted({int(n) for one in planes for layers in one.layers for n in np.unique(layers[1:]) if n})
    handles = [Line2D([], [], color=_colour(n), label=organs[n - 1]) for n in shown]
    if any(len(one.layers[0]) > 2 for one in planes):
        handles.insert(0, Line2D([], [], color="white", label="truth"))
    columns = legend_columns(str(one.get_label()) for one in handles)
    below = 0.1 + 0.21 * -(-len(handles) // columns)
    height = sum(heights) + len(planes) * (heading + gap) + below
    with rc_context(STYLE):
        figure, top = Figure(figsize=(WIDTH, height)), height
        for one, title, tall in zip(planes, titles, heights, strict=True):
            figure.text(gap / WIDTH, (top - heading / 2) / height, title, va="center")
            left, top = gap, top - heading
            for plane, width in enumerate(widths):
                high, wide = (scale * mm for mm in one.size(plane))
                axis = figure.add_axes((left / WIDTH, (top - high) / height, wide / WIDTH, high / height))
                _draw_plane(axis, one.layers[plane])
                left += scale * width + gap
            top -= tall + gap
        figure.legend(handles=handles, loc="lower left", ncols=columns, frameon=False, fontsize=9, handlelength=1.2)
        file = BytesIO()
        figure.savefig(file, dpi=200, metadata={"Software": None})
    return file.getvalue()


def legend_columns(names: Iterable[str]) -> int:
    """How many names fit beside each other into a picture of this width."""
    return 3 if max(map(len, names), default=0) < 14 else 2


def _around_outlines(one: Planes) -> Planes:
    """The part of all three planes that holds the labels of any of them; the whole where there are none."""
    rows, columns = ([layers[1:].any(axis=(0, across)) for layers in one.layers] for across in (2, 1))
    held = columns[0] | columns[1], rows[0] | columns[2], rows[1] | rows[2]  # along x, y, z
    sides = []
    for spacing, side in zip(one.spacing, held, strict=True):
        places, margin = np.flatnonzero(side), round(_MARGIN / spacing)
        sides.append(slice(max(0, places[0] - margin), places[-1] + margin + 1) if places.size else slice(None))
    x, y, z = sides
    axial, coronal, sagittal = one.layers
    return Planes((axial[:, y, x], coronal[:, z, x], sagittal[:, z, y]), one.spacing)


def _draw_plane(axis: Any, layers: Pixels) -> None:
    axis.set_axis_off()
    axis.imshow(layers[0], cmap="gray", vmin=0, vmax=255, aspect="auto")
    for labels, truth in zip(layers[:0:-1], (True, False) if len(layers) > 2 else (False,), strict=True):
        for number in np.unique(labels[labels > 0]):
            # A rim of background closes the outline of an organ at the border.
            mask = np.pad(labels == number, 1)
            rows, columns = (np.arange(side) - 1 for side in mask.shape)
            colour = "white" if truth else _colour(int(number))
            axis.contour(columns, rows, mask, [0.5], colors=[colour], linewidths=0.9)


def _colour(number: int) -> Any:
    """Of an organ: hues by the golden ratio lie far apart, however many there are."""
    return hsv_to_rgb((0.618034 * number % 1, 0.9 if number % 2 else 0.55, 1))
