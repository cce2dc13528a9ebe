"""An experiment file, read; and the steps in which it is carried out."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ssl_ray.config.loading import dump, parse
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.storage.files import read_file, write_file
from ssl_ray.storage.folders import Folders

Step = Literal["prepare", "pretrain", "finetune", "report"]
KEPT = "experiment.yaml"
"""In a study's folder: the study as it was last carried out."""
_MOST_BYTES = 2**20
"""An experiment has some kilobytes; a larger file is a mistake, e.g. a volume or weights named instead."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """Read and validate an experiment file; overrides and errors as for `ssl_ray.config.loading.parse`."""
    try:
        text = read_file(Path(path), _MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the experiment: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, str(path), overrides)


def keep(study: Study, folders: Folders) -> None:
    """Write down what is carried out now, for `load_kept`."""
    path = folders.study / KEPT
    write_file(path, dump(study).encode())
    folders.output.push(path)


def load_kept(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """The study of an experiment file as it was last carried out, with all that `--set` replaced then.

    `overrides` say where it lies, if they did. One that was not begun yet is the one in the file.
    """
    study = load(path, overrides)
    kept = Folders.of(study.name, study.output, study.cache, study.scratch).study / KEPT
    try:
        known = load(kept, overrides)
    except UserError:  # of another version, too
        return study
    own = ("output", "cache", "scratch", "tracking")  # what is kept has no passwords
    return known.model_copy(update={key: getattr(study, key) for key in own})
