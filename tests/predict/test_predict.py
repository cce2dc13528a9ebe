"""`ssl-ray predict` and `embed` on a Ray cluster."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from studies import small_study
from volumes import oblique_affine, organ_labels, smooth_ct, write_nifti

from ssl_ray.cli.main import main
from ssl_ray.cluster.worker import begun, count_tries
from ssl_ray.data.datalist import Case
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.store import Store
from ssl_ray.errors import UserError
from ssl_ray.finetune.job import TrialData, TrialJob
from ssl_ray.finetune.trial import Trial
from ssl_ray.predict.case import LABELS
from ssl_ray.predict.model import read_model
from ssl_ray.predict.run import SIZES
from ssl_ray.predict.workers import _spread, _Worker, over_cases
from ssl_ray.storage.mirror import Mirror

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
SHAPE = (34, 32, 20)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial with four test volumes, listed in `list.json` in the parent of its folder, on grids of all kinds."""
    root, cases = tmp_path_factory.mktemp("trial"), []
    study = small_study(
        finetune={
            "cohort": {"classes": 3},
            "preparation": {"spacing": 3},
            "steps": 4,
            "validate_every": 4,
            "optimizer": {"lr": 2e-3},
        }
    )
    for number in range(6):
        affine = oblique_affine((2.5, 2.1 + number / 10, 4.0), 10.0 * number, flip=number % 2 == 1)
        image = write_nifti(root / f"scans/image{number}.nii.gz", smooth_ct(SHAPE, number), affine)
        label = write_nifti(root / f"labels/label{number}.nii.gz", organ_labels(SHAPE, 3, number), affine)
        cases.append(Case(f"image{number}", image, label))
    entries = [
        {"image": f"scans/{case.image.name}", "label": f"labels/{case.label.name}"} for case in cases if case.label
    ]
    names = {"0": "background", "1": "first", "2": "second"}
    (root / "list.json").write_text(json.dumps({"training": entries[:2], "test": entries[2:], "labels": names}))
    store, finetune = Store(root / "cache"), study.finetune
    volumes = [prepare_case(case, finetune.preparation, store)[0] for case in cases]
    data = TrialData(store, tuple(volumes[:1]), tuple(volumes[1:2]), tuple(volumes[2:]), ("first", "second"))
    folder = root / "cell"
    made = Trial(TrialJob(finetune, study.network, 2, data, None, folder, Mirror(folder), "key"), torch.device("cpu"))
    for _ in made.train():
        pass
    made.evaluate()
    return root / "cell"


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / SIZES).open()))


def test_predict_and_evaluate_give_the_scores_of_the_trial(
    trial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every score of every test volume on its original grid, and their means, to the last digit."""
    listed = str(trial.parent / "list.json")
    assert main(["predict", str(trial), listed, "--part", "test", "-o", str(tmp_path / "out")]) == 0
    assert "4 of 4 volumes segmented now" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "out"), listed]) == 0
    expected = json.loads((trial / "evaluation.json").read_text())
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    scores = ("case", "original_dice", "original_hd95", "original_surface_dice", "false_positives")
    told, made = (
        [{name: case[name] for name in scores} for case in part] for part in (expected["test"], found["cases"])
    )
    assert sorted(made, key=lambda case: case["case"]) == told
    assert any(score for case in told for score in case["original_dice"]), "something was found"
    means = read_model(str(trial)).metadata.scores["test"]
    assert found["means"] == {name: mean for name, mean in means.items() if name.startswith("original_")}
    assert found["labels"] == {"1": "first", "2": "second"}
    assert {(row["case"], row["organ"]) for row in rows(tmp_path / "out")} == {
        (f"image{number}", organ) for number in range(2, 6) for organ in ("first", "second")
    }


def test_what_is_bad_or_done_does_not_stop_the_others(
    trial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad file is listed and ends in code 2; mended, `--continue` does it and no other one; others are refused."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for number in (2, 3):
        os.link(trial.parent / f"scans/image{number}.nii.gz", scans / f"image{number}.nii.gz")
    (scans / "image4.nii.gz").write_bytes(b"\x1f\x8bno scan")
    command = ["predict", str(trial), str(scans), "-o", str(out)]
    assert main(command) == 2
    printed = capsys.readouterr().out
    assert "2 of 3 volumes segmented now" in printed
    assert "FAILED: " in printed
    assert "image4.nii.gz" in printed
    assert {row["case"] for row in rows(out)} == {"image2", "image3"}
    before = {name: (out / LABELS.format(name)).stat().st_mtime_ns for name in ("image2", "image3")}
    assert main(command) == 2
    assert "an earlier run wrote into this folder: --continue goes on with it" in capsys.readouterr().err
    assert main([*command, "--continue", "--overlap", "0.5"]) == 2
    assert "the earlier run had other models or settings" in capsys.readouterr().err
    (scans / "image4.nii.gz").write_bytes((trial.parent / "scans/image4.nii.gz").read_bytes())
    with (out / SIZES).open("a") as file:
        file.write("image3,1,first")  # a line that was being written when its process was killed
    assert main([*command, "--continue"]) == 0
    assert "2 of 3 volumes segmented now, 1 were there already" in capsys.readouterr().out
    assert (out / LABELS.format("image2")).stat().st_mtime_ns == before["image2"]
    assert sorted((row["case"], row["label"]) for row in rows(out)) == [
        (f"image{number}", organ) for number in (2, 3, 4) for organ in "12"
    ]
    first = [nib.load(out / LABELS.format(f"image{number}")) for number in (2, 3, 4)]
    assert all(image.shape == SHAPE for image in first)


def test_wrong_arguments_are_told_before_anything_is_begun(
    trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No Ray is joined for them, and no output is left that would be in the way of the right command."""
    monkeypatch.setattr("ssl_ray.predict.workers.connect", lambda settings: pytest.fail("Ray is joined"))
    (tmp_path / "a file").write_text("")
    scan, beyond = str(trial.parent / "scans/image2.nii.gz"), str(tmp_path / "a file" / "out")
    for arguments, word in (
        (
            ["predict", str(trial), str(tmp_path / "nosuch.nii.gz"), "-o", str(tmp_path / "out")],
            "nosuch.nii.gz: no such",
        ),
        (
            ["predict", str(trial), scan, "-o", str(tmp_path / "out"), "--keep-largest", "secnd"],
            "--keep-largest: secnd is",
        ),
        (["predict", str(trial), scan, "-o", beyond], "a file"),
        (["embed", str(trial), scan, "-o", beyond], "a file"),
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert word in told
        assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_where_every_volume_was_bad_there_is_nothing_to_go_on_with(
    trial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same folder takes the next try, with or without `--continue`."""
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(b"no scan")
    command = ["predict", str(trial), str(scan), "-o", str(tmp_path / "out")]
    assert main(command) == 2
    assert "1 failed\n" in capsys.readouterr().out
    scan.write_bytes((trial.parent / "scans/image2.nii.gz").read_bytes())
    assert main(command) == 0
    assert {row["case"] for row in rows(tmp_path / "out")} == {"scan"}


def test_a_dataset_json_of_somebodys_own_is_not_written_over(trial: Path, tmp_path: Path) -> None:
    """As in the folder of an nnU-Net data set, with or without a table of other columns beside it."""
    scan, own = str(trial.parent / "scans/image2.nii.gz"), tmp_path / "dataset.json"
    own.write_text("{}")
    for beside in (None, "a,b\n"):
        if beside:
            (tmp_path / SIZES).write_text(beside)
        assert main(["predict", str(trial), scan, "-o", str(tmp_path)]) == 2
        assert own.read_text() == "{}"


def test_features_as_parquet(trial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean of a volume's tokens is that of its rows with `--tokens`; a bad file is listed."""
    scans = trial.parent / "scans"
    assert main(["embed", str(trial), str(scans), "-o", str(tmp_path / "means.parquet")]) == 0
    assert main(["embed", str(trial), str(scans), "--tokens", "-o", str(tmp_path / "tokens.parquet")]) == 0
    means, tokens = (pq.read_table(tmp_path / f"{name}.parquet").to_pandas() for name in ("means", "tokens"))
    assert sorted(means["case"]) == [f"image{number}" for number in range(6)]
    for name, features in zip(means["case"], means["features"], strict=True):
        own = tokens[tokens["case"] == name]
        np.testing.assert_allclose(np.stack(own["features"]).mean(0), features, rtol=1e-5)
        assert list(own[["i", "j", "k"]].iloc[0]) == [0, 0, 0]
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"")
    assert main(["embed", str(trial), str(bad), "-o", str(tmp_path / "none.parquet")]) == 2
    assert "bad.nii.gz" in capsys.readouterr().out


def test_a_volume_that_kills_its_worker_is_a_bad_one() -> None:
    """As one does that the memory does not hold: the others are done all the same, and it is named."""
    cases = [Case(name, Path(f"{name}.nii.gz")) for name in "abcd"]

    def make(device: torch.device) -> Any:
        return lambda case: os.kill(os.getpid(), 9) if case.id == "b" else case.id * 2

    found = {case.id: outcome for case, outcome in over_cases("killing", cases, make, "cpu", 1)}
    assert {name: found[name] for name in "acd"} == {"a": "aa", "c": "cc", "d": "dd"}
    assert "b.nii.gz: its worker was killed twice" in str(found["b"])


@pytest.mark.parametrize(
    ("nodes", "on_gpus", "workers", "expected"),
    [
        ([(2, 0)], False, None, (2, 1)),
        ([(16, 0), (16, 0)], False, None, (4, 8)),
        ([(16, 0)], False, 8, (2, 8)),
        ([(16, 1)], True, None, (4, 2)),
        ([(2, 1), (16, 0)], True, None, (1, 2)),
        ([(2, 1), (64, 1)], True, None, (4, 2)),
        ([(16, 1)], False, None, (4, 4)),
    ],
)
def test_a_worker_asks_for_what_one_node_has(
    nodes: list[tuple[float, float]], on_gpus: bool, workers: int | None, expected: tuple[int, int]
) -> None:
    """Ray would wait for ever for four CPUs beside a GPU on a node of two, whatever nodes without GPUs have."""
    assert _spread([{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes], on_gpus, workers) == expected


def test_no_case_fails_because_the_count_of_tries_is_lost(ray_cluster: None, tmp_path: Path) -> None:
    """Its node was taken away: each case counts as begun for the first time."""
    import pickle

    import ray

    tries = count_tries()
    begun(tries, "a")
    worker = _Worker(ray.put((lambda device: lambda case: case.id.upper(), "cpu", 1, tries)))
    ray.kill(tries)
    case = Case("a", tmp_path / "a.nii.gz")
    assert pickle.loads(worker({"case": pickle.dumps(case)})["outcome"]) == (case, "A")


def test_a_volume_that_raises_is_a_bad_one() -> None:
    """Whatever it raises; but an output that cannot be written ends the run."""
    cases = [Case(name, Path(f"{name}.nii.gz")) for name in "ab"]

    def make(error: Exception) -> Any:
        def work(case: Case) -> str:
            if case.id == "b":
                raise error
            return case.id

        return lambda device: work

    found = {case.id: outcome for case, outcome in over_cases("raising", cases, make(MemoryError("huge")), "cpu", 1)}
    assert found["a"] == "a"
    assert str(found["b"]) == "b.nii.gz: MemoryError: huge"
    with pytest.raises(UserError, match=r"cannot write the output: .*No space left"):
        list(over_cases("raising", cases, make(OSError(28, "No space left on device")), "cpu", 1))
