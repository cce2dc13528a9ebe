"""`ssl-ray check`: the volumes of a study as its networks will see them, on one page, before a day of training."""

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ssl_ray.config.schema import Augmentation, Study
from ssl_ray.data.consistency import held_out_sections, sections
from ssl_ray.data.datalist import Case, subject_of
from ssl_ray.data.patch import open_array, read_patch
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.estimate.look import Finding, Look, findings, look_at, number, sides
from ssl_ray.evaluate.scores import sided
from ssl_ray.finetune.patches import PatchSampler
from ssl_ray.pretrain.picture import draw_picture
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.tasks.registry import build_task
from ssl_ray.report.page import literal, templates, to_html
from ssl_ray.report.tables import Table
from ssl_ray.storage.files import write_file
from ssl_ray.storage.folders import Folders
from ssl_ray.study.cohorts import read_cohorts

_TRIES = 5
"""Volumes of a part that are tried for its picture, as some may be bad, and patches, as some may be of air."""
_Rows = dict[str, npt.NDArray[Any]]


def check_study(study: Study, folders: Folders, most: int) -> tuple[dict[str, Any], str]:
    """Read up to `most` volumes of each part of the lists, draw a patch of each -> facts, and the same as text.

    `check/check.html` in the study's folder is the page, with pictures, and `check/check.json` has the facts. Volumes
    that are drawn are prepared as by a run, and stay in the store.

    Raises:
        UserError: for anything that is wrong with the lists.
    """
    training, validation, splits = read_cohorts(study)
    parts = {part: cases for part, cases in sections(training, validation, splits).items() if cases}
    folder, organs = folders.study / "check", splits.organs
    stages = {part: study.finetune if part.startswith("labelled") else study.pretrain for part in parts}
    patches = {part: np.multiply(one.patch_size, one.preparation.spacing).tolist() for part, one in stages.items()}
    preparations = {part: one.preparation for part, one in stages.items()}
    evenly = {part: range(min(most, len(cases))) for part, cases in parts.items()}
    chosen = [(part, cases[n * len(cases) // len(evenly[part])]) for part, cases in parts.items() for n in evenly[part]]
    looks = look_at(chosen, preparations, study.finetune.cohort.classes)
    found = findings(looks, patches, organs, held_out_sections(splits)) + _flipped(study, organs)
    pictures = _draw(study, Store(folders.cache, folders.scratch), parts, organs, folder)
    facts = {
        "study": study.name,
        "parts": {part: _part(part, cases, looks) | {"patch_mm": patches[part]} for part, cases in parts.items()},
        "organs": {organ: _organ(value, looks) for value, organ in enumerate(organs, 1)},
        "findings": [one._asdict() for one in found],
        "page": str(folder / "check.html"),
    }
    page = to_html(_text(study, facts, pictures), folder, f"{study.name}: its volumes")
    write_file(folder / "check.html", page.encode())
    write_file(folder / "check.json", json.dumps(facts, indent=1).encode())
    folders.output.push(folder)
    return facts, _text(study, facts, {})


def _flipped(study: Study, organs: Sequence[str]) -> list[Finding]:
    augmentation, names = study.finetune.augmentation, sided(organs)
    if not names or not augmentation.flip_prob or 0 not in augmentation.flip_axes:
        return []
    what = f"flips left and right, but {names[0]} is on one side: set flip_prob: 0, or flip_axes: [1, 2]"
    return [Finding("finetune.augmentation", what)]


def _part(part: str, cases: Sequence[Case], looks: Sequence[Look]) -> dict[str, Any]:
    """What one part of the lists holds: medians, and the range of the intensities that 99 % of each scan have."""
    looks = [look for look in looks if look.part == part]
    whole = [look for look in looks if not look.refused]
    facts: dict[str, Any] = {"patients": len({subject_of(case) for case in cases}), "volumes": len(cases)}
    facts |= {"read": len(looks), "refused": len(looks) - len(whole)}
    if whole:
        facts["spacing_mm"] = np.median([look.spacing for look in whole], axis=0).tolist()
        facts["extent_mm"] = np.median([look.extent for look in whole], axis=0).tolist()
        facts["intensities"] = [min(look.ends[0] for look in whole), max(look.ends[1] for look in whole)]
    return facts


def _organ(value: int, looks: Sequence[Look]) -> dict[str, Any]:
    """In how many of the volumes an organ is, how large, and what share of its voxels the normalisation clips."""
    having = [look for look in looks if value in look.organs]
    if not having:
        return {"volumes": 0}
    ml, clipped = np.array([(look.organs[value], look.clipped[value]) for look in having]).T
    sizes = [float(ml.min()), float(np.median(ml)), float(ml.max())]
    return {"volumes": len(having), "ml": sizes, "clipped": float(clipped.mean())}


def _draw(
    study: Study, store: Store, parts: Mapping[str, Sequence[Case]], organs: Sequence[str], folder: Path
) -> dict[str, str]:
    """A picture of a random patch of each part that has a usable volume, the same for the same seed -> part by file."""
    drawn = {}
    for part, cases in parts.items():
        labelled, order = part.startswith("labelled"), list(cases)
        random.Random(f"{study.seed} {part}").shuffle(order)
        preparation = (study.finetune if labelled else study.pretrain).preparation
        for case in order[:_TRIES]:
            with suppress(UserError):
                volume, _ = prepare_case(case, preparation, store)
                if labelled and volume.largest_label >= study.finetune.cohort.classes:
                    continue  # it is among the findings
                name = f"{part.replace(' ', '_')}.png"
                rows, labels = _labelled(study, store, volume, part) if labelled else _unlabelled(study, store, volume)
                draw_picture(folder / name, rows, f"{part}: {case.id}", preparation.spacing, labels, organs)
                drawn[name] = part
                break
    return drawn


def _unlabelled(study: Study, store: Store, volume: Volume) -> tuple[_Rows, None]:
    """A patch of the pretraining, of several the one with most to see, and what the task shows of it."""
    config = study.pretrain
    table = SampleTable(study.seed, np.array([volume.shape]), config.patch_size, _TRIES, _TRIES, 1)
    origins = [table.sample(number).origin for number in range(_TRIES)]
    patch = max((read_patch(open_array(store, volume.key), one, config.patch_size) for one in origins), key=np.std)
    clean = torch.from_numpy(patch.astype(np.float32)).div_(volume.levels).reshape(1, -1, *config.patch_size)
    task = build_task(config.task, study.network, config.patch_size, volume.channels)
    with torch.no_grad():  # the network is not trained: what it makes of the patch is not shown
        _, rows = task.validate(task.see(clean, [task.draw(study.seed, np.zeros(1, np.int64), 0)]), clean)
    return {name: patches[0].numpy() for name, patches in list(rows.items())[:2]}, None


def _labelled(study: Study, store: Store, volume: Volume, part: str) -> tuple[_Rows, npt.NDArray[np.uint8]]:
    """A patch of the fine-tuning around a labelled voxel, augmented where it is trained on, and its labels."""
    plain = (
        {} if part == "labelled training" else {"augmentation": Augmentation(flip_prob=0, rotate_prob=0, shift_prob=0)}
    )
    config = study.finetune.model_copy(update={"foreground_prob": 1.0, **plain})
    images, labels = PatchSampler((volume,), store, config, study.seed).batch(0)
    return {"image": images[0].numpy(), "labels": images[0, 0].numpy()}, labels[0, 0].numpy()


def _text(study: Study, facts: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The facts as Markdown, which reads well as plain text where there are no pictures."""
    parts = [
        [
            *(part, *(str(found[name]) for name in ("patients", "volumes", "read", "refused"))),
            *(sides(found[name]) if name in found else "" for name in ("spacing_mm", "extent_mm", "patch_mm")),
            " to ".join(map(number, found.get("intensities", ()))),
        ]
        for part, found in facts["parts"].items()
    ]
    organs = [
        [literal(organ), str(found["volumes"]), *map(number, found["ml"]), f"{found['clipped']:.0%}"]
        if found["volumes"]
        else [literal(organ), "0", "", "", "", ""]
        for organ, found in facts["organs"].items()
    ]
    columns = ["part", "patients", "volumes", "read", "refused", "voxel (mm)", "extent (mm)", "patch (mm)"]
    columns += ["99 % of the values"]
    tables = [
        Table(columns, parts, 1),
        Table(["organ", "in volumes", "least ml", "median", "most", "clipped"], organs, 1),
    ]
    template = templates("ssl_ray.study").get_template("check.md.j2")
    values = {"study": study, "facts": facts, "tables": tables, "pictures": pictures, "literal": literal}
    return template.render(values).rstrip() + "\n"
