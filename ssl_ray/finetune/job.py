"""What a trial is started with.

The driver and the report read it, too: torch and MONAI take seconds to import and are not here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_ray.data.store import Store, Volume


@dataclass(frozen=True)
class TrialData:
    """Prepared volumes of a trial, shared read-only by all of them."""

    store: Store | Path
    training: tuple[Volume, ...]
    validation: tuple[Volume, ...]
    test: tuple[Volume, ...]
    organs: tuple[str, ...]


Record = tuple[int, dict[str, float]]
"""A step and metrics of it."""


def work(*arguments: Any) -> Iterator[Record]:
    """`trial.run_trial` with these arguments."""
    from ssl_ray.finetune.trial import run_trial

    yield from run_trial(*arguments)
