"""The synthetic cohort: reproducible, anatomically ordered, and written so that it can be interrupted."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from ssl_ray.config.schema import PhantomCohort
from ssl_ray.phantom.anatomy import ORGANS
from ssl_ray.phantom.cohort import synthesize, write_cohort

Array = npt.NDArray[Any]
Volume = tuple[nib.Nifti1Image, nib.Nifti1Image]  # image and label
LABEL = {name: i + 1 for i, name in enumerate(ORGANS)}
PARAMETERS: dict[str, Any] = {
    "unlabelled": 3, "labelled": 3, "validation": 1, "test": 1, "splits": (1, 3), "seed": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def volumes() -> list[Volume]:
    return [synthesize(3, index, spacing=8) for index in range(6)]


@pytest.fixture(scope="module")
def native() -> list[Volume]:
    return [synthesize(3, index) for index in range(5)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cohort")
    write(root)
    return root


def write(root: Path, **changes: Any) -> None:
    write_cohort(PhantomCohort(root=str(root), **PARAMETERS | changes))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def centre(label: nib.Nifti1Image, organ: str) -> Array:
    """Centre of mass of an organ in world coordinates (RAS+, mm)."""
    voxels = np.argwhere(np.asarray(label.dataobj) == LABEL[organ])
    return np.asarray(nib.affines.apply_affine(label.affine, voxels.mean(0)))


def test_a_volume_is_a_pure_function_of_seed_and_index() -> None:
    """The same seed and index give the same bytes, another index or seed gives another volume."""
    first = synthesize(5, 2, spacing=8)
    again = synthesize(5, 2, spacing=8)
    assert [i.to_bytes() for i in first] == [i.to_bytes() for i in again]
    for seed, index in ((5, 3), (6, 2)):
        assert synthesize(seed, index, spacing=8)[0].to_bytes() != first[0].to_bytes()


def test_spacing_does_not_change_the_patient(volumes: list[Volume], native: list[Volume]) -> None:
    """The same volume at another spacing has its large organs in the same place of the world, of the same size."""
    fine, coarse = native[0][1], volumes[0][1]
    assert nib.aff2axcodes(fine.affine) == nib.aff2axcodes(coarse.affine)
    for organ in ("liver", "spleen", "right kidney", "left kidney"):
        assert np.linalg.norm(centre(fine, organ) - centre(coarse, organ)) < 4
        ml = [np.sum(np.asarray(i.dataobj) == LABEL[organ]) * np.prod(i.header.get_zooms()) for i in (fine, coarse)]
        assert ml[0] == pytest.approx(ml[1], rel=0.15)


def test_image_and_label_share_a_grid_and_hold_all_organs(volumes: list[Volume], native: list[Volume]) -> None:
    """Types, grids and affines agree; all thirteen organs and nothing else are labelled."""
    for image, label in volumes + native:
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        np.testing.assert_allclose(image.get_qform(), image.affine, atol=1e-3)
        assert set(np.unique(label.dataobj)) - set(LABEL.values()) == {0}
    for _, label in native:
        assert set(np.unique(label.dataobj)) == {0, *LABEL.values()}


def test_the_organs_to_label_can_be_chosen() -> None:
    """Their labels count from 1 in the order asked for; the patient stays the same, the others are background."""
    (image, label), (again, every) = (
        synthesize(5, 2, spacing=8, **more) for more in ({"organs": ("liver", "aorta")}, {})
    )
    assert image.to_bytes() == again.to_bytes()
    chosen, whole = np.asarray(label.dataobj), np.asarray(every.dataobj)
    np.testing.assert_array_equal(chosen == 1, whole == LABEL["liver"])
    np.testing.assert_array_equal(chosen == 2, whole == LABEL["aorta"])
    assert chosen.max() == 2


def test_volumes_differ_in_stored_axes_spacing_and_obliqueness(native: list[Volume]) -> None:
    """A cohort has several orientations, anisotropic spacings that vary, and both oblique and straight affines."""
    images = [image for image, _ in native]
    assert len({nib.aff2axcodes(image.affine) for image in images}) >= 3
    zooms = np.sort([image.header.get_zooms() for image in images], axis=1)
    assert zooms.min() > 3
    assert zooms.max() < 6.1
    assert np.ptp(zooms[:, 2]) > 0.5
    oblique = [np.abs(nib.affines.obliquity(image.affine)).max() > 1e-3 for image in images]
    assert any(oblique)
    assert not all(oblique)


def test_tissues_have_the_hu_of_ct(volumes: list[Volume]) -> None:
    """Air, lung, fat, soft tissue and bone are all there, and organs have medians that CT knows."""
    for image, label in volumes:
        hu, organ = np.asarray(image.dataobj), np.asarray(label.dataobj)
        assert np.mean(hu < -900) > 0.15
        assert 0.01 < np.mean((hu > -880) & (hu < -600)) < 0.25
        assert np.mean((hu > -150) & (hu < -60)) > 0.1
        assert np.mean((hu > 0) & (hu < 200)) > 0.15
        assert 0.01 < np.mean(hu > 200) < 0.15
        for name, low, high in (("liver", 0, 140), ("spleen", 0, 150), ("left kidney", 0, 230), ("aorta", 10, 380)):
            assert low < np.median(hu[organ == LABEL[name]]) < high


def test_organs_lie_where_anatomy_puts_them(volumes: list[Volume]) -> None:
    """In world coordinates, whatever the stored axes: right is right, front is front, adrenals above the kidneys."""
    assert len({nib.aff2axcodes(image.affine) for image, _ in volumes}) > 1
    for _, label in volumes:
        at = {name: centre(label, name) for name in ORGANS if np.any(np.asarray(label.dataobj) == LABEL[name])}
        for right, left in (
            ("liver", "spleen"),
            ("liver", "stomach"),
            ("right kidney", "left kidney"),
            ("inferior vena cava", "aorta"),
            ("gallbladder", "aorta"),
        ):
            assert at[right][0] > at[left][0]
        assert at["stomach"][1] > at["left kidney"][1]
        assert at["pancreas"][1] > at["aorta"][1]
        assert at["esophagus"][2] > at["pancreas"][2]
        for side in ("right", "left"):
            if f"{side} adrenal gland" in at:
                assert at[f"{side} adrenal gland"][2] > at[f"{side} kidney"][2]


def test_datalists_are_nested_and_disjoint(cohort: Path) -> None:
    """Splits share validation and test volumes and are prefixes of one another; nothing is listed twice."""
    lists = {path.stem: json.loads(path.read_text()) for path in cohort.glob("*.json")}
    assert set(lists) == {"phantom", "unlabelled", "labelled_1", "labelled_3"}
    small, large, unlabelled = lists["labelled_1"], lists["labelled_3"], lists["unlabelled"]
    assert small["training"] == large["training"][:1]
    assert [len(large[key]) for key in ("training", "validation", "test")] == [3, 1, 1]
    assert [len(unlabelled[key]) for key in ("training", "validation")] == [1, 2]
    for key in ("validation", "test", "labels"):
        assert small[key] == large[key]
    assert large["labels"] == {"0": "background", **{str(i): name for name, i in LABEL.items()}}
    images = [case["image"] for part in (large, unlabelled) for key in part for case in part[key] if "image" in case]
    assert len(set(images)) == len(images) == 8
    assert {f"images/{p.name}" for p in (cohort / "images").iterdir()} == set(images)
    labels = [case["label"] for key in ("training", "validation", "test") for case in large[key]]
    assert {f"labels/{p.name}" for p in (cohort / "labels").iterdir()} == set(labels)
    assert all("label" not in case for key in ("training", "validation") for case in unlabelled[key])


def test_a_second_call_writes_nothing(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A complete cohort is left alone: no file is touched, none is added, and no progress is shown."""
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    write(cohort)
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before


def test_an_interrupted_call_is_completed_to_the_same_bytes(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing volumes, missing datalists and a part left by a killed writer end in the bytes of an undisturbed call."""
    root = tmp_path / "cohort"
    shutil.copytree(cohort, root)
    for name in ("labels/phantom0000.nii.gz", "images/phantom0002.nii.gz", "images/phantom0007.nii.gz"):
        (root / name).unlink()
    (root / "unlabelled.json").unlink()
    old, new = (root / "images" / f".phantom0002.nii.gz.{digit * 32}.part" for digit in "ab")
    for part in (old, new):
        part.write_bytes(b"half a volume")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    write(root)
    assert "synthesizing volumes 3/3" in capsys.readouterr().out
    assert new.exists(), "it might be the work of a call that goes on"
    new.unlink()
    assert contents(root) == contents(cohort)


def test_other_parameters_are_refused(cohort: Path) -> None:
    """The folder of one cohort does not silently become another; the message names both."""
    before = contents(cohort)
    with pytest.raises(ValueError, match=r'"seed": 7.*"seed": 8'):
        write(cohort, seed=8)
    assert contents(cohort) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": (1, 4)}, r"between 1 and labelled = 3, got \[1, 4\]"),
        ({"splits": (0, 3)}, "greater than 0"),
        ({"splits": ()}, r"got \[\]"),
        ({"unlabelled": 2}, "unlabelled must be at least 3, got 2"),
        ({"organs": ("liver", "hart")}, "organs must be of spleen, .*, got liver, hart"),
        ({"organs": ("liver", "liver")}, "each once, got liver, liver"),
    ],
)
def test_counts_out_of_range_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A number out of its range is named before anything is written."""
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "cohort", **change)
    assert not (tmp_path / "cohort").exists()
