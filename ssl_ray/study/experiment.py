"""An experiment file, read; and the steps in which it is carried out."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ssl_ray.config.loading import parse
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.storage.files import read_file

Step = Literal["prepare", "pretrain", "finetune", "report"]
_MOST_BYTES = 2**20
"""An experiment has some kilobytes; a larger file is a mistake, e.g. a volume or weights named instead."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """Read and validate an experiment file; overrides and errors as for `ssl_ray.config.loading.parse`."""
    try:
        text = read_file(Path(path), _MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the experiment: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, str(path), overrides)
