"""`ssl-ray new`: the study that is written for a folder can be looked at and run without an edit."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from studies import place_database
from volumes import AFFINE, SHAPE, organ_labels, smooth_ct, write_nifti

from ssl_ray.cli.main import main
from ssl_ray.data.datalist import read_unlabelled
from ssl_ray.data.splits import read_labelled
from ssl_ray.study.cohorts import read_cohorts
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of
from ssl_ray.study.status import status_of

ROOT = Path(__file__).parents[2]
TINY = [
    *("network.hidden_size=48", "network.mlp_dim=64", "network.feature_size=4", "cluster.object_store_gigabytes=0.3"),
    *("pretrain.epochs=1", "finetune.steps=2", "finetune.validate_every=2", "finetune.runs=1"),
    *("pretrain.probe=false", "finetune.sliding_window_overlap=0"),
]
"""What makes a run of minutes out of one of hours; nothing about the data."""
FOLDS = ["finetune.cohort.folds=3", "finetune.grid.init=[pretrained]"]
"""Three trainings instead of ten."""


def nnunet(root: Path, cohort: Path, unlabelled: bool) -> Path:
    """The synthetic cohort in nnU-Net's layout, with its dataset.json; labelled scans alone, or all of them."""
    lists = [json.loads((cohort / name).read_text()) for name in ("labelled_4.json", "unlabelled.json")]
    labelled = [entry for part in ("training", "validation", "test") for entry in lists[0][part]]
    free = [entry for part in ("training", "validation") for entry in lists[1][part]] if unlabelled else []
    for entry in (*labelled, *free):
        name = Path(entry["image"]).name.removesuffix(".nii.gz")
        for folder, end, source in (("imagesTr", "_0000", entry["image"]), ("labelsTr", "", entry.get("label"))):
            if source:
                (root / folder).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(cohort / source, root / folder / f"{name}{end}.nii.gz")
    labels = {name: int(value) for value, name in lists[0]["labels"].items()}
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    return root


def test_a_study_fits_the_folder(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes and names of dataset.json, the scans' spacing, a patch and a window that hold them, folds for few."""
    monkeypatch.chdir(tmp_path)
    root = nnunet(tmp_path / "my ct", cohort, unlabelled=True)
    assert main(["new", "my ct", "--gpu"]) == 0
    study = load("my ct.yaml")
    assert study.name == "my_ct"
    images = [nib.as_closest_canonical(nib.load(path)) for path in sorted((root / "imagesTr").glob("*.nii.gz"))]
    spacings = np.array([image.header.get_zooms() for image in images])
    assert study.finetune.preparation.spacing == pytest.approx(np.median(spacings, axis=0), rel=0.01)
    rooms = np.array([image.shape for image in images]) * spacings / study.finetune.preparation.spacing
    assert ((np.array(study.finetune.patch_size) <= rooms).all(axis=1)).mean() >= 0.85
    assert study.finetune.cohort.classes == 14
    low, high = study.finetune.preparation.normalise.hu_window
    for label in (root / "labelsTr").glob("*.nii.gz"):
        image = nib.load(root / "imagesTr" / label.name.replace(".nii", "_0000.nii"))
        organs = image.get_fdata()[np.asarray(nib.load(label).dataobj) > 0]
        assert np.mean((organs >= low) & (organs <= high)) > 0.95
    assert study.finetune.augmentation.flip_prob == 0, "the phantom has kidneys of two sides"
    assert study.finetune.cohort.folds == 5
    splits = read_labelled(study.finetune.cohort, study.finetune.sizes)
    assert splits.organs[5] == "liver"
    training, validation = read_unlabelled(study.pretrain.sources)
    assert len(training) + len(validation) == 6
    assert main(["new", "my ct"]) == 2, "a study that is there is not written over"


def test_where_every_image_is_labelled_the_held_out_ones_are_not_pretrained_on(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A test part, no folds, and it is said; the lists pass all checks of a run."""
    monkeypatch.chdir(tmp_path)
    nnunet(tmp_path / "all", cohort, unlabelled=False)
    assert main(["new", "all", "--cpu"]) == 0
    assert "without their labels, and none that is held out" in " ".join(capsys.readouterr().out.split())
    study = load("all.yaml")
    training, validation, splits = read_cohorts(study)
    held_out = {case.image for case in (*splits.validation, *splits.test)}
    assert len(held_out) == 2
    assert len({case.image for case in (*training, *validation)} - held_out) == 5 == len(splits.cases) - len(held_out)


def test_without_a_dataset_json_the_values_are_read_and_mri_gets_percentiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest value decides; broken files are named and do not stop the rest."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        bright = np.clip(smooth_ct(SHAPE, number).astype(np.float32) + 1000, 0, None)
        in_metres = nib.Nifti1Image(bright, AFFINE * [[1e-3], [1e-3], [1e-3], [1]])
        in_metres.header.set_xyzt_units("meter")
        (tmp_path / "mr/images").mkdir(parents=True, exist_ok=True)
        nib.save(in_metres, tmp_path / f"mr/images/p{number}.nii.gz")
        write_nifti(tmp_path / f"mr/labels/p{number}.nii.gz", organ_labels(SHAPE, 4, number), AFFINE)
    (tmp_path / "mr/images/p5.nii.gz").write_bytes(b"<html>404</html>")
    write_nifti(tmp_path / "mr/images/scout.nii.gz", np.zeros((8, 8), np.float32), AFFINE)
    cut_off = tmp_path / "mr/images/p4.nii.gz"
    cut_off.write_bytes(cut_off.read_bytes()[:-2000])
    assert main(["new", "mr", "--study", "2024.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "left out of the median spacing: " in printed
    assert "scout.nii.gz: ValueError: not a volume, got shape (8, 8)" in printed
    assert "a run would refuse: " in printed
    assert "mr/images/p4.nii.gz: " in printed
    study = load("2024.yaml")
    assert study.name == "2024"
    assert min(study.finetune.preparation.spacing) >= min(nib.affines.voxel_sizes(AFFINE)), "in mm"
    assert study.finetune.cohort.classes == 4
    assert study.finetune.preparation.normalise.kind == study.pretrain.preparation.normalise.kind == "percentile"


def test_a_study_of_volumes_with_two_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's two images of a volume are its two channels, in the lists and in the study, whose lists a run takes."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        bright = np.clip(smooth_ct(SHAPE, number).astype(np.float32) + 1000, 0, None)
        for channel in (0, 1):
            write_nifti(tmp_path / f"mr/imagesTr/p{number}_{channel:04d}.nii.gz", bright * (1 + channel), AFFINE)
        write_nifti(tmp_path / f"mr/labelsTr/p{number}.nii.gz", organ_labels(SHAPE, 4, number), AFFINE)
    assert main(["new", "mr"]) == 0
    study = load("mr.yaml")
    assert study.finetune.preparation.channels == study.pretrain.preparation.channels == 2
    training, validation, splits = read_cohorts(study)
    for case in (*training, *validation, *splits.cases, *splits.validation, *splits.test):
        assert [image.name[2:] for image in case.images] == ["_0000.nii.gz", "_0001.nii.gz"]


def test_volumes_that_a_run_would_refuse_give_no_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Decathlon's Prostate keeps its channels in one 4D file: the first reason is told, and what to do."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        both = np.stack([smooth_ct(SHAPE, number + seed) for seed in (0, 50)], -1)
        write_nifti(tmp_path / f"mr/images/p{number}.nii.gz", both, AFFINE)
        write_nifti(tmp_path / f"mr/labels/p{number}.nii.gz", organ_labels(SHAPE, 3, number), AFFINE)
    assert main(["new", "mr"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "a run would refuse all 4 labelled volumes that were read: " in told
    assert f"must be a 3D volume, got shape {(*SHAPE, 2)}; split it into a file for each channel" in told
    assert "list them as `image: [a, b]`" in told
    assert not [*tmp_path.rglob("*.yaml"), *tmp_path.rglob("*.json")], "lists alone would refuse the next try"


@pytest.mark.parametrize(("labelled", "unlabelled", "least"), [(2, 5, 3), (3, 0, 4), (0, 5, 3)])
def test_too_few_patients_are_refused(
    tmp_path: Path, labelled: int, unlabelled: int, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(labelled + unlabelled):
        write_nifti(tmp_path / f"images/p{number}.nii.gz", smooth_ct(SHAPE, number), AFFINE)
        if number < labelled:
            write_nifti(tmp_path / f"labels/p{number}.nii.gz", organ_labels(SHAPE), AFFINE)
    assert main(["new", str(tmp_path), "--study", str(tmp_path / "a.yaml")]) == 2
    assert f"labels of {least} patients" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("*.yaml")) + list(tmp_path.glob("*.json"))


@pytest.mark.slow
def test_an_installed_wheel_has_what_new_needs(tmp_path: Path) -> None:
    """There is no `experiments/` then; the templates are data of the package."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "ssl_ray", source / "ssl_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, source / name)
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    for number in range(4):
        write_nifti(tmp_path / f"ct/images/p{number}.nii.gz", smooth_ct(SHAPE, number), AFFINE)
        write_nifti(tmp_path / f"ct/labels/p{number}.nii.gz", organ_labels(SHAPE), AFFINE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "ssl_ray", "new", "ct", "--cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "ct.yaml").finetune.cohort.classes == 4


@pytest.mark.slow
@pytest.mark.parametrize("unlabelled", [True, False])
def test_what_new_writes_is_checked_run_and_tidied_up(
    ray_cluster: None,
    cohort: Path,
    tmp_path: Path,
    unlabelled: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """nnU-Net's layout with unlabelled scans, and one where everything is labelled: no edit in between."""
    monkeypatch.chdir(tmp_path)
    nnunet(tmp_path / "ct", cohort, unlabelled)
    place_database(tmp_path / "output" / "mlflow.db")
    assert main(["new", "ct", "--cpu"]) == 0
    settings = [*TINY, "finetune.grid.sizes=[1]", *(FOLDS if unlabelled else [])]
    changes = [part for setting in settings for part in ("--set", setting)]
    capsys.readouterr()
    assert main(["check", "ct.yaml", "--json", *changes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["organs"]["liver"]["volumes"] == 7
    study = load("ct.yaml", settings)
    assert status_of(study, folders_of(study))["stage"] == "not begun"
    assert main(["run", "ct.yaml", "--quiet", *changes]) == 0
    found = status_of(study, folders_of(study))
    assert found["stage"] == "finished"
    for stage in found["stages"].values():
        assert stage["step"] == stage["steps"] > 0
    capsys.readouterr()
    assert main(["clean", "ct.yaml", "--yes", "--json", *changes]) == 0
    cleaned = json.loads(capsys.readouterr().out)
    assert cleaned["removed_bytes"] > 0
    assert not list((tmp_path / "output").glob("ct/pretrain-*/checkpoints"))
    if unlabelled:
        return  # once is enough
    assert main(["run", "ct.yaml", *changes]) == 0, "nothing that was needed is gone"
    printed = capsys.readouterr().out
    assert "pretraining was done already" in printed
    assert "0 cells trained now" in printed
