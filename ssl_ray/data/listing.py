"""Datalists for a folder of NIfTI: validation held out by subject, nested training splits."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_ray.data.datalist import SUFFIXES, stem
from ssl_ray.errors import UserError


def write_datalists(
    folder: Path, sizes: Sequence[int], validation_share: float, subject: str, seed: int
) -> dict[str, tuple[int, int]]:
    """Write `unlabelled.json` and nested `labelled_<n>.json` for a folder of NIfTI.

    Labels are looked for as the file of the same name in a folder `labels` (or `labelsTr`) beside `images` (or
    `imagesTr`). Validation is held out by subject, so that no person is on both sides; who is held out of the labelled
    volumes is also held out of the unlabelled ones.

    Args:
        folder: the root; searched for `*.nii` and `*.nii.gz`.
        sizes: numbers of labelled training volumes; all there are if empty.
        validation_share: share of the subjects held out, in (0, 1); at least one.
        subject: regular expression whose first group (or whole match) in the file name is the subject.
        seed: of the order in which subjects are drawn.

    Returns:
        Per file written, its numbers of training and validation volumes.

    Raises:
        UserError: where there are too few volumes for what is asked, or another list is there; nothing is written then.
    """
    entries = _find_volumes(folder)
    if sizes and not any("label" in entry for entry in entries.values()):
        raise UserError(f"{folder}: {max(sizes)} labelled training volumes asked for, but no image has a label")
    people = _by_subject(list(entries), subject, seed)
    held_out: set[str] = set()
    lists: dict[str, dict[str, Any]] = {}
    for name, sought in (("labelled", sorted(sizes)), ("unlabelled", [])):
        groups = {
            one: [entries[image] for image in images if ("label" in entries[image]) == (name == "labelled")]
            for one, images in people
        }
        persons = sorted((one for one in groups if groups[one]), key=lambda one: one not in held_out)
        if not persons:
            continue
        held = max(1, round(validation_share * len(persons)), len(held_out.intersection(persons)))
        held_out.update(persons[:held])
        validation = [entry for one in persons[:held] for entry in groups[one]]
        training = [entry for one in persons[held:] for entry in groups[one]]
        for size in sought or [len(training)]:
            if not 0 < size <= len(training):
                raise UserError(
                    f"{folder}: {size} {name} training volumes asked for, but {len(training)} are left after holding "
                    f"out {len(validation)} of {held} subjects for validation"
                )
            file = f"labelled_{size}.json" if name == "labelled" else "unlabelled.json"
            lists[file] = {"training": training[:size], "validation": validation}
    texts = {folder / file: json.dumps(tree, indent=1) + "\n" for file, tree in lists.items()}
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path}: a list with other content is there already; move it away first")
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return {file: (len(tree["training"]), len(tree["validation"])) for file, tree in lists.items()}


def _find_volumes(folder: Path) -> dict[Path, dict[str, str]]:
    """The images below a folder, and the entry of each in a datalist, with its label where it has one."""
    found = sorted(path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
    files = [path.relative_to(folder) for path in found if not path.name.startswith("._")]  # by macOS in archives
    is_label = {path: any(part.startswith("labels") for part in path.parts[:-1]) for path in files}
    labels = {_common_name(path): path for path in files if is_label[path]}
    entries = {path: {"image": path.as_posix()} for path in files if not is_label[path]}
    if not entries:
        raise UserError(f"{folder}: no .nii or .nii.gz file in it")
    for image, entry in entries.items():
        if label := labels.get(_common_name(image)):
            entry["label"] = label.as_posix()
    return entries


def _by_subject(images: Sequence[Path], subject: str, seed: int) -> list[tuple[str, list[Path]]]:
    """Subjects and their images, in an order that the seed draws."""
    try:
        pattern = re.compile(subject)
    except re.error as error:
        raise UserError(f"--subject {subject}: not a regular expression: {error}") from error
    people: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        match = pattern.search(stem(image))
        person = next((group for group in match.groups() if group), match[0]) if match else stem(image)
        people[person].append(image)
    order = sorted(people)
    random.Random(str(seed)).shuffle(order)
    return [(one, people[one]) for one in order]


def _common_name(path: Path) -> tuple[str, ...]:
    """What an image and its label share: the path without images/labels, and without img/label in BTCV's names."""
    parents = (part.removeprefix("images").removeprefix("labels") for part in path.parts[:-1])
    return (*filter(None, parents), stem(path).replace("label", "img"))
