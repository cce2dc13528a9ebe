"""The lists of a study together: patients are held out whole, and no list contradicts another."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from studies import small_study
from volumes import PREPARATION, make_case, touch

from ssl_ray.config.schema import LabelledCohort, Source, Study
from ssl_ray.data.consistency import check_lists, not_nested
from ssl_ray.data.datalist import read_datalist, read_unlabelled
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.splits import Splits, read_labelled
from ssl_ray.data.store import Store
from ssl_ray.errors import UserError
from ssl_ray.study.cohorts import read_cohorts


def scan(name: str, subject: str | None = None, label: str | None = "") -> dict[str, str]:
    """An entry; without a label where that is None."""
    entry = {"image": f"{name}.nii.gz" if "." not in name else name}
    if label is not None:
        entry["label"] = f"labels/{label or name}.nii.gz"
    return entry | ({"subject": subject} if subject else {})


def bare(name: str, subject: str | None = None) -> dict[str, str]:
    return scan(name, subject, None)


LISTS: dict[str, dict[str, Any]] = {
    "free.json": {"training": [bare("u1", "p1"), bare("u2", "p2")], "validation": [bare("u3", "p3")]},
    "two.json": {"training": [scan("a"), scan("b", "p1")], "validation": [scan("v", "p8")], "test": [scan("t", "p9")]},
    "three.json": {
        "training": [scan("a"), scan("b", "p1"), scan("c")],
        "validation": [scan("v", "p8")],
        "test": [scan("t", "p9")],
    },
}


def study_of(root: Path, **changes: dict[str, Any]) -> Study:
    """A study with an unlabelled list and splits of 2 and 3; `changes`: sections of its lists, by name of the list."""
    for name, tree in LISTS.items():
        tree = tree | changes.get(name.removesuffix(".json"), {})
        (root / name).write_text(json.dumps(tree))
        for entry in (entry for section in ("training", "validation", "test") for entry in tree.get(section, ())):
            touch(root, entry["image"], *([entry["label"]] if "label" in entry else []))
    splits = {2: "two.json", 3: "three.json"}
    tree = {"sources": [{"root": str(root), "datalist": "free.json"}]}
    return small_study(root, root, pretrain=tree, finetune={"cohort": {"splits": splits}})


def refusal(root: Path, **changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        read_cohorts(study_of(root, **changes))
    return str(caught.value)


def test_lists_that_agree_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A labelled training patient may be among the unlabelled ones, in both parts of a study; nested splits are nothing
    to speak of."""
    training, _, splits = read_cohorts(study_of(tmp_path))
    labelled = {"training": [scan("a"), scan("b", "p1"), scan("c", "p7")]}
    assert read_cohorts(study_of(tmp_path, free={"validation": [bare("u3", "p7")]}, three=labelled))
    assert [case.subject for case in training] == ["p1", "p2"]
    assert [case.subject for case in splits.training[3]] == ["", "p1", ""]
    assert not_nested(splits) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("held_out", [{"validation": [scan("v", "p2")]}, {"test": [scan("t", "p2")]}])
@pytest.mark.parametrize("section", ["training", "validation"])
def test_a_held_out_patient_is_not_among_the_unlabelled(tmp_path: Path, held_out: dict[str, Any], section: str) -> None:
    """Another scan of the patient is enough, in training or in validation, and the message names both entries."""
    free = {"training": [bare("u1"), bare("u2")], "validation": [bare("u3")]}
    free[section][-1]["subject"] = "p2"
    message = refusal(tmp_path, free=free, two=held_out, three=held_out)
    (name,) = held_out
    assert message.startswith(f"{tmp_path / 'two.json'}: {name}.0: patient p2 is in labelled {name} ")
    assert f"and also in unlabelled {section} (" in message
    assert f"{tmp_path / 'free.json'}: {section}.{len(free[section]) - 1})" in message


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"free": {"validation": [bare("u3", "p2")]}}, "patient p2 is in unlabelled validation"),
        ({"three": {"training": [scan("a"), scan("b", "p1"), scan("c", "p8")]}}, "patient p8 is in labelled valid"),
        ({"three": {"training": [scan("a"), scan("b", "p1"), scan("c", "p9")]}}, "patient p9 is in labelled test"),
        ({name: {"test": [scan("t", "p8")]} for name in ("two", "three")}, "patient p8 is in labelled test"),
        ({"three": {"training": [scan("a"), scan("b", "p1"), scan("v.nii", label="c")]}}, "v is in labelled valid"),
        ({"free": {"training": [bare("t.nii")]}}, "t is in labelled test"),
        ({"free": {"training": [bare("V.NII.GZ"), bare("v.NII")]}}, "v is in labelled validation"),
    ],
)
def test_a_patient_or_scan_is_on_one_side(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    """Across all lists: a patient by the subject, a scan by its name whether it is compressed or not."""
    message = refusal(tmp_path, **changes)
    assert rule in message
    assert "but must be in one of them alone" in message
    assert message.endswith("give them different subjects") == rule.startswith("patient")


def test_patients_of_two_sources_are_held_apart(tmp_path: Path) -> None:
    """A patient in training of one source and in validation of another is found, too."""
    study = study_of(tmp_path)
    (tmp_path / "more.json").write_text(json.dumps({"training": [bare("u9", "p3")]}))
    touch(tmp_path, "u9.nii.gz")
    sources = [Source(root=str(tmp_path), datalist=name) for name in ("free.json", "more.json")]
    unlabelled = read_unlabelled(sources)
    with pytest.raises(UserError, match=r"free.json: validation.0: patient p3 .*more.json: training.0"):
        check_lists(*unlabelled, read_labelled(study.finetune.cohort, (2,)))


@pytest.mark.parametrize(
    ("third", "values"),
    [
        (scan("b", "p1", label="b2"), ("the label {root}/labels/b2.nii.gz", "{root}/labels/b.nii.gz")),
        (scan("b", "p7"), ("the subject 'p7'", "'p1'")),
        (scan("b"), ("the subject ''", "'p1'")),
    ],
)
def test_two_lists_do_not_contradict_each_other(tmp_path: Path, third: dict[str, str], values: tuple[str, ...]) -> None:
    """Two raters' labels, or two patients, of one image: both lists, the image and both values are named."""
    message = refusal(tmp_path, three={"training": [scan("a"), third, scan("c")]})
    assert message == (
        f"{tmp_path}/three.json: training.1: {tmp_path}/b.nii.gz has {values[0]} here, but {values[1]} in "
        f"{tmp_path}/two.json: training.1"
    ).format(root=tmp_path)


def test_an_unlabelled_list_may_not_say_whose_scans_they_are(tmp_path: Path) -> None:
    """A published list without subjects goes with one that has them; one that has others does not."""
    study_of(tmp_path, free={"training": [bare("b")]})
    assert read_cohorts(study_of(tmp_path, free={"training": [bare("b")]}))
    assert "has the subject 'p2' here, but 'p1' in" in refusal(tmp_path, free={"training": [bare("b", "p2")]})


def test_validation_that_differs_is_shown_with_both_values(tmp_path: Path) -> None:
    """The first entry that differs is named with both labels."""
    message = refusal(tmp_path, three={"validation": [scan("v", "p8", label="w")]})
    assert f"'validation' differs from that of {tmp_path}/two.json" in message
    assert f"{tmp_path}/labels/w.nii.gz and p8 against {tmp_path}/v.nii.gz and {tmp_path}/labels/v.nii.gz" in message


def test_organs_are_named_alike_in_all_lists(tmp_path: Path) -> None:
    """Another name is refused with both lists and names; a list may leave names to the others."""
    named = {"labels": {"1": "liver", "2": "spleen"}}
    assert "three.json: label 2 is 'kidney', but 'spleen' in " in refusal(
        tmp_path, two=named, three={"labels": {"2": "kidney"}}
    )
    splits = read_cohorts(study_of(tmp_path, two={"labels": {"1": "liver"}}, three=named))[2]
    assert splits.organs[:3] == ("liver", "spleen", "label 3")


def test_splits_that_are_not_nested_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no mistake, but the reader of the report has to know."""
    read_cohorts(study_of(tmp_path, three={"training": [scan("a"), scan("c"), scan("d")]}))
    printed = capsys.readouterr().out
    assert f"not nested: 1 of the 2 training volumes, e.g. {tmp_path}/b.nii.gz, are not among the 3" in printed


def test_a_subject_goes_into_the_volume_but_not_into_the_store(tmp_path: Path, store: Store) -> None:
    """Two lists that name the patient differently have the same stored bytes."""
    case = replace(make_case(tmp_path), subject="p1")
    volume, fresh = prepare_case(case, PREPARATION, store)
    assert (volume.subject, fresh) == ("p1", True)
    again, fresh = prepare_case(replace(case, subject="p2"), PREPARATION, store)
    assert (again.subject, fresh) == ("p2", False)
    assert "p1" not in store.path(volume.key, "manifest.json").read_text()


@pytest.mark.parametrize("subject", [5, None, ["p1"]])
def test_a_subject_is_text(tmp_path: Path, subject: Any) -> None:
    """Whatever else stands there is refused with its entry."""
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii", "subject": subject}]}))
    with pytest.raises(UserError, match=r"list.json: training.0.subject: input should be a valid string, got"):
        read_datalist(tmp_path, "list.json", labelled=False)


def test_upper_case_suffixes_are_read(tmp_path: Path, store: Store) -> None:
    """What Windows writes as `.NII.GZ` is listed and prepared as any other volume."""
    case = make_case(tmp_path)
    image, label = (path.rename(path.with_name("ONE.NII.GZ")) for path in (case.image, case.label) if path)
    entry = {"image": str(image.relative_to(tmp_path)), "label": str(label.relative_to(tmp_path))}
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry], "validation": [scan("v")]}))
    touch(tmp_path, "v.nii.gz", "labels/v.nii.gz")
    cohort = LabelledCohort(root=str(tmp_path), classes=4, splits={1: "list.json"})
    splits: Splits = read_labelled(cohort, (1,))
    assert prepare_case(splits.training[1][0], PREPARATION, store)[0].id == "ONE"
