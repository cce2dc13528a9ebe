"""A name stands for one configuration: a changed one is refused with the difference, `--fresh` keeps the old."""

from pathlib import Path

import pytest
from runs import write

from ssl_ray.cli.main import main
from ssl_ray.config import depends
from ssl_ray.errors import UserError
from ssl_ray.study import identity
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of, tracker_of


def begin(path: Path, stage: depends.Stage, **content: str) -> None:
    study = load(path)
    identity.record(study, folders_of(study), stage, content)


def check(path: Path, *settings: str) -> None:
    study = load(path, settings)
    identity.check_unchanged(study, folders_of(study))


@pytest.fixture
def begun(cohort: Path, tmp_path: Path) -> Path:
    """The path of an experiment whose pretraining and grid were begun."""
    path = write(tmp_path, cohort)
    begin(path, "pretrain")
    begin(path, "finetune")
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
def test_a_changed_configuration_is_refused(
    begun: Path, capsys: pytest.CaptureFixture[str], setting: str, difference: str
) -> None:
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
        "finetune.optimizer.lr=3e-3",
        "finetune.runs=3",
        "finetune.margin=0.01",
        "finetune.sliding_window_batch=1",
        "pretrain.microbatch=2",
        "pretrain.gpu=true",
        "finetune.gpus_per_trial=1",
        "finetune.cohort.root=/moved",
        "pretrain.sources.0.root=/moved",
        "finetune.max_concurrent_trials=1",
        "cluster.cpus=1",
        "on_bad_volume=skip",
    ],
)
def test_how_a_run_is_carried_out_may_change(begun: Path, setting: str) -> None:
    """More workers, other checkpoints, a wider grid: what is done stays right."""
    check(begun, setting)


def test_the_device_does_not_bind_precision_auto(cohort: Path, tmp_path: Path) -> None:
    """What it comes to is kept by the training itself, so the study may go on elsewhere."""
    path = write(tmp_path, cohort, precision="auto")
    begin(path, "pretrain")
    check(path, "pretrain.gpu=true")
    with pytest.raises(UserError, match=r"pretrain.precision: auto -> float32"):
        check(path, "pretrain.precision=float32")


def test_workers_bind_where_the_loss_is_between_their_own_patches(cohort: Path, tmp_path: Path) -> None:
    """With the contrastive loss, another number of workers is another result, and is said to be."""
    path = write(tmp_path, cohort, task={"contrastive": {"enabled": True}})
    begin(path, "pretrain")
    check(path, "pretrain.workers=1")
    with pytest.raises(UserError, match=r"pretrain.workers: 1 -> 2"):
        check(path, "pretrain.workers=2")


def test_a_setting_that_nothing_reads_does_not_bind(begun: Path) -> None:
    """The temperature of a loss that is off."""
    check(begun, "pretrain.task.contrastive.temperature=0.1")


def test_another_version_of_the_code_is_said(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage whose code gives other weights now does not silently start again."""
    monkeypatch.setitem(depends.VERSION, "pretrain", 99)
    with pytest.raises(UserError, match=r"pretrain.version: \d+ -> 99"):
        check(begun)


def test_other_volumes_are_said(begun: Path) -> None:
    """Files that were exchanged under their names change keys, and are refused; parts may be added."""
    begin(begun, "finetune", held_out="6 (a)", size_6="6 (b)")
    begin(begun, "finetune", held_out="6 (a)", size_12="12 (c)")
    with pytest.raises(UserError, match=r"size_6: 6 \(b\) -> 6 \(d\)"):
        begin(begun, "finetune", size_6="6 (d)")
    begin(begun, "finetune", size_12="12 (c)", size_6="6 (b)")


def test_a_folder_of_an_older_version_is_refused(begun: Path) -> None:
    """Its keys were made otherwise: all would silently be trained again beside it."""
    study = load(begun)
    (folders_of(study).study / "pretrain.yaml").write_text("pretrain.epochs: '120'\nseed: '0'\n")
    with pytest.raises(UserError, match=r"pretrain.yaml: begun by an older version of ssl_ray.*--fresh"):
        check(begun)


def test_only_what_was_begun_is_compared(cohort: Path, tmp_path: Path) -> None:
    """After `ssl-ray pretrain`, the fine-tuning may still be changed."""
    path = write(tmp_path, cohort)
    begin(path, "pretrain")
    check(path, "finetune.steps=7")


def test_fresh_keeps_the_old(begun: Path) -> None:
    """Folder and MLflow experiment get another name, with everything in them; a second time there is nothing."""
    study = load(begun)
    tracker = tracker_of(study)
    run = tracker.open("pretraining", "key", "pretrain", {})
    run.metrics({"loss": 1.0}, 1)
    run.close()
    tracker.settle()
    kept = identity.set_aside(study, folders_of(study))
    assert kept
    assert kept.startswith("faults-until-")
    assert (folders_of(study).study.parent / kept / "pretrain.yaml").is_file()
    assert not folders_of(study).study.exists()
    old = tracker_of(study.model_copy(update={"name": kept}), create=False)
    assert [found.info.run_name for found in old.runs(kind="pretraining")] == ["pretrain"]
    assert tracker_of(study).runs(kind="pretraining") == []


def test_fresh_does_not_rename_what_others_share(begun: Path) -> None:
    """An MLflow experiment that the study does not have for itself is left alone."""
    study = load(begun, ["tracking.experiment=ours"])
    with pytest.raises(UserError, match="may hold other studies"):
        identity.set_aside(study, folders_of(study))


def test_fresh_sets_nothing_aside_before_the_new_study_is_looked_at(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake in it, or weights that would move away, cost the old study nothing."""
    folder = folders_of(load(begun)).study
    (folder / "pretrain-a").mkdir()
    weights = folder / "pretrain-a" / "best.safetensors"
    weights.touch()
    for setting, told in (
        ("pretrain.sources.0.datalist=nope.json", "nope.json"),
        ("finetune.weights=nowhere.safetensors", "nowhere.safetensors"),
        (f"finetune.weights={weights}", "--fresh would move these weights away"),
        (f"pretrain.weights={weights}", "--fresh would move these weights away"),
    ):
        assert main(["run", str(begun), "--fresh", "--set", setting]) == 2
        told_of = " ".join(capsys.readouterr().err.split())
        assert told in told_of
        assert (folder / "pretrain.yaml").is_file()
        assert [one.name for one in folder.parent.glob("faults*")] == ["faults"]
