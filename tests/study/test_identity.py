"""A name stands for one configuration: a changed one is refused with the difference, `--fresh` keeps the old."""

import pytest
from runs import write

from ssl_ray.cli import main
from ssl_ray.config.loading import load
from ssl_ray.study import identity as reuse
from ssl_ray.study.parts import folders_of, tracker_of


@pytest.fixture
def begun(cohort, tmp_path):
    """The path of an experiment whose pretraining and grid were begun."""
    path = write(tmp_path, cohort)
    study = load(path, [])
    reuse.record(study, folders_of(study), "pretrain")
    reuse.record(study, folders_of(study), "finetune")
    return path


@pytest.mark.parametrize(
    ("setting", "difference"),
    [
        ("pretrain.optimizer.lr=3e-4", "pretrain.optimizer.lr: 0.0001 -> 0.0003"),
        ("pretrain.epochs=121", "pretrain.epochs: 120 -> 121"),
        ("seed=1", "seed: 0 -> 1"),
        ("network.hidden_size=96", "network.hidden_size: 48 -> 96"),
        ("finetune.steps=7", "finetune.steps: 30000 -> 7"),
        ("finetune.augmentation.shift=0.3", "finetune.augmentation.shift: 0.1 -> 0.3"),
    ],
)
def test_a_changed_configuration_is_refused(begun, capsys, setting, difference):
    """Exit code 2 before anything starts, and every difference in one message."""
    assert main(["run", str(begun), "--set", setting]) == 2
    text = capsys.readouterr().err
    assert difference in text
    assert "--fresh" in text


@pytest.mark.parametrize(
    "setting",
    [
        "pretrain.workers=[1, 2]",
        "pretrain.checkpoint_minutes=1",
        "pretrain.max_failures=9",
        "finetune.grid.lr=[1e-3, 1e-4]",
        "finetune.max_concurrent_trials=1",
        "cluster.cpus=1",
        "on_bad_volume=skip",
    ],
)
def test_how_a_run_is_carried_out_may_change(begun, setting):
    """More workers, other checkpoints, a wider grid: what is done stays right."""
    reuse.check_unchanged(load(begun, [setting]), folders_of(load(begun, [setting])))


def test_precision_auto_binds_the_device(cohort, tmp_path):
    """With `precision: auto`, a GPU may compute in another type than the CPU, so `gpu` may not change."""
    path = write(tmp_path, cohort, precision="auto")
    reuse.record(load(path, []), folders_of(load(path, [])), "pretrain")
    with pytest.raises(ValueError, match=r"pretrain.gpu: False -> True"):
        reuse.check_unchanged(load(path, ["pretrain.gpu=true"]), folders_of(load(path, ["pretrain.gpu=true"])))


def test_only_what_was_begun_is_compared(cohort, tmp_path):
    """After `ssl-ray pretrain`, the fine-tuning may still be changed."""
    path = write(tmp_path, cohort)
    reuse.record(load(path, []), folders_of(load(path, [])), "pretrain")
    reuse.check_unchanged(load(path, ["finetune.steps=7"]), folders_of(load(path, ["finetune.steps=7"])))


def test_fresh_keeps_the_old(begun):
    """Folder and MLflow experiment get another name, with everything in them; a second time there is nothing."""
    study = load(begun, [])
    tracker = tracker_of(study)
    run = tracker.open("pretraining", "key", "pretrain", {})
    run.metrics({"loss": 1.0}, 1)
    run.close()
    tracker.settle()
    kept = reuse.set_aside(study, folders_of(study))
    assert kept
    assert kept.startswith("faults-until-")
    assert (folders_of(study).study.parent / kept / "pretrain.yaml").is_file()
    assert not folders_of(study).study.exists()
    old = tracker_of(study.model_copy(update={"name": kept}), create=False)
    assert [found.info.run_name for found in old.runs(kind="pretraining")] == ["pretrain"]
    assert tracker_of(study).runs(kind="pretraining") == []


def test_fresh_does_not_rename_what_others_share(begun):
    """An MLflow experiment that the study does not have for itself is left alone."""
    with pytest.raises(ValueError, match="may hold other studies"):
        reuse.set_aside(
            load(begun, ["tracking.experiment=ours"]), folders_of(load(begun, ["tracking.experiment=ours"]))
        )
