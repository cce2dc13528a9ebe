"""The whole study on a small synthetic cohort, as a user runs it."""

import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import yaml

from ssl_ray.cli import main
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of, tracker_of
from ssl_ray.tracking.tracker import PRETRAINING_RUN

pytestmark = pytest.mark.slow

PREPARATION = {"spacing": 9, "hu_window": [-175, 250]}


@pytest.fixture
def experiment(cohort, tmp_path):
    """Writes a small experiment; `experiment(a={"b": 1})` changes values in it."""

    def write(name="small", root=cohort, **changes):
        tree = {
            "name": name,
            "output": str(tmp_path / "output"),
            "network": {"hidden_size": 48, "mlp_dim": 64, "num_heads": 3, "feature_size": 4},
            "pretrain": {
                "sources": [{"root": str(root), "datalist": "unlabelled.json"}],
                "preparation": PREPARATION,
                "patch_size": 16,
                "batch_size": 4,
                "epochs": 10,
                "validate_every": 5,
                "log_every": 1,
                "corruption": {"inpaint_size": [2, 6], "outpaint_size": [4, 10], "shuffle_size": 3},
                "optimizer": {"lr": 1e-3},
                "precision": "float32",
            },
            "finetune": {
                "cohort": {
                    "root": str(root),
                    "classes": 14,
                    "splits": {2: "labelled_2.json", 4: "labelled_4.json"},
                },
                "preparation": PREPARATION,
                "patch_size": 16,
                "patches_per_volume": 2,
                "steps": 4,
                "validate_every": 2,
                "precision": "float32",
                "grid": {"lr": [1e-3]},
            },
        }
        for section, values in changes.items():
            tree[section] = {**tree[section], **values}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def losses(tracker, name="loss"):
    (run,) = tracker.runs(kind="pretraining")
    history = tracker.client.get_metric_history(run.info.run_id, name)
    assert len({point.step for point in history}) == len(history), "no step is logged twice"
    return {point.step: point.value for point in sorted(history, key=lambda point: point.step)}


def test_run_answers_and_a_second_run_does_nothing_again(ray_cluster, experiment, capfd):
    """`run` ends with the table; run again, it prepares nothing, trains nothing and writes the report anew."""
    path = experiment()
    assert main(["run", str(path)]) == 0
    first = capfd.readouterr().out
    assert "training volumes" in first
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
    assert len({frozenset(run.data.metrics) for run in trials}) == 1
    assert "selected/test/original_dice_foreground" in trials[0].data.metrics
    assert pretraining.data.metrics["validation_identity_loss"] > 0
    pictures = [item.path for item in tracker.client.list_artifacts(pretraining.info.run_id, "pictures")]
    assert pictures
    assert "weight_transfer.json" in [item.path for item in tracker.client.list_artifacts(grid.info.run_id)]
    report = folders_of(study).study / "report.html"
    ends = {run.info.run_id: run.info.end_time for run in (pretraining, *trials)}
    report.unlink()

    assert main(["run", str(path)]) == 0
    second = capfd.readouterr().out
    assert "prepared 0 of 13 volumes now" in second
    assert "pretraining was done already" in second
    assert "0 cells trained now, 4 were done already" in second
    assert report.is_file()
    after = {run.info.run_id: run.info.end_time for kind in ("pretraining", "trial") for run in tracker.runs(kind=kind)}
    assert after == ends


def test_two_workers_give_the_losses_of_one(ray_cluster, experiment):
    """With the same global batch, the losses of 20 steps do not depend on the number of workers."""
    found = []
    for workers in (1, 2):
        name = f"workers{workers}"
        path = experiment(
            name, pretrain=yaml.safe_load(experiment("base").read_text())["pretrain"] | {"workers": workers}
        )
        assert main(["pretrain", str(path), "--set", "pretrain.cpus_per_worker=0.5"]) == 0
        found.append(losses(tracker_of(load(path))))
    one, two = found
    assert list(one) == list(two) == list(range(1, 21))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)


def test_the_contrastive_view_trains(ray_cluster, experiment):
    """With two views a patch the run completes, and its loss differs from that of one view."""
    path = experiment("contrastive")
    options = ["--set", "pretrain.contrastive.enabled=true", "--set", "pretrain.epochs=4"]
    assert main(["pretrain", str(path), *options]) == 0
    other = experiment("single")
    assert main(["pretrain", str(other), "--set", "pretrain.epochs=4"]) == 0
    two, one = losses(tracker_of(load(path))), losses(tracker_of(load(other)))
    assert two[1] == pytest.approx(one[1], rel=1e-5), "the first view is the same"
    assert two[8] != one[8]


def test_a_failing_worker_ends_in_one_message_and_code_1(ray_cluster, experiment, capfd, monkeypatch):
    """Without restarts left, the message says on which rank and why, without a traceback; the run is marked failed."""
    path = experiment("failing")
    study = load(path)

    def broken(job):
        raise OSError(5, "Input/output error", "image.npy")

    monkeypatch.setattr("ssl_ray.pretrain.driver.work", broken)
    assert main(["pretrain", str(path), "--set", "pretrain.max_failures=0"]) == 1
    printed = capfd.readouterr()
    assert "pretraining failed on rank 0" in printed.err
    assert "image.npy" in printed.err
    assert "Traceback" not in printed.err
    assert [run.info.status for run in tracker_of(study).runs(kind="pretraining")] == ["FAILED"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flatten(path):
    nib.save(nib.Nifti1Image(np.zeros((40, 40), np.int16), np.eye(4)), path)


def poison(path):
    image = nib.load(path)
    voxels = image.get_fdata().astype(np.float32)
    voxels[5, 5, 5] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), path)


def reshape_label(path):
    image = nib.load(path)
    path.write_bytes(gzip.compress(nib.Nifti1Image(np.asarray(image.dataobj)[1:], image.affine).to_bytes()))


@pytest.mark.parametrize(
    ("damage", "folder", "words"),
    [
        (truncate, "images", "truncated"),
        (flatten, "images", "3D volume"),
        (poison, "images", "not finite"),
        (reshape_label, "labels", "shape"),
    ],
)
def test_a_bad_volume_ends_in_one_message_and_code_2(
    ray_cluster, experiment, cohort, tmp_path, capfd, damage, folder, words
):
    """The message names the file and the rule, there is no traceback, and the good volumes stay in the store."""
    root = tmp_path / "copy"
    shutil.copytree(cohort, root)
    victim = sorted((root / folder).iterdir())[1]
    damage(victim)
    path = experiment(root=root)
    assert main(["run", str(path)]) == 2
    printed = capfd.readouterr()
    assert victim.name in printed.err
    assert words in printed.err
    assert "Traceback" not in printed.err + printed.out
    assert len(list(folders_of(load(path)).cache.glob("*/*/manifest.json"))) == 12
    # Without the bad volume the study goes on, and says so.
    assert main(["prepare", str(path), "--set", "on_bad_volume=skip"]) == 0
    out = capfd.readouterr().out
    assert "going on without 1 volumes" in out
    assert "prepared 0 of 12 volumes now" in out
    assert list(json.loads((folders_of(load(path)).study / "bad_volumes.json").read_text())) == [
        victim.name.removesuffix(".nii.gz")
    ]


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
def test_a_mistake_in_the_experiment_ends_in_code_2(experiment, capfd, option, words):
    """Before anything starts: one message and exit code 2."""
    assert main(["run", str(experiment()), "--set", option]) == 2
    printed = capfd.readouterr()
    assert words in printed.err
    assert "Traceback" not in printed.err
