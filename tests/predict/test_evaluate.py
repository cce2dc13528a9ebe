"""Scores of anybody's label maps."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from volumes import oblique_affine, organ_labels, touch, write_nifti

from ssl_ray.cli.main import main
from ssl_ray.errors import UserError
from ssl_ray.evaluate.metrics import evaluate_original
from ssl_ray.predict.evaluate import evaluate_all, names_of, pairs_of

AFFINE = oblique_affine((1.2, 1.1, 3.0), 20)
SHAPE = (20, 18, 9)


def maps(folder: Path, *names: str, seed: int = 0, values: tuple[int, ...] = (0, 1, 2)) -> None:
    for number, name in enumerate(names):
        labels = np.array(values, np.uint8)[organ_labels(SHAPE, len(values), seed + 10 * number)]
        write_nifti(folder / f"{name}.nii.gz", labels, AFFINE)


def test_scores_are_the_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers to the last digit; organs by name; a table, CSV and JSON; the prediction in another layout."""
    maps(tmp_path / "made", "a", "b", seed=1)
    maps(tmp_path / "labels", "a", "b", "c", seed=3)
    (tmp_path / "made" / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver"}}))
    turned = nib.load(tmp_path / "made" / "a.nii.gz").as_reoriented([[2, -1], [0, 1], [1, -1]])
    nib.save(turned, tmp_path / "made" / "a.nii.gz")
    assert main(["evaluate", str(tmp_path / "made"), str(tmp_path / "labels"), "--tolerance", "1.5"]) == 0
    printed = capsys.readouterr().out
    assert "liver" in printed
    assert "1 label map in " in printed
    tree = json.loads((tmp_path / "made" / "evaluation.json").read_text())
    assert tree["labels"] == {"1": "liver", "2": "label 2"}
    truths, made = ([organ_labels(SHAPE, 3, seed + 10 * number) for number in range(2)] for seed in (3, 1))
    for case, truth, prediction in zip(tree["cases"], truths, made, strict=True):
        expected = asdict(evaluate_original(case["case"], prediction, truth, AFFINE, 3, 1.5))
        assert {key: case[key] for key in ("case", "original_dice", "false_positives")} == {
            key: value if isinstance(value, str) else list(value)
            for key, value in expected.items()
            if key in ("case", "original_dice", "false_positives")
        }
        for key in ("original_hd95", "original_surface_dice"):
            np.testing.assert_allclose(case[key], expected[key], rtol=1e-6)
    dice = [score for case in tree["cases"] for score in case["original_dice"]]
    assert tree["means"]["original_dice_foreground"] == pytest.approx(np.mean(dice))
    rows = list(csv.DictReader((tmp_path / "made" / "evaluation.csv").open()))
    assert [(row["case"], row["label"], row["organ"]) for row in rows][:2] == [
        ("a", "1", "liver"),
        ("a", "2", "label 2"),
    ]
    assert [float(row["dice"]) for row in rows] == dice


def test_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever they are called, with labels that leave gaps; `--json` is all that is printed."""
    maps(tmp_path, "one", values=(0, 3, 200))
    maps(tmp_path, "other", values=(0, 3, 7))
    capsys.readouterr()
    out = str(tmp_path / "out")
    assert main(["evaluate", str(tmp_path / "one.nii.gz"), str(tmp_path / "other.nii.gz"), "--json", "-o", out]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["labels"] == {"3": "label 3", "7": "label 7", "200": "label 200"}
    (case,) = tree["cases"]
    assert case["original_dice"] == [1.0, 0.0, None]
    assert case["original_hd95"] == [0.0, None, None]
    assert case["false_positives"] == [None, None, True]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == tree


def test_json_stands_alone_beside_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program reads stdout; who watches it sees on stderr what was left out."""
    maps(tmp_path / "made", "a", "b")
    maps(tmp_path / "labels", "a", "b")
    (tmp_path / "made" / "b.nii.gz").write_bytes(b"")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "made"), str(tmp_path / "labels"), "--json"]) == 2
    printed = capsys.readouterr()
    assert [case["case"] for case in json.loads(printed.out)["cases"]] == ["a"]
    assert "FAILED: " in printed.err
    assert "1 failed; 1 volume complete" in printed.err
    assert main(["evaluate", str(tmp_path / "made"), str(tmp_path / "labels")]) == 2
    assert "FAILED: " in capsys.readouterr().out


def pairs(made: Path, labels: Path) -> dict[str, str]:
    return {name: truth.name for name, (_, truth) in pairs_of(made, labels)[0].items()}


def test_files_are_paired_by_name(tmp_path: Path) -> None:
    """By the same one, by one that differs in words for image and label, or by the datalist of the images."""
    maps(tmp_path / "made", "img01", "img02", "x/img02")
    maps(tmp_path / "labels", "label01", "label02", "img02")
    assert pairs(tmp_path / "made", tmp_path / "labels") == {"img01": "label01.nii.gz", "img02": "img02.nii.gz"}
    assert [Path(path).name for path in pairs_of(tmp_path / "made", tmp_path / "labels")[1]] == ["img02.nii.gz"]
    entry = {"image": "scans/s_0000.nii.gz", "label": "labels/label02.nii.gz"}
    maps(tmp_path, "scans/s_0000")
    (tmp_path / "list.json").write_text(json.dumps({"test": [entry], "labels": {"1": "liver"}}))
    maps(tmp_path / "ours", "s")
    assert pairs(tmp_path / "ours", tmp_path / "list.json") == {"s": "label02.nii.gz"}
    assert names_of(tmp_path / "ours", tmp_path / "list.json") == {1: "liver"}
    with pytest.raises(UserError, match="no two files of the same name among 1 and 3 label maps"):
        pairs_of(tmp_path / "ours", tmp_path / "labels")


def test_no_truth_is_another_patients_or_taken_twice(tmp_path: Path) -> None:
    """Folders are a part of the name; a prediction that could be of several truths, or one of several, is named."""
    for place, names in {
        "folders": ("p1/seg", "p2/seg", "p3/seg"),
        "truth of one": ("p1/seg",),
        "exact": ("case01", "case01_seg"),
        "one": ("case01",),
        "unclear": ("img1", "seg1", "mask2"),
        "labels": ("label1", "label2", "gt2"),
        "scans": ("p1/ct", "p2/ct"),
        "by patient": ("p1/label", "labels/p2/label"),
    }.items():
        touch(tmp_path / place, *[f"{name}.nii.gz" for name in names])

    def matched(made: str, labels: str) -> tuple[dict[str, str], dict[str, str], int]:
        pairs, alone, missing = pairs_of(tmp_path / made, tmp_path / labels)
        truths = {name: truth.relative_to(tmp_path / labels).as_posix() for name, (_, truth) in pairs.items()}
        return truths, {Path(path).relative_to(tmp_path / made).as_posix(): why for path, why in alone.items()}, missing

    nothing = f"no label map of its name in {tmp_path}"
    assert matched("folders", "truth of one") == (
        {"p1/seg": "p1/seg.nii.gz"},
        dict.fromkeys(["p2/seg.nii.gz", "p3/seg.nii.gz"], f"{nothing}/truth of one"),
        0,
    )
    assert matched("exact", "one") == ({"case01": "case01.nii.gz"}, {"case01_seg.nii.gz": f"{nothing}/one"}, 0)
    assert matched("scans", "by patient") == (
        {"p1/ct": "p1/label.nii.gz", "p2/ct": "labels/p2/label.nii.gz"},
        {},
        0,
    )
    with pytest.raises(UserError, match="no two files of the same name among 3 and 3"):
        matched("unclear", "labels")
    touch(tmp_path, "unclear/a.nii.gz", "labels/a.nii.gz")
    assert matched("unclear", "labels") == (
        {"a": "a.nii.gz"},
        dict.fromkeys(["img1.nii.gz", "seg1.nii.gz"], "img1 or seg1 could be of label1")
        | {"mask2.nii.gz": "mask2 could be of gt2 or of label2"},
        3,
    )


@pytest.mark.parametrize(
    ("made", "truth"),
    [
        (("sub-01_ct", "sub-02_ct"), ("sub-01/sub-01_seg", "sub-02/sub-02_seg")),
        (("p1", "p2"), ("p1/p1", "p2/p2")),
        (("sub-1_ct",), ("derivatives/manual/sub-1/anat/sub-1_seg",)),
        (("case1", "case2"), ("labelsTr/case1", "labelsTr/case2")),
    ],
)
def test_a_prediction_without_folder_finds_its_truth_in_any(
    made: tuple[str, ...], truth: tuple[str, ...], tmp_path: Path
) -> None:
    """As `predict` writes them where names are enough; one that is in two folders stays unclear."""
    touch(tmp_path, *[f"made/{name}.nii.gz" for name in made], *[f"true/{name}.nii.gz" for name in truth])
    pairs, alone, missing = pairs_of(tmp_path / "made", tmp_path / "true")
    assert {name: found for name, (_, found) in pairs.items()} == {
        name: tmp_path / f"true/{found}.nii.gz" for name, found in zip(made, truth, strict=True)
    }
    assert (alone, missing) == ({}, 0)
    touch(tmp_path, f"true/elsewhere/{truth[0].rpartition('/')[2]}.nii.gz", "made/x.nii.gz", "true/x.nii.gz")
    pairs, alone, missing = pairs_of(tmp_path / "made", tmp_path / "true")
    assert [*pairs] == sorted([*made[1:], "x"])
    assert "could be of" in alone[str(tmp_path / f"made/{made[0]}.nii.gz")]
    assert missing == 2


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    """One of them would be scored, and nobody knows which."""
    touch(tmp_path, "made/a.nii", "made/a.nii.gz", "labels/a.nii.gz")
    with pytest.raises(UserError, match=r"made/a\.nii\.gz: has the name of .*made/a\.nii; which of both is meant"):
        pairs_of(tmp_path / "made", tmp_path / "labels")


def test_labels_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    """Where names are beside both, a value must be the same organ; nnU-Net writes them the other way round."""
    for folder, labels in (("made", {"0": "background", "1": "liver", "2": "Spleen"}), ("labels", {"spleen": 2})):
        maps(tmp_path / folder, "a")
        (tmp_path / folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert names_of(tmp_path / "made", tmp_path / "labels")[1] == "liver"
    (tmp_path / "labels" / "dataset.json").write_text(json.dumps({"labels": {"liver": 2}}))
    with pytest.raises(UserError, match=r"label 2 is Spleen in .*made and liver in .*labels"):
        names_of(tmp_path / "made", tmp_path / "labels")


def test_regions_of_nnunet_name_no_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several values are no organ's, so each of them stays what it is; what is no name at all is refused."""
    maps(tmp_path / "made", "a")
    maps(tmp_path / "labels", "a")
    told = tmp_path / "made" / "dataset.json"
    told.write_text(json.dumps({"labels": {"background": 0, "kidney": [1, 2], "tumor": 2}}))
    command = ["evaluate", str(tmp_path / "made"), str(tmp_path / "labels")]
    assert main(command) == 0
    tree = json.loads((tmp_path / "made" / "evaluation.json").read_text())
    assert tree["labels"] == {"1": "label 1", "2": "tumor"}
    told.write_text(json.dumps({"labels": {"kidney": "one"}}))
    assert main(command) == 2
    assert "labels.kidney: must be one organ's name and value, got one" in capsys.readouterr().err


def test_voxels_to_ignore_are_not_scored(tmp_path: Path) -> None:
    """Neither what is predicted there nor the label itself, which nnU-Net calls `ignore`."""
    truth = organ_labels(SHAPE, 4)
    wrong = np.where(truth == 3, 1, truth).astype(np.uint8)
    write_nifti(tmp_path / "labels/a.nii.gz", truth, AFFINE)
    write_nifti(tmp_path / "made/a.nii.gz", wrong, AFFINE)
    labels = {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    (tmp_path / "labels" / "dataset.json").write_text(json.dumps({"labels": labels}))
    pairs, names = (f(tmp_path / "made", tmp_path / "labels") for f in (pairs_of, names_of))
    evaluation, bad = evaluate_all(pairs[0], names, 1)
    assert not bad
    assert evaluation.organs == {1: "liver", 2: "spleen"}
    assert evaluation.cases[0].original_dice == [1.0, 1.0]


def test_the_table_counts_false_positives_as_the_report_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all organs the number a volume, of one organ the share; also where the system tells no cores, as macOS."""
    monkeypatch.delattr("os.sched_getaffinity")
    truth = (organ_labels(SHAPE, 2) > 0).astype(np.uint8)
    for name, extra in (("a", (2, 3)), ("b", (2,))):
        made = truth.copy()
        for value in extra:
            made[value, :2] = value
        write_nifti(tmp_path / f"labels/{name}.nii.gz", truth, AFFINE)
        write_nifti(tmp_path / f"made/{name}.nii.gz", made, AFFINE)
    evaluation, _ = evaluate_all(pairs_of(tmp_path / "made", tmp_path / "labels")[0], {}, 1)
    shown = {" ".join(line.split()[:2]): line.split()[-1] for line in evaluation.table().splitlines()}
    assert (shown["label 1"], shown["label 2"], shown["label 3"]) == ("-", "1.000", "0.500")
    assert evaluation.tree()["means"]["original_false_positives"] == 1.5 == float(shown["all organs"])


def test_one_bad_file_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is listed with the reason, and so is one without truth; the exit code says so."""
    maps(tmp_path / "made", "a", "b", "c", "d")
    maps(tmp_path / "labels", "a", "b", "c")
    (tmp_path / "made" / "b.nii.gz").write_bytes(b"\x1f\x8b")
    write_nifti(tmp_path / "made" / "c.nii.gz", organ_labels((5, 6, 7)), AFFINE)
    assert main(["evaluate", str(tmp_path / "made"), str(tmp_path / "labels")]) == 2
    printed = capsys.readouterr().out
    for rule in ("b.nii.gz: ", "the prediction has shape (5, 6, 7)", "d.nii.gz: no label map of its name"):
        assert rule in printed
    assert len(json.loads((tmp_path / "made" / "evaluation.json").read_text())["cases"]) == 1
