"""Decathlon JSON -> cases and splits, checked.

Format: Medical Segmentation Decathlon (Antonelli et al., 2022) as the MONAI tutorials publish it: the lists
`training`, `validation` and `test`, whose entries are paths or `{"image": ..., "label": ...}`, and a `labels` mapping.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ssl_ray.config.schema import LabelledCohort, Source
from ssl_ray.storage.files import read_file
from ssl_ray.text import BREAKS, shown

SECTIONS = ("training", "validation", "test")
SUFFIXES = (".nii.gz", ".nii")
_MOST_BYTES, _MOST_ENTRIES = 20_000_000, 250_000
"""Of a list and of a section: terabytes of volumes, and still read within half a gigabyte and a minute."""


@dataclass(frozen=True)
class Case:
    """One volume: a name for people, its image and, where there is one, its label."""

    id: str
    image: Path
    label: Path | None = None


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
    """The labelled cohort: nested training splits that share validation and test cases."""

    training: dict[int, tuple[Case, ...]]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]
    organs: tuple[str, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every labelled case once."""
        every = [case for cases in self.training.values() for case in cases]
        return tuple({case.image: case for case in (*every, *self.validation, *self.test)}.values())


def read_datalist(root: str | Path, datalist: str | Path, *, labelled: bool) -> Datalist:
    """Read and check one list.

    Args:
        root: folder that the paths in the list are relative to; none may lead out of it.
        datalist: the JSON file; a relative path is meant from `root`.
        labelled: whether training and validation entries need a label. Test entries without one are left out, as
            the published BTCV list names test images whose labels are not public.

    Raises:
        ValueError: naming file, entry, rule and value.
    """
    base = Path(os.path.abspath(root))
    path = base / datalist
    tree = _read_json(path)
    real = _resolver()
    cases = {
        name: tuple(
            _case(base, path, place, entry, labelled, real)
            for place, entry in _entries(tree, name, path)
            if name != "test" or not labelled or "label" in entry
        )
        for name in SECTIONS
    }
    _check_repeats(path, cases, real)
    _check_exists(path, cases)
    named = _unique_ids(cases, base)
    if not named["training"]:
        raise ValueError(f"{path}: 'training' must list at least one volume")
    return Datalist(path, named["training"], named["validation"], named["test"], _labels(tree, path))


def read_unlabelled(sources: Iterable[Source]) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Training and validation cases of all sources together.

    Raises:
        ValueError: also when two sources share a volume, or none has a validation volume.
    """
    training: list[Case] = []
    validation: list[Case] = []
    owner: dict[str, Datalist] = {}
    for source in sources:
        listed = read_datalist(source.root, source.datalist, labelled=False)
        for case in (*listed.training, *listed.validation):
            other = owner.setdefault(os.path.realpath(case.image), listed)
            if other is not listed:
                raise ValueError(f"{listed.path}: {case.image} is also in {other.path}; a volume belongs to one source")
        training += listed.training
        validation += listed.validation
    if not validation:
        raise ValueError(f"{listed.path}: 'validation' must list a volume in at least one pretraining source")
    return tuple(training), tuple(validation)


def read_labelled(cohort: LabelledCohort, sizes: Sequence[int]) -> Splits:
    """The splits of the sizes asked for.

    Raises:
        ValueError: also when a split does not have as many volumes as its name says, when the splits differ in
            validation or test volumes, or when a list names more classes than the cohort has.
    """
    lists: dict[int, Datalist] = {}
    for size in sizes:
        split = cohort.splits[size]
        if isinstance(split, str):
            lists[size] = read_datalist(cohort.root, split, labelled=True)
        else:
            assert cohort.datalist is not None
            lists[size] = _select(read_datalist(cohort.root, cohort.datalist, labelled=True), split, size)
    first = lists[sizes[0]]
    for size, listed in lists.items():
        if len(listed.training) != size:
            raise ValueError(f"{listed.path}: the split of {size} volumes lists {len(listed.training)} for training")
        for section in ("validation", "test"):
            if _files(getattr(listed, section)) != _files(getattr(first, section)):
                raise ValueError(f"{listed.path}: '{section}' differs from that of {first.path}; splits must share it")
        if not listed.validation:
            raise ValueError(f"{listed.path}: 'validation' must list at least one labelled volume")
        beyond = sorted(value for value in listed.labels if value >= cohort.classes)
        if beyond:
            raise ValueError(f"{listed.path}: labels {beyond} are beyond the {cohort.classes} classes of the study")
    organs = tuple(first.labels.get(value, f"label {value}") for value in range(1, cohort.classes))
    training = {size: listed.training for size, listed in lists.items()}
    return Splits(training, first.validation, first.test, organs)


def check_held_out(unlabelled: Iterable[Case], splits: Splits) -> None:
    """Refuse labelled validation and test volumes among the unlabelled ones: the encoder would have seen them.

    Raises:
        ValueError: naming the first such volume.
    """
    seen = {os.path.realpath(case.image) for case in unlabelled}
    for case in (*splits.validation, *splits.test):
        if os.path.realpath(case.image) in seen:
            raise ValueError(f"{case.image}: a labelled validation or test volume is among the unlabelled ones")


def stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def _files(cases: Iterable[Case]) -> list[tuple[Path, Path | None]]:
    return [(case.image, case.label) for case in cases]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(read_file(path, _MOST_BYTES).decode(), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise ValueError(f"{path}: cannot read the datalist: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a datalist is an object with the key 'training', got a {type(tree).__name__}")
    return tree


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a key that stands twice, of which JSON would silently keep the last."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice, 80)!r} stands twice")
    return tree


def _entries(tree: dict[str, Any], section: str, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    entries = tree.get(section, [])
    if not isinstance(entries, list):
        raise ValueError(f"{path}: {section}: must be a list, got {type(entries).__name__}")
    if len(entries) > _MOST_ENTRIES:
        raise ValueError(f"{path}: {section}: must list at most {_MOST_ENTRIES} volumes, got {len(entries)}")
    for number, entry in enumerate(entries):
        place = f"{section}[{number}]"
        fields = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, dict) or "image" not in fields:
            raise ValueError(f"{path}: {place}: must be a path or {{image, label}}, got {shown(entry, 80)}")
        for key in ("image", "label"):
            if key in fields and not _is_path(fields[key]):
                raise ValueError(f"{path}: {place}.{key}: must be a path, got {str(fields[key])[:80]!r}")
        yield place, fields


def _is_path(value: Any) -> bool:
    """Whether the file system and one line of a message can take it: no other type, no control character."""
    return isinstance(value, str) and bool(value) and not BREAKS.search(value)


def _resolver() -> Callable[[str], str]:
    """`os.path.realpath` of normal paths that resolves each folder once: a list has many files in few folders."""
    folder = cache(os.path.realpath)

    def real(path: str) -> str:
        if os.path.islink(path):
            return os.path.realpath(path)
        above, name = os.path.split(path)
        return os.path.join(folder(above), name)

    return real


def _case(
    base: Path, path: Path, place: str, entry: dict[str, str], labelled: bool, real: Callable[[str], str]
) -> Case:
    if labelled and "label" not in entry:
        raise ValueError(f"{path}: {place}: needs a 'label', got only {shown(entry['image'])}")
    inside = {}
    for key in ("image", "label") if labelled else ("image",):
        target = os.path.normpath(os.path.join(base, entry[key]))
        # A link inside the root may point elsewhere only as a whole tree: what counts is where the file really is.
        if not _is_below(target, str(base)) or not _is_below(real(target), real(os.path.join(base, ""))):
            raise ValueError(f"{path}: {place}.{key}: {shown(entry[key])} leaves the root {base}")
        if not target.endswith(SUFFIXES):
            raise ValueError(f"{path}: {place}.{key}: {shown(entry[key])} must end in .nii or .nii.gz")
        inside[key] = Path(target)
    return Case(stem(inside["image"]), inside["image"], inside.get("label"))


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _check_repeats(path: Path, cases: dict[str, tuple[Case, ...]], real: Callable[[str], str]) -> None:
    where: dict[str, str] = {}
    for section, listed in cases.items():
        for case in listed:
            file = real(str(case.image))  # a link is no other volume
            before = where.get(file)
            if before == section:
                raise ValueError(f"{path}: {section}: {case.image} is listed twice")
            if before:
                raise ValueError(f"{path}: {case.image} is in both '{before}' and '{section}'")
            where[file] = section


def _check_exists(path: Path, cases: dict[str, tuple[Case, ...]]) -> None:
    files = [file for listed in cases.values() for case in listed for file in (case.image, case.label) if file]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(files)} files)" if len(missing) > 1 else ""
        raise ValueError(f"{path}: no such file: {shown(missing[0])}{more}")


def _unique_ids(cases: dict[str, tuple[Case, ...]], base: Path) -> dict[str, tuple[Case, ...]]:
    """File names as ids, or the path below the root where two files have the same name (.nii beside .nii.gz: all)."""

    def names(case: Case) -> tuple[str, str, str]:
        below = str(case.image)[len(os.path.join(base, "")) :]
        return case.id, os.path.join(os.path.dirname(below), case.id), below

    count = Counter(name for listed in cases.values() for case in listed for name in set(names(case)))

    def name(case: Case) -> Case:
        return case if count[case.id] == 1 else replace(case, id=next(name for name in names(case) if count[name] == 1))

    return {section: tuple(name(case) for case in listed) for section, listed in cases.items()}


def _labels(tree: dict[str, Any], path: Path) -> dict[int, str]:
    labels = tree.get("labels", {})
    try:
        named = {int(value): shown(name) for value, name in labels.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path}: labels: must map label values to names, got {shown(labels, 80)}") from error
    if min(named, default=0) < 0:
        raise ValueError(f"{path}: labels: must map label values to names, none negative, got {min(named)}")
    return named


def _select(listed: Datalist, ids: Sequence[str], size: int) -> Datalist:
    """The training cases named by ids; `img0001..img0006` is a range over the trailing number."""
    by_id = {case.id: case for case in listed.training}
    wanted = [name for entry in ids for name in _expand(entry)]
    unknown = [name for name in wanted if name not in by_id]
    if unknown:
        raise ValueError(f"{listed.path}: splits.{size}: no training volume has the id {unknown[0]!r}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"{listed.path}: splits.{size}: an id stands twice")
    return replace(listed, training=tuple(by_id[name] for name in wanted))


def _expand(entry: str) -> list[str]:
    match = re.fullmatch(r"(.*?)(\d+)\.\.(.*?)(\d+)", entry)
    if not match or match[1] != match[3]:
        return [entry]
    width = len(match[2])
    return [f"{match[1]}{number:0{width}d}" for number in range(int(match[2]), int(match[4]) + 1)]
