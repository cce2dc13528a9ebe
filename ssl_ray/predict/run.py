"""Segments many volumes: what is written of all of them together, and what goes on where it was cut off."""

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ssl_ray.data.datalist import Case
from ssl_ray.errors import UserError
from ssl_ray.predict.case import LABELS, OVERLAYS, PROBABILITIES, OrganSize, Outputs, predict_case
from ssl_ray.predict.model import Model
from ssl_ray.predict.segment import Manner, Segmenter
from ssl_ray.predict.workers import Device, Work, over_cases
from ssl_ray.storage.files import file_digest, write_file

TOLD, SIZES = "dataset.json", "organs.csv"
"""In the output: names of the labels, how and of which cases they were made; the organs' sizes in every case."""
_COLUMNS = ("case", "label", "organ", "voxels", "millilitres", "components", "seconds")


def predict_all(
    models: Sequence[Model],
    manner: Manner,
    cases: Sequence[Case],
    outputs: Outputs,
    *,
    device: Device = "auto",
    workers: int | None = None,
    resume: bool = False,
) -> tuple[int, dict[str, str]]:
    """Segment all cases on the Ray cluster -> how many were done now, and the reason by image of those that were not.

    `resume`: leave out what an earlier run with the same models and settings has finished.

    Raises:
        UserError: where models disagree, and where the output holds what this run would overwrite or mix with, scans
            and their true labels above all.
    """
    told = models[0].metadata
    Segmenter(models, manner, torch.device("cpu"))  # weights that do not fit are told before any worker starts
    made = _told(models, manner, outputs)
    done, begun = _begin(outputs, made, cases, resume)
    waiting = [case for case in cases if case.id not in done]

    def make(on: torch.device) -> Work[tuple[list[OrganSize], float]]:
        segmenter = Segmenter(models, manner, on)
        return lambda case: predict_case(case, segmenter, outputs)

    bad: dict[str, str] = {}
    with (outputs.folder / SIZES).open("a", newline="") as file:
        work = "segmenting", waiting, make, device, workers, outputs.folder
        for case, outcome in over_cases(*work) if waiting else ():
            if isinstance(outcome, UserError):
                bad[str(case.image)] = str(outcome)
                begun.discard(case.id)
                continue
            sizes, seconds = outcome
            for one in sizes:
                organ = one.number, told.organs[one.number - 1], one.voxels, f"{one.millilitres:.3f}", one.components
                csv.writer(file).writerow([case.id, *organ, f"{seconds:.1f}"])
            file.flush()
    _write_told(outputs, made, begun)  # what somebody puts in the place of a failed case is not ours
    return len(waiting) - len(bad), bad


def _told(models: Sequence[Model], manner: Manner, outputs: Outputs) -> dict[str, Any]:
    """Names of the labels, as datalists have them, and all that the labels depend on beside the scans."""
    organs = models[0].metadata.organs
    made = {
        "models": [{"sha256": file_digest(model.path), **model.metadata.lineage} for model in models],
        "keep_largest": [organs[number - 1] for number in outputs.largest],
        "probabilities": outputs.probabilities,
        **asdict(manner),
    }
    labels = {str(number): name for number, name in enumerate(["background", *organs])}
    told: dict[str, Any] = json.loads(json.dumps({"labels": labels, "prediction": made}))  # as it is read again
    return told


def _begin(outputs: Outputs, told: dict[str, Any], cases: Sequence[Case], resume: bool) -> tuple[set[str], set[str]]:
    """Write what is told of all cases, unless this run would replace files that are not ours.

    Returns names of the cases that are complete, and of all that this run and earlier ones into the folder begin: a
    label map of theirs without its rows was written just before its run was cut off.
    """
    path, sizes = outputs.folder / TOLD, outputs.folder / SIZES
    if not path.is_file() and sizes.exists():
        raise UserError(f"{sizes}: is no file of ours; take another folder")
    earlier, begun = _read_told(path)
    header, *lines = csv.reader(io.StringIO(sizes.read_text() if sizes.is_file() else "\n"))
    rows = defaultdict(list)
    for row in lines:
        rows["".join(row[:1])].append(row)
    count = len(told["labels"]) - 1
    whole = [name for name, lines in rows.items() if [len(row) for row in lines] == [len(_COLUMNS)] * count]
    done = {name for name in whole if (outputs.folder / LABELS.format(name)).is_file()}
    # Of a run of ours in which every case failed, there is nothing to keep; a dataset.json alone is somebody's own.
    if path.is_file() and (resume or done or header != [*_COLUMNS]):
        if not resume:
            raise UserError(f"{path}: an earlier run wrote into this folder: --continue goes on with it")
        if earlier != told:
            raise UserError(f"{path}: the earlier run had other models or settings; take another folder")
    if begun is None:  # an earlier version did not write down which; rows come some time after their label maps
        begun = {case.id for case in cases} if resume and earlier == told else set()
    _check_free(outputs, [case for case in cases if case.id not in done], begun, again=bool(earlier))
    text = io.StringIO()
    csv.writer(text).writerows([_COLUMNS, *(row for name in sorted(done) for row in rows[name])])
    write_file(sizes, text.getvalue().encode())
    begun |= {case.id for case in cases}
    _write_told(outputs, told, begun)
    return done, begun


def _check_free(outputs: Outputs, cases: Sequence[Case], begun: Collection[str], again: bool) -> None:
    """Refuse to replace an image or a true label, whoever made it, and any file that no run of ours began.

    `again`: the folder is that of an earlier run, whose failed cases may have left pictures and probabilities.
    """
    given = {os.path.realpath(image): f"an image of {case.id}" for case in cases for image in case.images}
    given |= {os.path.realpath(case.label): f"the true label of {case.id}" for case in cases if case.label}
    kinds = [LABELS, OVERLAYS, *([PROBABILITIES] if outputs.probabilities else [])]
    for case in cases:
        for kind in kinds:
            path = outputs.folder / kind.format(case.id)
            if what := given.get(os.path.realpath(path)):
                raise UserError(f"{path}: is {what}, which the output would replace; take another folder")
            ours = case.id in begun or (again and kind != LABELS)
            if os.path.lexists(path) and not ours:
                raise UserError(f"{path}: is there already, and no earlier run of ours wrote it; take another folder")


def _read_told(path: Path) -> tuple[dict[str, Any], set[str] | None]:
    """What an earlier run told of its cases, and their names if it did; nothing of a file that is none of ours."""
    try:
        told = json.loads(path.read_text())
        return told, set(told.pop("cases")) if "cases" in told else None
    except (OSError, ValueError, TypeError, AttributeError):
        return {}, set()


def _write_told(outputs: Outputs, told: Mapping[str, Any], begun: Collection[str]) -> None:
    write_file(outputs.folder / TOLD, json.dumps({**told, "cases": sorted(begun)}, indent=1).encode())
