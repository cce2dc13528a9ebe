"""Datalists that are written for a folder hold subjects apart, nest their splits and pair images with labels."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from volumes import touch

from ssl_ray.config.schema import LabelledCohort, Source
from ssl_ray.data.consistency import check_lists
from ssl_ray.data.datalist import Case, read_datalist, read_unlabelled
from ssl_ray.data.layouts import Scan
from ssl_ray.data.listing import _parts, find_scans, summary, write_datalists
from ssl_ray.data.splits import Splits, read_labelled
from ssl_ray.errors import UserError

SUBJECT = r"(s\d+)_"
Lists = dict[str, dict[str, int]]


def folder_of(root: Path, unlabelled: Sequence[str], labelled: Sequence[str]) -> Path:
    touch(root, *[f"images/{name}.nii.gz" for name in (*unlabelled, *labelled)])
    touch(root, *[f"labels/{name}.nii.gz" for name in labelled])
    return root


def listing(root: Path, sizes: Sequence[int] = (), validation: float = 0.2, test: float = 0, **more: Any) -> Lists:
    """Write lists for a folder, whose patients are `SUBJECT` unless `subject` is given -> volumes of each part."""
    seed = more.pop("seed", 0)
    return write_datalists(root, find_scans(root, more.get("subject", SUBJECT)), sizes, validation, test, seed)


def visits(subjects: Sequence[int], visits: int) -> list[str]:
    return [f"s{subject}_{visit}" for subject in subjects for visit in range(visits)]


def people(cases: Sequence[Case]) -> set[str]:
    return {case.id.split("_")[0] for case in cases}


@given(
    unlabelled=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 3)), min_size=8),
    labelled=st.sets(st.tuples(st.integers(0, 11), st.integers(4, 6)), min_size=8),
    share=st.floats(0.05, 0.6),
    test=st.sampled_from([0, 0.1, 0.3, 1, 2]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_no_patient_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory,
    unlabelled: set[tuple[int, int]],
    labelled: set[tuple[int, int]],
    share: float,
    test: float,
    seed: int,
) -> None:
    """Nobody held out is trained on, with or without labels; every other volume is listed once, or named."""
    names = [[f"s{subject}_{visit}" for subject, visit in sorted(volumes)] for volumes in (unlabelled, labelled)]
    root = folder_of(tmp_path_factory.mktemp("cohort"), *names)
    found = find_scans(root, SUBJECT)
    try:
        written = write_datalists(root, found, [], share, test, seed)
    except ValueError:
        reject()  # everybody is held out
    drawn = read_datalist(root, "labelled.json", labelled=True)
    parts = {name: people(getattr(drawn, name)) for name in ("training", "validation", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == len({s for s, _ in labelled})
    assert (len(parts["test"]) == test) if test >= 1 else (bool(parts["test"]) == bool(test))
    assert {case.subject for case in drawn.training} == parts["training"]
    assert sorted(case.id for case in (*drawn.training, *drawn.validation, *drawn.test)) == sorted(names[1])
    held_out = parts["validation"] | parts["test"]
    kept_back = {f"images/{name}.nii.gz" for name in names[0] if name.split("_")[0] in held_out}
    all_of_them = {f"images/{name}.nii.gz" for name in names[0]}  # where too few are left to train and validate on
    assert set(found.left_out) == (kept_back if "unlabelled.json" in written else all_of_them)
    if "unlabelled.json" in written:
        free = read_datalist(root, "unlabelled.json", labelled=False)
        assert not people(free.training) & people(free.validation)
        shared = [case for case in drawn.training if found.notes]  # too few others were left
        assert len(free.training) + len(free.validation) + len(kept_back) == len(names[0]) + len(shared)
        assert written["unlabelled.json"] == {"training": len(free.training), "validation": len(free.validation)}
        cohort = LabelledCohort(root=str(root), classes=3, splits={len(drawn.training): "labelled.json"})
        check_lists(free.training, free.validation, read_labelled(cohort, tuple(cohort.splits)))


def test_splits_of_a_folder_are_nested_and_share_validation(tmp_path: Path) -> None:
    """A smaller split is the beginning of the larger ones, and the study's reader accepts them together."""
    root = folder_of(tmp_path, visits(range(10), 2), visits(range(20, 32), 2))
    written = listing(root, [12, 3, 6], 0.25, seed=4)
    assert {name: counts["training"] for name, counts in written.items() if name != "unlabelled.json"} == {
        "labelled_3.json": 3, "labelled_6.json": 6, "labelled_12.json": 12,
    }  # fmt: skip
    cohort = LabelledCohort(root=str(root), classes=3, splits={n: f"labelled_{n}.json" for n in (3, 6, 12)})
    splits = read_labelled(cohort, (3, 6, 12))
    assert splits.training[12][:6] == splits.training[6]
    assert splits.training[6][:3] == splits.training[3]
    assert len(people(splits.validation)) == 3
    training, validation = read_unlabelled([Source(root=str(root), datalist="unlabelled.json")])
    check_lists(training, validation, splits)


def test_listing_is_a_function_of_the_seed(tmp_path: Path) -> None:
    """The same folder and seed give the same bytes, whatever was written before; another seed holds out others."""
    root = folder_of(tmp_path, visits(range(10), 2), visits(range(20, 32), 1))

    def written(seed: int) -> dict[str, bytes]:
        written = [root / name for name in listing(root, [2, 4], seed=seed)]
        assert list(listing(root, [2, 4], seed=seed)) == [path.name for path in written]
        with pytest.raises(ValueError, match="there already with other content"):
            listing(root, [2, 4], seed=seed + 10)
        content = {path.name: path.read_bytes() for path in written}
        for path in written:
            path.unlink()
        return content

    first = written(0)
    others = [written(seed) for seed in (1, 2, 3)]
    assert written(0) == first
    assert any(other["unlabelled.json"] != first["unlabelled.json"] for other in others)


@pytest.mark.parametrize(
    ("files", "pairs"),
    [
        (("imagesTr/a.nii.gz", "labelsTr/a.nii.gz"), {"imagesTr/a.nii.gz": "labelsTr/a.nii.gz"}),
        (("images/a.nii", "labels/a.nii.gz"), {"images/a.nii": "labels/a.nii.gz"}),
        (("imagesTr/img0001.nii", "labelsTr/label0001.nii"), {"imagesTr/img0001.nii": "labelsTr/label0001.nii"}),
        (("imagesTr/a.nii", "imagesTs/b.nii", "labelsTr/a.nii"), {"imagesTr/a.nii": "labelsTr/a.nii"}),
        (("x/images/a.nii", "x/labels/a.nii", "y/images/a.nii"), {"x/images/a.nii": "x/labels/a.nii"}),
        (("x/images/a.nii", "x/labels/a.nii", "y/images/a.nii", "y/labels/a.nii"),
         {"x/images/a.nii": "x/labels/a.nii", "y/images/a.nii": "y/labels/a.nii"}),
        (("images/x/a.nii", "labels/x/a.nii", "images/y/a.nii"), {"images/x/a.nii": "labels/x/a.nii"}),
        (("a.nii", "labels/a.nii"), {"a.nii": "labels/a.nii"}),
    ],
)  # fmt: skip
def test_labels_are_found_beside_their_images(tmp_path: Path, files: Sequence[str], pairs: dict[str, str]) -> None:
    """The layouts of the Decathlon and BTCV pair each image with its own label; what is left over is unlabelled."""
    extra = [f"images/zz{number}.nii.gz" for number in range(3)] + [f"images/yy{number}.nii.gz" for number in range(2)]
    touch(tmp_path, *files, *extra, *[f"labels/yy{number}.nii.gz" for number in range(2)], "images/._a.nii.gz")
    written = listing(tmp_path, validation=0.1, subject=".*")
    found: dict[str, str] = {}
    unlabelled: set[str] = set()
    for name in written:
        tree = json.loads((tmp_path / name).read_text())
        for entry in tree["training"] + tree["validation"]:
            if name == "unlabelled.json":
                unlabelled.add(entry["image"])
            else:
                found[entry["image"]] = entry["label"]
    assert found == pairs | {f"images/yy{number}.nii.gz": f"labels/yy{number}.nii.gz" for number in range(2)}
    images = {name for name in (*files, *extra) if "labels" not in name}
    assert unlabelled == images - set(found)


@pytest.mark.parametrize(
    ("unlabelled", "labelled", "sizes", "test", "rule"),
    [
        (0, 0, [], 0, "no image (.nii or .nii.gz) in it"),
        (5, 5, [5], 0, "5 labelled training volumes asked for, but 4 are left after holding out 1 volumes of 1 of 5"),
        (5, 5, [3], 2, "3 labelled training volumes asked for, but 2 are left after holding out 3 volumes of 3 of 5"),
        (5, 5, [], 5, "1 labelled training volumes asked for, but 0 are left after holding out 5 volumes of 5 of 5"),
        (5, 5, [0], 0, "0 labelled training volumes asked for"),
        (5, 0, [2], 0, "--splits and --test are about labelled volumes, but no image has a label"),
        (5, 0, [], 0.1, "--splits and --test are about labelled volumes, but no image has a label"),
        (1, 0, [], 0, "1 unlabelled training volumes asked for, but 0 are left"),
    ],
)
def test_too_few_volumes_are_refused(
    tmp_path: Path, unlabelled: int, labelled: int, sizes: list[int], test: float, rule: str
) -> None:
    """A folder that cannot give what is asked for is refused before anything is written."""
    folder_of(tmp_path, visits(range(unlabelled), 1), visits(range(50, 50 + labelled), 1))
    with pytest.raises(UserError, match=re.escape(rule)) as caught:
        listing(tmp_path, sizes, test=test)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("unlabelled", [[], ["s1_0"], ["s50_9"]])
def test_where_all_are_labelled_the_training_images_are_pretrained_on(tmp_path: Path, unlabelled: list[str]) -> None:
    """Without their labels, all of them whatever the splits, and nobody who is held out; it is said, and a study runs.

    So too where a scan or two have no label. A patient's other scan is listed if the patient trains.
    """
    root = folder_of(tmp_path, unlabelled, visits(range(50, 65), 1))
    found = find_scans(root, SUBJECT)
    assert set(write_datalists(root, found, [2, 4], 0.2, 0.2, seed=0)) == {
        "labelled_2.json", "labelled_4.json", "unlabelled.json"
    }  # fmt: skip
    entries = json.loads((root / "unlabelled.json").read_text())
    assert not any("label" in entry for part in ("training", "validation") for entry in entries[part])
    cohort = LabelledCohort(root=str(root), classes=3, splits={4: "labelled_4.json"})
    splits = read_labelled(cohort, (4,))
    held_out = people(splits.validation) | people(splits.test)
    training, validation = read_unlabelled([Source(root=str(root), datalist="unlabelled.json")])
    assert not people((*training, *validation)) & held_out
    others = {name.split("_")[0] for name in unlabelled}
    assert people((*training, *validation)) == ({f"s{number}" for number in range(50, 65)} | others) - held_out
    check_lists(training, validation, splits)
    (note,) = found.notes
    assert note in summary(root, found)
    assert "without their labels, and none that is held out" in note


def test_folds_score_everybody_so_nobody_with_a_label_is_pretrained_on(tmp_path: Path) -> None:
    """Neither are other scans of theirs; where nothing else is there, there is no list to pretrain on."""
    both = folder_of(tmp_path / "both", [*visits(range(4), 1), "s50_8"], visits(range(50, 55), 1))
    found = find_scans(both, SUBJECT)
    written = write_datalists(both, found, [], 0.2, 0, 0, folds=True)
    assert sum(written["unlabelled.json"].values()) == 4
    assert found.left_out == {"images/s50_8.nii.gz": "an unlabelled scan of a patient who is held out"}
    cohort = LabelledCohort(root=str(both), classes=3, pool="labelled.json", sizes=(1,), folds=3)
    check_lists(*read_unlabelled([Source(root=str(both), datalist="unlabelled.json")]), read_labelled(cohort, (1,)))
    alone = folder_of(tmp_path / "alone", [], visits(range(50, 55), 1))
    assert list(write_datalists(alone, find_scans(alone, SUBJECT), [], 0.2, 0, 0, folds=True)) == ["labelled.json"]


@pytest.mark.parametrize("sizes", [[], [2], [2, 4]])
def test_labelled_scans_beyond_the_largest_split_are_named(tmp_path: Path, sizes: list[int]) -> None:
    """Every labelled scan is in a list or left out by name."""
    found = find_scans(folder_of(tmp_path, visits(range(20, 24), 1), visits(range(8), 1)), SUBJECT)
    written = write_datalists(tmp_path, found, sizes, 0.2, 0, seed=0)
    listed = {
        entry["image"] for name in written for part in ("training", "validation")
        for entry in json.loads((tmp_path / name).read_text())[part]
    }  # fmt: skip
    assert not listed & set(found.left_out)
    assert listed | set(found.left_out) == {scan.image for scan in found.scans}
    assert set(found.left_out.values()) <= {"a labelled scan beyond the largest split"}
    assert len(found.left_out) == (6 - max(sizes) if sizes else 0)


def test_many_patients_are_listed_and_drawn_in_linear_time(tmp_path: Path) -> None:
    """20000 patients take a second, where a search for each in a list of the others takes a minute."""
    people = {f"s{number}": [Scan(f"s{number}.nii.gz", "label")] for number in range(20000)}
    cases = tuple(Case(f"s{number}", tmp_path / f"s{number}.nii.gz", tmp_path / "label") for number in range(20000))
    usable = {str(case.image) for case in cases}
    start = time.process_time()
    parts = _parts(people, 0.2, list(people)[:10000])
    drawn = Splits({20000: cases}, (), (), (), pool=True).draw(10000, 0, 0, usable)
    assert time.process_time() - start < 5
    assert [len(parts[name]) for name in ("training", "validation", "test")] == [6000, 4000, 10000]
    assert len(drawn) == 10000


@pytest.mark.parametrize(
    ("subject", "rule"),
    [
        ("(", "--subject (: not a regular expression"),
        (
            r"(patient\d+)",
            r"--subject (patient\d+): finds no patient in 3 of 3 paths, e.g. in images/s1_x.nii.gz; it must",
        ),
        (r"s1", "finds no patient in 1 of 3 paths, e.g. in images/s2_x.nii.gz"),
        (r"(\d*)", "finds no patient in 3 of 3 paths"),
    ],
)
def test_an_expression_that_finds_no_patient_is_refused(tmp_path: Path, subject: str, rule: str) -> None:
    """Also where it finds one in some of the paths, and not in others: no volume becomes a patient of its own."""
    touch(tmp_path, *[f"images/{name}.nii.gz" for name in ("s1_x", "s1_y", "s2_x")])
    with pytest.raises(UserError, match=re.escape(rule)):
        find_scans(tmp_path, subject)


def test_a_patient_is_the_group_that_matches(tmp_path: Path) -> None:
    """Alternatives in the expression may each have their group."""
    touch(tmp_path, *[f"{name}.nii.gz" for name in ("siteA-1_x", "siteA-1_y", "siteB-1_x", "siteB-1_y")])
    found = find_scans(tmp_path, r"site(A-\d+)|site(B-\d+)")
    assert [scan.subject for scan in found.scans] == ["A-1", "A-1", "B-1", "B-1"]


@pytest.mark.parametrize(
    "files", ["patient{}/baseline", "patient{}/scan1/ct", "data/patient{}/ct", "images/patient{}/ct"]
)
@pytest.mark.parametrize("subject", [None, r"(patient\d+)"])
def test_a_patient_is_looked_for_in_the_path(tmp_path: Path, files: str, subject: str | None) -> None:
    """Scans that are all called alike are told apart by the folder, with the expression or without."""
    names = [files.format(number) for number in range(6)]
    touch(tmp_path, *[f"{name}.nii.gz" for name in names], *[f"{Path(name).parent / 'later'}.nii.gz" for name in names])
    assert listing(tmp_path, subject=subject) == {"unlabelled.json": {"training": 10, "validation": 2}}
    listed = read_datalist(tmp_path, "unlabelled.json", labelled=False)
    training, validation = ({case.subject for case in part} for part in (listed.training, listed.validation))
    assert training | validation == {f"patient{number}" for number in range(6)}
    assert not training & validation
