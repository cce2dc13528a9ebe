"""Layouts in which scans, masks or patients lie where a first guess does not look for them."""

from pathlib import Path

import pytest
from volumes import touch

from ssl_ray.data.layouts import Layout
from ssl_ray.data.listing import find_scans, summary
from ssl_ray.errors import UserError


def found_in(root: Path, *names: str) -> Layout:
    touch(root, *names)
    return find_scans(root)


def pairs(found: Layout) -> dict[str, str | None]:
    return {scan.image: scan.label for scan in found.scans}


def test_unlabelled_ct_beside_nnunet_is_listed(tmp_path: Path) -> None:
    """As in FLARE, with a channel in its name, or without; four digits alone may be its number."""
    images = [f"imagesTr/F_{number:02d}_0000.nii.gz" for number in range(3)]
    labels = [f"labelsTr/F_{number:02d}.nii.gz" for number in range(3)]
    beside = [f"unlabelled/Case_{number:05d}_0000.nii.gz" for number in range(1, 4)]
    beside += ["more/a.nii.gz", "numbered/b_0007.nii.gz", "numbered/c_0008.nii.gz"]
    second = "unlabelled/Case_00001_0001.nii.gz"
    found = found_in(tmp_path, *images, *labels, *beside, second, "imagesTr/odd.nii.gz")
    assert found.name == "nnU-Net"
    assert pairs(found) == dict(zip(images, labels, strict=True)) | dict.fromkeys(beside)
    assert set(found.left_out) == {second, "imagesTr/odd.nii.gz"}
    assert "channel 0001" in found.left_out[second]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("ct/a.nii.gz", "CT_Mask/a.nii.gz"),
        ("Lung/a.nii.gz", "Lung_Mask/a.nii.gz"),
        ("COVID-19-CT-Seg_20cases/a.nii.gz", "Infection_Mask/a.nii.gz"),
        ("ct/a.nii.gz", "RTSTRUCT/a.nii.gz"),
        ("images/a.nii.gz", "image_masks/a.nii.gz"),
        ("a.nii.gz", "a_segm.nii.gz"),
        ("p1/ct.nii.gz", "p1/RTSTRUCT.nii.gz"),
    ],
)
def test_masks_are_never_listed_as_ct(tmp_path: Path, image: str, label: str) -> None:
    """Also those of a folder whose name ends in what it holds; they belong to an image of the same other folders."""
    found = found_in(tmp_path, image, label)
    clear = "Infection" not in label  # which could be of any folder's image
    assert pairs(found) == {image: label if clear else None}
    assert set(found.left_out) == (set() if clear else {label})


def test_scans_of_other_kinds_are_named(tmp_path: Path) -> None:
    """MR, cone beam CT and dose are no CT; a folder without labels and a CT of low dose are."""
    other = [f"p1/{name}.nii.gz" for name in ("t1", "x_T2", "adc", "cbct", "dose", "x_dose")]
    ct = ["no_labels/a.nii.gz", "p1/low_dose.nii.gz", "p1/x_full_dose.nii.gz"]
    found = found_in(tmp_path, *other, *ct)
    assert list(pairs(found)) == ct
    assert set(found.left_out) == set(other)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/{}_t1.nii.gz", "labels/{}.nii.gz"),
        ("images/{}_t1.nii.gz", "labels/{}_seg.nii.gz"),
        ("{}_T2.nii.gz", "{}_T2_seg.nii.gz"),
        ("{}/t1.nii.gz", "{}/seg.nii.gz"),
        ("sub-{0}/anat/sub-{0}_T1w.nii.gz", "derivatives/sub-{0}/anat/sub-{0}_T1w_dseg.nii.gz"),
    ],
)
def test_scans_of_one_other_kind_are_the_images_where_there_is_no_ct(tmp_path: Path, image: str, label: str) -> None:
    """MRI is named by its weighting, and its label map often without it."""
    expected = {image.format(name): label.format(name) for name in ("p1", "p2")}
    found = found_in(tmp_path, *expected, *expected.values())
    assert pairs(found) == expected
    assert not found.left_out


def test_scans_of_several_kinds_are_their_owners_to_choose(tmp_path: Path) -> None:
    """They may be channels of one volume, or scans of one patient that are not on one grid."""
    touch(tmp_path, *[f"images/p{number}_{kind}.nii.gz" for number in range(3) for kind in ("t1", "t2")])
    touch(tmp_path, "labels/p0.nii.gz")
    rule = (
        r"no CT but scans of several kinds, t1, t2: keep those of one in a folder, or, .* list with `image: \[a, b\]`"
    )
    with pytest.raises(UserError, match=rule):
        find_scans(tmp_path)


@pytest.mark.parametrize(
    ("files", "people", "told"),
    [
        (["2020/patient1/ct", "2021/patient1/ct", "2021/patient2/ct"], "patient1 patient1 patient2", "the second one"),
        (["2020/LIDC-1/ct", "2021/LIDC-1/ct"], "2020 2021", "LIDC-1 lies in 2020 and in 2021: if it is one patient"),
        (["2020/patient1/ct", "2021/patient1/ct", "2022/ct"], "2020 2021 2022", "give --subject"),
        (["patient1/scan1/ct", "patient2/scan1/ct"], "patient1 patient2", "where a scan lies in one (--subject"),
        (["patient1/case1/ct", "patient2/case1/ct"], "patient1 patient2", "where a scan lies in one (--subject"),
        (["A/baseline/ct", "B/baseline/ct"], "A B", "baseline lies in A and in B"),
        (["A/s1/ct", "A/s2/ct", "B/s1/ct"], "A A B", "s1 lies in A and in B"),
    ],
)
def test_one_patient_in_several_folders(tmp_path: Path, files: list[str], people: str, told: str) -> None:
    """Is one patient where names say so; else the summary says which folder was taken and what to do."""
    found = found_in(tmp_path, *[f"{name}.nii.gz" for name in files])
    assert [scan.subject for scan in found.scans] == people.split()
    assert told in summary(tmp_path, found)
