"""Decathlon JSON -> cases, checked; and the dataset.json of a folder: its volumes, and names of label values.

Format: Medical Segmentation Decathlon (Antonelli et al., 2022) as the MONAI tutorials publish it: the lists
`training`, `validation` and `test`, whose entries are paths or `{"image": ..., "label": ...}`, and a `labels` mapping.
An entry may also have a `subject`: whose scan it is. A list of images is the channels of one volume.
"""

import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, FailFast, Field, NonNegativeInt, ValidationError

from ssl_ray.config.schema import Source
from ssl_ray.errors import UserError
from ssl_ray.storage.files import read_file
from ssl_ray.text import BREAKS, did_you_mean, shown

_SUFFIX = re.compile(r"(?i)\.nii(\.gz)?\Z")
"""Scanners and Windows also write `.NII.GZ`."""
_MOST_BYTES, _MOST_ENTRIES = 20_000_000, 250_000
"""Bytes of a list, and volumes of one of its sections: terabytes of volumes, and read within half a gigabyte."""
_MOST_LABELS, _MOST_CHANNELS = 256, 256
"""A label is one byte. Images of a volume: more than any scanner makes."""
IGNORE = "ignore"
"""nnU-Net's name of the label of voxels that nobody has looked at."""
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Case:
    """One volume: a name for people, its image and, where there is one, its label.

    `subject` is the patient; empty where the list does not say: the volume then counts as a patient of its own. `place`
    is where it is listed, for messages: `list.json: training.3`. `others` are its channels after the first, `image`.
    """

    id: str
    image: Path
    label: Path | None = None
    subject: str = ""
    place: str = field(default="", compare=False)
    others: tuple[Path, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """Its channels, the first one's grid being that of the volume."""
        return self.image, *self.others


@dataclass(frozen=True)
class Datalist:
    """The cases of one list; `labels` maps label values to organ names."""

    path: Path
    training: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]
    labels: dict[int, str]


def _one_or_more(image: Any) -> Any:
    return [image] if isinstance(image, str) else image


@dataclass(frozen=True, slots=True)
class _Entry:
    image: Annotated[list[str], BeforeValidator(_one_or_more), Field(min_length=1, max_length=_MOST_CHANNELS)]
    label: str | None = None
    subject: str = ""


def _path_alone(entry: Any) -> Any:
    if not isinstance(entry, str | dict):
        raise ValueError("must be a path or {image, label}")
    return {"image": entry} if isinstance(entry, str) else entry


def _names(labels: Any) -> Any:  # before each of them is checked, and each mistake kept
    if not isinstance(labels, dict):
        return labels
    if len(labels) > _MOST_LABELS:
        raise ValueError(f"must name at most {_MOST_LABELS} label values")
    values = [value for value in labels.values() if type(value) is int]
    reversed_ = len(set(values)) == len(labels)  # {"liver": 1}, as nnU-Net has them
    return {value: name for name, value in labels.items()} if reversed_ else labels


Section = Annotated[list[Annotated[_Entry, BeforeValidator(_path_alone)]], Field(max_length=_MOST_ENTRIES), FailFast()]


class _Parts(BaseModel):
    """What a file holds; other keys of the Decathlon's, such as `modality`, are ignored."""

    training: Section = []
    validation: Section = []
    test: Section = []


class DatasetJson(_Parts):
    """A dataset.json of the Decathlon or of nnU-Net, of either version."""

    labels: dict[str, int | str | list[int]] = {}

    def organs(self, path: Path, for_scores: bool = False) -> dict[int, str]:
        """Names by value, from {"1": "liver"} or {"liver": 1}; regions, and voxels to ignore, are nothing to train on.

        `for_scores`: nnU-Net's regions, of several values, are left out, and `ignore` is the name of its value.
        """
        found = {}
        for key, value in self.labels.items():
            if for_scores and isinstance(value, list):
                continue
            number, name = (key, value) if key.isdecimal() else (value, key)
            if not re.fullmatch(r"[0-9]{1,3}", str(number)) or (name == IGNORE and not for_scores):
                raise UserError(f"{path}: labels.{shown(key)}: must be one organ's name and value, got {shown(value)}")
            found[int(str(number))] = str(name)
        return found


class _AnyPart(_Parts):
    """A list of a study, or a part of one."""

    labels: Annotated[dict[NonNegativeInt, str], BeforeValidator(_names)] = {}


class _Json(_AnyPart):
    """A list that must have training volumes."""

    training: Annotated[Section, Field(min_length=1)]


def read_datalist(root: str | Path, datalist: str | Path, *, labelled: bool | None) -> Datalist:
    """Read and check one list, in or below `root`, which none of its paths may leave; errors name file, entry and rule.

    `labelled`: training and validation entries need a label, and test entries without one are left out, as the
    published BTCV list names test images whose labels are not public. None, for a trained model: all entries, with the
    labels that they have, which need not be there; it may be without training volumes.
    """
    base = Path(os.path.abspath(root))
    path = base / datalist
    listed = read_json(path, _AnyPart if labelled is None else _Json)
    if labelled and IGNORE in listed.labels.values():
        raise UserError(f"{path}: labels: voxels to {IGNORE} are nothing to train on; give a list without that label")
    real = cache(os.path.realpath)
    cases = {
        section: [
            _case(base, f"{path}: {section}.{number}", entry, labelled, real)
            for number, entry in enumerate(getattr(listed, section))
            if section != "test" or not labelled or entry.label
        ]
        for section in ("training", "validation", "test")
    }
    known: dict[str, Case] = {}
    for case in chain(*cases.values()):
        for image in case.images:
            if first := known.get(real(str(image))):  # also by a link to it
                raise UserError(f"{case.place}: {image} is listed twice, first in {first.place}")
            known[real(str(image))] = case
        for volume in (*case.images, case.label if labelled else None):
            if volume and not os.path.isfile(volume):
                raise UserError(f"{case.place}: no such file: {shown(volume)}")
    count = Counter(case.id for case in chain(*cases.values()))

    def named(case: Case) -> Case:  # a file name that the list has twice is no id
        return case if count[case.id] == 1 else replace(case, id=os.path.relpath(case.image, base))

    labels = {value: shown(name) for value, name in listed.labels.items()}
    return Datalist(path, **{section: tuple(map(named, part)) for section, part in cases.items()}, labels=labels)


def read_unlabelled(sources: Iterable[Source]) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Training and validation cases of all sources together; two may not share a volume, one must have validation."""
    training: list[Case] = []
    validation: list[Case] = []
    known: dict[str, Case] = {}
    for source in sources:
        listed = read_datalist(source.root, source.datalist, labelled=False)
        for case in (*listed.training, *listed.validation):
            for image in case.images:
                if (first := known.setdefault(os.path.realpath(image), case)) is not case:
                    raise UserError(f"{case.place}: {image} is also {first.place}; a volume belongs to one source")
        training += listed.training
        validation += listed.validation
    if not validation:
        raise UserError(f"{listed.path}: 'validation' must list a volume in at least one pretraining source")
    return tuple(training), tuple(validation)


def names_in(path: Path) -> dict[int, str]:
    """Names by label value from a dataset.json or a datalist, `IGNORE` among them; empty where it has none."""
    return read_json(path, DatasetJson).organs(path, for_scores=True)


def subject_of(case: Case) -> str:
    """The patient of a case."""
    return case.subject or case.id


def stem(path: PurePath) -> str:
    """File name without .nii or .nii.gz, in either case."""
    return _SUFFIX.sub("", path.name)


def is_nifti(path: str) -> bool:
    """Whether the name of a file is one of NIfTI's."""
    return bool(_SUFFIX.search(path))


def read_json(path: Path, model: type[_Model]) -> _Model:
    """What a JSON file holds, checked by a model of pydantic; a UserError names file, key, rule and value."""
    try:
        return model.model_validate_json(read_file(path, _MOST_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot read the datalist: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(shown(part, 80) for part in first["loc"] if part != "[key]")
        rule = first["msg"].removeprefix("Value error, ")
        place = f"{path}: {key}" if key else str(path)
        if first["type"] == "missing" and isinstance(there := first["input"], dict):
            meant = did_you_mean(key.rpartition(".")[2], [*map(str, there)]) or f"got {shown(list(there), 100)}"
            raise UserError(f"{place}: this key is required; {meant}") from None
        got = "" if first["type"] == "json_invalid" else f", got {reprlib.repr(first['input'])}"
        raise UserError(f"{place}: {rule[0].lower()}{rule[1:]}{got}") from None


def _case(base: Path, place: str, entry: _Entry, labelled: bool | None, real: Callable[[str], str]) -> Case:
    if labelled and not entry.label:
        raise UserError(f"{place}: needs a 'label', got only {shown(entry.image[0])}")
    label = [entry.label] if labelled is not False and entry.label else []
    inside = []
    if labelled is None and label and not (_fits(label[0]) and _within(base, label[0], real)):
        label = []  # nobody needs it
    for number, path in enumerate(entry.image + label):
        key = "label" if number == len(entry.image) else f"image.{number}" if number else "image"
        if not _fits(path):
            raise UserError(f"{place}.{key}: '{shown(path)}' must end in .nii or .nii.gz, without control characters")
        if not _within(base, path, real):
            raise UserError(f"{place}.{key}: {shown(path)} leaves the root {base}")
        inside.append(Path(os.path.normpath(base / path)))
    image, *others = inside[: len(entry.image)]
    return Case(stem(image), image, inside[-1] if label else None, shown(entry.subject), place, tuple(others))


def _fits(path: str) -> bool:
    return is_nifti(path) and not BREAKS.search(path)


def _within(base: Path, path: str, real: Callable[[str], str]) -> bool:
    """Whether a path leads below the root, which may itself be a link; of a link inside of it, where that leads to."""
    return real(os.path.normpath(base / path)).startswith(os.path.join(real(str(base)), ""))
