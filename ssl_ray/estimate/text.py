"""Figures with their units, and an estimate as aligned lines for people, under the names of its JSON."""

import math
from collections.abc import Iterator, Mapping
from typing import Any


def render(tree: Mapping[str, Any]) -> str:
    """Sections of lines out of an estimate's tree; what is not known or zero is left out."""
    groups = {name: ", ".join(map(" ".join, _lines(group))) for name, group in tree["volumes"]["groups"].items()}
    sections = {
        "Volumes": list(_lines(groups | tree["volumes"])),
        f"Pretraining on {tree['cluster']['where']}": list(_lines(tree["pretraining"] or {})),
        f"Fine-tuning on {tree['cluster']['where']}": list(_lines(tree["grid"])),
        "Altogether": list(_lines({"total_seconds": tree["total_seconds"] or "not known"})),
    }
    width = max(len(name) for lines in sections.values() for name, _ in lines)
    blocks = {title: [f"{name:<{width}}  {text}" for name, text in lines] for title, lines in sections.items()}
    blocks |= {title: [f"- {line}" for line in tree[title.lower()]] for title in ("Basis", "WARNINGS")}
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in blocks.items() if lines)


def _lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values with the units that the names tell."""
    for key, value in figures.items():
        name = key.replace("_bytes", "").replace("_seconds", "").replace("_", " ").replace("flops", "FLOPs")
        if not value or key == "bad" or isinstance(value, dict):
            continue
        if isinstance(value, bool | str):
            text = value if isinstance(value, str) else "yes"
        elif key == "shape":
            text = " x ".join(f"{side:.0f}" for side in value)
        elif "bytes" in key:
            text = size(value)
        elif "seconds" in key:
            text = duration(value)
        else:
            text = _scaled(value, "FLOP") if "flops" in key else f"{value:,.0f}"
        yield name, text


def size(count: float) -> str:
    """Bytes with a unit."""
    return _scaled(count, "B")


def duration(seconds: float) -> str:
    """Seconds with a unit."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _scaled(count: float, unit: str) -> str:
    power = min(6, max(1, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.3g} {' kMGTPE'[power]}{unit}"
