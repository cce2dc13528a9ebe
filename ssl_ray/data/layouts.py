"""The layouts in which people keep CT: which file is a scan, which is its label map, whose it is, what is left out."""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath

from ssl_ray.data.datalist import DatasetJson, read_json, stem
from ssl_ray.data.layout_files import (
    OWN,
    Key,
    is_label_map,
    kinds_of,
    parents,
    patient_level,
    people_folders,
    shared_path,
    usable_files,
)
from ssl_ray.errors import UserError

Files = Sequence[PurePosixPath]
_TEST = re.compile(r"(?i)images?ts|test(ing)?")
_CHANNEL = re.compile(r"(.*)_(\d{4})")


@dataclass
class Scan:
    """One volume; paths are relative to the root. `test`: the layout itself keeps it for testing.

    `others` are its channels after the first, `image`: as many in every scan of a layout.
    """

    image: str
    label: str | None = None
    subject: str = ""
    test: bool = False
    others: tuple[str, ...] = ()


@dataclass
class Layout:
    """What a folder holds.

    `subjects` says how patients are told apart, `organs` names label values, `left_out` has a reason by file, `masks`
    the masks, by value, out of which a label map of `scans` is still to be made, and `notes` what else is to be known.
    """

    name: str
    subjects: str = "each scan counts as a patient of its own"
    scans: list[Scan] = field(default_factory=list)
    organs: dict[int, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    masks: dict[str, dict[int, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_layout(folder: Path) -> Layout:
    """What `folder` holds, by the first layout that fits; no voxels are read.

    A UserError where there is no image, with what there is instead; where a dataset.json cannot be understood; and
    where there is one further down, as label values of two data sets need not mean the same.
    """
    files, left_out = usable_files(folder)
    dataset = read_json(path, DatasetJson) if (path := folder / "dataset.json").is_file() else None
    for below in sorted({path.parent.parent for path in files} - {PurePosixPath(".")}):
        if (folder / below / "dataset.json").is_file():
            raise UserError(f"{folder}: {below} is a data set with labels of its own; make lists of each by itself")
    found = _totalsegmentator(files) or _nnunet(files) or _decathlon(files, dataset) or _bids(files) or _plain(files)
    found.left_out = left_out | found.left_out
    if dataset and not found.organs:
        found.organs = dataset.organs(path)
    for scan in found.scans:
        scan.test |= any(map(_TEST.fullmatch, PurePosixPath(scan.image).parts[:-1]))
        scan.test &= scan.label is not None
    if not found.scans:
        kinds = sorted({*kinds_of(files).values()})
        if len(kinds) > 1 and "" not in kinds:
            rule = "keep those of one in a folder, or, for channels of one volume, write a list with `image: [a, b]`"
            raise UserError(f"{folder}: has no CT but scans of several kinds, {', '.join(kinds)}: {rule}")
        why = "".join(f"; {name}: {reason}" for name, reason in list(found.left_out.items())[:3])
        raise UserError(f"{folder}: no image (.nii or .nii.gz) in it{why}")
    return found


def _totalsegmentator(files: Files) -> Layout | None:
    """s0001/ct.nii.gz and s0001/segmentations/liver.nii.gz: a mask for each organ."""
    images = {path.parent: path for path in files if stem(path) == "ct"}
    masks: dict[PurePosixPath, dict[str, str]] = defaultdict(dict)
    for path in files:
        if path.parent.name == "segmentations" and path.parent.parent in images:
            masks[path.parent.parent][stem(path)] = str(path)
    if not masks:
        return None
    names = sorted({name for found in masks.values() for name in found})
    found = Layout("TotalSegmentator", "by the folder of the scan")
    found.organs = dict(enumerate(["background", *names]))
    for place, image in images.items():
        label = f"{OWN}/{place}.nii.gz"
        if not (missing := [name for name in names if name not in masks[place]]):
            found.masks[label] = {value: masks[place][name] for value, name in found.organs.items() if value}
        elif masks[place]:
            why = f"has no mask of {len(missing)} organs, e.g. {missing[0]}; its scan is listed without label"
            found.left_out[f"{place}/segmentations/"] = why
        found.scans.append(Scan(str(image), label if label in found.masks else None, str(place)))
    known = {*images.values(), *(PurePosixPath(path) for organs in masks.values() for path in organs.values())}
    found.left_out |= {str(path): "neither ct.nii.gz nor a mask beside one" for path in files if path not in known}
    return found


def _nnunet(files: Files) -> Layout | None:
    """imagesTr/case_0000.nii.gz and labelsTr/case.nii.gz; imagesTs and labelsTs are for testing."""
    found = Layout("nnU-Net")
    images, labels = _told_apart(files, found.left_out)
    inside = {path for path in images if path.parent.name.startswith("images")}  # others lie beside, unlabelled
    cases = {path: match.groups() for path in images if (match := _CHANNEL.fullmatch(stem(path)))}
    first = {(path.parent, name) for path, (name, channel) in cases.items() if channel == "0000"}
    cased = [path for path in inside if path in cases]
    names, labelled = {cases[path][0] for path in cased}, {stem(path) for path in labels}
    numbered = any(stem(path) in labelled for path in cased)  # the digits are a volume's number
    if numbered or not (labelled & names or len(names) > 1):
        return None
    if not any((path.parent, cases[path][0]) in first for path in cased):
        return None
    scans: dict[tuple[PurePosixPath, str], dict[str, str]] = {key: {} for key in first}
    for path, (name, channel) in cases.items():
        scans.get((path.parent, name), {})[channel] = str(path)
    usual = Counter(tuple(sorted(channels)) for channels in scans.values()).most_common(1)[0][0]
    listed: dict[PurePosixPath, tuple[str, ...]] = {}  # first channels -> the others
    for path in images:
        name, channel = cases.get(path, ("", ""))
        mine = scans.get((path.parent, name), {})
        needed = usual if mine else usual[1:]  # an image without a channel in its name is the only one of its scan
        if path in inside and not channel:
            found.left_out[str(path)] = "an image without a channel, such as _0000, in its name"
        elif path in inside and not mine:
            found.left_out[str(path)] = f"channel {channel} of a scan without channel 0000"
        elif missing := [one for one in needed if one not in mine]:
            found.left_out[str(path)] = f"of a scan without channel {missing[0]}, which most scans have"
        elif mine and channel not in usual:
            found.left_out[str(path)] = f"channel {channel} of a scan, which most scans do not have"
        elif not mine or channel == "0000":
            listed[path] = tuple(mine[one] for one in usual[1:])
    _pair(found, [*listed], _alike([*listed], labels, lambda path: (*parents(path), stem(path).removesuffix("_0000"))))
    for scan in found.scans:
        scan.others = listed[PurePosixPath(scan.image)]
    return found


def _decathlon(files: Files, dataset: DatasetJson | None) -> Layout | None:
    """A dataset.json that lists the volumes."""
    if not dataset or not dataset.training:
        return None
    found = Layout("Decathlon, by its dataset.json")
    there = {str(path) for path in files}
    scans: dict[str, Scan] = {}
    sections = dataset.training, dataset.validation, dataset.test
    usual = Counter(len(entry.image) for section in sections for entry in section).most_common(1)[0][0]
    for section in sections:
        for entry in section:
            image, *others = (posixpath.normpath(path) for path in entry.image)
            label = posixpath.normpath(entry.label) if entry.label else None
            further, others = others[usual - 1 :], others[: usual - 1]
            found.left_out |= dict.fromkeys(further, f"a further channel of a scan; most scans have {usual}")
            missing = {path for path in (image, *others, label) if path and path not in there}
            found.left_out |= dict.fromkeys(missing, "dataset.json lists it, but no such file can be listed")
            if len(others) < usual - 1 or not missing.isdisjoint(others):
                why = f"of a scan that has not all channels; most scans have {usual}"
                found.left_out |= dict.fromkeys({image, *others} - missing, why)
            elif image not in missing:
                label = None if label in missing else label
                test = section is dataset.test
                scans.setdefault(image, Scan(image, label, entry.subject, test, tuple(others)))
    found.scans = list(scans.values())
    listed = {path for scan in found.scans for path in (scan.image, scan.label, *scan.others)}
    found.left_out = {path: why for path, why in found.left_out.items() if path not in listed}  # another entry has it
    found.left_out |= dict.fromkeys(sorted(there - listed - found.left_out.keys()), "not in dataset.json")
    return found


def _bids(files: Files) -> Layout | None:
    """sub-01/ses-02/ct/sub-01_ses-02_ct.nii.gz, and its label under derivatives/ with the same entities or more."""
    if not any(_patient(path) for path in files):
        return None
    found = Layout("BIDS", "by the folder sub-…")
    images, labels = _told_apart(files, found.left_out)
    entities = {path: {*stem(path).split("_")[:-1], *_patient(path)} for path in files}
    owners = _alike(images, labels, _patient)
    for label, of_patient in owners.items():
        fitting = [image for image in of_patient if entities[image] <= entities[label]]
        most = max((len(entities[image]) for image in fitting), default=0)
        owners[label] = [image for image in fitting if len(entities[image]) == most]
    _pair(found, images, owners)
    for scan in found.scans:
        scan.subject = "".join(_patient(PurePosixPath(scan.image))[:1])
    return found


def _plain(files: Files) -> Layout:
    """Any folder: label maps are known by their folder or name, and belong to the image of the same name."""
    found = Layout("plain folder")
    images, labels = _told_apart(files, found.left_out)
    owners = _alike(images, labels, shared_path)
    if kind := "".join({*kinds_of(images).values()}):  # that of all; the label of x_t1 may also be called x
        longer = {label.with_name(f"{stem(label)}_{kind}"): label for label in labels}
        of_kind = _alike(images, [*longer], shared_path)
        owners |= {label: of_kind[name] for name, label in longer.items() if not owners[label]}
    _pair(found, images, owners)
    folders = [people_folders(PurePosixPath(scan.image)) for scan in found.scans]
    # Folders that all scans share are no patient's.
    shared = len([*takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))])
    level, doubt = patient_level([parts[shared:] for parts in folders])
    for scan, parts in zip(found.scans, folders, strict=True):
        scan.subject = "".join(parts[shared + level :][:1])
    if any(scan.subject for scan in found.scans):
        found.subjects = f"by the folder, where a scan lies in one{doubt}"
    return found


def _told_apart(files: Files, left_out: dict[str, str]) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """Images and label maps, by the name or the nearest folder that says which.

    Scans that are no CT by their names are left out, unless all are of the same kind.
    """
    labels = [path for path in files if is_label_map(path)]
    kinds = kinds_of(files)
    if len({*kinds.values()}) < 2:
        return [*kinds], labels
    left_out |= {str(path): f"no CT by its name, which ends in {kind}" for path, kind in kinds.items() if kind}
    return [path for path, kind in kinds.items() if not kind], labels


def _alike(images: Files, labels: Files, key: Callable[[PurePosixPath], Key]) -> dict[PurePosixPath, Files]:
    """Of each label, the images with the same key."""
    same: dict[Key, list[PurePosixPath]] = defaultdict(list)
    for image in images:
        same[key(image)].append(image)
    return {label: same[key(label)] for label in labels}


def _pair(found: Layout, images: Files, owners: Mapping[PurePosixPath, Files]) -> None:
    """Add the scans with their labels; `owners` are the images that a label may be of. What is unclear is left out."""
    claims: dict[PurePosixPath, list[PurePosixPath]] = defaultdict(list)
    for label, fitting in owners.items():
        fitting = [image for image in fitting if stem(image) == stem(label)] or fitting
        if len(fitting) == 1:
            claims[fitting[0]].append(label)
        elif fitting:
            found.left_out[str(label)] = f"a label map that could be of {fitting[0]} or of {fitting[1]}"
        else:
            found.left_out[str(label)] = "a label map without a usable image of its name"
    for image in images:
        mine = claims[image]
        chosen = mine if len(mine) == 1 else [one for one in mine if stem(one) == stem(image)]
        scan = Scan(str(image), str(chosen[0]) if len(chosen) == 1 else None)
        others = [str(one) for one in mine if str(one) != scan.label]
        found.left_out |= dict.fromkeys(others, f"one of {len(mine)} label maps of {image}")
        found.scans.append(scan)


def _patient(path: PurePosixPath) -> Key:
    """BIDS's folders of patient and session."""
    return tuple(part for part in path.parts[:-1] if part.startswith(("sub-", "ses-")))
