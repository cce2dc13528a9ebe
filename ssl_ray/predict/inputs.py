"""Which volumes a command is about: files, folders and datalists, as cases with names of their own; and one, read."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ssl_ray.config.schema import Preparation
from ssl_ray.data.datalist import Case, is_nifti, read_datalist, stem
from ssl_ray.data.layout_files import is_label_map, usable_files
from ssl_ray.data.normalise import CanonicalVolume, prepare
from ssl_ray.data.prepare import read_case
from ssl_ray.errors import UserError
from ssl_ray.text import shown

Part = Literal["training", "validation", "test"]
_CHANNEL = re.compile(r"(?P<name>.+)_(?P<channel>\d{4})")
"""nnU-Net's name of an image: `liver_003_0000` is the first channel of `liver_003`."""


def cases_of(
    inputs: Sequence[Path], channels: int, part: Part | None = None, output: Path | None = None
) -> tuple[list[Case], dict[str, str]]:
    """The volumes to read, each once, by name, and files of the folders that are left out, with the reason.

    A folder stands for all images below it, but for those below `output`, which may be label maps of an earlier run. A
    file is a volume, or a channel of one where its name ends as nnU-Net's do, in `_0000`, `_0001`; a datalist says
    which images are one volume, and `part` which of its volumes are meant. The name, which may hold folders, is that of
    the file without suffix and channel; a part's volumes are called as they are among all of their list, as the
    datalist gives the names to `pairs_of`, too.

    Raises:
        UserError: for an input that is not there, no volume at all, another number of channels, names that collide, and
            a `part` where no input is a datalist.
    """
    if part and not any(place.suffix == ".json" for place in inputs):
        raise UserError(f"--part {part}: is a part of a datalist (.json), and {', '.join(map(str, inputs))} is none")
    files: list[Path] = []
    cases: list[Case] = []
    others, meant = set[Path](), set[Path]()  # images of the parts of lists
    left_out: dict[str, str] = {}
    for place in inputs:
        if place.is_dir():
            found, unusable = _images_below(place, channels, output)
            files += [place / path for path in found]
            left_out |= {str(place / path): why for path, why in unusable.items()}
        elif place.suffix == ".json":
            for one, listed in listed_in(place).items():
                cases += listed
                (meant if part in (None, one) else others).update(case.image for case in listed)
        elif not place.exists():
            raise UserError(f"{place}: no such file or folder")
        elif is_nifti(place.name):
            files.append(place)
        else:
            raise UserError(f"{place}: must be a folder, a .nii or .nii.gz file, or a datalist (.json)")
    single = _grouped(files, channels)
    others -= meant | {case.image for case in single}
    cases = [case for case in named([*cases, *single]) if case.image not in others]
    if not cases:
        why = "".join(f"; {shown(path)}: {reason}" for path, reason in list(left_out.items())[:3])
        raise UserError(f"{', '.join(map(str, inputs))}: no volume in it{why}")
    for case in cases:
        if len(case.images) != channels:
            raise UserError(
                f"{case.image}: the model takes {channels} images a volume, got {len(case.images)}: several are told "
                "by a datalist, or by names that end in _0000, _0001 and so on"
            )
    return cases, left_out


def _images_below(place: Path, channels: int, output: Path | None) -> tuple[list[PurePosixPath], dict[str, str]]:
    """The images below a folder, and what is left out with the reason; both relative to it."""
    found, left_out = usable_files(place)
    root, written = place.resolve(), output and output.resolve()
    if written and written != root and written.is_relative_to(root):
        inside = PurePosixPath(written.relative_to(root))
        here = [path for path in found if inside not in path.parents]
        if len(here) < len(found):
            left_out = {path: why for path, why in left_out.items() if inside not in PurePosixPath(path).parents}
            left_out[str(inside)] = "the folder that the output goes to"
        found = here
    labels = [path for path in found if is_label_map(root.name / path)]
    left_out |= {str(path): "a label map, by its name or folder" for path in labels}
    images = [path for path in found if path not in labels]
    further = _further_channels(images) if channels == 1 else set()
    left_out |= {str(path): "a further channel of a volume, of which the model takes one" for path in further}
    return [path for path in images if path not in further], left_out


def _further_channels(images: Sequence[PurePosixPath]) -> set[PurePosixPath]:
    """Those of nnU-Net's second channel and up; where one name alone has numbers, they may be those of patients."""
    matches = {path: match for path in images if (match := _CHANNEL.fullmatch(stem(path)))}
    first = {(path.parent, match["name"]) for path, match in matches.items() if match["channel"] == "0000"}
    if len(first) < 2:
        return set()
    others = {path: match["name"] for path, match in matches.items() if match["channel"] != "0000"}
    return {path for path, name in others.items() if (path.parent, name) in first}


def listed_in(place: Path) -> dict[Part, tuple[Case, ...]]:
    """The volumes of a datalist by part, whose labels need not be there."""
    listed = read_datalist(place.parent, place.name, labelled=None)
    return {"training": listed.training, "validation": listed.validation, "test": listed.test}


def _grouped(files: Sequence[Path], channels: int) -> list[Case]:
    """A case for each file, or, where a volume has several, for each group that differs in its channel alone."""
    groups: dict[Path, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(Path(os.path.abspath(file)) for file in files):
        match = _CHANNEL.fullmatch(stem(path)) if channels > 1 else None
        groups[path.with_name(match["name"]) if match else path].append(path)
    return [Case(stem(one[0]), one[0], others=tuple(one[1:])) for one in (sorted(group) for group in groups.values())]


def named(cases: Sequence[Case]) -> list[Case]:
    """Each case once, under the name of its output: its file's, with its folders where several are called the same."""
    cases = list({case.image: case for case in cases}.values())
    names = [stem(case.image).removesuffix("_0000") for case in cases]
    count, found = Counter(names), dict[str, Case]()
    base = Path(os.path.commonpath([case.image.parent for case in cases])) if cases else Path()
    for name, case in zip(names, cases, strict=True):
        own = name if count[name] == 1 else (case.image.parent.relative_to(base) / name).as_posix()
        if own in found:
            raise UserError(f"{case.image}: would have the output {own}.nii.gz, as {found[own].image} has")
        found[own] = replace(case, id=own)
    return [*found.values()]


def read_prepared(case: Case, preparation: Preparation) -> tuple[CanonicalVolume, Any]:
    """The canonical volume of a case, and nibabel's header of its first image; a UserError names the file."""
    first, _, others = read_case(replace(case, label=None))
    try:
        return prepare(first, None, preparation, others), first.header
    except UserError as error:
        raise UserError(f"{' and '.join(map(str, case.images))}: {error}") from error
