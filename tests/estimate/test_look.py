"""What `ssl-ray check` finds in volumes: each planted fault is named with its file, and a good cohort has none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from volumes import AFFINE, PREPARATION, SHAPE, make_case, oblique_affine, organ_labels, smooth_ct, write_nifti

from ssl_ray.data.datalist import Case
from ssl_ray.data.normalisations.intensities import sampled
from ssl_ray.estimate.look import Finding, findings, look_at, sides

TRAINING, TEST, FREE = "labelled training", "labelled test", "unlabelled training"
ORGANS = ("liver", "spleen", "kidney")


def test_lengths_are_written_out() -> None:
    """A whole body is not 1.8e+03 mm."""
    assert sides([1800, 500, 999.7]) == "1,800 x 500 x 1,000"
    assert sides([0.703, 0.7, 5.25]) == "0.703 x 0.7 x 5.25"


def cases(folder: Path) -> list[tuple[str, Case]]:
    """Six labelled volumes to train on, one to test on, two without labels."""
    parts = [TRAINING] * 6 + [TEST] + [FREE] * 2
    return [(part, make_case(folder, f"v{n}", n, labelled=part != FREE)) for n, part in enumerate(parts)]


def found(
    chosen: list[tuple[str, Case]], classes: int = 4, patch: float = 4, organs: Sequence[str] = ORGANS
) -> list[Finding]:
    looks = look_at(chosen, dict.fromkeys((TRAINING, TEST, FREE), PREPARATION), classes)
    patches = dict.fromkeys((TRAINING, TEST, FREE), [patch] * 3)
    return findings(looks, patches, organs[: classes - 1], {TEST})


def test_what_a_volume_shows_is_what_nibabel_and_numpy_say(tmp_path: Path) -> None:
    """Organs in ml, what the window clips of each, voxels and intensities, on an oblique grid."""
    _, case = cases(tmp_path)[0]
    (look,) = look_at([(TRAINING, case)], {TRAINING: PREPARATION}, 4)
    image, label = nib.load(case.image), nib.load(case.label)
    values, voxels = np.asarray(label.dataobj), image.get_fdata()
    for organ in (1, 2, 3):
        inside = values == organ
        assert look.organs[organ] == pytest.approx(inside.sum() * np.prod(image.header.get_zooms()) / 1000, rel=1e-5)
        assert look.clipped[organ] == pytest.approx(((voxels < -175) | (voxels > 250))[inside].mean())
    assert look.spacing == pytest.approx(image.header.get_zooms(), rel=1e-5)
    assert look.ends == pytest.approx(np.percentile(sampled(voxels.astype(np.float32)), (0.5, 99.5)))
    # Seen as nibabel's closest canonical axes, the scan is as long as its canonical grid, to a voxel of that.
    closest = nib.as_closest_canonical(image)
    sides = np.array(closest.shape) * closest.header.get_zooms()
    assert np.abs(np.array(look.extent) - sides).max() <= max(PREPARATION.spacing)


def test_nothing_looks_wrong_with_a_good_cohort(tmp_path: Path) -> None:
    """No threshold is so narrow that equal patients break it."""
    chosen = cases(tmp_path)
    assert [one for one in found(chosen) if "normalisation" not in one.what] == []


def truncate(case: Case) -> None:
    case.image.write_bytes(case.image.read_bytes()[:200])


def in_cm(case: Case) -> None:
    write_nifti(case.image, smooth_ct(SHAPE, 3), oblique_affine((8, 11, 25), 25))
    assert case.label
    write_nifti(case.label, organ_labels(SHAPE, 4, 3), oblique_affine((8, 11, 25), 25))


def no_organ(case: Case) -> None:
    assert case.label
    write_nifti(case.label, np.zeros(SHAPE, np.uint8), AFFINE)


def tiny_liver(case: Case) -> None:
    label = organ_labels(SHAPE, 4, 3)
    label[label == 1] = 0
    label[5, 5, 5] = 1
    assert case.label
    write_nifti(case.label, label, AFFINE)


def scaled(case: Case) -> None:
    write_nifti(case.image, (smooth_ct(SHAPE, 3) + 1000.0).astype(np.float32) / 1700, AFFINE)


def other_grid(case: Case) -> None:
    assert case.label
    write_nifti(case.label, organ_labels(SHAPE, 4, 3), oblique_affine((0.8, 1.1, 2.5), 40))


@pytest.mark.parametrize(
    ("spoil", "file", "what", "refused"),
    [
        (truncate, "image", "Compressed file ended before", True),
        (scaled, "image", "not a CT in HU", True),
        (other_grid, "label", "affine puts its voxels", True),
        (in_cm, "image", "is the header right?", False),
        (no_organ, "label", "a label map without any organ", False),
        (tiny_liver, "label", "liver has", False),
    ],
)
def test_a_fault_is_told_with_its_file(
    tmp_path: Path, spoil: Callable[[Case], None], file: str, what: str, refused: bool
) -> None:
    """And nothing is said of the others; what a run would refuse comes first."""
    chosen = cases(tmp_path)
    before = found(chosen)
    case = chosen[3][1]
    spoil(case)
    new = [one for one in found(chosen) if one not in before and "normalisation" not in one.what]
    assert new, "the fault is not seen"
    assert {one.place for one in new} <= {str(case.image), str(case.label)}
    (told,) = [one for one in new if what in one.what]
    assert (told.place, told.refused) == (str(getattr(case, file)), refused)


def test_a_scan_that_is_scored_and_trained_on_is_found_under_any_name(tmp_path: Path) -> None:
    """By its content, in another file, orientation and format; the same scan without labels may be pretrained on."""
    chosen = cases(tmp_path)
    copy = tmp_path / "copy.nii"
    nib.save(nib.as_closest_canonical(nib.load(chosen[0][1].image)), copy)
    twin = replace(chosen[0][1], id="copy", image=copy)
    (one,) = [one for one in found([*chosen, (TEST, twin)]) if "the same scan" in one.what]
    assert one.place == str(copy)
    assert one.refused
    assert str(chosen[0][1].image) in one.what
    assert not any("the same scan" in one.what for one in found([*chosen, (FREE, replace(twin, label=None))]))


def test_an_organ_without_a_name_is_told_where_others_have_one(tmp_path: Path) -> None:
    """The list names fewer than the maps have; where none has a name, it is by numbers that they are known."""
    chosen = cases(tmp_path)
    for organs, told in ((("liver", "spleen", "label 3"), True), (("label 1", "label 2", "label 3"), False)):
        unnamed = [one for one in found(chosen, organs=organs) if "without a name" in one.what]
        assert [one.place for one in unnamed] == ["class 3"] * told


def test_classes_windows_and_patches_are_told_of_the_study(tmp_path: Path) -> None:
    """A label beyond the classes, an organ that nothing learns, a patch that no volume fills."""
    chosen = cases(tmp_path)
    beyond = found(chosen, classes=3)
    assert sum("label 3 is beyond the 3 classes (0..2)" in one.what and one.refused for one in beyond) == 7
    looks = look_at(chosen, dict.fromkeys((TRAINING, TEST, FREE), PREPARATION), 5)
    patches = dict.fromkeys((TRAINING, TEST, FREE), [500.0] * 3)
    told = findings(looks, patches, (*ORGANS, "aorta"), {TEST})
    assert [one.place for one in told if "nothing learns it" in one.what] == ["class 4, aorta"]
    assert sum("less than a patch of 500 x 500 x 500 mm" in one.what for one in told) == len(chosen)
