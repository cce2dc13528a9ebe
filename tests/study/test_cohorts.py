"""The volumes of a study: its lists agree, which part a bad one belonged to is said, one scan counts once."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import ray.data
from studies import small_study
from volumes import AFFINE, PREPARATION, SHAPE, make_case, smooth_ct, write_nifti

from ssl_ray.data.consistency import Cohorts
from ssl_ray.data.datalist import Case
from ssl_ray.data.splits import Splits
from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders
from ssl_ray.study.cohorts import PreparedCohorts, prepare_cohorts, read_cohorts

PARTS = ("unlabelled", "unlabelled_validation", "training", "validation", "test")


class OneAfterTheOther:
    """A dataset of Ray's that needs no cluster."""

    def __init__(self, rows: Sequence[Any], **_: Any) -> None:
        self.rows = rows

    def map(self, work: Callable[[Any], Any], **_: Any) -> "OneAfterTheOther":
        return OneAfterTheOther([work(row) for row in self.rows])

    def iter_rows(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.data, "from_items", OneAfterTheOther)


@pytest.fixture
def cases(tmp_path: Path) -> dict[str, list[Case]]:
    """Two volumes a part."""
    return {
        part: [make_case(tmp_path / part, f"scan{n}", 10 * row + n, labelled=row > 1) for n in range(2)]
        for row, part in enumerate(PARTS)
    }


def prepared(
    folder: Path, cases: dict[str, list[Case]], splits: Splits | None = None, probe: bool = True, **settings: Any
) -> PreparedCohorts:
    preparation = PREPARATION.model_dump()
    coarse = {"preparation": preparation | {"spacing": 3}, "probe": probe}
    sections = {"pretrain": coarse, "finetune": {"preparation": preparation}}
    study = small_study(folder, folder, **sections, **settings)
    unlabelled, held_out, training, validation, test = (tuple(cases[part]) for part in PARTS)
    cohorts: Cohorts = unlabelled, held_out, splits or Splits({2: training}, validation, test, ("liver",))
    return prepare_cohorts(study, Folders.of("study", str(folder / "output"), str(folder / "store")), cohorts)


def test_the_part_of_each_bad_volume_is_said(
    tmp_path: Path, cases: dict[str, list[Case]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A test volume that is left out changes what is reported; ids repeat between the parts, and none gets lost."""
    bad = {part: cases[part][1] for part in ("unlabelled", "training", "validation", "test")}
    for case in bad.values():
        case.image.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match="4 volumes cannot be used") as caught:
        prepared(tmp_path, cases)
    for part, case in bad.items():
        assert f"\n  {part}  {case.id}  {case.image}: not a NIfTI file but a web page" in str(caught.value)
    usable = prepared(tmp_path, cases, on_bad_volume="skip")
    assert len(usable.labelled) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "going on without 4 volumes (1 unlabelled, 1 training, 1 validation, 1 test)" in printed
    rows = json.loads((tmp_path / "output" / "study" / "bad_volumes.json").read_text())
    assert {row["part"]: (row["id"], row["image"]) for row in rows} == {
        part: (case.id, str(case.image)) for part, case in bad.items()
    }
    assert all("web page" in row["reason"] for row in rows)


@pytest.mark.parametrize(
    ("part", "other", "refused"),
    [
        ("test", "unlabelled", "labelled test"),
        ("test", "unlabelled_validation", "labelled test"),
        ("test", "training", "labelled test"),
        ("test", "validation", "labelled test"),
        ("validation", "training", "labelled validation"),
        ("validation", "unlabelled", "labelled validation"),
        ("unlabelled_validation", "unlabelled", "unlabelled validation"),
        ("training", "unlabelled", None),
    ],
)
def test_one_scan_is_not_trained_on_and_held_out(
    tmp_path: Path, cases: dict[str, list[Case]], part: str, other: str, refused: str | None
) -> None:
    """The same scan as a .nii of floats, its axes in another order, is found before anything is trained."""
    scan = nib.load(cases[part][0].image)
    turn = nib.orientations.ornt_transform(nib.io_orientation(scan.affine), nib.orientations.axcodes2ornt("PIR"))
    copy = nib.Nifti1Image(np.asarray(scan.dataobj, np.float32), scan.affine).as_reoriented(turn)
    nib.save(copy, path := tmp_path / other / "of_another_name.nii")
    cases[other][1] = Case("of_another_name", path, cases[part][0].label if other not in PARTS[:2] else None)
    if refused is None:
        assert len(prepared(tmp_path, cases).labelled) == 6
        return
    message = rf"^{cases[part][0].image}: this {refused} volume has the same content as {path}, which is trained or"
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, cases)


@pytest.mark.parametrize("other", ["validation", "unlabelled"])
def test_in_folds_a_scan_is_there_once(tmp_path: Path, cases: dict[str, list[Case]], other: str) -> None:
    """Every labelled scan is scored in one fold: under another name it would be trained on there."""
    cases[other][1].image.write_bytes(cases["training"][0].image.read_bytes())
    pool = tuple(replace(case, subject=f"{part} {case.id}") for part in PARTS[2:] for case in cases[part])
    splits = Splits({len(pool): pool}, (), (), ("liver",), pool=True, folds=3)
    with pytest.raises(UserError, match=r"this labelled volume has the same content as .*, which is trained or"):
        prepared(tmp_path, cases, splits)


def test_the_probe_gets_labelled_volumes_as_the_pretraining_prepares_them(
    tmp_path: Path, cases: dict[str, list[Case]]
) -> None:
    """Fitted on training volumes, tested on validation volumes; in folds on those of another; none if not wanted."""
    found = prepared(tmp_path, cases)
    assert found.probed
    assert [one.id for one in found.probed.fitted] == [case.id for case in cases["training"]]
    assert [one.image_source for one in found.probed.tested] == [str(case.image) for case in cases["validation"]]
    assert {one.spacing for one in (*found.probed.fitted, *found.probed.tested)} == {(3.0, 3.0, 3.0)}
    assert {one.spacing for one in found.labelled.values()} == {PREPARATION.spacing}
    assert prepared(tmp_path, cases, probe=False).probed is None
    pool = tuple(replace(case, subject=f"{part} {case.id}") for part in PARTS[2:] for case in cases[part])
    probed = prepared(tmp_path, cases, Splits({6: pool}, (), (), ("liver",), pool=True, folds=3)).probed
    assert probed
    assert len({one.subject for one in (*probed.fitted, *probed.tested)}) == 4


def test_other_scans_of_one_shape_are_other_scans(tmp_path: Path, cases: dict[str, list[Case]]) -> None:
    """One voxel of another value makes another scan."""
    changed = smooth_ct(SHAPE, 40)
    changed[5, 6, 4] += 1
    write_nifti(cases["unlabelled"][0].image, changed, AFFINE)
    assert len(prepared(tmp_path, cases).training) == 2


def test_a_warm_up_longer_than_the_pretraining_is_refused(cohort: Path) -> None:
    """Its steps follow from the number of volumes: six of them, two patches each, four a step."""
    training = {"patches_per_volume": 2, "batch_size": 4, "epochs": 2}
    steps = 2 * len(read_cohorts(small_study(cohort=cohort, pretrain=training))[0]) * 2 // 4
    fits = {"optimizer": {"warmup_steps": steps - 1}}
    read_cohorts(small_study(cohort=cohort, pretrain=training | fits))
    with pytest.raises(UserError, match=rf"^pretrain\.optimizer\.warmup_steps: must be below the {steps} steps"):
        read_cohorts(small_study(cohort=cohort, pretrain=training | {"optimizer": {"warmup_steps": steps}}))
