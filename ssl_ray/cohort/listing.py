"""Datalists for a folder of NIfTI: validation held out by subject, nested training splits."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_ray.cohort.datalist import SUFFIXES, stem


def write_datalists(
    folder: Path, sizes: Sequence[int], validation_share: float, subject: str, seed: int
) -> dict[str, tuple[int, int]]:
    """Write `unlabelled.json` and nested `labelled_<n>.json` for a folder of NIfTI.

    Labels are looked for as the file of the same name in a folder `labels` (or `labelsTr`) beside `images` (or
    `imagesTr`). Validation is held out by subject, so that no person is on both sides.

    Args:
        folder: the root; searched for `*.nii` and `*.nii.gz`.
        sizes: numbers of labelled training volumes.
        validation_share: share of the subjects held out, in (0, 1); at least one.
        subject: regular expression whose first group (or whole match) in the file name is the subject.
        seed: of the order in which subjects are drawn.

    Returns:
        Per file written, its numbers of training and validation volumes.

    Raises:
        ValueError: where there are too few volumes for what is asked.
    """
    images, labels = _find_volumes(folder)
    if not images:
        raise ValueError(f"{folder}: no .nii or .nii.gz file in it")
    try:
        pattern = re.compile(subject)
    except re.error as error:
        raise ValueError(f"--subject {subject}: not a regular expression: {error}") from error
    people: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        match = pattern.search(stem(image))
        person = (match.group(1) if match.groups() else match.group(0)) if match else stem(image)
        people[person].append(image)
    written = {}
    for name, wanted in (("unlabelled", []), ("labelled", sorted(sizes))):
        chosen = [[image for image in people[person] if (image in labels) == bool(wanted)] for person in sorted(people)]
        groups = [group for group in chosen if group]
        if not groups:
            continue
        random.Random(f"{seed} {name}").shuffle(groups)
        held = max(1, round(validation_share * len(groups)))
        validation = [_entry(folder, image, labels) for group in groups[:held] for image in group]
        training = [_entry(folder, image, labels) for group in groups[held:] for image in group]
        for size in wanted or [len(training)]:
            if not training or size > len(training):
                raise ValueError(
                    f"{folder}: {size} {name} training volumes asked for, but {len(training)} are left after holding "
                    f"out {len(validation)} of {held} subjects for validation"
                )
            file = f"{name}_{size}.json" if wanted else f"{name}.json"
            tree: dict[str, Any] = {"name": f"{folder.resolve().name} {name}", "modality": {"0": "CT"}}
            tree |= {"training": training[:size], "validation": validation}
            (folder / file).write_text(json.dumps(tree, indent=1) + "\n")
            written[file] = (size, len(validation))
    return written


def _find_volumes(folder: Path) -> tuple[list[Path], dict[Path, Path]]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    files = sorted(path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
    is_label = {path: any(part.startswith("labels") for part in path.relative_to(folder).parts[:-1]) for path in files}
    by_name = {stem(path).replace("label", "img"): path for path in files if is_label[path]}
    images = [path for path in files if not is_label[path]]
    named = {image: by_name.get(stem(image).replace("label", "img")) for image in images}
    return images, {image: label for image, label in named.items() if label is not None}


def _entry(folder: Path, image: Path, labels: dict[Path, Path]) -> dict[str, str]:
    entry = {"image": image.relative_to(folder).as_posix()}
    return entry | ({"label": labels[image].relative_to(folder).as_posix()} if image in labels else {})
