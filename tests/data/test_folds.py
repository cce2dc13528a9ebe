"""A cohort without a test part, in folds: every patient is scored once a run, by networks that have not seen it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from volumes import touch

from ssl_ray.config.schema import LabelledCohort
from ssl_ray.data.consistency import check_lists
from ssl_ray.data.datalist import Case, subject_of
from ssl_ray.data.splits import Splits, read_labelled
from ssl_ray.errors import UserError


def splits(subjects: int, folds: int) -> Splits:
    """Two scans of every second patient, listed one after the other."""
    scans = [(n, scan) for n in range(subjects) for scan in range(1 + n % 2)]
    cases = [Case(f"s{n}_{scan}", Path(f"s{n}_{scan}"), Path("label"), f"patient{n}") for n, scan in scans]
    return Splits({subjects: tuple(cases)}, (), (), ("organ",), pool=True, folds=folds)


def people(cases: tuple[Case, ...]) -> set[str]:
    return {subject_of(case) for case in cases}


@given(st.integers(3, 7), st.integers(0, 25), st.integers(0, 3), st.integers(0, 2**32))
def test_every_patient_is_scored_once_by_a_network_that_has_not_seen_it(
    folds: int, more: int, run: int, seed: int
) -> None:
    """All scans of a patient, in one fold alone; nobody is in two parts of a training; parts differ by one patient."""
    made = splits(folds + more, folds)
    usable = {str(case.image) for case in made.cases}
    reach = len(people(made.cases)) - max(
        len(people(made.parts(0, seed, run, fold, usable)[1])) + len(people(made.parts(0, seed, run, fold, usable)[2]))
        for fold in range(folds)
    )
    scored: list[Case] = []
    selecting: list[Case] = []
    sizes = set()
    for fold in range(folds):
        training, validation, test = made.parts(max(1, reach), seed, run, fold, usable)
        parts = [people(part) for part in (training, validation, test)]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert len(parts[0]) == max(1, reach)
        scored += test
        selecting += validation
        sizes.add(len(parts[2]))
        assert validation == made.parts(1, seed, run, (fold + 1) % folds, usable)[2], "the next fold selects"
    assert sorted(case.id for case in scored) == sorted(case.id for case in selecting)
    assert len(scored) == len(made.cases)
    assert max(sizes) - min(sizes) <= 1


def test_runs_and_seeds_deal_differently_and_sizes_are_nested() -> None:
    """A smaller draw of a fold is part of a larger one; the order of the list is of no account."""
    made, usable = splits(20, 5), {str(case.image) for case in splits(20, 5).cases}
    scored = {(seed, run): made.parts(4, seed, run, 0, usable)[2] for seed in (0, 1) for run in (0, 1)}
    assert len(set(scored.values())) == 4
    small, large = (people(made.parts(size, 0, 0, 2, usable)[0]) for size in (4, 9))
    assert small < large
    (pool,) = made.training.values()
    turned = Splits({20: pool[::-1]}, (), (), ("organ",), pool=True, folds=5)
    for one, other in zip(made.parts(4, 0, 1, 3, usable), turned.parts(4, 0, 1, 3, usable), strict=True):
        assert set(one) == set(other)


def test_a_patient_that_cannot_be_used_moves_no_other() -> None:
    """He is dealt all the same; where he would have been trained on, the next one is drawn."""
    made, usable = splits(20, 5), {str(case.image) for case in splits(20, 5).cases}
    training, validation, test = made.parts(6, 0, 0, 1, usable)
    lost = training[0].subject
    less = usable - {str(case.image) for case in made.cases if case.subject == lost}
    kept, *others = made.parts(6, 0, 0, 1, less)
    assert others == [validation, test]
    assert len(people(kept)) == 6
    assert people(training) - {lost} < people(kept)
    with pytest.raises(UserError, match="13 subjects are to be drawn, but 12 are usable"):
        made.parts(13, 0, 0, 1, usable)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Eight volumes, two of them listed for validation."""
    names = [f"v{number}" for number in range(8)]
    entries = [{"image": f"i/{name}.nii.gz", "label": f"l/{name}.nii.gz", "subject": name} for name in names]
    touch(tmp_path, *(entry[key] for entry in entries for key in ("image", "label")))
    tree = {"training": entries[:6], "validation": entries[6:], "labels": {"1": "liver"}}
    (tmp_path / "all.json").write_text(json.dumps(tree))
    (tmp_path / "tested.json").write_text(json.dumps(tree | {"training": entries[:5], "test": entries[5:6]}))
    return tmp_path


def cohort(root: Path, **changes: Any) -> LabelledCohort:
    settings = {"root": str(root), "classes": 2, "pool": "all.json", "sizes": (2, 4), "folds": 4} | changes
    return LabelledCohort.model_validate(settings)


def test_the_whole_list_is_dealt_into_folds(listed: Path) -> None:
    """Its validation volumes, too: every patient is scored."""
    found = read_labelled(cohort(listed), (2, 4))
    assert (found.folds, [*found.training], found.validation, found.test) == (4, [8], (), ())
    assert len(found.cases) == 8


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"pool": "tested.json"},
            r"tested.json: lists a test part, which is scored without finetune.cohort.folds",
        ),
        (
            {"sizes": (2, 5)},
            r"all.json: 5 subjects are to be drawn from a pool of 8 in 4 folds, which leave 4 while one is scored and",
        ),
        ({"folds": 3}, r"4 subjects are to be drawn from a pool of 8 in 3 folds, which leave 2 while"),
        ({"folds": 9, "sizes": (1,)}, r"1 subjects are to be drawn from a pool of 8 in 9 folds, which leave 6 while"),
    ],
)
def test_folds_that_leave_too_little_are_refused(listed: Path, changes: dict[str, Any], rule: str) -> None:
    """Before anything is prepared, with the arithmetic."""
    wanted = cohort(listed, **changes)
    with pytest.raises(UserError, match=rule):
        read_labelled(wanted, wanted.sizes or ())


def test_a_patient_that_is_scored_is_in_no_pretraining(listed: Path) -> None:
    """Where a fold scores every patient, none may be among the unlabelled volumes; else those for training may."""
    found = read_labelled(cohort(listed), (2,))
    apart = Case("u", listed / "i" / "u.nii.gz", None, "somebody else")
    check_lists([apart], [], found)
    unlabelled = Case("v0", listed / "i" / "another.nii.gz", None, "v0")
    with pytest.raises(UserError, match=r"patient v0 is in labelled training .* and also in unlabelled training"):
        check_lists([apart, unlabelled], [], found)
    check_lists([unlabelled], [], read_labelled(cohort(listed, folds=None), (2,)))
