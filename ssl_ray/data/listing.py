"""Datalists for a folder of scans: label maps out of masks, test and validation held out by patient, nested splits."""

import gzip
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from ssl_ray.console import track
from ssl_ray.data.datalist import stem
from ssl_ray.data.layout_files import OWN
from ssl_ray.data.layouts import Layout, Scan, read_layout
from ssl_ray.data.nifti import read_label
from ssl_ray.errors import UserError
from ssl_ray.storage.files import write_file
from ssl_ray.text import shown

_SHOWN = 5
"""Files that the summary names for one reason; the others are in the file `LEFT_OUT`."""
LEFT_OUT = "ssl_ray_left_out.txt"


def find_scans(folder: Path, subject: str | None = None) -> Layout:
    """The scans below a folder, each with its label and its patient; label maps are made where there are only masks.

    `subject` is a regular expression, whose first group that matches (or whole match) in an image's path below the
    folder is the patient; None: by the layout. A path that it does not match, no such folder, and one without scans, is
    a UserError.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = read_layout(folder)
    if subject is not None:
        _set_subjects(found, subject)
    if found.masks:
        failed = _merge_masks(folder, found.masks, found.organs)
        found.left_out |= failed
        for scan in found.scans:
            scan.label = None if scan.label in failed else scan.label
    return found


def summary(folder: Path, found: Layout) -> str:
    """What was found and what is left out, with the reason; what is too long for a screen is written to a file."""
    labelled = [scan for scan in found.scans if scan.label]
    people = len({person(scan) for scan in found.scans})
    organs = [name for value, name in found.organs.items() if value]
    named = f", organs: {shown(', '.join(organs), 120)}" if organs else ""
    tested = sum(scan.test for scan in labelled)
    named += f"; the folder keeps {tested} for testing (--test draws others)" if tested else ""
    others = max((len(scan.others) for scan in found.scans), default=0)
    volumes = f"volumes of {1 + others} images" if others else "images"
    lines = [
        f"{folder}: {found.name}: {len(found.scans)} {volumes}, {len(labelled)} of them with a label map{named}",
        f"{people} patients: {found.subjects} (--subject says otherwise)",
        *found.notes,
    ]
    reasons: dict[str, list[str]] = defaultdict(list)
    for path, why in found.left_out.items():
        reasons[why].append(shown(path))
    for why, paths in reasons.items():
        more = f", and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        lines.append(f"left out: {', '.join(paths[:_SHOWN])}{more}: {why}")
    if len(lines) > 40 or any(len(paths) > _SHOWN for paths in reasons.values()):
        text = "".join(f"{path}: {why}\n" for why, paths in reasons.items() for path in paths)
        write_file(folder / LEFT_OUT, text.encode())
        lines = [*lines[:40], f"all {len(found.left_out)} that are left out: {folder / LEFT_OUT}"]
    return "\n".join(lines)


def write_datalists(
    folder: Path,
    found: Layout,
    sizes: Sequence[int],
    validation: float,
    test: float,
    seed: int,
    folds: bool = False,
) -> dict[str, dict[str, int]]:
    """Write `unlabelled.json` and, for each size, `labelled_<n>.json`, or `labelled.json` with all labelled volumes.

    Patients are held out whole: all labelled scans of one are in one part, and their unlabelled scans are in no list.
    Splits are nested: each has the first volumes of one order. A share `validation` of the patients is held out, at
    least one, and `test` likewise; from 1 on it is a number of patients, and 0 stands for those whom the layout keeps
    for testing. With `folds`, everybody with a label is scored in one of them, and so held out of `unlabelled.json`.
    Where too few scans without a label are left, `unlabelled.json` has the labelled training scans, too, without their
    labels, and a note in `found` says so. Scans that get into no list are added to what `found` leaves out.

    Returns how many volumes each part of each file has. A UserError where there are too few for what is asked, or where
    another list is there; none is written then.
    """
    labelled, unlabelled = (_byperson(found, has_label, seed) for has_label in (True, False))
    if (sizes or test) and not labelled:
        raise UserError(f"{folder}: --splits and --test are about labelled volumes, but no image has a label")
    people = list(labelled)
    count = int(test) if test >= 1 else round(test * len(people)) or int(test > 0)
    tested = people[:count] if test else [one for one in people if any(scan.test for scan in labelled[one])]
    lists: dict[str, dict[str, list[Scan]]] = {}
    parts = _parts(labelled, validation, tested)
    for size in (sorted(sizes) or [len(parts["training"]) or 1]) if labelled else ():
        if not 0 < size <= len(parts["training"]):
            raise UserError(_too_few(folder, f"{size} labelled", parts, labelled))
        lists[f"labelled_{size}.json" if sizes else "labelled.json"] = parts | {"training": parts["training"][:size]}
    apart = ("training", "validation", "test") if folds else ("validation", "test")
    held_out = {person(scan) for part in apart for scan in parts.get(part, ())}
    kept_back = [scan.image for one in held_out.intersection(unlabelled) for scan in unlabelled.pop(one)]
    found.left_out |= dict.fromkeys(sorted(kept_back), "an unlabelled scan of a patient who is held out")
    free = _parts(unlabelled, validation, [])
    few = [scan.image for scan in free["validation"]]
    if not free["training"] and not folds:
        free = _with_training(found, unlabelled, parts["training"], validation)
    if sizes and not found.notes:
        beyond = [scan.image for scan in parts["training"][max(sizes) :]]
        found.left_out |= dict.fromkeys(beyond, "a labelled scan beyond the largest split")
    if free["training"]:
        lists["unlabelled.json"] = free
    elif not lists:
        raise UserError(_too_few(folder, "1 unlabelled", free, unlabelled))
    else:
        found.left_out |= dict.fromkeys(few, "too few unlabelled scans for training and validation")
    _write(folder, lists, found.organs)
    return {file: {part: len(scans) for part, scans in parts.items()} for file, parts in lists.items()}


def _merge_masks(folder: Path, masks: Mapping[str, Mapping[int, str]], organs: Mapping[int, str]) -> dict[str, str]:
    """Write each label map of `masks` that is not there yet: its path below `folder` -> the mask of each value.

    A voxel of several organs gets the largest value. Returns why a label map could not be made, by its path. A
    UserError where the folder of label maps has those of other organs, or a byte cannot hold all values.
    """
    if max(organs) > 255:
        raise UserError(f"{folder}: {max(organs)} masks a scan, but a label map holds at most 255 organs")
    record, names = folder / OWN / "organs.json", json.dumps(organs, indent=1)
    if (folder / OWN).exists() and (not record.is_file() or record.read_text(encoding="utf-8") != names):
        raise UserError(f"{record.parent}: has label maps of other organs, or of another program; move it away first")
    write_file(record, names.encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(lambda label: _merge(folder, label, masks[label]), masks)
        failed = dict(zip(masks, track("merging masks", outcomes, len(masks)), strict=True))
    return {label: why for label, why in failed.items() if why}


def _merge(folder: Path, label: str, masks: Mapping[int, str]) -> str | None:
    """Make one label map, unless it is there and newer than its masks -> why that is not possible."""
    path = folder / label
    if path.is_file():
        newer = [mask for mask in masks.values() if (folder / mask).stat().st_mtime_ns > path.stat().st_mtime_ns]
        return f"older than {newer[0]}; move it away" if newer else None
    merged: npt.NDArray[np.uint8] | None = None
    for value, mask in masks.items():
        try:
            found = read_label(folder / mask)
        except UserError as error:
            return str(error)
        if merged is None:
            merged, affine, first = np.zeros(found.voxels.shape, np.uint8), found.affine, mask
        if found.voxels.shape != merged.shape or not np.allclose(found.affine, affine, atol=1e-3):
            return f"{mask} is on another grid than {first}"
        if not np.isin(found.voxels, (0, found.voxels.max())).all():
            return f"{mask} has several values, so it is no mask of one organ"
        merged[found.voxels > 0] = value
    write_file(path, gzip.compress(nib.Nifti1Image(merged, affine).to_bytes(), 6, mtime=0))
    return None


def _set_subjects(found: Layout, subject: str) -> None:
    """Give each scan the patient that the expression finds in its path."""
    try:
        pattern = re.compile(subject)
    except re.error as error:
        raise UserError(f"--subject {subject}: not a regular expression: {error}") from error
    for scan in found.scans:
        match = pattern.search(scan.image)
        scan.subject = next((group for group in match.groups() if group), match[0]) if match else ""
    if missing := [scan.image for scan in found.scans if not scan.subject]:
        raise UserError(
            f"--subject {subject}: finds no patient in {len(missing)} of {len(found.scans)} paths, e.g. in "
            f"{shown(missing[0])}; it must match in each, as '[^/]+' does: the first part of the path"
        )
    found.subjects = f"by {subject}, e.g. {shown(found.scans[0].subject)} in {shown(found.scans[0].image)}"


def person(scan: Scan) -> str:
    """Whose scan it is; a scan that is there twice, compressed and not, is of one patient."""
    return scan.subject or str(PurePosixPath(scan.image).with_name(stem(PurePosixPath(scan.image))))


def _byperson(found: Layout, labelled: bool, seed: int) -> dict[str, list[Scan]]:
    """The scans with or without a label, by patient, in an order of all patients that the seed draws."""
    order = sorted({person(scan) for scan in found.scans})
    random.Random(str(seed)).shuffle(order)
    people: dict[str, list[Scan]] = {one: [] for one in order}
    for scan in found.scans:
        people[person(scan)] += [scan] if bool(scan.label) == labelled else []
    return {one: scans for one, scans in people.items() if scans}


def _parts(people: dict[str, list[Scan]], validation: float, tested: Sequence[str]) -> dict[str, list[Scan]]:
    """The scans of each part; patients of the part `test` are given, the first of the others are for validation."""
    apart = set(tested)
    rest = [one for one in people if one not in apart]
    held = max(1, round(validation * len(people)))
    parts = {"training": rest[held:], "validation": rest[:held]} | ({"test": list(tested)} if tested else {})
    return {part: [scan for one in ones for scan in people[one]] for part, ones in parts.items()}


def _with_training(
    found: Layout, unlabelled: dict[str, list[Scan]], training: Sequence[Scan], validation: float
) -> dict[str, list[Scan]]:
    """The parts of the unlabelled scans once the labelled training scans are among them, without their labels."""
    for scan in training:
        unlabelled.setdefault(person(scan), []).append(replace(scan, label=None))
    parts = _parts(unlabelled, validation, [])
    if parts["training"]:
        found.notes.append(
            f"too few scans without a label: unlabelled.json has the {len(training)} labelled training scans, without "
            "their labels, and none that is held out for validation or test"
        )
    return parts


def _too_few(folder: Path, asked: str, parts: dict[str, list[Scan]], people: dict[str, list[Scan]]) -> str:
    held_out = [person(scan) for part in ("validation", "test") for scan in parts.get(part, ())]
    return (
        f"{folder}: {asked} training volumes asked for, but {len(parts['training'])} are left after holding out "
        f"{len(held_out)} volumes of {len(set(held_out))} of {len(people)} patients"
    )


def _entry(scan: Scan) -> dict[str, Any]:
    """The scan as a datalist has it."""
    entry = {"image": [scan.image, *scan.others] if scan.others else scan.image}
    return entry | {key: text for key in ("label", "subject") if (text := getattr(scan, key))}


def _write(folder: Path, lists: dict[str, dict[str, list[Scan]]], organs: dict[int, str]) -> None:
    """Write all lists, or none where another one has the name of one of them."""
    texts: dict[Path, str] = {}
    for file, parts in lists.items():
        tree: dict[str, Any] = {"labels": organs} if organs else {}
        for part, scans in parts.items():
            tree[part] = [_entry(scan) for scan in scans]
        texts[folder / file] = json.dumps(tree, indent=1) + "\n"
    if others := [path for path, text in texts.items() if path.exists() and path.read_text(encoding="utf-8") != text]:
        names = ", ".join(path.name for path in others)
        rule = "there already with other content, as with other options: move away first what is not needed"
        raise UserError(f"{folder}: {names}: {rule}")
    for path, text in texts.items():
        write_file(path, text.encode())
