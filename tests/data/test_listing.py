"""Datalists that are written for a folder hold subjects apart, nest their splits and pair images with labels."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from volumes import touch

from ssl_ray.config.schema import LabelledCohort, Source
from ssl_ray.data.consistency import check_lists
from ssl_ray.data.datalist import Case, read_datalist, read_labelled, read_unlabelled
from ssl_ray.data.listing import write_datalists

SUBJECT = r"^(s\d+)"


def folder_of(root: Path, unlabelled: Sequence[str], labelled: Sequence[str]) -> Path:
    touch(root, *[f"images/{name}.nii.gz" for name in (*unlabelled, *labelled)])
    touch(root, *[f"labels/{name}.nii.gz" for name in labelled])
    return root


def visits(subjects: Sequence[int], visits: int) -> list[str]:
    return [f"s{subject}_{visit}" for subject in subjects for visit in range(visits)]


def people(cases: Sequence[Case]) -> set[str]:
    return {case.id.split("_")[0] for case in cases}


@given(
    unlabelled=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 3)), min_size=8),
    labelled=st.sets(st.tuples(st.integers(0, 11), st.integers(4, 6)), min_size=8),
    share=st.floats(0.05, 0.6),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_no_person_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory,
    unlabelled: set[tuple[int, int]],
    labelled: set[tuple[int, int]],
    share: float,
    seed: int,
) -> None:
    """Nobody held out of the labelled volumes is trained on, with or without labels; every volume is listed once."""
    names = [[f"s{subject}_{visit}" for subject, visit in sorted(volumes)] for volumes in (unlabelled, labelled)]
    root = folder_of(tmp_path_factory.mktemp("cohort"), *names)
    try:
        written = write_datalists(root, [], share, SUBJECT, seed)
    except ValueError:
        reject()  # everybody with unlabelled volumes is held out
    (labelled_file,) = (name for name in written if name.startswith("labelled_"))
    free = read_datalist(root, "unlabelled.json", labelled=False)
    drawn = read_datalist(root, labelled_file, labelled=True)
    for listed in (free, drawn):
        assert not people(listed.training) & people(listed.validation)
    assert not people(free.training) & people(drawn.validation)
    assert sorted(case.id for case in (*free.training, *free.validation)) == sorted(names[0])
    assert sorted(case.id for case in (*drawn.training, *drawn.validation)) == sorted(names[1])
    assert written["unlabelled.json"] == (len(free.training), len(free.validation))


def test_splits_of_a_folder_are_nested_and_share_validation(tmp_path: Path) -> None:
    """A smaller split is the beginning of the larger ones, and the study's reader accepts them together."""
    root = folder_of(tmp_path, visits(range(10), 2), visits(range(20, 32), 2))
    written = write_datalists(root, [12, 3, 6], 0.25, SUBJECT, seed=4)
    assert {name: counts[0] for name, counts in written.items() if name != "unlabelled.json"} == {
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

    def listing(seed: int) -> dict[str, bytes]:
        written = [root / name for name in write_datalists(root, [2, 4], 0.2, SUBJECT, seed)]
        assert list(write_datalists(root, [2, 4], 0.2, SUBJECT, seed)) == [path.name for path in written]
        with pytest.raises(ValueError, match="a list with other content is there already"):
            write_datalists(root, [2, 4], 0.2, SUBJECT, seed + 10)
        content = {path.name: path.read_bytes() for path in written}
        for path in written:
            path.unlink()
        return content

    first = listing(0)
    others = [listing(seed) for seed in (1, 2, 3)]
    assert listing(0) == first
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
    written = write_datalists(tmp_path, [], 0.1, ".*", seed=0)
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
    ("unlabelled", "labelled", "sizes", "rule"),
    [
        (0, 0, [], "no .nii or .nii.gz file in it"),
        (5, 5, [5], "5 labelled training volumes asked for, but 4 are left after holding out 1 of 1 subjects"),
        (5, 5, [0], "0 labelled training volumes asked for"),
        (5, 0, [2], "2 labelled training volumes asked for, but no image has a label"),
        (1, 5, [2], "unlabelled training volumes asked for, but 0 are left"),
    ],
)
def test_too_few_volumes_are_refused(
    tmp_path: Path, unlabelled: int, labelled: int, sizes: list[int], rule: str
) -> None:
    """A folder that cannot give what is asked for is refused before anything is written."""
    folder_of(tmp_path, visits(range(unlabelled), 1), visits(range(50, 50 + labelled), 1))
    with pytest.raises(ValueError, match=re.escape(rule)) as caught:
        write_datalists(tmp_path, sizes, 0.2, SUBJECT, seed=0)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert not list(tmp_path.glob("*.json"))


def test_a_wrong_folder_or_expression_is_refused(tmp_path: Path) -> None:
    """A folder without volumes, or none at all, and what is no regular expression are named."""
    with pytest.raises(ValueError, match=r"no: no \.nii or \.nii\.gz file in it"):
        write_datalists(tmp_path / "no", [], 0.2, SUBJECT, seed=0)
    folder_of(tmp_path, ["a"], [])
    with pytest.raises(ValueError, match=r"--subject \(: not a regular expression"):
        write_datalists(tmp_path, [], 0.2, "(", seed=0)


def test_a_subject_is_the_group_that_matches(tmp_path: Path) -> None:
    """Alternatives in the expression may each have their group; a name that does not match is a subject of its own."""
    names = ["siteA-1_x", "siteA-1_y", "siteB-1_x", "siteB-1_y", "other_x", "other_y"]
    touch(tmp_path, *[f"{name}.nii.gz" for name in names])
    write_datalists(tmp_path, [], 0.3, r"site(A-\d+)|site(B-\d+)", seed=0)
    listed = read_datalist(tmp_path, "unlabelled.json", labelled=False)
    sides = [{case.id for case in cases} for cases in (listed.training, listed.validation)]
    for site in "AB":
        assert any({f"site{site}-1_x", f"site{site}-1_y"} <= side for side in sides)
