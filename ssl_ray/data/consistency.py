"""The lists of a study together: who is scored is trained on nowhere, and no two lists contradict each other."""

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from ssl_ray.config.schema import Finetune, Pretrain
from ssl_ray.data.datalist import Case, read_unlabelled, stem
from ssl_ray.data.splits import Splits, read_labelled
from ssl_ray.errors import UserError

Cohorts = tuple[tuple[Case, ...], tuple[Case, ...], Splits]
"""The cases of a study: unlabelled ones to train and to validate on, and the labelled splits."""

SECTIONS = "unlabelled training", "unlabelled validation", "labelled training", "labelled validation", "labelled test"
"""What the lists of a study hold, in the order in which one is checked against those before it."""


def read_lists(pretrain: Pretrain | None, finetune: Finetune) -> Cohorts:
    """The datalists of a study, checked without reading a volume; None where nothing is pretrained."""
    training, validation = read_unlabelled(pretrain.sources) if pretrain else ((), ())
    if pretrain and training:  # the steps follow from the volumes, so that the configuration alone cannot check this
        samples = pretrain.epochs * pretrain.drawn(len(training)) * pretrain.patches_per_volume
        pretrain.optimizer.check_warmup(pretrain.steps or samples // pretrain.batch_size, "pretrain.")
    splits = read_labelled(finetune.cohort, finetune.sizes)
    check_lists(training, validation, splits, finetune.preparation.channels)
    return training, validation, splits


def check_lists(training: Sequence[Case], validation: Sequence[Case], splits: Splits, channels: int = 1) -> None:
    """Check all lists of a study together, by names alone; `training` and `validation` are the unlabelled volumes.

    A scan is known by its file, whatever links lead to it and whether it is compressed or not; a patient by the subject
    in the lists. Labelled training patients may be among the unlabelled ones, to train or to validate on, as their
    labels are what is asked about, unless they are scored in some fold.

    A UserError names lists, entries and both values, where a patient or scan of the labelled validation or test is in
    any other list, one is both trained and validated on without labels, two lists give an image different labels,
    patients or further channels, or a volume has more or fewer images than `channels`.
    """
    labelled = [case for cases in splits.training.values() for case in cases]
    for case in (*training, *validation, *labelled, *splits.validation, *splits.test):
        if len(case.images) != channels:
            rule = f"must list as many images as preparation.channels, {channels}"
            raise UserError(f"{case.place}.image: {rule}, got {len(case.images)}")
    _check_same([*labelled, *splits.validation, *splits.test], (*training, *validation))
    held_out = held_out_sections(splits)
    seen: dict[tuple[str, str], tuple[str, Case]] = {}
    for part, cases in sections(training, validation, splits).items():
        known = [(key, case) for case in cases for key in _known_by(case)]
        for key, case in known if part in held_out else ():
            if key in seen:
                other_part, other = seen[key]
                hint = "; if these are two people, give them different subjects" if key[0] == "patient" else ""
                raise UserError(
                    f"{case.place}: {' '.join(key)} is in {part} ({case.image}) and also in {other_part} "
                    f"({other.image}, {other.place}), but must be in one of them alone{hint}"
                )
        seen |= {key: (part, case) for key, case in known}


def sections(training: Sequence[Case], validation: Sequence[Case], splits: Splits) -> dict[str, Sequence[Case]]:
    """The cases of a study by section, each once: unlabelled ones to train and to validate on, and those of splits."""
    labelled = {case.image: case for cases in splits.training.values() for case in cases}
    parts = training, validation, tuple(labelled.values()), splits.validation, splits.test
    return dict(zip(SECTIONS, parts, strict=True))


def held_out_sections(splits: Splits) -> set[str]:
    """Those that a network is selected or scored on, and so not trained on; in folds everybody is scored."""
    return {*SECTIONS} - ({"unlabelled training"} if splits.folds else {"unlabelled training", "labelled training"})


def not_nested(splits: Splits) -> str | None:
    """What to say where a smaller split is not part of the next larger one: the sizes then differ in more than size."""
    for small, large in pairwise(sorted(splits.training)):
        more = {os.path.realpath(case.image) for case in splits.training[large]}
        lost = [case for case in splits.training[small] if os.path.realpath(case.image) not in more]
        if lost:
            return (
                f"splits are not nested: {len(lost)} of the {small} training volumes, e.g. {lost[0].image}, are not "
                f"among the {large}; a difference between the two is also one of who was labelled"
            )
    return None


def _check_same(labelled: Sequence[Case], unlabelled: Sequence[Case]) -> None:
    """Refuse an image that is given other labels, channels, or another patient, in another list."""
    known: dict[str, Case] = {}
    for case in (*labelled, *unlabelled):
        first = known.setdefault(os.path.realpath(case.image), case)
        if case.label and first.label and os.path.realpath(case.label) != os.path.realpath(first.label):
            values = f"the label {case.label} here, but {first.label}"
        elif [*map(os.path.realpath, case.others)] != [*map(os.path.realpath, first.others)]:
            others, theirs = (" and ".join(map(str, one.others)) for one in (case, first))
            values = f"the further channels {others} here, but {theirs}"
        # A list without labels need not say whose scans they are.
        elif case.subject != first.subject and (case.label or (case.subject and first.subject)):
            values = f"the subject {case.subject!r} here, but {first.subject!r}"
        else:
            continue
        raise UserError(f"{case.place}: {case.image} has {values} in {first.place}")


def _known_by(case: Case) -> Iterator[tuple[str, str]]:
    """What tells two cases apart: the files without their suffix and, where the list has it, the patient."""
    for image in case.images:
        file = Path(os.path.realpath(image))
        yield "scan", str(file.with_name(stem(file)))
    if case.subject:
        yield "patient", case.subject
