"""`ssl-ray new`: for somebody's own folder the datalists, and a study that can be run as it is."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ssl_ray.config.loading import parse
from ssl_ray.config.schema import Preparation
from ssl_ray.console import say, track
from ssl_ray.data.datalist import Case, read_datalist, subject_of
from ssl_ray.data.layouts import Layout
from ssl_ray.data.listing import find_scans, person, summary, write_datalists
from ssl_ray.data.nifti import header_affine, read_label
from ssl_ray.errors import UserError
from ssl_ray.estimate.look import look_at
from ssl_ray.evaluate.scores import sided
from ssl_ray.report.page import templates
from ssl_ray.storage.files import write_file
from ssl_ray.text import reason, shown

_SOFT_TISSUE = (-175.0, 250.0)
"""HU window of the recipe; it is widened where organs lie outside."""
_FEW = 30
"""With fewer labelled patients a part set aside for a test tells little: folds score all of them."""
_STEPS = 15_000
"""Of pretraining without a GPU, however few the volumes are."""
_HEADERS, _IMAGES = 1000, 24
"""The most headers, and labelled images, that are read."""


def new_study(
    folder: Path, path: Path, subject: str | None, test: float | None, seed: int, gpu: bool
) -> dict[str, dict[str, int]]:
    """Write the datalists of `folder`, and a study on them as `path` -> volumes of each part, by list.

    `subject` and `test` are as for `find_scans` and `write_datalists`. Without `test`, a test part that the folder has
    is kept; otherwise a few patients are scored in folds, and of many a fifth is held out. With `gpu`, the study is the
    recipe of MONAI's tutorial at the scans' own spacing; without, a small one on larger voxels.

    Raises:
        UserError: when `path` exists, when there are too few patients, and when lists of other content are there.
    """
    if path.exists():
        raise UserError(f"{path}: is there already; name another file with --study, or move it away")
    found, there = find_scans(folder, subject), {file.name for file in folder.glob("*.json")}
    try:
        folds, share = _held_out(folder, found, test)
        written = write_datalists(folder, found, [], 0.2, share, seed, folds=folds > 0)
    finally:  # what was found explains what is missing
        say(summary(folder, found))
    try:
        if "unlabelled.json" not in written:
            raise UserError(f"{folder}: too few scans are left to pretrain on; give fewer to --test")
        text = _experiment(folder, path, found, folds, seed, gpu)
    except UserError:  # lists without a study would stand in the way of the next try
        for file in written.keys() - there:
            (folder / file).unlink()
        raise
    write_file(path, text.encode())
    return written


def _experiment(folder: Path, path: Path, found: Layout, folds: int, seed: int, gpu: bool) -> str:
    """The experiment of the lists that are in the folder now, as the file `path` will have it."""
    labelled = read_datalist(folder, "labelled.json", labelled=True)
    unlabelled = read_datalist(folder, "unlabelled.json", labelled=False)
    every = (*labelled.training, *labelled.validation, *labelled.test)
    images = dict.fromkeys(case.image for case in (*every, *unlabelled.training, *unlabelled.validation))
    facts = {"channels": len(every[0].images)} | _grid(list(images), gpu) | _contents(every, found.organs)
    people = len({subject_of(case) for case in (every if folds else labelled.training)})
    pool = people - sum(-(-(people - n) // folds) for n in (0, 1)) if folds else people
    sizes = sorted({max(1, pool // part) for part in ((1, 2, 4) if pool < 64 else (1, 4, 16))})
    facts |= {"folds": folds, "sizes": sizes, "shared": bool(found.notes)}
    facts |= {"epochs": -(-2 * _STEPS // len(unlabelled.training))}  # a step has two volumes' patches
    # As JSON, which YAML reads: a folder may be called 2024, or hold a colon.
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem).lstrip("._-") or "study"
    facts |= {"name": json.dumps(name), "root": json.dumps(str(folder), ensure_ascii=False)}
    text = templates("ssl_ray.study").get_template("experiment.yaml.j2").render(facts, gpu=gpu, seed=seed)
    parse(text, str(path))
    return text


def _held_out(folder: Path, found: Layout, test: float | None) -> tuple[int, float]:
    """Number of folds, or 0, and what is asked of `write_datalists` as the test part."""
    labelled = {person(scan) for scan in found.scans if scan.label}
    free = {person(scan) for scan in found.scans} - labelled
    own = any(scan.test for scan in found.scans)
    least = 3 if len(free) > 1 else 4
    if len(labelled) < least:
        rule = f"a study needs labels of {least} patients, to train, to validate and to test on"
        raise UserError(f"{folder}: {rule}; there are {len(labelled)} (`ssl-ray datalist` lists any folder)")
    if test is None and not own and len(free) > 1 and len(labelled) < _FEW:
        return min(5, len(labelled)), 0
    return 0, test if test is not None else 0 if own else 0.2


def _grid(images: Sequence[Path], gpu: bool) -> dict[str, Any]:
    """Median spacing in RAS order, by headers; the study's, and a patch that fits into nine of ten scans."""
    spacings, extents = [], []
    for path in images[:: 1 + len(images) // _HEADERS]:
        try:
            image: Any = nib.load(path)
            if len(image.shape) < 3:
                raise ValueError(f"not a volume, got shape {image.shape}")
            affine = header_affine(image.header)
        except Exception as error:  # nibabel's, zlib's and the system's; `check` and `run` name every such file
            say(f"left out of the median spacing: {path}: {reason(error)}")
            continue
        axes = nib.io_orientation(affine)[:, 0].argsort()
        spacings.append(nib.affines.voxel_sizes(affine)[axes])
        extents.append(spacings[-1] * np.array(image.shape[:3])[axes])
    if not spacings:
        raise UserError(f"{images[0].parent}: no header can be read")
    median, most = np.median(spacings, axis=0), 96 if gpu else 32
    # Without a GPU, four patches of 32 voxels span a scan: that is what a small network can learn in hours.
    spacing = median if gpu else np.maximum(median, np.median(extents, axis=0) / (4 * most))
    spacing = [float(f"{side:.3g}") for side in spacing]
    room = np.percentile(extents, 10, axis=0) / spacing
    patch = [16 * max(1, min(most, int(side)) // 16) for side in room]
    facts = {"spacing": spacing, "patch": patch, "most": most, "larger": max(spacing / median) > 1.01}
    return facts | {"median": [round(float(side), 3) for side in median]}


def _contents(cases: Sequence[Case], organs: dict[int, str]) -> dict[str, Any]:
    """Classes by all label maps, and by some of the images a normalisation that holds what is labelled."""
    with ThreadPoolExecutor(4) as pool:
        largest = max(track("reading labels", pool.map(_largest, cases), len(cases)))
    if not largest:
        raise UserError(f"{cases[0].place.partition(': ')[0]}: no label map of it can be read and has an organ")
    recipe = Preparation.model_validate({"spacing": 1, "hu_window": _SOFT_TISSUE})
    looks = look_at([("", case) for case in cases[:: 1 + len(cases) // _IMAGES]], {"": recipe}, 256)
    ends = [look.labelled for look in looks if look.organs]
    foreign = [look.refused for look in looks if look.refused.startswith("not a CT")]
    if not foreign and all(look.refused for look in looks):
        raise UserError(f"a run would refuse all {len(looks)} labelled volumes that were read: {looks[0].refused}")
    for look in looks:
        if look.refused and look.refused not in foreign:
            say(f"a run would refuse: {look.refused}")
    window, classes = None, 1 + max([largest, *organs])
    if len(foreign) <= len(ends):
        ends = ends or [_SOFT_TISSUE]
        low, high = np.percentile(ends, 10, axis=0)[0], np.percentile(ends, 90, axis=0)[1]
        window = [int(5 * (min(low, _SOFT_TISSUE[0]) // 5)), int(-5 * (-max(high, _SOFT_TISSUE[1]) // 5))]
    names = [shown(organs.get(value, f"label {value}")) for value in range(1, classes)]
    facts = {"classes": classes, "organs": names, "named": bool(organs), "window": window}
    return facts | {"sided": sided(names), "no_ct": shown(foreign[0]) if not window else ""}


def _largest(case: Case) -> int:
    """The largest value of a case's label map, 0 where it cannot be read."""
    assert case.label
    try:
        return int(read_label(case.label).voxels.max())
    except UserError as error:
        say(f"not read: {error}")
        return 0
