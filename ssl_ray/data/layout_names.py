"""What the names of files and folders say: whether a file is a scan or a label map, of what kind, and whose it is."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from ssl_ray.data.datalist import stem

Key = tuple[str, ...]
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


def is_label_map(path: PurePosixPath) -> bool:
    """Whether a file is a label map by its name, or by the nearest folder that says what it holds."""
    nearest = next(filter(None, map(_holds, reversed(path.parts[:-1]))), "")
    return bool(_LABEL_NAME.search(stem(path))) or nearest == "label"


def _holds(folder: str) -> str:
    """What a folder holds by its name: label, image, or "" where it does not say."""
    match = _FOLDER.match(folder)
    return "label" if _LABEL_FOLDER.search(folder) else (match and match.lastgroup) or ""


def kinds_of(files: Iterable[PurePosixPath]) -> dict[PurePosixPath, str]:
    """What each scan among the files is if it is no CT, by its name: t1, FLAIR, or "" where it does not say."""
    scans = [path for path in files if not is_label_map(path)]
    return {path: match[1] if (match := _KIND.search(stem(path))) else "" for path in scans}


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
