"""The files of a folder that a list may name, why it may not name the others, and what the names of all say."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from ssl_ray.data.datalist import is_nifti, stem
from ssl_ray.text import BREAKS, shown

Key = tuple[str, ...]
OWN = "ssl_ray_labels"
"""Folder under the root for label maps that we make out of masks."""
_IMAGES = re.compile(r"(?i)\.(mha|mhd|nrrd|img|mgz)$|\.nii")
"""Names of other formats, and of a NIfTI that is still being copied or packed in another way."""
_LINKED_FOLDER = "a link to a folder, which is not followed; copy the folder, or write lists where it is"
_DICOM = re.compile(r"(?i)\.(dcm|dicom|ima)$|^[^.]*$|^[\d.]+$")
"""Names that files of a DICOM series have; a few of those without a suffix are looked into."""
_PATIENT = re.compile(r"(?i)(patients?|pat|pt|subjects?|subj?|cases?)[ _-]*\d+")
"""What folders of a patient are often called; p1 and s1 may be a phase and a session."""
_LABEL = r"labels?|lbl|d?seg|segm|segmentations?|masks?|msk|gt|annotations?|rtstruct|rtss"
_FOLDER = re.compile(
    rf"^(?:(?P<label>(?i:{_LABEL}|derivatives))|(?P<image>(?i:images?|img|rawdata))|(?i:scans?|ct|volumes?))(?![a-z])"
)
"""How the folders of label maps and of images begin: labelsTr, images_v2; not `labelled`."""
_LABEL_FOLDER = re.compile(rf"(?i)(?<!no)(?<!without)[_\- ]({_LABEL})$")
"""How a folder of label maps may end instead: Lung_Mask; not `no_label`."""
_LABEL_NAME = re.compile(rf"(?i)^({_LABEL})(?![a-z])|[_\-. ]({_LABEL})[_\-]?\d*$")
"""Names of label maps that lie among the images: label0001, segmentation-3, s1_seg."""
_WORDS = re.compile(rf"(?i)(?<![a-z])({_LABEL}|images?|img|imaging|volumes?|vol|scans?|ct|combined)(?![a-z])")
"""What an image and its label may be called beside what they share."""
_PART = re.compile(
    r"(?i)(tr|ts|va|train(ing)?|test(ing)?|val(idation)?|(un)?label+ed|data)?[ _-]*((batch|part)[ _-]*\d+)?"
)
"""What folders are called that hold a part of the volumes, not one patient's; the first three with `images` before."""
_KIND = re.compile(r"(?i)(?:^|_)(T[12]w?|FLAIR|PDw|bold|dwi|adc|sbref|swi|pet|suv|mri?|cbct|(?<!low_)(?<!full_)dose)$")
"""Names, or BIDS's suffixes, of scans that are no CT."""


def usable_files(folder: Path) -> tuple[list[PurePosixPath], dict[str, str]]:
    """NIfTI files below `folder`, relative to it and sorted, and what is left out, each with the reason."""
    found: list[PurePosixPath] = []
    left_out: dict[str, str] = {}

    def cannot_read(error: OSError) -> None:
        left_out[f"{Path(error.filename).relative_to(folder).as_posix()}/"] = f"cannot read: {error.strerror}"

    for place, folders, names in os.walk(folder, onerror=cannot_read):
        here = PurePosixPath(Path(place).relative_to(folder))
        left_out |= {f"{here / name}/": _LINKED_FOLDER for name in folders if os.path.islink(os.path.join(place, name))}
        folders[:] = sorted(name for name in folders if str(here / name) != OWN)
        found += [here / name for name in names if is_nifti(name)]
        others = [name for name in names if not is_nifti(name)]
        series = [name for name in others if _DICOM.search(name)]
        if any(_is_dicom(Path(place, name)) for name in sorted(series)[:9]):
            left_out[f"{here}/"] = "a DICOM series; convert it to NIfTI first, e.g. with dcm2niix"
        left_out |= {str(here / name): "no NIfTI file; convert it first" for name in others if _IMAGES.search(name)}
    first: dict[str, PurePosixPath] = {}
    root = os.path.join(os.path.realpath(folder), "")
    for path in sorted(found, key=lambda path: (os.path.islink(folder / path), path)):  # a file before its links
        real = os.path.realpath(folder / path)
        if why := _unfit(path, real, root):
            left_out[str(path)] = why
        elif (same := first.setdefault(real, path)) != path:
            left_out[str(path)] = f"a link to {same}"
    return sorted(first.values()), left_out


def patient_level(folders: Sequence[Sequence[str]]) -> tuple[int, str]:
    """Which of the folders above each scan is its patient's: the first, 0, or the second, 1, and what is in doubt.

    `2020/patient1` and `2021/patient1` are one patient if every scan has such a second folder. Where the same folder
    lies in several others, and no names say which of both levels is the patient, the text is for the summary.
    """
    tops: dict[str, set[str]] = defaultdict(set)
    for top, lower, *_ in (parts for parts in folders if len(parts) > 1):
        tops[lower].add(top)
    shared = next((lower for lower, above in sorted(tops.items()) if len(above) > 1), None)
    if shared is None or all(_PATIENT.fullmatch(parts[0]) for parts in folders if parts):
        return 0, ""
    if all(len(parts) > 1 and _PATIENT.fullmatch(parts[1]) for parts in folders):
        return 1, f" (the second one, as {shown(shared)} lies in several)"
    first, second, *_ = sorted(tops[shared])
    where = f"{shown(first)} and in {shown(second)}"
    return 0, f" (the first one, but {shown(shared)} lies in {where}: if it is one patient's, give --subject)"


def is_label_map(path: PurePosixPath) -> bool:
    """Whether a file is a label map by its name, or by the nearest folder that says what it holds."""
    nearest = next(filter(None, map(_holds, reversed(path.parts[:-1]))), "")
    return bool(_LABEL_NAME.search(stem(path))) or nearest == "label"


def _holds(folder: str) -> str:
    """What a folder holds by its name: label, image, or "" where it does not say."""
    match = _FOLDER.match(folder)
    return "label" if _LABEL_FOLDER.search(folder) else (match and match.lastgroup) or ""


def kinds_of(files: Iterable[PurePosixPath]) -> dict[PurePosixPath, str]:
    """What each scan among the files is if it is no CT, by its name: t1, flair, or "" where it does not say."""
    scans = [path for path in files if not is_label_map(path)]
    return {path: match[1].lower() if (match := _KIND.search(stem(path))) else "" for path in scans}


def parents(path: PurePosixPath) -> Key:
    """The folders of an image or its label, without what says which of the two it is."""
    names = [_LABEL_FOLDER.sub("", part) for part in path.parts[:-1]]
    return tuple(rest for name in names if (rest := _FOLDER.sub("", name).strip("_- ")))


def shared_path(path: PurePosixPath) -> Key:
    """What the folders, and the names, of an image and its label share."""
    return *parents(path), re.sub(r"[_\-. ]+", "_", _WORDS.sub("", stem(path))).strip("_")


def people_folders(path: PurePosixPath) -> list[str]:
    """The folders of an image that could be a patient's."""
    return [part for part in path.parts[:-1] if not _PART.fullmatch(_FOLDER.sub("", part).strip("_- "))]


def _unfit(path: PurePosixPath, real: str, root: str) -> str | None:
    """Why a list may not name the file `real` as `path`."""
    if path.name.startswith("._"):
        return "macOS's notes on another file"
    if BREAKS.search(str(path)):
        return "control characters in its name"
    if not os.path.isfile(real):
        return "not a regular file" if os.path.exists(real) else "a link that leads nowhere"
    outside = f"a link out of this folder, to {real}: copy it, or give a folder that holds both"
    return None if real.startswith(root) else outside


def _is_dicom(path: Path) -> bool:
    """By the suffix, or by the letters after the preamble (DICOM PS3.10, section 7.1)."""
    if path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
