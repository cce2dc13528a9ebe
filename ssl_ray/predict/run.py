"""Segments many volumes: what is written of all of them together, and what goes on where it was cut off."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ssl_ray.data.datalist import Case
from ssl_ray.errors import UserError
from ssl_ray.predict.case import LABELS, OrganSize, Outputs, predict_case
from ssl_ray.predict.model import Model
from ssl_ray.predict.segment import Manner, Segmenter
from ssl_ray.predict.workers import Device, Work, over_cases
from ssl_ray.storage.files import file_digest, write_file

TOLD, SIZES = "dataset.json", "organs.csv"
"""In the output: names of the labels and how they were made, and the organs' sizes in every case."""
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
        UserError: where models disagree, and where the output holds what this run would overwrite or mix with.
    """
    told = models[0].metadata
    Segmenter(models, manner, torch.device("cpu"))  # weights that do not fit are told before any worker starts
    done = _begin(outputs, _told(models, manner, outputs), resume)
    waiting = [case for case in cases if case.id not in done]

    def make(on: torch.device) -> Work[tuple[list[OrganSize], float]]:
        segmenter = Segmenter(models, manner, on)
        return lambda case: predict_case(case, segmenter, outputs)

    bad: dict[str, str] = {}
    with (outputs.folder / SIZES).open("a", newline="") as file:
        for case, outcome in over_cases("segmenting", waiting, make, device, workers) if waiting else ():
            if isinstance(outcome, UserError):
                bad[str(case.image)] = str(outcome)
                continue
            sizes, seconds = outcome
            for one in sizes:
                organ = one.number, told.organs[one.number - 1], one.voxels, f"{one.millilitres:.3f}", one.components
                csv.writer(file).writerow([case.id, *organ, f"{seconds:.1f}"])
            file.flush()
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
    return {"labels": {str(number): name for number, name in enumerate(["background", *organs])}, "prediction": made}


def _begin(outputs: Outputs, told: Mapping[str, Any], resume: bool) -> set[str]:
    """Write what is told of all cases, and nothing else over what is there -> names of the cases that are complete."""
    path, sizes = outputs.folder / TOLD, outputs.folder / SIZES
    content = json.dumps(told, indent=1)
    if not path.is_file() and sizes.exists():
        raise UserError(f"{sizes}: is no file of ours; take another folder")
    rows = defaultdict(list)
    if sizes.is_file():
        for row in csv.reader(io.StringIO(sizes.read_text())):
            rows["".join(row[:1])].append(row)
    count = len(told["labels"]) - 1
    whole = [name for name, lines in rows.items() if [len(row) for row in lines] == [len(_COLUMNS)] * count]
    done = {name for name in whole if (outputs.folder / LABELS.format(name)).is_file()}
    # Of a run of ours in which every case failed, there is nothing to keep; a dataset.json alone is somebody's own.
    if path.is_file() and (resume or done or rows["case"] != [[*_COLUMNS]]):
        if not resume:
            raise UserError(f"{path}: an earlier run wrote into this folder: --continue goes on with it")
        if path.read_text() != content:
            raise UserError(f"{path}: the earlier run had other models or settings; take another folder")
    text = io.StringIO()
    csv.writer(text).writerows([_COLUMNS, *(row for name in sorted(done) for row in rows[name])])
    write_file(sizes, text.getvalue().encode())
    write_file(path, content.encode())
    return done
