"""Decathlon JSON -> cases and splits, checked.

Format: Medical Segmentation Decathlon (Antonelli et al., 2022) as the MONAI tutorials publish it: the lists
`training`, `validation` and `test`, whose entries are paths or `{"image": ..., "label": ...}`, and a `labels` mapping.
"""

import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, FailFast, Field, NonNegativeInt, ValidationError

from ssl_ray.config.schema import LabelledCohort, Source
from ssl_ray.errors import UserError
from ssl_ray.random import number
from ssl_ray.storage.files import read_file
from ssl_ray.text import BREAKS, shown

SUFFIXES = (".nii.gz", ".nii")
_MOST_BYTES, _MOST_ENTRIES = 20_000_000, 250_000
"""Bytes of a list, and volumes of one of its sections: terabytes of volumes, and read within half a gigabyte."""
_MOST_LABELS = 256
"""A label is one byte."""


@dataclass(frozen=True)
class Case:
    """One volume: a name for people, its image and, where there is one, its label.

    `subject` is the patient, for whom the id stands where it is empty.
    """

    id: str
    image: Path
    label: Path | None = None
    subject: str = ""


@dataclass(frozen=True)
class Datalist:
    """The cases of one list; `labels` maps label values to organ names."""

    path: Path
    training: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]
    labels: dict[int, str]


@dataclass(frozen=True)
class Splits:
    """The labelled cohort: a training split for each size, and the validation and test cases that all splits share.

    With `pool`, `training` has one entry, the whole pool under its number of subjects, which `draw` takes from.
    """

    training: dict[int, tuple[Case, ...]]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]
    organs: tuple[str, ...]
    pool: bool = False

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every labelled case once."""
        every = [case for cases in self.training.values() for case in cases]
        return tuple({case.image: case for case in (*every, *self.validation, *self.test)}.values())

    def draw(self, size: int, seed: int, run: int, usable: Container[str]) -> tuple[Case, ...]:
        """The cases that a run trains on, out of those whose image path is in `usable`.

        Published splits are the same in all runs. Out of a pool, they are those of the first `size` subjects in an
        order that depends on seed and run: a smaller draw is part of a larger one, and a subject that is not usable
        changes the place of no other.
        """
        listed = next(iter(self.training.values())) if self.pool else self.training[size]
        cases = tuple(case for case in listed if str(case.image) in usable)
        if not self.pool:
            return cases
        order = sorted({subject_of(case) for case in cases}, key=lambda subject: number(seed, "draw", run, subject))
        return tuple(case for case in cases if subject_of(case) in order[:size])


@dataclass(frozen=True, slots=True)
class _Entry:
    image: str
    label: str | None = None


def _path_alone(entry: Any) -> Any:
    if not isinstance(entry, str | dict):
        raise ValueError("must be a path or {image, label}")
    return {"image": entry} if isinstance(entry, str) else entry


def _few(labels: Any) -> Any:  # before each of them is checked, and each mistake kept
    if isinstance(labels, dict) and len(labels) > _MOST_LABELS:
        raise ValueError(f"must name at most {_MOST_LABELS} label values")
    return labels


_Section = Annotated[list[Annotated[_Entry, BeforeValidator(_path_alone)]], Field(max_length=_MOST_ENTRIES), FailFast()]


class _Json(BaseModel):
    """What a file holds; other keys of the Decathlon's, such as `modality`, are ignored."""

    training: Annotated[_Section, Field(min_length=1)]
    validation: _Section = []
    test: _Section = []
    labels: Annotated[dict[NonNegativeInt, str], BeforeValidator(_few)] = {}


def read_datalist(root: str | Path, datalist: str | Path, *, labelled: bool) -> Datalist:
    """Read and check one list; an error names file, entry, rule and value.

    Args:
        root: folder that the paths in the list are relative to; none may lead out of it.
        datalist: the JSON file; a relative path is meant from `root`.
        labelled: whether training and validation entries need a label. Test entries without one are left out, as
            the published BTCV list names test images whose labels are not public.
    """
    base = Path(os.path.abspath(root))
    path = base / datalist
    listed = _read_json(path)
    real = cache(os.path.realpath)
    cases = {
        section: tuple(
            _case(base, f"{path}: {section}.{number}", entry, labelled, real)
            for number, entry in enumerate(getattr(listed, section))
            if section != "test" or not labelled or entry.label
        )
        for section in ("training", "validation", "test")
    }
    _check_files(path, cases, real)
    labels = {value: shown(name) for value, name in listed.labels.items()}
    return Datalist(path, **_unique_ids(cases, base), labels=labels)


def read_unlabelled(sources: Iterable[Source]) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Training and validation cases of all sources together; two may not share a volume, one must have validation."""
    training: list[Case] = []
    validation: list[Case] = []
    owner: dict[str, Datalist] = {}
    for source in sources:
        listed = read_datalist(source.root, source.datalist, labelled=False)
        for case in (*listed.training, *listed.validation):
            other = owner.setdefault(os.path.realpath(case.image), listed)
            if other is not listed:
                raise UserError(f"{listed.path}: {case.image} is also in {other.path}; a volume belongs to one source")
        training += listed.training
        validation += listed.validation
    if not validation:
        raise UserError(f"{listed.path}: 'validation' must list a volume in at least one pretraining source")
    return tuple(training), tuple(validation)


def read_labelled(cohort: LabelledCohort, sizes: Sequence[int]) -> Splits:
    """The splits of the sizes asked for.

    Each must have as many training volumes as its name says, and no class beyond those of the cohort; validation and
    test volumes must be the same in all. A pool must have as many subjects as the largest size.
    """
    lists: dict[int, Datalist] = {}
    if cohort.pool:
        pool = read_datalist(cohort.root, cohort.pool, labelled=True)
        lists[len({subject_of(case) for case in pool.training})] = pool
        if max(sizes) > max(lists):
            raise UserError(f"{pool.path}: {max(sizes)} subjects are to be drawn from a pool of {max(lists)}")
    for size in () if cohort.pool else sizes:
        split = (cohort.splits or {})[size]
        if isinstance(split, str):
            lists[size] = read_datalist(cohort.root, split, labelled=True)
        else:
            assert cohort.datalist is not None
            lists[size] = _select(read_datalist(cohort.root, cohort.datalist, labelled=True), split, size)
    first = next(iter(lists.values()))
    for size, listed in lists.items():
        if not cohort.pool and len(listed.training) != size:
            raise UserError(f"{listed.path}: the split of {size} volumes lists {len(listed.training)} for training")
        for section in ("validation", "test"):
            files = [[(case.image, case.label) for case in getattr(one, section)] for one in (listed, first)]
            if files[0] != files[1]:
                raise UserError(f"{listed.path}: '{section}' differs from that of {first.path}; splits must share it")
        if not listed.validation:
            raise UserError(f"{listed.path}: 'validation' must list at least one labelled volume")
        beyond = sorted(value for value in listed.labels if value >= cohort.classes)
        if beyond:
            raise UserError(f"{listed.path}: labels {beyond} are beyond the {cohort.classes} classes of the study")
    organs = tuple(first.labels.get(value, f"label {value}") for value in range(1, cohort.classes))
    training = {size: listed.training for size, listed in lists.items()}
    return Splits(training, first.validation, first.test, organs, pool=cohort.pool is not None)


def subject_of(case: Case) -> str:
    """The patient of a case."""
    return case.subject or case.id


def check_held_out(unlabelled: Iterable[Case], splits: Splits) -> None:
    """Refuse labelled validation and test volumes among the unlabelled ones: the encoder would have seen them."""
    seen = {os.path.realpath(case.image) for case in unlabelled}
    for case in (*splits.validation, *splits.test):
        if os.path.realpath(case.image) in seen:
            raise UserError(f"{case.image}: a labelled validation or test volume is among the unlabelled ones")


def stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def _read_json(path: Path) -> _Json:
    try:
        return _Json.model_validate_json(read_file(path, _MOST_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot read the datalist: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise UserError(f"{path}: not valid JSON: {first['ctx']['error']}") from None
        key = ".".join(shown(part, 80) for part in first["loc"] if part != "[key]")
        rule = first["msg"].removeprefix("Value error, ")
        place = f"{path}: {key}" if key else str(path)
        raise UserError(f"{place}: {rule[0].lower()}{rule[1:]}, got {reprlib.repr(first['input'])}") from None


def _case(base: Path, place: str, entry: _Entry, labelled: bool, real: Callable[[str], str]) -> Case:
    if labelled and not entry.label:
        raise UserError(f"{place}: needs a 'label', got only {shown(entry.image)}")
    inside = []
    for key in ("image", "label") if labelled else ("image",):
        path = getattr(entry, key)
        if BREAKS.search(path) or not path.endswith(SUFFIXES):
            raise UserError(f"{place}.{key}: '{shown(path)}' must end in .nii or .nii.gz, without control characters")
        target = os.path.normpath(os.path.join(base, path))
        # The root may itself be a link. What counts for a link inside of it is the place that it leads to.
        if not real(target).startswith(os.path.join(real(str(base)), "")):
            raise UserError(f"{place}.{key}: {shown(path)} leaves the root {base}")
        inside.append(Path(target))
    return Case(stem(inside[0]), inside[0], inside[1] if labelled else None)


def _check_files(path: Path, cases: dict[str, tuple[Case, ...]], real: Callable[[str], str]) -> None:
    """Refuse images that are listed twice, also by a link to the other one, and files that do not exist."""
    where: dict[str, str] = {}
    for section, case in ((section, case) for section, listed in cases.items() for case in listed):
        if before := where.get(file := real(str(case.image))):
            raise UserError(f"{path}: {case.image} is listed twice, in '{before}' and in '{section}'")
        where[file] = section
    for volume in (volume for listed in cases.values() for case in listed for volume in (case.image, case.label)):
        if volume and not os.path.isfile(volume):
            raise UserError(f"{path}: no such file: {shown(volume)}")


def _unique_ids(cases: dict[str, tuple[Case, ...]], base: Path) -> dict[str, tuple[Case, ...]]:
    """A case is called by its file name, or by its path below the root where the list has that name twice."""
    count = Counter(case.id for listed in cases.values() for case in listed)

    def named(case: Case) -> Case:
        return case if count[case.id] == 1 else replace(case, id=os.path.relpath(case.image, base))

    return {section: tuple(map(named, listed)) for section, listed in cases.items()}


def _select(listed: Datalist, ids: Sequence[str], size: int) -> Datalist:
    """The training cases named by ids; `img0001..img0006` is a range over the trailing number."""
    by_id = {case.id: case for case in listed.training}
    wanted = [name for entry in ids for name in _expand(entry)]
    unknown = [name for name in wanted if name not in by_id]
    if unknown:
        raise UserError(f"{listed.path}: splits.{size}: no training volume has the id {unknown[0]!r}")
    return replace(listed, training=tuple(by_id[name] for name in dict.fromkeys(wanted)))


def _expand(entry: str) -> list[str]:
    match = re.fullmatch(r"(.*?)(\d+)\.\.(.*?)(\d+)", entry)
    if not match or match[1] != match[3]:
        return [entry]
    width = len(match[2])
    return [f"{match[1]}{number:0{width}d}" for number in range(int(match[2]), int(match[4]) + 1)]
