"""A study's name stands for one configuration: what was begun under it goes on only while that stays the same."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import yaml

from ssl_ray.config.loading import flatten
from ssl_ray.config.schema import Finetune, Pretrain, Study
from ssl_ray.storage.files import appearing
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.tracker import rename_experiment

Stage = Literal["pretrain", "finetune"]

_HOW = {"pretrain": Pretrain.HOW, "finetune": Finetune.HOW | {"grid"}}
"""A cell of the grid is a run of its own, so that a grid may grow."""


def check_unchanged(study: Study, folders: Folders) -> None:
    """Compare a study with the configuration under which each of its stages was begun.

    Raises:
        ValueError: with every difference.
    """
    differences = []
    for stage in _HOW:
        record = _record(folders, stage)
        if not folders.output.pull(record):
            continue
        before, now = yaml.safe_load(record.read_text()), _settings(study, stage)
        differences += [
            f"  {key}: {before.get(key, '(not set)')} -> {now.get(key, '(not set)')}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
    if differences:
        changes = "\n".join(dict.fromkeys(differences))
        raise ValueError(
            f"{folders.study}: {study.name!r} was begun with another configuration; give the study another name, or "
            f"--fresh to start anew and keep the old one:\n{changes}"
        )


def record(study: Study, folders: Folders, stage: Stage) -> None:
    """Write down what a stage is begun with."""
    path = _record(folders, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as part:
        part.write_text(yaml.safe_dump(_settings(study, stage)))
    folders.output.push(path)


def set_aside(study: Study, folders: Folders) -> str | None:
    """Give another name to everything that the study has written, its MLflow experiment and its folder.

    Returns:
        The name that the old study now has, or None where there was nothing.

    Raises:
        ValueError: when the MLflow experiment may hold other studies too.
    """
    if study.tracking.experiment not in (None, study.name):
        raise ValueError(
            f"--fresh: tracking.experiment is {study.tracking.experiment!r}, which may hold other studies, and "
            "would have to be renamed: give the study another name instead"
        )
    kept = f"{study.name}-until-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    found = rename_experiment(study.tracking, folders, kept)
    if folders.output.move(folders.study, folders.study.with_name(kept)):
        found = True
    return kept if found else None


@contextmanager
def only_one(folders: Folders) -> Iterator[None]:
    """Keep a second process on this machine or this shared disk off the study.

    Raises:
        ValueError: when another process is working on it.
    """
    path = folders.study.parent / f".{folders.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process dies
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(f"{folders.study}: another process works on this study: {file.read().strip()}") from error
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}")
        file.flush()
        yield


def _record(folders: Folders, stage: str) -> Path:
    return folders.study / f"{stage}.yaml"


def _settings(study: Study, stage: str) -> dict[str, str]:
    """What a stage's results depend on, flat. `gpu` counts where `precision: auto` may mean another type on it."""
    how = _HOW[stage] - ({"gpu"} if study.pretrain.precision == "auto" else set())
    skipped = tuple(f"{stage}.{name}" for name in how) + (("network.feature_size",) if stage == "pretrain" else ())
    return {
        key: str(value)
        for key, value in flatten(study).items()
        if key.partition(".")[0] in ("seed", "phantom", "network", stage)
        and not any(key == name or key.startswith(f"{name}.") for name in skipped)
    }
