"""The whole study on a small synthetic cohort, as a user runs it."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from ray.train.torch import TorchTrainer
from safetensors import safe_open
from safetensors.torch import save_file
from studies import place_database, small_tree, write_study

from ssl_ray.cli.main import main
from ssl_ray.networks.model_file import read_metadata
from ssl_ray.pretrain import driver
from ssl_ray.storage.files import file_digest
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of, tracker_of
from ssl_ray.tracking.tracker import PRETRAINING_RUN

pytestmark = pytest.mark.slow

Experiment = Callable[..., Path]
PRETRAIN = {"batch_size": 4, "epochs": 10, "validate_every": 5, "log_every": 1, "optimizer": {"lr": 1e-3}}
SPLITS = {2: "labelled_2.json", 4: "labelled_4.json"}
FINETUNE = {"cohort": {"splits": SPLITS}, "patches_per_volume": 2, "steps": 4, "validate_every": 2}


def write_experiment(folder: Path, root: Path, name: str = "small", **pretrain: Any) -> Path:
    """A small experiment with a store and a database of its own."""
    grid = {"grid": {"lr": [1e-3]}}
    tree = small_tree(None, root, name=name, pretrain=PRETRAIN | pretrain, finetune=FINETUNE | grid)
    del tree["cache"]
    place_database(folder / "output" / "mlflow.db")
    return write_study(folder / f"{name}.yaml", tree | {"output": str(folder / "output")})


@pytest.fixture
def experiment(cohort: Path, tmp_path: Path) -> Experiment:
    """Writes an experiment; `experiment(workers=2)` changes how it pretrains."""

    def write(name: str = "small", root: Path = cohort, **pretrain: Any) -> Path:
        return write_experiment(tmp_path, root, name, **pretrain)

    return write


@pytest.fixture(scope="module")
def carried_out(ray_cluster: None, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study that was run, with one worker and one view a patch, and what it printed."""
    path = write_experiment(tmp_path_factory.mktemp("plain"), cohort, "plain")
    printed = StringIO()
    with redirect_stdout(printed):
        assert main(["run", str(path)]) == 0
    return path, printed.getvalue()


def test_run_answers_and_a_second_run_does_nothing_again(
    carried_out: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """`run` ends with the table; run again, it prepares nothing, trains nothing and writes the report once more."""
    path, first = carried_out
    assert "labelled volumes" in first
    assert "mlflow ui --backend-store-uri" in first
    study = load(path)
    tracker = tracker_of(study)
    (pretraining,), (grid,) = tracker.runs(kind="pretraining"), tracker.runs(kind="grid")
    trials = tracker.runs(kind="trial", parent=grid.info.run_id)
    assert len(trials) == 4
    assert {run.info.status for run in (pretraining, *trials)} == {"FINISHED"}
    for run in trials:
        lineage = run.data.tags.get(PRETRAINING_RUN)
        assert lineage == (pretraining.info.run_id if run.data.params["init"] == "pretrained" else None)
    assert len({frozenset(run.data.params) for run in trials}) == 1, "the compare view needs equal names"
    # An organ that a network never finds has no distance.
    named = [frozenset(name for name in run.data.metrics if "hd95" not in name) for run in trials]
    assert len(set(named)) == 1
    assert "selected/test/original_dice_foreground" in trials[0].data.metrics
    learned = pretraining.data.metrics["best_validation_loss"] < pretraining.data.metrics["validation_identity_loss"]
    assert not learned, "ten epochs of three volumes are too short"
    assert re.search(r"what needs no learning gives [\d.]+: such weights can be worse than random ones", first)
    assert {"probe_r2", "probe_r2_untrained", "probe_rank"} <= pretraining.data.metrics.keys()
    pictures = [item.path for item in tracker.client.list_artifacts(pretraining.info.run_id, "pictures")]
    assert pictures
    assert "weight_transfer.json" in [item.path for item in tracker.client.list_artifacts(grid.info.run_id)]
    report = folders_of(study).study / "report.html"
    page = report.with_suffix(".md").read_text()
    assert re.search(r"the network\s+\*\*adds\*\* \d+% of it: such weights can be worse than random ones\.", page)
    pictures = set(re.findall(r"\(figures/(\w+)\.png\)", page))
    assert {"examples_random", "examples_pretrained", "organ_map", "organ_curves", "restored"} <= pictures
    assert re.findall(r"^\| (pretraining|fine-tuning) +\| CPU +\| +(\d) ", page, re.MULTILINE) == [
        ("pretraining", "1"),
        ("fine-tuning", "4"),
    ]
    ends = {run.info.run_id: run.info.end_time for run in (pretraining, *trials)}
    report.unlink()

    assert main(["run", str(path)]) == 0
    second = capfd.readouterr().out
    assert "prepared 0 of 13 volumes now" in second
    assert "pretraining was done already" in second
    assert "0 cells trained now, 4 were done already" in second
    assert report.is_file()

    def ended() -> dict[str, int]:
        runs = [run for kind in ("pretraining", "trial") for run in tracker.runs(kind=kind)]
        return {run.info.run_id: run.info.end_time for run in runs}

    assert ended() == ends
    kept = report.parent.rename(report.parent.with_name("kept"))
    assert main(["run", str(path)]) == 0, "MLflow and the store are enough"
    assert "its weights are gone, not needed" in capfd.readouterr().out
    assert ended() == ends
    shutil.rmtree(report.parent)
    kept.rename(report.parent)


def test_each_run_starts_from_the_weights_given_for_it(
    carried_out: tuple[Path, str], experiment: Experiment, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing is pretrained, and the page names the files; equal ones, a pretraining counted twice, are refused."""
    (made,) = folders_of(load(carried_out[0])).study.glob("pretrain-*/best.safetensors")
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for file in files:
        shutil.copy(made, file)
    settings = ["finetune.runs=2", "pretrain.pretrainings=2", f"finetune.weights=[{files[0]}, {files[1]}]"]
    settings += ["finetune.grid.sizes=[2]", "finetune.grid.init=[pretrained]"]
    path = experiment("given")
    command = ["run", str(path), *(word for setting in settings for word in ("--set", setting))]
    assert main(command) == 2
    assert "finetune.weights: each run needs a pretraining of its own; equal files are among" in capfd.readouterr().err

    with safe_open(made, "pt") as opened:
        save_file({name: opened.get_tensor(name) * 0.5 for name in opened.keys()}, files[1], opened.metadata())  # noqa: SIM118
    assert main(command) == 0
    tracker = tracker_of(load(path))
    assert not tracker.runs(kind="pretraining")
    models = sorted(folders_of(load(path)).study.glob("finetune-trials/*/model.safetensors"))
    assert [read_metadata(model).lineage["pretraining"] for model in models] == [file_digest(file) for file in files]
    page = (folders_of(load(path)).study / "report.md").read_text()
    assert f"- Pretrained cells: weights out of `{files[0]}`, `{files[1]}`." in page


def test_a_failing_worker_ends_in_one_message_and_code_1(
    ray_cluster: None,
    experiment: Experiment,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without restarts left, the message says on which rank and why, without a traceback; the run is marked failed."""
    path = experiment("failing")
    study = load(path)

    def broken(job: object) -> None:
        raise OSError(5, "Input/output error", "image.npy")

    monkeypatch.setattr(driver, "TorchTrainer", lambda work, **options: TorchTrainer(broken, **options))
    assert main(["pretrain", str(path), "--set", "pretrain.max_failures=0"]) == 1
    printed = capfd.readouterr()
    assert "pretraining failed on rank 0" in printed.err
    assert "image.npy" in printed.err
    assert "Traceback" not in printed.err
    assert [run.info.status for run in tracker_of(study).runs(kind="pretraining")] == ["FAILED"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flatten(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((40, 40), np.int16), np.eye(4)), path)


def poison(path: Path) -> None:
    image = nib.load(path)
    voxels = image.get_fdata().astype(np.float32)
    voxels[5, 5, 5] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), path)


def reshape_label(path: Path) -> None:
    image = nib.load(path)
    path.write_bytes(gzip.compress(nib.Nifti1Image(np.asarray(image.dataobj)[1:], image.affine).to_bytes()))


def test_bad_volumes_end_in_one_message_and_code_2(
    ray_cluster: None, experiment: Experiment, cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The message names every file with its rule, there is no traceback, and the good volumes stay in the store."""
    root = tmp_path / "copy"
    shutil.copytree(cohort, root, ignore=shutil.ignore_patterns("store"))
    images, labels = (sorted((root / folder).iterdir()) for folder in ("images", "labels"))
    damages = {"end-of-stream": truncate, "3D volume": flatten, "not finite": poison}
    victims = dict(zip(damages, images[1:], strict=False)) | {"shape": labels[-1]}
    for words, path in victims.items():
        damages.get(words, reshape_label)(path)
    path = experiment(root=root)
    assert main(["run", str(path)]) == 2
    printed = capfd.readouterr()
    assert "4 volumes cannot be used" in printed.err
    for words, victim in victims.items():
        assert any(victim.name in line and words in line for line in printed.err.splitlines()), (words, printed.err)
    assert "Traceback" not in printed.err + printed.out
    good = 13 - len(victims)
    assert len(list(Path(folders_of(load(path)).cache).glob("*/*/manifest.json"))) == good
    # Without the bad volumes the study goes on, and says so.
    assert main(["prepare", str(path), "--set", "on_bad_volume=skip"]) == 0
    out = capfd.readouterr().out
    assert "going on without 4 volumes" in out
    assert f"prepared 0 of {good} volumes now" in out
    recorded = json.loads((folders_of(load(path)).study / "bad_volumes.json").read_text())
    assert {one["id"] for one in recorded} == {victim.name.removesuffix(".nii.gz") for victim in victims.values()}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("pretrain.optimizer.lrr=1", "did you mean 'lr'?"),
        ("finetune.cohort.root=/nowhere", "cannot read the datalist"),
        ("finetune.patch_size=20", "multiple of 16"),
        ("pretrain.workers=64", "every worker a patch"),
        ("finetune.weights=/nowhere.safetensors", "nowhere.safetensors"),
    ],
)
def test_a_mistake_in_the_experiment_ends_in_code_2(
    experiment: Experiment, capfd: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    """Before anything starts: one message and exit code 2."""
    assert main(["run", str(experiment()), "--set", option]) == 2
    printed = capfd.readouterr()
    assert words in printed.err
    assert "Traceback" not in printed.err
