"""One volume from file to file: the label map lies on the scan's own grid, and says what the network said."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import inv_ornt_aff
from numpy.typing import NDArray
from scipy import ndimage
from tiny_model import write_model
from volumes import oblique_affine, smooth_ct, touch

from ssl_ray.data.datalist import Case
from ssl_ray.errors import UserError
from ssl_ray.evaluate.metrics import to_original_grid
from ssl_ray.predict.case import Outputs, measure, predict_case
from ssl_ray.predict.inputs import cases_of, read_prepared
from ssl_ray.predict.model import Model
from ssl_ray.predict.run import SIZES, TOLD, predict_all
from ssl_ray.predict.segment import Segmenter, manner_of

AFFINE = oblique_affine((2.2, 2.6, 4.1), 25, flip=True)
SHAPE = (31, 26, 17)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    model = write_model(tmp_path_factory.mktemp("model"))
    return Segmenter([model], manner_of(model.metadata)[0], torch.device("cpu"))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """For `predict_all`, whose work is done in this process."""

    def here(title: str, cases: Sequence[Case], make: Any, *how: Any) -> Iterator[tuple[Case, Any]]:
        for case in cases:
            try:
                yield case, make(torch.device("cpu"))(case)
            except UserError as error:
                yield case, error

    monkeypatch.setattr("ssl_ray.predict.run.over_cases", here)
    return write_model(tmp_path / "model")


def predict(model: Model, folder: Path, *inputs: Path, probabilities: bool = False, resume: bool = False) -> int:
    """How many cases are segmented now."""
    cases, _ = cases_of(inputs, 1)
    outputs = Outputs(folder, probabilities)
    return predict_all([model], manner_of(model.metadata)[0], cases, outputs, resume=resume)[0]


def write(path: Path, voxels: NDArray[Any], affine: NDArray[Any] = AFFINE, kind: Any = nib.Nifti1Image) -> Any:
    image = kind(voxels, affine)
    image.header["descrip"] = b"a scan"
    nib.save(image, path)
    return nib.load(path)


def labels_of(scan: Path, segmenter: Segmenter, folder: Path, **options: Any) -> Any:
    case = Case("made", scan)
    predict_case(case, segmenter, Outputs(folder, **options))
    return nib.load(folder / "made.nii.gz")


@pytest.mark.parametrize(("sform", "qform"), [(1, 1), (2, 0), (0, 1), (0, 0), (4, 2)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_labels_lie_where_the_scan_lies(
    tmp_path: Path, segmenter: Segmenter, kind: Any, sform: int, qform: int
) -> None:
    """For nibabel: the same shape, affine, codes and units, and bytes as labels, whatever the scan was stored as."""
    image = kind(smooth_ct(SHAPE)[..., None] // 2, AFFINE)
    image.set_sform(AFFINE, sform)
    image.set_qform(AFFINE, qform)
    image.header.set_slope_inter(2, 0)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "scan.nii.gz")
    scan, made = nib.load(tmp_path / "scan.nii.gz"), labels_of(tmp_path / "scan.nii.gz", segmenter, tmp_path / "out")
    assert type(made) is kind
    assert made.shape == SHAPE
    assert made.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(made.affine, scan.affine)
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "quatern_b", "srow_x"):
        np.testing.assert_array_equal(made.header[field], scan.header[field], field)
    assert np.isnan(made.header["scl_slope"])
    assert made.header.get_intent()[0] == "label"
    assert set(np.unique(made.dataobj)) > {0}
    assert set(np.unique(made.dataobj)) <= {0, 1, 2, 3}


def test_labels_lie_where_the_scan_lies_for_itk(tmp_path: Path, segmenter: Segmenter) -> None:
    """The same physical space for SimpleITK, which reads headers by itself, and the same voxels."""
    sitk = pytest.importorskip("SimpleITK")
    write(tmp_path / "scan.nii.gz", smooth_ct(SHAPE))
    made = labels_of(tmp_path / "scan.nii.gz", segmenter, tmp_path)
    scan, labels = (sitk.ReadImage(str(tmp_path / name)) for name in ("scan.nii.gz", "made.nii.gz"))
    assert labels.IsSameImageGeometryAs(scan, 1e-9, 1e-9)
    assert labels.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(labels).T, np.asarray(made.dataobj))


def test_the_network_says_the_same_of_a_scan_in_every_orientation(tmp_path: Path, segmenter: Segmenter) -> None:
    """Written with its axes in another order and direction, each voxel keeps its label."""
    voxels = smooth_ct(SHAPE)
    straight = np.diag([2.2, 2.6, 4.1, 1.0])
    write(tmp_path / "scan.nii.gz", voxels, straight)
    expected = np.asarray(labels_of(tmp_path / "scan.nii.gz", segmenter, tmp_path).dataobj)
    turns = list(permutations(range(3)))
    for order, flips in random.Random(0).sample(list(product(turns, product((1, -1), repeat=3))), 4):
        turn = np.array([[axis, flip] for axis, flip in zip(order, flips, strict=True)])
        turned = nib.apply_orientation(voxels, turn)
        write(tmp_path / "turned.nii.gz", turned, straight @ inv_ornt_aff(turn, SHAPE))
        made = np.asarray(labels_of(tmp_path / "turned.nii.gz", segmenter, tmp_path / "turned").dataobj)
        assert np.array_equal(made, nib.apply_orientation(expected, turn)), (order, flips)


def test_what_is_written_of_a_case(tmp_path: Path, segmenter: Segmenter) -> None:
    """Probabilities on the prepared grid belong to the labels, the picture is one, sizes are those of the file."""
    write(tmp_path / "scan.nii.gz", smooth_ct(SHAPE))
    case = Case("a/made", tmp_path / "scan.nii.gz")
    sizes, seconds = predict_case(case, segmenter, Outputs(tmp_path / "out", probabilities=True))
    assert seconds > 0
    made = nib.load(tmp_path / "out" / "a" / "made.nii.gz")
    labels = np.asarray(made.dataobj)
    with np.load(tmp_path / "out" / "probabilities" / "a" / "made.npz") as kept:
        probabilities, affine = kept["probabilities"], kept["affine"]
    assert probabilities.dtype == np.float16
    prepared, _ = read_prepared(case, segmenter.metadata.preparation)
    np.testing.assert_array_equal(affine, prepared.affine)
    assert probabilities.shape == (4, *prepared.image.shape)
    np.testing.assert_allclose(probabilities.astype(np.float32).sum(0), 1, atol=3e-3)
    here = to_original_grid(np.asarray(probabilities.argmax(0), np.uint8), affine, SHAPE, made.affine)
    assert (here == labels).mean() > 0.999, "float16 has equal ones"
    assert (tmp_path / "out" / "overlays" / "a" / "made.png").read_bytes().startswith(b"\x89PNG")
    for size in sizes:
        mask = labels == size.number
        assert size.voxels == mask.sum()
        assert size.millilitres == pytest.approx(mask.sum() * 2.2 * 2.6 * 4.1 / 1000, rel=1e-5)
        assert size.components == ndimage.label(mask, np.ones((3, 3, 3)))[1]
    assert list((tmp_path / "out").rglob(".*")) == []


def test_the_largest_component_is_kept(tmp_path: Path, segmenter: Segmenter) -> None:
    """Of the organs that are named; of the others all."""
    write(tmp_path / "scan.nii.gz", smooth_ct(SHAPE, 1))
    whole = np.asarray(labels_of(tmp_path / "scan.nii.gz", segmenter, tmp_path / "a").dataobj)
    kept = np.asarray(labels_of(tmp_path / "scan.nii.gz", segmenter, tmp_path / "b", largest=(2,)).dataobj)
    parts, count = ndimage.label(whole == 2, np.ones((3, 3, 3)))
    assert count > 1
    largest = parts == 1 + ndimage.sum_labels(whole == 2, parts, range(1, count + 1)).argmax()
    np.testing.assert_array_equal(kept, np.where((whole == 2) & ~largest, 0, whole))


def test_sizes_of_organs_against_scipy() -> None:
    """Absent ones are 0; voxels that share a corner are of one component."""
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[5, 5, 5] = 3
    labels[2, 2:5, 2] = 1
    found = measure(labels, 5, 2000.0)
    assert [(one.number, one.voxels, one.millilitres, one.components) for one in found] == [
        (1, 3, 6.0, 1),
        (2, 0, 0.0, 0),
        (3, 3, 6.0, 2),
        (4, 0, 0.0, 0),
    ]


@pytest.mark.parametrize(
    ("voxels", "rule"),
    [
        (np.zeros(SHAPE, np.int16), "not a CT in HU"),
        (np.full(SHAPE, np.nan, np.float32), "not finite"),
        (np.zeros((4, 4), np.int16), "must be a 3D volume"),
    ],
)
def test_a_scan_that_is_none_is_named(tmp_path: Path, segmenter: Segmenter, voxels: NDArray[Any], rule: str) -> None:
    """And nothing is left in the output."""
    write(tmp_path / "scan.nii.gz", voxels)
    with pytest.raises(UserError, match=rf"scan\.nii\.gz: .*{rule}"):
        labels_of(tmp_path / "scan.nii.gz", segmenter, tmp_path / "out")
    assert list(tmp_path.glob("out/**/*")) == []


def test_channels_must_share_a_grid(tmp_path: Path) -> None:
    """Two images are one volume where they lie in one place; else the second one is named."""
    preparation = {"spacing": 3, "normalise": "zscore", "channels": 2}
    model = write_model(tmp_path / "model", preparation=preparation)
    two = Segmenter([model], manner_of(model.metadata)[0], torch.device("cpu"))
    for name, affine in (("a", AFFINE), ("b", AFFINE), ("c", oblique_affine((2.2, 2.6, 4.1), 20))):
        write(tmp_path / f"{name}.nii.gz", smooth_ct(SHAPE, ord(name)), affine)
    case = Case("made", tmp_path / "a.nii.gz", others=(tmp_path / "b.nii.gz",))
    predict_case(case, two, Outputs(tmp_path))
    assert nib.load(tmp_path / "made.nii.gz").shape == SHAPE
    with pytest.raises(UserError, match=r"c\.nii\.gz: the channel's affine"):
        predict_case(replace(case, others=(tmp_path / "c.nii.gz",)), two, Outputs(tmp_path))


def test_scans_and_true_labels_are_never_replaced(tmp_path: Path, model: Model) -> None:
    """Nor any other file that no run of ours wrote: it is named before anything is written."""
    scans, truth, out = tmp_path / "scans", tmp_path / "labelsTs", tmp_path / "out"
    scans.mkdir()
    scan = scans / "case1.nii.gz"
    write(scan, smooth_ct(SHAPE))
    touch(truth, "case1.nii.gz")
    touch(out, "overlays/case1.png", "probabilities/case1.npz")
    kept = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))}
    with pytest.raises(UserError, match=r"scans/case1\.nii\.gz: is an image of case1, which the output would replace"):
        predict(model, scans, scan)
    with pytest.raises(UserError, match=r"labelsTs/case1\.nii\.gz: is there already, and no earlier run of ours wrote"):
        predict(model, truth, scan)
    with pytest.raises(UserError, match=r"out/overlays/case1\.png: is there already"):
        predict(model, out, scan)
    (out / "overlays/case1.png").rename(tmp_path / "a.png")
    kept[tmp_path / "a.png"] = kept.pop(out / "overlays/case1.png")
    with pytest.raises(UserError, match=r"out/probabilities/case1\.npz: is there already"):
        predict(model, out, scan, probabilities=True)
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"test": [{"image": "scans/case1.nii.gz", "label": "labelsTs/case1.nii.gz"}]}))
    kept[listed] = listed.read_bytes()
    (tmp_path / "linked").symlink_to(truth)
    with pytest.raises(UserError, match=r"linked/case1\.nii\.gz: is the true label of case1"):
        predict(model, tmp_path / "linked", listed)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))} == kept
    assert predict(model, out, scan) == 1, "probabilities that are not asked for are in nobody's way"


def test_a_scan_may_be_called_as_the_first_column(tmp_path: Path, model: Model) -> None:
    """Once it is complete, it is left out as any other."""
    write(tmp_path / "case.nii.gz", smooth_ct(SHAPE))
    assert predict(model, tmp_path / "out", tmp_path / "case.nii.gz") == 1
    assert predict(model, tmp_path / "out", tmp_path / "case.nii.gz", resume=True) == 0
    with pytest.raises(UserError, match="--continue goes on with it"):
        predict(model, tmp_path / "out", tmp_path / "case.nii.gz")


def test_what_a_run_was_writing_when_it_was_cut_off_is_written_again(tmp_path: Path, model: Model) -> None:
    """A label map without rows is ours if the run began its case, and somebody's own if it did not, or failed in it."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.nii.gz", smooth_ct(SHAPE))
    a, b, bad, out = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", tmp_path / "bad.nii.gz", tmp_path / "out"
    bad.write_bytes(b"no scan")
    assert predict(model, out, a, bad) == 1
    rows = (out / SIZES).read_text().splitlines(keepends=True)
    (out / SIZES).write_text("".join(rows[:2]))
    assert predict(model, out, a, resume=True) == 1
    (out / SIZES).write_text("".join(rows[:1]))
    assert predict(model, out, a) == 1, "with nothing complete, no --continue is needed"
    told = json.loads((out / TOLD).read_text())
    (out / TOLD).write_text(json.dumps({key: told[key] for key in told if key != "cases"}))
    (out / SIZES).write_text("".join(rows[:1]))
    assert predict(model, out, a, resume=True) == 1, "begun by a version that did not say of which cases"
    write(bad, smooth_ct(SHAPE))
    for name in ("b", "bad"):
        touch(out, f"{name}.nii.gz")
    for scan in (b, bad):
        with pytest.raises(UserError, match=rf"out/{scan.name}: is there already"):
            predict(model, out, a, scan, resume=True)
        (out / scan.name).unlink()
    assert predict(model, out, a, b, bad, resume=True) == 2
