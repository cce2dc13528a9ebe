"""Scores label maps against the true ones by the report's metrics, whoever made them."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from ssl_ray.console import track
from ssl_ray.data.datalist import IGNORE, is_nifti, names_in, stem
from ssl_ray.data.layout_files import Key, shared_path, usable_files
from ssl_ray.data.nifti import on_image_grid, read_label
from ssl_ray.errors import UserError
from ssl_ray.evaluate.metrics import evaluate_original
from ssl_ray.evaluate.scores import CaseScores, aggregate
from ssl_ray.predict.inputs import listed_in, named
from ssl_ray.predict.run import TOLD
from ssl_ray.text import shown
from ssl_ray.training.prefetch import ahead

_LABELS = 256
_THREADS = 4
"""Volumes that are scored at the same time, at most; each takes some ten bytes a voxel."""
Pairs = Mapping[str, tuple[Path, Path]]
"""Prediction and truth by case."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of volumes; `organs` are the names by value of all labels that are named, or that any volume has."""

    organs: Mapping[int, str]
    cases: tuple[CaseScores, ...]
    tolerance: float

    def tree(self) -> dict[str, Any]:
        """For `evaluation.json`, with the report's means over volumes."""
        means = aggregate(self.cases, [*self.organs.values()])
        told = {"tolerance": self.tolerance, "labels": self.organs, "means": means}
        return told | {"cases": [asdict(case) for case in self.cases]}

    def rows(self) -> pd.DataFrame:
        """A row for each case and organ."""
        names = ["original_dice", "original_surface_dice", "original_hd95", "missed", "false_positives"]
        organs = {"label": self.organs.keys(), "organ": self.organs.values()}
        return pd.concat(
            pd.DataFrame(
                {"case": case.case, **organs, **{name.removeprefix("original_"): getattr(case, name) for name in names}}
            )
            for case in self.cases
        )

    def table(self) -> str:
        """Means over the volumes that have an organ, or lack it, and over all organs of a volume, for people.

        Of false positives the last row has the number a volume, as the report has it.
        """
        rows = self.rows().set_index(["case", "label", "organ"]).astype(float)  # a column may hold None alone
        means = rows.groupby("organ", sort=False).mean()
        of_volumes = rows.groupby("case").mean()
        of_volumes["false_positives"] = rows.groupby("case")["false_positives"].sum()
        means.loc["all organs"] = of_volumes.mean()
        return str(means.to_string(float_format="%.3f", na_rep="-"))


def evaluate_all(pairs: Pairs, names: Mapping[int, str], tolerance: float) -> tuple[Evaluation, dict[str, str]]:
    """Score pairs on the grid of the truth; and the reason by path of prediction for those that cannot be.

    `names` are those of labels; voxels whose true label is called `ignore` count as background in both. The tolerance
    of surface Dice is in mm.
    """
    ignored = [value for value, name in names.items() if name == IGNORE]

    def score(item: tuple[str, tuple[Path, Path]]) -> CaseScores | UserError:
        name, (prediction, truth) = item
        try:
            true = read_label(truth)
            made = on_image_grid(true, read_label(prediction), prediction, "prediction")
        except UserError as error:
            return error
        predicted, voxels = (one.voxels.astype(np.uint8, order="C") for one in (made, true))
        unknown = np.isin(voxels, ignored)
        predicted[unknown] = voxels[unknown] = 0
        return evaluate_original(name, predicted, voxels, true.affine, _LABELS, tolerance)

    threads = min(_THREADS, _cores()) - 1
    outcomes = list(track("scoring", ahead(score, pairs.items(), threads), len(pairs)))
    made = [str(prediction) for prediction, _ in pairs.values()]
    bad = {path: str(one) for path, one in zip(made, outcomes, strict=True) if isinstance(one, UserError)}
    scored = [one for one in outcomes if isinstance(one, CaseScores)]
    there = {n for case in scored for n, extra in enumerate(case.false_positives or (), 1) if extra is not False}
    organs = {value: names.get(value, f"label {value}") for value in sorted({*there, *names} - {0, *ignored})}
    return Evaluation(organs, tuple(_only(case, organs) for case in scored), tolerance), bad


def _cores() -> int:
    """That this process may use, where the system says it; macOS does not."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _only(case: CaseScores, values: Iterable[int]) -> CaseScores:
    """The scores of these labels."""
    fields = ("original_dice", "original_hd95", "original_surface_dice", "false_positives")
    kept: dict[str, Any] = {name: [getattr(case, name)[value - 1] for value in values] for name in fields}
    return replace(case, **kept)


def pairs_of(predictions: Path, labels: Path) -> tuple[Pairs, dict[str, str], int]:
    """Prediction and truth by case, the reason by path for predictions without truth, and how many truths are left.

    Two files, or two folders whose files are matched by folder and name below them: the same, or one that differs in
    words such as `label` and `img` alone, if no other file could be meant; no label map is taken for two predictions. A
    prediction in no folder is that of a label map in any, if the names say so.
    `labels` may be a datalist, whose images gave the predictions their names.

    Raises:
        UserError: where nothing is there, or nothing matches.
    """
    for place in (predictions, labels):
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
    if predictions.is_file() and labels.is_file() and is_nifti(labels.name):
        return {stem(predictions): (predictions, labels)}, {}, 0
    made = _maps(predictions)
    if labels.suffix == ".json":
        cases = named([case for part in listed_in(labels).values() for case in part])
        true = {case.id: case.label for case in cases if case.label}
    else:
        true = _maps(labels)
    pairs = {name: (path, true[name]) for name, path in made.items() if name in true}
    left, free = made.keys() - true.keys(), true.keys() - made.keys()
    alone = {str(made[name]): f"no label map of its name in {labels}" for name in sorted(left)}
    for part in (slice(None), slice(-1, None)):  # `predict` leaves out folders where names tell cases apart
        claims, truths = _alike((name for name in left if "/" not in name or not part.start), part), _alike(free, part)
        for key in claims.keys() & truths.keys():
            names, fitting = claims[key], truths[key]
            if len(names) == len(fitting) == 1:
                pairs[names[0]] = made[names[0]], true[fitting[0]]
                del alone[str(made[names[0]])]
                left, free = left - {*names}, free - {*fitting}
            else:
                why = f"{' or '.join(names[:2])} could be of {' or of '.join(fitting[:2])}"
                alone |= {str(made[name]): why for name in names}
    if not pairs:
        found = f"{len(made)} and {len(true)} label maps"
        raise UserError(f"{predictions} and {labels}: no two files of the same name among {found}")
    return dict(sorted(pairs.items())), alone, len(true) - len(pairs)


def _alike(names: Iterable[str], part: slice) -> dict[Key, list[str]]:
    """Names that differ in words such as `label` and `img` alone, by what they share of folders and name."""
    found: dict[Key, list[str]] = defaultdict(list)
    for name in sorted(names):
        found[shared_path(PurePosixPath(name))[part]].append(name)
    return found


def _maps(place: Path) -> dict[str, Path]:
    """Label maps below a folder, or the file itself, by name without suffix; a UserError where two have one name."""
    if place.is_file():
        return {stem(place): place}
    found: dict[str, Path] = {}
    for path in usable_files(place)[0]:
        name = str(path.with_name(stem(path)))
        if name in found:
            raise UserError(f"{place / path}: has the name of {found[name]}; which of both is meant? Move one away")
        found[name] = place / path
    return found


def names_of(predictions: Path, labels: Path) -> dict[int, str]:
    """Names by label value, from the dataset.json in or beside either place, or from `labels` if it is a datalist.

    A UserError where a value is one organ here and another one there.
    """
    ours, theirs = _names(predictions), _names(labels)
    for value in sorted(ours.keys() & theirs.keys()):
        if value and ours[value].lower() != theirs[value].lower():
            told = f"{shown(ours[value], 80)} in {predictions} and {shown(theirs[value], 80)} in {labels}"
            raise UserError(f"label {value} is {told}, by the names beside them: their labels mean different organs")
    return theirs | ours


def _names(place: Path) -> dict[int, str]:
    folder = place if place.is_dir() else place.parent
    for path in (place, folder / TOLD, folder.parent / TOLD):
        if path.suffix == ".json" and path.is_file() and (found := names_in(path)):
            return found
    return {}
