"""A study's name stands for one configuration.

What a result depends on (`ssl_ray.config.depends`) is also in its key, so that nothing wrong is ever taken up. Here the
user is told, with the difference, instead of seeing a stage start again from zero under another key.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import yaml

from ssl_ray.config import depends
from ssl_ray.config.depends import Stage, digest
from ssl_ray.config.loading import flatten, read_yaml
from ssl_ray.config.schema import Study
from ssl_ray.data.normalise import VERSION
from ssl_ray.data.store import Volume
from ssl_ray.errors import UserError
from ssl_ray.storage.files import write_file
from ssl_ray.storage.folders import Folders


def check_unchanged(study: Study, folders: Folders) -> None:
    """Compare a study with the configuration under which each of its stages was begun.

    Raises:
        UserError: with every difference, and for what an older version of this program has begun.
    """
    before: dict[str, str] = {}
    now: dict[str, str] = {}
    for stage in get_args(Stage):
        if begun := _begun(folders, stage):
            before |= begun["settings"]
            now |= _settings(study, stage)
    _compare(folders, before, now)


def record(study: Study, folders: Folders, stage: Stage, content: Mapping[str, str]) -> None:
    """Write down with which settings a stage is begun, and on what: `content` has digests of its parts, by name.

    Parts may be added, as a grid may grow.

    Raises:
        UserError: with every part that has another content than before.
    """
    known = (_begun(folders, stage) or {"content": {}})["content"]
    shared = known.keys() & content.keys()
    _compare(folders, {name: known[name] for name in shared}, {name: content[name] for name in shared})
    path = folders.study / f"{stage}.yaml"
    tree = {"settings": _settings(study, stage), "content": known | dict(content)}
    write_file(path, yaml.safe_dump(tree).encode())
    folders.output.push(path)


def told(volumes: Sequence[Volume]) -> str:
    """What `record` is given of volumes, wherever they lie: their number, and the digest of their content."""
    return f"{len(volumes)} ({digest([(volume.key, volume.subject) for volume in volumes])})"


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
    from ssl_ray.tracking.tracker import rename_experiment  # not above: a study that starts has not loaded MLflow yet

    kept = f"{study.name}-until-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    renamed = rename_experiment(study.tracking, folders, kept)
    moved = folders.output.move(folders.study, folders.study.with_name(kept))
    return kept if renamed or moved else None


def _begun(folders: Folders, stage: Stage) -> dict[str, Any] | None:
    """What `record` wrote of a stage, or None where it was not begun."""
    path = folders.study / f"{stage}.yaml"
    if not folders.output.pull(path):
        return None
    tree: dict[str, Any] = read_yaml(path.read_text(), f"{path}: not valid YAML")
    if "settings" not in tree:
        raise UserError(
            f"{path}: begun by an older version of ssl_ray, whose results this one does not go on from; give the study "
            "another name, or --fresh to start again and keep the old one"
        )
    return tree


def _compare(folders: Folders, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        none = "(not set)"
        changes = "\n".join(f"  {key}: {before.get(key, none)} -> {now.get(key, none)}" for key in changed)
        raise UserError(
            f"{folders.study}: {folders.name!r} was begun with another configuration; give the study another name, or "
            f"--fresh to start again and keep the old one:\n{changes}"
        )


def _settings(study: Study, stage: Stage) -> dict[str, str]:
    """The settings that a stage's results depend on, flat."""
    if stage == "pretrain":
        tree = depends.pretraining(study.pretrain, study.network)
    else:
        tree = depends.grid(study.finetune, study.network)
    phantom = {"phantom": study.phantom.model_dump(exclude={"root"})} if study.phantom else {}
    return flatten({"seed": study.seed, "preparation version": VERSION, **phantom, **tree})
