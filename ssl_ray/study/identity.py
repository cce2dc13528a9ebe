"""A study's name stands for one configuration and, at a time, one process.

What a result depends on is also in its key, where it is made: `pretrain.driver.pretraining_key` and the keys of the
cells in `search.grid`. Here the user is told before anything starts, with the settings that differ.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import yaml

from ssl_ray.config.loading import flatten
from ssl_ray.config.schema import Finetune, Pretrain, Study
from ssl_ray.errors import UserError
from ssl_ray.storage.files import write_file
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.tracker import rename_experiment

Stage = Literal["pretrain", "finetune"]

_MAY_CHANGE: dict[Stage, set[str]] = {"pretrain": Pretrain.HOW, "finetune": Finetune.HOW | {"grid"}}
"""Fields of each stage that may change after it was begun. The grid may grow, as each of its cells has its own key."""


def check_unchanged(study: Study, folders: Folders) -> None:
    """Compare a study with the configuration under which each of its stages was begun.

    Raises:
        UserError: with every difference.
    """
    before: dict[str, str] = {}
    now: dict[str, str] = {}
    for stage in _MAY_CHANGE:
        path = folders.study / f"{stage}.yaml"
        if folders.output.pull(path):
            before |= yaml.safe_load(path.read_text())
            now |= _settings(study, stage)
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if changed:
        none = "(not set)"
        changes = "\n".join(f"  {key}: {before.get(key, none)} -> {now.get(key, none)}" for key in changed)
        raise UserError(
            f"{folders.study}: {study.name!r} was begun with another configuration; give the study another name, or "
            f"--fresh to start again and keep the old one:\n{changes}"
        )


def record(study: Study, folders: Folders, stage: Stage) -> None:
    """Write down with which settings a stage is begun."""
    path = folders.study / f"{stage}.yaml"
    write_file(path, yaml.safe_dump(_settings(study, stage)).encode())
    folders.output.push(path)


def set_aside(study: Study, folders: Folders) -> str | None:
    """Rename what the study has written, its MLflow experiment and its folder -> the new name; None: there was nothing.

    Raises:
        UserError: when the MLflow experiment may hold other studies too.
    """
    if study.tracking.experiment not in (None, study.name):
        raise UserError(
            f"--fresh: tracking.experiment is {study.tracking.experiment!r}, which may hold other studies, and "
            "would have to be renamed: give the study another name instead"
        )
    kept = f"{study.name}-until-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    renamed = rename_experiment(study.tracking, folders, kept)
    moved = folders.output.move(folders.study, folders.study.with_name(kept))
    return kept if renamed or moved else None


@contextmanager
def only_one(folders: Folders) -> Iterator[None]:
    """Keep a second process on this machine, or on this shared disk, off the study.

    Raises:
        UserError: when another process is working on it, with its host and number, or nothing can be written there.
    """
    path = folders.study.parent / f".{folders.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
    except OSError as error:
        raise UserError(f"output: {error.filename}: {error.strerror}") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system even if the process is killed
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(f"{folders.study}: another process works on this study: {file.read().strip()}") from error
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}")
        file.flush()
        yield


def _settings(study: Study, stage: Stage) -> dict[str, str]:
    """The settings that a stage's results depend on, flat."""
    may_change = {f"{stage}.{name}" for name in _MAY_CHANGE[stage]}
    if study.pretrain.precision == "auto":  # may mean another type on a GPU
        may_change.discard(f"{stage}.gpu")
    if stage == "pretrain":
        may_change.add("network.feature_size")  # the width of UNETR's decoder, which pretraining does not have
    return {
        key: value
        for key, value in flatten(study).items()
        if key.partition(".")[0] in ("seed", "phantom", "network", stage)
        and not any(key == name or key.startswith(f"{name}.") for name in may_change)
    }
