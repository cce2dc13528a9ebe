"""An estimate as aligned lines for people, under the names of its JSON."""

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any


def render(tree: Mapping[str, Any]) -> str:
    """Totals first, then a block for each section; `-` stands for what is not known."""
    totals = {key: value for key, value in tree.items() if not isinstance(value, dict | list | tuple)}
    lines = []
    for title, block in {"study": totals, **tree}.items():
        if block and isinstance(block, list | tuple):
            lines += ["", title, *(f"  - {line}" for line in block)]
        elif block and isinstance(block, dict):
            lines += ["", title, *(f"  {_name(key):<24} {figure(key, value)}" for key, value in block.items())]
    return "\n".join(lines[1:])


def _name(key: str) -> str:
    return key.replace("_bytes", "").replace("_seconds", "").replace("_", " ").replace("flops", "FLOPs")


def figure(name: str, value: Any) -> str:
    """A value with the unit that its name tells."""
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, dict):
        return ", ".join(f"{_name(inner)} {figure(inner, part)}" for inner, part in value.items())
    if isinstance(value, list | tuple):
        return " x ".join(f"{side:.0f}" for side in value)
    if "seconds" in name:
        return f"{value:.3g} s" if value < 60 else str(timedelta(seconds=round(value)))
    unit = "B" if "bytes" in name else "FLOP" if "flops" in name else None
    if not unit:
        return f"{value:,.10g}"
    value = float(f"{value:.3g}")  # first: 999,700 bytes are 1 MB
    power = min(8, int(math.log10(max(value, 1)) // 3))
    return f"{value / 1000**power:.3g} {' kMGTPEZY'[power].strip()}{unit}"
