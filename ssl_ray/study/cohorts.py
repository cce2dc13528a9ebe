"""The volumes of a study: read from its datalists, brought into the store, and kept apart."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_ray.config.schema import Study
from ssl_ray.console import say
from ssl_ray.data.consistency import check_lists, not_nested
from ssl_ray.data.datalist import Case, read_unlabelled, subject_of
from ssl_ray.data.prepare import BadVolume, prepare_cohort, usable
from ssl_ray.data.splits import Splits, read_labelled
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.phantom.cohort import write_cohort
from ssl_ray.pretrain.job import MOST_FITTED, MOST_TESTED, Labelled
from ssl_ray.search.cells import BAD_VOLUMES
from ssl_ray.storage.files import write_file
from ssl_ray.storage.folders import Folders

Cohorts = tuple[tuple[Case, ...], tuple[Case, ...], Splits]
"""The cases of a study: unlabelled ones to train and to validate on, and the labelled splits."""


@dataclass(frozen=True)
class PreparedCohorts:
    """The stored volumes of a study; `labelled` by image path. Bad volumes that it skips are in `splits` alone.

    `probed` are some of the labelled ones as the pretraining prepares its own, for its probe; None: there are none.
    """

    training: tuple[Volume, ...]
    validation: tuple[Volume, ...]
    labelled: dict[str, Volume]
    splits: Splits
    probed: Labelled | None = None


def read_cohorts(study: Study) -> Cohorts:
    """Write the synthetic cohort if the study has one; read the datalists and check them without reading a volume."""
    if study.phantom:
        write_cohort(study.phantom)
    training, validation = read_unlabelled(study.pretrain.sources) if study.pretrains else ((), ())
    if training:  # the steps follow from the volumes, so that the configuration alone cannot check this
        steps = study.pretrain.steps_over(study.pretrain.drawn(len(training)))
        study.pretrain.optimizer.check_warmup(steps, "pretrain.")
    splits = read_labelled(study.finetune.cohort, study.finetune.sizes)
    check_lists(training, validation, splits)
    if warning := not_nested(splits):
        say(warning)
    return training, validation, splits


def prepare_cohorts(study: Study, folders: Folders, cohorts: Cohorts, verify: bool = False) -> PreparedCohorts:
    """Bring all volumes into the store, on the Ray cluster; `verify`: compare digests, whatever times of files say.

    Raises:
        UserError: with a table of all bad volumes, unless the study skips them; when a held-out volume has the content
            of one that is trained on.
    """
    training, validation, splits = cohorts
    store = Store(folders.cache, folders.scratch)
    settings = study.finetune
    unlabelled: dict[str, Volume] = {}
    bad: list[BadVolume] = []
    fresh = 0
    if cases := (*training, *validation):
        unlabelled, bad, fresh = prepare_cohort(cases, study.pretrain.preparation, store, None, verify)
    labelled, bad_labelled, fresh_labelled = prepare_cohort(
        splits.cases, settings.preparation, store, settings.cohort.classes, verify
    )
    held_out = {str(case.image): name for name in ("validation", "test") for case in getattr(splits, name)}
    parts = [("unlabelled", one) for one in bad]
    parts += [(held_out.get(one.image, "training"), one) for one in bad_labelled]
    _tell_bad(parts, folders.study / BAD_VOLUMES, skip=study.on_bad_volume == "skip")
    probed = _probed(study, store, splits, labelled) if cases and study.pretrain.probe else None
    prepared = PreparedCohorts(usable(training, unlabelled), usable(validation, unlabelled), labelled, splits, probed)
    _check_content(prepared)
    say(f"prepared {fresh + fresh_labelled} of {len(unlabelled) + len(labelled)} volumes now; the store is {store}")
    return prepared


def _probed(study: Study, store: Store, splits: Splits, labelled: Mapping[str, Volume]) -> Labelled | None:
    """Labelled training volumes to fit the probe on, and validation volumes to test it; no patient is in both.

    In folds all volumes are training volumes: those of the first quarter of the patients test it.
    """
    fitted = tuple(dict.fromkeys(case for cases in splits.training.values() for case in cases))
    tested = splits.validation
    if splits.folds:
        patients = sorted({subject_of(case) for case in fitted})
        last = patients[len(patients) // 4]
        tested = tuple(case for case in fitted if subject_of(case) < last)
        fitted = tuple(case for case in fitted if subject_of(case) >= last)
    parts = fitted[:MOST_FITTED], tested[:MOST_TESTED]
    volumes = dict(labelled)
    if study.pretrain.preparation != study.finetune.preparation:  # what is bad now is left out
        classes = study.finetune.cohort.classes
        volumes = prepare_cohort([*parts[0], *parts[1]], study.pretrain.preparation, store, classes)[0]
    found = [usable(part, volumes) for part in parts]
    return Labelled(found[0], found[1], study.finetune.cohort.classes) if all(found) else None


def _tell_bad(bad: Sequence[tuple[str, BadVolume]], record: Path, skip: bool) -> None:
    """Refuse bad volumes, or go on without them and record which they are; each comes with its part of the study."""
    if not bad:
        record.unlink(missing_ok=True)
        return
    table = "\n".join(f"  {part}  {one.id}  {one.reason}" for part, one in bad)
    if not skip:
        raise UserError(
            f"{len(bad)} volumes cannot be used (on_bad_volume: skip goes on without them; the others are kept in the "
            f"store):\n{table}"
        )
    rows = [{"part": part, "id": one.id, "image": one.image, "reason": one.reason} for part, one in bad]
    write_file(record, json.dumps(rows, indent=1).encode())
    counts = ", ".join(f"{count} {part}" for part, count in Counter(part for part, _ in bad).items())
    say(f"going on without {len(bad)} volumes ({counts}), recorded in {record}:\n{table}")


def _check_content(cohorts: PreparedCohorts) -> None:
    """The same scan under another name, in another format or orientation, is still the same patient.

    So it may not be trained on and held out, by its content any more than by its path.
    """
    splits, labelled = cohorts.splits, cohorts.labelled
    training = [volume for cases in splits.training.values() for volume in usable(cases, labelled)]
    seen = {volume.content: volume.image_source for volume in cohorts.training}
    held_out: list[tuple[str, Sequence[Volume], Sequence[Volume]]] = [
        ("unlabelled validation", cohorts.validation, ()),
        ("labelled validation", usable(splits.validation, labelled), training),
        ("labelled test", usable(splits.test, labelled), ()),
    ]
    if splits.folds:  # each patient is scored in one fold and trained on in others
        patients: dict[str, list[Volume]] = {}
        for volume in training:
            patients.setdefault(volume.subject or volume.id, []).append(volume)
        held_out[1:] = [("labelled", one, ()) for one in patients.values()]
    for part, volumes, others in held_out:
        seen |= {volume.content: volume.image_source for volume in others}
        for volume in volumes:
            if volume.content in seen:
                raise UserError(
                    f"{volume.image_source}: this {part} volume has the same content as {seen[volume.content]}, which "
                    "is trained or selected on"
                )
        seen |= {volume.content: volume.image_source for volume in volumes}
