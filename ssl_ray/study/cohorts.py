"""The volumes of a study: read from its datalists, brought into the store, and kept apart."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_ray.config.schema import Study
from ssl_ray.console import say
from ssl_ray.data.consistency import Cohorts, held_out_sections, not_nested, read_lists, sections
from ssl_ray.data.prepare import BadVolume, prepare_cohort, usable
from ssl_ray.data.splits import Splits
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.phantom.cohort import write_cohort
from ssl_ray.pretrain.job import Labelled
from ssl_ray.search.cells import BAD_VOLUMES
from ssl_ray.storage.files import write_file
from ssl_ray.storage.folders import Folders
from ssl_ray.text import count_of


@dataclass(frozen=True)
class PreparedCohorts:
    """The stored volumes of a study; `labelled` by image path, `probed` for the pretraining's probe, if it has one.

    Bad volumes that it skips are in `splits` alone.
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
    cohorts = read_lists(study.pretrain if study.pretrains else None, study.finetune)
    if warning := not_nested(cohorts[2]):
        say(warning)
    return cohorts


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
    _check_content(cohorts, unlabelled, labelled)
    say(f"prepared {fresh + fresh_labelled} of {len(unlabelled) + len(labelled)} volumes now; the store is {store}")
    return prepared


def _probed(study: Study, store: Store, splits: Splits, labelled: Mapping[str, Volume]) -> Labelled | None:
    """Volumes that the first training with the most labels is trained and validated on: 24 fit the probe, 8 test it."""
    fold, size = 0 if splits.folds else None, max(study.finetune.sizes)
    fitted, tested, _ = splits.parts(size, study.seed, 0, fold, labelled)
    parts, volumes, classes = (fitted[:24], tested[:8]), labelled, study.finetune.cohort.classes
    if study.pretrain.preparation != study.finetune.preparation:  # what is bad now is left out
        volumes = prepare_cohort([*parts[0], *parts[1]], study.pretrain.preparation, store, classes)[0]
    first, second = (usable(part, volumes) for part in parts)
    return Labelled(first, second, classes) if first and second else None


def _tell_bad(bad: Sequence[tuple[str, BadVolume]], record: Path, skip: bool) -> None:
    """Refuse bad volumes, or go on without them and record which they are; each comes with its part of the study."""
    if not bad:
        record.unlink(missing_ok=True)
        return
    table = "\n".join(f"  {part}  {one.id}  {one.reason}" for part, one in bad)
    if not skip:
        raise UserError(
            f"{count_of(len(bad), 'volume')} cannot be used (on_bad_volume: skip goes on without them; the others are "
            f"kept in the store):\n{table}"
        )
    rows = [{"part": part, "id": one.id, "image": one.image, "reason": one.reason} for part, one in bad]
    write_file(record, json.dumps(rows, indent=1).encode())
    counts = ", ".join(f"{count} {part}" for part, count in Counter(part for part, _ in bad).items())
    say(f"going on without {count_of(len(bad), 'volume')} ({counts}), recorded in {record}:\n{table}")


def _check_content(cohorts: Cohorts, unlabelled: Mapping[str, Volume], labelled: Mapping[str, Volume]) -> None:
    """The same scan under another name, in another format or orientation, is still the same patient.

    So it may not be trained on and held out, by its content any more than by its path.
    """
    held_out = held_out_sections(cohorts[2])
    seen: dict[str, str] = {}
    for part, cases in sections(*cohorts).items():
        volumes = usable(cases, unlabelled if part.startswith("unlabelled") else labelled)
        for volume in volumes if part in held_out else ():
            if volume.content in seen:
                raise UserError(
                    f"{volume.image_source}: this {part.removesuffix(' training')} volume has the same content as "
                    f"{seen[volume.content]}, which is trained or selected on"
                )
            if part == "labelled training":  # in folds each is scored in one and trained on in others
                seen[volume.content] = volume.image_source
        seen |= {volume.content: volume.image_source for volume in volumes}
