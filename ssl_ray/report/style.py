"""How figures look: legible where they are shown 380 pixels wide, as on a telephone, on a light page and on a dark one.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and dashes say the same once more.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.style import library

from ssl_ray.evaluate.overlay import WIDTH
from ssl_ray.storage.files import appearing

_EVERYWHERE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # an organ's name may hold a dollar
}
_DARK = "#14181d"  # the page's own, in `page.html.j2`
_THEMES: dict[str, dict[str, Any]] = {
    "": {"axes.prop_cycle": cycler(color=["#E69F00", "#0072B2", "#D55E00"])},
    "_dark": {
        **library["dark_background"],
        "figure.facecolor": _DARK,
        "savefig.facecolor": _DARK,
        "axes.facecolor": _DARK,
        "grid.color": "#7d8590",
        "axes.prop_cycle": cycler(color=["#E69F00", "#56B4E9", "#FF7F50"]),
    },
}
COLOUR = {"random": "C0", "pretrained": "C1"}
"""Of the theme; C2 is for what nothing was learned for."""
LINE: dict[str, dict[str, Any]] = {
    "random": {"color": "C0", "linestyle": (0, (4, 2))},
    "pretrained": {"color": "C1", "linestyle": "solid"},
}
MARKER = {"random": "s", "pretrained": "o"}
GREY = "#8a8a8a"


def save(draw: Callable[[], Figure], path: Path) -> list[Path]:
    """Draw and write a figure for light pages, and beside it `<name>_dark.png` for dark ones -> both paths."""
    paths = [path.with_stem(path.stem + theme) for theme in _THEMES]
    for place, theme in zip(paths, _THEMES.values(), strict=True):
        with rc_context({**theme, **_EVERYWHERE}), appearing(place) as part:
            draw().savefig(part, format="png", dpi=200, metadata={"Software": None})
    return paths


def ink() -> str:
    """The colour of text, in the theme that is drawn."""
    return str(rcParams["text.color"])


def panels(count: int, each: float, more: float, columns: int = 1, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure of the usual width, and the axes of so many panels; a row has `each` inches, what is around them `more`.

    What is above a blank panel says what is on its axis.
    """
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, more + each * rows), layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False, **shared).flat]
    for number in range(count, len(axes)):
        axes[number].set_axis_off()
        axes[number - columns].tick_params(labelbottom=True)
    return figure, axes[:count]


def legend_above(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One for all panels."""
    figure.legend(handles=handles, loc="outside upper center", ncols=min(3, len(handles)), columnspacing=1.2)
