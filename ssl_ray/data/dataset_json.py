"""The dataset.json of a folder in the Decathlon's or nnU-Net's layout: its volumes, and names of label values."""

import re
from pathlib import Path

from pydantic import BaseModel

from ssl_ray.data.datalist import Section, read_json
from ssl_ray.errors import UserError
from ssl_ray.text import shown


class DatasetJson(BaseModel):
    """A dataset.json of the Decathlon or of nnU-Net, of either version."""

    training: Section = []
    validation: Section = []
    test: Section = []
    labels: dict[str, int | str | list[int]] = {}

    def organs(self, path: Path) -> dict[int, str]:
        """Names by value, from {"1": "liver"} or {"liver": 1}."""
        found = {}
        for key, value in self.labels.items():
            number, name = (key, value) if key.isdecimal() else (value, key)
            if not re.fullmatch(r"[0-9]{1,3}", str(number)) or name == "ignore":
                raise UserError(f"{path}: labels.{shown(key)}: must be one organ's name and value, got {shown(value)}")
            found[int(str(number))] = str(name)
        return found


def organs_of(path: Path) -> dict[int, str]:
    """Names by label value from a dataset.json or a datalist; empty where it has none."""
    return read_json(path, DatasetJson).organs(path)
