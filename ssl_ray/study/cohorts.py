"""The volumes of a study: read from its datalists, brought into the store, and kept apart."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_ray.config.schema import Study
from ssl_ray.console import say, track
from ssl_ray.data.datalist import Case, Splits, check_held_out, read_labelled, read_unlabelled
from ssl_ray.data.prepare import BadVolume, prepare_cohort, usable
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.phantom.cohort import write_cohort
from ssl_ray.search.cells import BAD_VOLUMES
from ssl_ray.storage.files import write_file
from ssl_ray.storage.folders import Folders

Cohorts = tuple[tuple[Case, ...], tuple[Case, ...], Splits]
"""The cases of a study: unlabelled ones to train and to validate on, and the labelled splits."""


@dataclass(frozen=True)
class PreparedCohorts:
    """The stored volumes of a study; `labelled` by image path. Bad volumes that it skips are in `splits` alone."""

    training: tuple[Volume, ...]
    validation: tuple[Volume, ...]
    labelled: dict[str, Volume]
    splits: Splits


def read_cohorts(study: Study) -> Cohorts:
    """Write the synthetic cohort if the study has one; read the datalists and check them without reading a volume."""
    if phantom := study.phantom:
        numbers = phantom.model_dump(exclude={"root"})
        write_cohort(Path(phantom.root), **numbers, progress=track("synthesizing volumes"))
    training, validation = read_unlabelled(study.pretrain.sources) if study.pretrains else ((), ())
    if training:  # the steps follow from the volumes, so that the configuration alone cannot check this
        samples = study.pretrain.epochs * len(training) * study.pretrain.patches_per_volume
        study.pretrain.optimizer.check_warmup(samples // study.pretrain.batch_size, "pretrain.")
    splits = read_labelled(study.finetune.cohort, study.finetune.split_sizes)
    check_held_out((*training, *validation), splits)
    return training, validation, splits


def prepare_cohorts(study: Study, folders: Folders, cohorts: Cohorts, verify: bool = False) -> PreparedCohorts:
    """Bring all volumes into the store, on the Ray cluster; `verify`: compare digests, whatever times of files say.

    Raises:
        UserError: with a table of all bad volumes, unless the study skips them; when a held-out volume has the content
            of one that is trained on.
    """
    training, validation, splits = cohorts
    store = Store(folders.cache, folders.scratch)
    settings, classes = study.finetune, study.finetune.cohort.classes
    unlabelled: dict[str, Volume] = {}
    bad: list[BadVolume] = []
    fresh = 0
    if cases := (*training, *validation):
        progress = track("preparing unlabelled volumes")
        unlabelled, bad, fresh = prepare_cohort(cases, study.pretrain.preparation, store, None, progress, verify)
    progress = track("preparing labelled volumes")
    labelled, bad_labelled, fresh_labelled = prepare_cohort(
        splits.cases, settings.preparation, store, classes, progress, verify
    )
    _tell_bad([*bad, *bad_labelled], folders.study / BAD_VOLUMES, skip=study.on_bad_volume == "skip")
    _check_content(list(unlabelled.values()), labelled, splits)
    say(f"prepared {fresh + fresh_labelled} of {len(unlabelled) + len(labelled)} volumes now; the store is {store}")
    return PreparedCohorts(usable(training, unlabelled), usable(validation, unlabelled), labelled, splits)


def _tell_bad(bad: Sequence[BadVolume], record: Path, skip: bool) -> None:
    """Refuse bad volumes, or go on without them and record which they are."""
    if not bad:
        record.unlink(missing_ok=True)
        return
    table = "\n".join(f"  {one.id}  {one.reason}" for one in bad)
    if not skip:
        raise UserError(
            f"{len(bad)} volumes cannot be used (on_bad_volume: skip goes on without them; the others are kept in the "
            f"store):\n{table}"
        )
    write_file(record, json.dumps({one.id: one.reason for one in bad}, indent=1).encode())
    say(f"going on without {len(bad)} volumes, recorded in {record}:\n{table}")


def _check_content(unlabelled: Sequence[Volume], labelled: Mapping[str, Volume], splits: Splits) -> None:
    """The same bytes under another name are still the same patient, so they may not be trained on and held out."""
    training = [volume for cases in splits.training.values() for volume in usable(cases, labelled)]
    seen = {volume.image_sha256: volume.image_source for volume in (*unlabelled, *training)}
    for part, cases in (("validation", splits.validation), ("test", splits.test)):
        held_out = usable(cases, labelled)
        for volume in held_out:
            if volume.image_sha256 in seen:
                raise UserError(
                    f"{volume.image_source}: this labelled {part} volume has the same content as "
                    f"{seen[volume.image_sha256]}, which is trained or selected on"
                )
        seen |= {volume.image_sha256: volume.image_source for volume in held_out}
