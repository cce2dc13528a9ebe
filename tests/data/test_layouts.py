"""The layouts that people have: every image finds its label and its patient, and what is left out is named."""

import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from volumes import AFFINE, PREPARATION, organ_labels, smooth_ct, touch, write_nifti

from ssl_ray.cli.main import main
from ssl_ray.config.schema import LabelledCohort
from ssl_ray.data.datalist import read_datalist
from ssl_ray.data.layouts import Layout
from ssl_ray.data.listing import LEFT_OUT, find_scans, summary, write_datalists
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.splits import read_labelled
from ssl_ray.data.store import Store
from ssl_ray.errors import UserError

SHAPE = (12, 14, 9)


def dataset(root: Path, **tree: Any) -> None:
    (root / "dataset.json").write_text(json.dumps(tree))


def found_in(root: Path, *names: str, subject: str | None = None) -> Layout:
    touch(root, *names)
    return find_scans(root, subject)


def pairs(found: Layout) -> dict[str, str | None]:
    return {scan.image: scan.label for scan in found.scans}


def check_summary(root: Path, found: Layout, left_out: dict[str, str]) -> None:
    """What is left out is `left_out`: each file with a part of its reason; the summary names all of them."""
    assert set(found.left_out) == set(left_out)
    text = summary(root, found)
    for name, why in left_out.items():
        assert why in found.left_out[name]
        assert name in text
        assert found.left_out[name] in text


@pytest.mark.parametrize(
    "labels", [{"background": 0, "liver": 1, "spleen": 2}, {"0": "background", "1": "liver", "2": "spleen"}]
)
def test_nnunet(tmp_path: Path, labels: dict[str, Any]) -> None:
    """Images with a channel find their labels, with names of either version; imagesTs with labels is for testing."""
    cases = [f"c_{number:03d}" for number in range(5)]
    names = [f"imagesTr/{case}_0000.nii.gz" for case in cases] + [f"labelsTr/{case}.nii.gz" for case in cases]
    extra = ["imagesTs/t_1_0000.nii.gz", "labelsTs/t_1.nii.gz", "imagesTs/u_1_0000.nii.gz", "imagesTs/u_2_0000.nii.gz"]
    touch(tmp_path, "imagesTr/c_000_0001.nii.gz", "imagesTr/odd.nii.gz", "labelsTr/none.nii.gz")
    dataset(tmp_path, labels=labels, channel_names={"0": "CT"}, file_ending=".nii.gz", numTraining=5)
    found = found_in(tmp_path, *names, *extra)
    assert found.name == "nnU-Net"
    assert pairs(found) == {
        **{f"imagesTr/{case}_0000.nii.gz": f"labelsTr/{case}.nii.gz" for case in cases},
        "imagesTs/t_1_0000.nii.gz": "labelsTs/t_1.nii.gz",
        "imagesTs/u_1_0000.nii.gz": None,
        "imagesTs/u_2_0000.nii.gz": None,
    }
    assert found.organs == {0: "background", 1: "liver", 2: "spleen"}
    left_out = {
        "imagesTr/c_000_0001.nii.gz": "channel 0001 of a scan",
        "imagesTr/odd.nii.gz": "without a channel",
        "labelsTr/none.nii.gz": "without a usable image",
    }
    check_summary(tmp_path, found, left_out)
    written = write_datalists(tmp_path, found, [], 0.2, 0, seed=0)
    assert written == {
        "labelled.json": {"training": 4, "validation": 1, "test": 1},
        "unlabelled.json": {"training": 1, "validation": 1},
    }
    listed = json.loads((tmp_path / "labelled.json").read_text())
    assert listed["labels"] == {"0": "background", "1": "liver", "2": "spleen"}
    assert listed["test"] == [{"image": "imagesTs/t_1_0000.nii.gz", "label": "labelsTs/t_1.nii.gz"}]
    drawn = write_datalists(tmp_path, found, [3], 0.2, 2, seed=0)
    assert drawn["labelled_3.json"] == {"training": 3, "validation": 1, "test": 2}


def test_channels_of_nnunet(tmp_path: Path) -> None:
    """All that most scans have are listed; a scan that lacks one is left out, and one that has more keeps those."""
    scans = [f"imagesTr/c_{number}" for number in range(5)]
    names = [f"{scan}_{channel:04d}.nii.gz" for scan in scans for channel in (0, 1)]
    more = ["imagesTr/c_0_0002.nii.gz", "imagesTr/lacks_0000.nii.gz", "imagesTr/late_0001.nii.gz", "other/alone.nii.gz"]
    found = found_in(tmp_path, *names, *more, *[f"labelsTr/c_{number}.nii.gz" for number in range(4)])
    assert [(scan.image, scan.others, scan.label) for scan in found.scans] == [
        (f"{scan}_0000.nii.gz", (f"{scan}_0001.nii.gz",), f"labelsTr/c_{number}.nii.gz" if number < 4 else None)
        for number, scan in enumerate(scans)
    ]
    left_out = {
        "imagesTr/c_0_0002.nii.gz": "channel 0002 of a scan, which most scans do not have",
        "imagesTr/lacks_0000.nii.gz": "of a scan without channel 0001",
        "imagesTr/late_0001.nii.gz": "channel 0001 of a scan without channel 0000",
        "other/alone.nii.gz": "of a scan without channel 0001",
    }
    check_summary(tmp_path, found, left_out)
    assert "5 volumes of 2 images, 4 of them with a label map" in summary(tmp_path, found)
    write_datalists(tmp_path, found, [], 0.2, 0, seed=0)
    listed = read_datalist(tmp_path, "labelled.json", labelled=True)
    for case in (*listed.training, *listed.validation):
        assert [image.name for image in case.images] == [f"{case.label.name[:3]}_{n:04d}.nii.gz" for n in (0, 1)]


def test_channels_of_the_decathlon(tmp_path: Path) -> None:
    """As dataset.json lists them, as many as in most of its entries."""
    names = [[f"imagesTr/b{number}_{kind}.nii.gz" for kind in ("t1", "t2", "pd")] for number in range(4)]
    counts = (2, 2, 3, 1)
    listed = [{"image": mine[:count]} for mine, count in zip(names, counts, strict=True)]
    dataset(tmp_path, training=[*listed, {"image": ["imagesTr/b0_pd.nii.gz", "imagesTr/gone.nii.gz"]}])
    found = found_in(tmp_path, *[name for mine, count in zip(names, counts, strict=True) for name in mine[:count]])
    assert [(scan.image, scan.others) for scan in found.scans] == [(mine[0], (mine[1],)) for mine in names[:3]]
    left_out = {
        "imagesTr/b2_pd.nii.gz": "a further channel of a scan; most scans have 2",
        "imagesTr/b3_t1.nii.gz": "of a scan that has not all channels",
        "imagesTr/b0_pd.nii.gz": "dataset.json lists it",
        "imagesTr/gone.nii.gz": "dataset.json lists it",
    }
    check_summary(tmp_path, found, left_out)


def test_what_one_entry_has_too_many_may_be_another_ones(tmp_path: Path) -> None:
    """A file that is listed is not left out."""
    entries = ["a", "b"], ["c", "d", "e"], ["e", "f"]
    listed = [[f"imagesTr/{name}.nii.gz" for name in names] for names in entries]
    dataset(tmp_path, training=[{"image": images} for images in listed])
    found = found_in(tmp_path, *{image for images in listed for image in images})
    assert [(scan.image, scan.others) for scan in found.scans] == [(one, (other,)) for one, other, *_ in listed]
    assert not found.left_out


@pytest.mark.parametrize("labelled", [True, False])
def test_four_digits_may_be_a_number(tmp_path: Path, labelled: bool) -> None:
    """`amos_0004` is the fourth volume of AMOS, not the fourth channel of one."""
    images = [f"imagesTr/amos_{number:04d}.nii.gz" for number in (0, 1, 4, 7)]
    labels = [name.replace("images", "labels") for name in images] if labelled else []
    found = found_in(tmp_path, *images, *labels)
    assert pairs(found) == {name: name.replace("images", "labels") if labelled else None for name in images}


def test_decathlon(tmp_path: Path) -> None:
    """The volumes are those of dataset.json; what it lists and is not there, and what it does not list, is named."""
    training = [{"image": f"./imagesTr/liver_{n}.nii.gz", "label": f"./labelsTr/liver_{n}.nii.gz"} for n in range(5)]
    dataset(
        tmp_path,
        training=[*training, {"image": ["imagesTr/two_t1.nii.gz", "imagesTr/two_t2.nii.gz"]}],
        test=["./imagesTs/liver_9.nii.gz", "./imagesTs/gone.nii.gz"],
        labels={"0": "background", "1": "liver"},
    )
    names = [f"{folder}/liver_{number}.nii.gz" for folder in ("imagesTr", "labelsTr") for number in range(4)]
    extra = ["imagesTr/liver_4.nii.gz", "imagesTs/liver_9.nii.gz", "imagesTr/more.nii.gz", "imagesTr/._liver_0.nii.gz"]
    two = "imagesTr/two_t1.nii.gz", "imagesTr/two_t2.nii.gz"
    found = found_in(tmp_path, *names, *extra, *two)
    assert found.name.startswith("Decathlon")
    assert pairs(found) == {
        **{f"imagesTr/liver_{n}.nii.gz": f"labelsTr/liver_{n}.nii.gz" for n in range(4)},
        "imagesTr/liver_4.nii.gz": None,
        "imagesTs/liver_9.nii.gz": None,
        "imagesTr/two_t1.nii.gz": None,
    }
    left_out = {
        "imagesTr/two_t2.nii.gz": "a further channel of a scan",
        "imagesTs/gone.nii.gz": "dataset.json lists it",
        "labelsTr/liver_4.nii.gz": "dataset.json lists it",
        "imagesTr/more.nii.gz": "not in dataset.json",
        "imagesTr/._liver_0.nii.gz": "macOS",
    }
    check_summary(tmp_path, found, left_out)


def test_bids(tmp_path: Path) -> None:
    """Labels under derivatives/ go with the image of the same entities; all sessions of a patient are one patient."""
    rows = {
        "sub-01/ses-1/ct/sub-01_ses-1_ct": "derivatives/labels/sub-01/ses-1/ct/sub-01_ses-1_desc-organs_dseg",
        "sub-01/ses-2/ct/sub-01_ses-2_ct": "derivatives/labels/sub-01/ses-2/ct/sub-01_ses-2_ct",
        "rawdata/sub-v5/sub-v5_dir-ax_ct": "derivatives/sub-v5/sub-v5_dir-ax_seg-vert_msk",
        "sub-02/sub-02_ct": None,
        "sub-02/sub-02_acq-thin_ct": "derivatives/labels/sub-02/sub-02_acq-thin_dseg",
        "sub-03/sub-03_ct": None,
    }
    names = [f"{name}.nii.gz" for row in rows.items() for name in row if name]
    odd = [f"derivatives/labels/sub-03/sub-03_label-{organ}_mask.nii.gz" for organ in ("liver", "spleen")]
    touch(tmp_path, *odd, "derivatives/sub-04/sub-04_dseg.nii.gz", "sub-03/sub-03_T1w.nii.gz")
    found = found_in(tmp_path, *names)
    assert found.name == "BIDS"
    assert pairs(found) == {f"{image}.nii.gz": label and f"{label}.nii.gz" for image, label in rows.items()}
    assert [scan.subject for scan in found.scans] == ["sub-v5", "sub-01", "sub-01", "sub-02", "sub-02", "sub-03"]
    left_out = dict.fromkeys(odd, "one of 2 label maps of sub-03/sub-03_ct.nii.gz")
    left_out |= {"derivatives/sub-04/sub-04_dseg.nii.gz": "without a usable image", "sub-03/sub-03_T1w.nii.gz": "no CT"}
    check_summary(tmp_path, found, left_out)


def totalsegmentator(root: Path, subjects: int = 4) -> dict[str, Any]:
    """A folder with masks of two organs, and the label map that each patient's masks make."""
    truth = {}
    for number in range(subjects):
        place, label = root / f"s{number:04d}", organ_labels(SHAPE, 3, number)
        write_nifti(place / "ct.nii.gz", smooth_ct(SHAPE, number), AFFINE)
        for value, organ in enumerate(("liver", "spleen"), 1):
            write_nifti(place / "segmentations" / f"{organ}.nii.gz", (label == value).astype(np.uint8), AFFINE)
        truth[place.name] = label
    return truth


def test_totalsegmentator(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks become one label map with names, which prepares; no mask is listed, and what was there is unchanged."""
    truth = totalsegmentator(tmp_path)
    touch(tmp_path, "s0000/mri.nii.gz")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.nii.gz")}
    found = find_scans(tmp_path)
    assert pairs(found) == {f"{name}/ct.nii.gz": f"ssl_ray_labels/{name}.nii.gz" for name in truth}
    check_summary(tmp_path, found, {"s0000/mri.nii.gz": "neither ct.nii.gz nor a mask"})
    for name, label in truth.items():
        made = nib.load(tmp_path / "ssl_ray_labels" / f"{name}.nii.gz")
        assert made.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(made.get_fdata(), label)
        np.testing.assert_allclose(made.affine, AFFINE, atol=1e-5)
    assert main(["datalist", str(tmp_path), "--splits", "2", "--test", "1", "--validation", "0.2"]) == 0
    assert "4 images, 4 of them with a label map, organs: liver, spleen" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    splits = read_labelled(LabelledCohort(root=str(tmp_path), classes=3, splits={2: "labelled_2.json"}), (2,))
    assert splits.organs == ("liver", "spleen")
    assert len({case.subject for case in splits.cases}) == 4
    volume, _ = prepare_case(splits.training[2][0], PREPARATION, store)
    assert set(volume.label_voxels) == {"0", "1", "2"}


def test_masks_that_do_not_make_a_label_map(tmp_path: Path) -> None:
    """A missing, broken or moved mask costs its scan the label, not the folder; the scan is listed without it."""
    totalsegmentator(tmp_path, 5)
    (tmp_path / "s0000/segmentations/liver.nii.gz").unlink()
    write_nifti(tmp_path / "s0004/segmentations/liver.nii.gz", organ_labels(SHAPE, 3), AFFINE)
    (tmp_path / "s0001/segmentations/liver.nii.gz").write_bytes(b"")
    write_nifti(tmp_path / "s0002/segmentations/spleen.nii.gz", np.ones(SHAPE, np.uint8), np.eye(4))
    found = find_scans(tmp_path)
    assert pairs(found) == {
        **{f"s000{number}/ct.nii.gz": None for number in (0, 1, 2, 4)},
        "s0003/ct.nii.gz": "ssl_ray_labels/s0003.nii.gz",
    }
    left_out = {
        "s0000/segmentations/": "no mask of 1 organs, e.g. liver",
        "ssl_ray_labels/s0001.nii.gz": "s0001/segmentations/liver.nii.gz: not a NIfTI file",
        "ssl_ray_labels/s0002.nii.gz": "s0002/segmentations/spleen.nii.gz is on another grid",
        "ssl_ray_labels/s0004.nii.gz": "s0004/segmentations/liver.nii.gz has several values",
    }
    check_summary(tmp_path, found, left_out)


def test_label_maps_that_are_there_stay(tmp_path: Path) -> None:
    """Those that we made are used again; those of other organs, of older masks or of somebody else are not touched."""
    totalsegmentator(tmp_path, 2)
    find_scans(tmp_path)
    made = tmp_path / "ssl_ray_labels/s0000.nii.gz"
    stamp = made.stat().st_mtime_ns
    assert pairs(find_scans(tmp_path))["s0000/ct.nii.gz"]
    assert made.stat().st_mtime_ns == stamp
    os.utime(tmp_path / "s0000/segmentations/spleen.nii.gz", ns=(stamp, stamp + 10**9))
    found = find_scans(tmp_path)
    assert "older than s0000/segmentations/spleen.nii.gz" in found.left_out["ssl_ray_labels/s0000.nii.gz"]
    for number in range(2):
        write_nifti(tmp_path / f"s000{number}/segmentations/aorta.nii.gz", np.ones(SHAPE, np.uint8), AFFINE)
    with pytest.raises(UserError, match="ssl_ray_labels: has label maps of other organs"):
        find_scans(tmp_path)
    assert made.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("case_1/imaging.nii.gz", "case_1/segmentation.nii.gz"),
        ("volume-1.nii", "segmentation-1.nii"),
        ("images/s1_ct.nii.gz", "labels/s1_seg.nii.gz"),
        ("s1/ct.nii.gz", "s1/mask.nii.gz"),
        ("a.NII.GZ", "a_label.Nii.gz"),
        ("images/FLARE_0001_0000.nii.gz", "labels/FLARE_0001.nii.gz"),
        ("imagesVa/a.nii.gz", "labelsVa/a.nii.gz"),
        ("train/scans/a.nii.gz", "train/masks/a.nii.gz"),
        ("labelled/a.nii.gz", "labelled/a_gt.nii.gz"),
        ("images/ct/a.nii.gz", "labels/ct/a.nii.gz"),
        ("b1/ct.nii.gz", "b1/combined_labels.nii.gz"),
        ("segmentation/images/a.nii.gz", "segmentation/labels/a.nii.gz"),
    ],
)
def test_plain_folder(tmp_path: Path, image: str, label: str) -> None:
    """Label maps are known by their folder or name, and are never listed as CT."""
    assert pairs(found_in(tmp_path, image, label)) == {image: label}


def test_what_is_not_clear_is_left_out(tmp_path: Path) -> None:
    """Two label maps of one image, and one of two images, are named and not guessed."""
    names = ["images/a.nii.gz", "labels/a_seg.nii.gz", "labels/a-seg.nii.gz", "images/b_ct.nii", "images/b_scan.nii"]
    names += ["labels/b.nii", "labels/c.nii", "images/d.nii", "labels/d.nii", "labels/d_gt.nii"]
    found = found_in(tmp_path, *names)
    assert pairs(found) == {
        "images/a.nii.gz": None, "images/b_ct.nii": None, "images/b_scan.nii": None, "images/d.nii": "labels/d.nii",
    }  # fmt: skip
    left_out = {
        "labels/a_seg.nii.gz": "one of 2 label maps of images/a.nii.gz",
        "labels/a-seg.nii.gz": "one of 2 label maps of images/a.nii.gz",
        "labels/b.nii": "could be of images/b_ct.nii or of images/b_scan.nii",
        "labels/c.nii": "without a usable image",
        "labels/d_gt.nii": "one of 2 label maps of images/d.nii",
    }
    check_summary(tmp_path, found, left_out)


def test_dicom_and_other_formats_are_named(tmp_path: Path) -> None:
    """A DICOM series is known by its suffix or its first bytes; a folder of nothing else is refused with its name."""
    touch(tmp_path, "p1/1.dcm", "p1/2.dcm", "p1/README", "p3/a.mha", "p3/a.nii.gz.part", "p3/notes.txt")
    (tmp_path / "p2").mkdir()
    (tmp_path / "p2" / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(50))
    with pytest.raises(
        UserError, match=r"no image \(.nii or .nii.gz\) in it; p1/: a DICOM series; convert it to NIfTI"
    ):
        find_scans(tmp_path)
    series, other = "a DICOM series", "no NIfTI file"
    left_out = {"p1/": series, "p2/": series, "p3/a.mha": other, "p3/a.nii.gz.part": other}
    check_summary(tmp_path, found_in(tmp_path, "a.nii.gz"), left_out)


def test_what_prepare_would_refuse_is_not_listed(tmp_path: Path) -> None:
    """Links out of the root, to nowhere or to another file of it, pipes and odd names are left out."""
    root = tmp_path / "root"
    touch(tmp_path, "out/x.nii.gz")
    touch(root, *[f"images/{name}.nii.gz" for name in "abc"], "images/bad\nname.nii.gz", "real/d.nii.gz")
    os.mkfifo(root / "images/pipe.nii.gz")
    for name, target in {"out": tmp_path / "out/x.nii.gz", "none": "no.nii.gz", "a2": "a.nii.gz"}.items():
        (root / f"images/{name}.nii.gz").symlink_to(target)
    (root / "linked").symlink_to("real")
    found = find_scans(root)
    assert list(pairs(found)) == [*[f"images/{name}.nii.gz" for name in "abc"], "real/d.nii.gz"]
    odd = found.left_out.pop("images/bad\nname.nii.gz")
    assert odd == "control characters in its name"
    assert "images/bad\\nname.nii.gz" in summary(root, Layout("", left_out={"images/bad\nname.nii.gz": odd}))
    left_out = {
        "images/out.nii.gz": f"a link out of this folder, to {tmp_path}/out/x.nii.gz: copy it",
        "images/none.nii.gz": "leads nowhere",
        "images/a2.nii.gz": "a link to images/a.nii.gz",
        "images/pipe.nii.gz": "not a regular file",
        "linked/": "a link to a folder",
    }
    check_summary(root, found, left_out)
    write_datalists(root, found, [], 0.2, 0, seed=0)
    assert len(read_datalist(root, "unlabelled.json", labelled=False).training) == 3


def test_a_long_list_of_what_is_left_out_is_in_a_file(tmp_path: Path) -> None:
    """The summary names a few for each reason and counts the others; the file names all."""
    labels = [f"labels/x{number:02d}.nii.gz" for number in range(30)]
    found = found_in(tmp_path, "images/a.nii.gz", *labels)
    text = summary(tmp_path, found)
    assert "left out: labels/x00.nii.gz, labels/x01.nii.gz," in text
    assert "and 25 more: a label map without a usable image" in text
    assert f"all 30 that are left out: {tmp_path / LEFT_OUT}" in text
    assert [line.partition(":")[0] for line in (tmp_path / LEFT_OUT).read_text().splitlines()] == labels


@pytest.mark.parametrize(
    ("tree", "rule"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, "labels.whole: must be one organ's name and value"),
        ({"labels": {"background": 0, "ignore": 2}}, "labels.ignore: must be one organ's name and value"),
        ({"labels": {"9" * 5000: "liver"}}, "labels.999"),
        ({"labels": {"liver": "one"}}, "labels.liver: must be one organ's name and value, got one"),
        ({"training": 5}, "training: input should be a valid"),
        ([], "input should be an object"),
    ],
)
def test_a_dataset_json_that_says_something_else_is_refused(tmp_path: Path, tree: Any, rule: str) -> None:
    """With its place, its key and its value."""
    (tmp_path / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"dataset.json: {rule}"):
        found_in(tmp_path, "imagesTr/a.nii.gz")


def test_the_command_says_what_it_found_also_when_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--splits` for labels that were left out: the reason stands above the message."""
    touch(tmp_path, *[f"images/{name}.nii.gz" for name in "abc"], "labels/x.nii.gz")
    assert main(["datalist", str(tmp_path), "--splits", "2"]) == 2
    printed = capsys.readouterr()
    assert "left out: labels/x.nii.gz: a label map without a usable image of its name" in printed.out
    assert "3 patients: each scan counts as a patient of its own (--subject says otherwise)" in printed.out
    assert "no image has a label" in printed.err
    assert main(["datalist", str(tmp_path), "--test", "1.5"]) == 2


@pytest.mark.parametrize("tested", ["imagesTs", "test/images"])
def test_a_test_part_of_the_folder_is_kept(tmp_path: Path, tested: str) -> None:
    """Labelled volumes that somebody has set apart are not trained on; with --test, others are drawn out of all."""
    places = [*[f"imagesTr/{name}.nii" for name in "abcdef"], f"{tested}/x.nii", f"{tested}/y.nii"]
    found = found_in(tmp_path, *places, *[place.replace("images", "labels") for place in places])
    assert "the folder keeps 2 for testing" in summary(tmp_path, found)
    assert write_datalists(tmp_path, found, [3], 0.2, 0, seed=0)["labelled_3.json"]["test"] == 2
    listed = json.loads((tmp_path / "labelled_3.json").read_text())
    assert [entry["image"] for entry in listed["test"]] in ([places[-2], places[-1]], [places[-1], places[-2]])
    (tmp_path / "unlabelled.json").unlink()  # the training images, which are others now
    assert write_datalists(tmp_path, found, [2], 0.2, 3, seed=0)["labelled_2.json"]["test"] == 3


def test_two_data_sets_are_listed_each_by_itself(tmp_path: Path) -> None:
    """Label 1 may be the liver in one and the spleen in the other."""
    for name in ("Dataset001_A", "Dataset002_B"):
        touch(tmp_path, f"{name}/imagesTr/a_0000.nii.gz", f"{name}/labelsTr/a.nii.gz")
        dataset(tmp_path / name, labels={"background": 0, name: 1})
    with pytest.raises(UserError, match="Dataset001_A is a data set with labels of its own"):
        find_scans(tmp_path)
    assert find_scans(tmp_path / "Dataset002_B").organs[1] == "Dataset002_B"
