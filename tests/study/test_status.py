"""`ssl-ray status`: right at every moment of a study, of a killed one too, and without touching anything."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from journals import begin, begin_cells, train
from studies import place_database, small_study, small_tree, write_study

from ssl_ray.cli.main import main
from ssl_ray.config.schema import Study
from ssl_ray.search.cells import FAILURE
from ssl_ray.storage.folders import Folders
from ssl_ray.study.experiment import KEPT, keep, load, load_kept
from ssl_ray.study.live import write_live
from ssl_ray.study.lock import only_one
from ssl_ray.study.parts import folders_of, tracker_of
from ssl_ray.study.status import render, status_of


@pytest.fixture
def study(tmp_path: Path) -> Study:
    cohort = {"splits": {2: "a.json", 4: "b.json"}}
    return small_study(tmp_path, pretrain={"batch_size": 4}, finetune={"cohort": cohort, "steps": 100})


def stage_of(study: Study) -> str:
    return str(status_of(study, folders_of(study))["stage"])


def test_a_study_from_its_beginning_to_its_end(study: Study) -> None:
    """Every stage as it comes, whether a process works on it or was killed there."""
    folders = folders_of(study)
    assert stage_of(study) == "not begun"
    with only_one(folders):
        assert stage_of(study) == "prepare"
        weights = begin(folders, "pretraining", "p", steps=200, run=0)
        train(weights, 50, rate=40)
        found = status_of(study, folders)
        assert found["stage"] == "pretrain"
        assert found["process"]
        assert found["heard_seconds"] < 60
        stage = found["stages"]["pretrain"]
        assert (stage["step"], stage["steps"], stage["steps_per_second"], stage["seconds_left"]) == (50, 200, 10, 15)
        assert "step 50 of 200, 10 steps/s, 0:00:15 left" in render(found)
    assert stage_of(study) == "interrupted"
    with only_one(folders):
        weights.close()
        assert stage_of(study) == "prepare"
        names = begin_cells(study, folders)
        assert stage_of(study) == "finetune"
        trials = [begin(folders, "trial", key, name) for name, key in names.items()]
        for trial in trials[:3]:
            train(trial, 100, rate=40)
            trial.close()
        train(trials[3], 20, rate=40)
        stage = status_of(study, folders)["stages"]["finetune"]
        assert {key: stage[key] for key in ("finished", "running", "total", "step", "steps")} == {
            "finished": 3, "running": 1, "total": 4, "step": 320, "steps": 400,
        }  # fmt: skip
        assert stage["seconds_left"] == pytest.approx(80 / (40 / 4))
        trials[3].close()
        begin(folders, "grid", "g").close()
        assert stage_of(study) == "report"
    assert stage_of(study) == "finished"


@pytest.mark.parametrize(
    ("search", "cells"),
    [({"algorithm": "grid", "samples": 9}, 4), ({"algorithm": "random", "samples": 9}, 9)],
)
def test_a_search_has_its_own_cells_and_they_their_own_steps(
    tmp_path: Path, search: dict[str, Any], cells: int
) -> None:
    """A grid every combination, whatever `samples` says; what is not drawn yet counts with the experiment's steps."""
    space = {"finetune.steps": {"choice": [100, 800]}, "finetune.optimizer.lr": {"choice": [1e-3, 1e-2]}}
    tuned = {"steps": 100, "grid": {"init": ["random"]}}
    study = small_study(tmp_path, finetune=tuned, search={"space": space, **search})
    folders = folders_of(study)
    with only_one(folders):
        begin(folders, "search", "s")
        for number, steps in enumerate((100, 800, 800)):
            trial = begin(folders, "trial", f"{number}cell", **{"finetune.steps": steps})
            train(trial, 80, rate=40)
            if number < 2:
                trial.close()
        facts = status_of(study, folders)
        found = facts["stages"]["finetune"]
        whole = 100 + 800 + 800 + (cells - 3) * 100
        assert (found["total"], found["steps"], found["step"]) == (cells, whole, 100 + 800 + 80)
        rate = 40 / (study.finetune.volumes_per_step * study.finetune.patches_per_volume)
        assert found["seconds_left"] == pytest.approx((whole - 980) / rate)
        assert f"2 of {cells} finished" in render(facts)
        assert "<td>80 of 800</td>" in re.sub(r"<td[^>]*>", "<td>", write_live(study, folders).read_text())


def test_it_is_about_the_study_as_it_is_carried_out(tmp_path: Path) -> None:
    """Whatever `--set` has replaced for that, the file alone is enough; and what it says of places still counts."""
    path = write_study(tmp_path / "s.yaml", small_tree(tmp_path))
    assert load_kept(path) == load(path)  # not begun yet
    carried_out = load(path, ["finetune.steps=7", "finetune.validate_every=7"])
    keep(carried_out, folders_of(carried_out))
    assert load_kept(path) == carried_out
    assert load_kept(path, ["finetune.runs=9"]).finetune.runs == 9
    kept = folders_of(carried_out).study / KEPT
    kept.write_text("of: another version")
    assert load_kept(path) == load(path)


def test_what_was_open_when_a_process_was_killed_is_not_running(study: Study) -> None:
    """Neither while nobody works on it nor while the next process still prepares."""
    folders = folders_of(study)
    train(begin(folders, "pretraining", "p", steps=200, run=0), 50, rate=40)
    checkpoint = folders.study / "pretrain-p" / "checkpoints" / "00000040" / "manifest.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    found = status_of(study, folders)
    assert (found["stage"], found["process"]) == ("interrupted", None)
    assert found["stages"]["pretrain"]["steps_per_second"] is None
    assert "goes on from step 40" in render(found)
    time.sleep(2.1)  # clocks of two machines may differ by less
    with only_one(folders):
        assert stage_of(study) == "prepare"
        assert status_of(study, folders)["stages"]["pretrain"]["state"] == "interrupted"
        begin(folders, "pretraining", "p")
        assert stage_of(study) == "pretrain"


def test_steps_that_are_done_again_are_followed(study: Study) -> None:
    """After a restart from an older checkpoint, or of a pretraining whose weights are gone and needed once more."""
    folders = folders_of(study)
    with only_one(folders):
        weights = begin(folders, "pretraining", "p", steps=200, run=0)
        for step, shown in ((20, 20), (50, 50), (20, 20), (50, 50), (60, 60)):
            train(weights, step, rate=40)
            assert status_of(study, folders)["stages"]["pretrain"]["step"] == shown


def test_failed_cells_are_named_with_the_cause(study: Study) -> None:
    """A study with one is not finished; cells of a grid that was larger do not count."""
    folders = folders_of(study)
    begin(folders, "pretraining", "p", steps=1, run=0).close()
    names = begin_cells(study, folders)
    for name, key in names.items():
        trial = begin(folders, "trial", key, "a name for people")
        if name == next(iter(names)):
            trial.tags({FAILURE: "no space left on device"})
            trial.close("FAILED")
        else:
            trial.close()
    begin(folders, "trial", "formerly", "n99").close("FAILED")
    begin(folders, "grid", "g").close()
    found = status_of(study, folders)
    assert found["stage"] == "failed"
    assert found["stages"]["finetune"]["failures"] == {next(iter(names)): "no space left on device"}
    assert found["stages"]["finetune"]["finished"] == 3
    assert f"FAILED {next(iter(names))}: no space left on device" in render(found)


def test_without_the_journals_mlflow_is_asked(study: Study, tmp_path: Path) -> None:
    """They lie on the machine that the study runs on, which need not be this one."""
    place_database(tmp_path / "mlflow.db")
    folders, tracker = folders_of(study), tracker_of(study)
    run = tracker.open("pretraining", "p", "pretrain", {"steps": 200, "run": 0})
    train(run, 50, rate=40)
    tracker.settle()
    tracker.stop()
    (folders.study / "journal").rename(tmp_path / "elsewhere")
    found = status_of(study, folders)
    assert found["stage"] == "pretrain", "it was heard of just now"
    assert found["stages"]["pretrain"]["step"] == 50
    assert "another machine" in found["process"]


def test_the_command_takes_a_second_and_writes_nothing(tmp_path: Path) -> None:
    """No torch, Ray or MLflow is loaded; `--json` is one object; the folder stays as it was."""
    path = write_study(tmp_path / "small.yaml", small_tree(tmp_path))
    begin(Folders.of("small", str(tmp_path / "output")), "pretraining", "p", steps=5)
    before = sorted(tmp_path.rglob("*"))
    code = (
        f"import sys\nfrom ssl_ray.cli.main import main\ncode = main(['status', {str(path)!r}, '--json'])\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules), 'imported'\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stage"] == "interrupted"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("command", "told"), [(["status"], "not begun"), (["clean", "--yes"], "can go: 0 bytes")])
def test_a_study_that_was_not_begun_has_no_folder_afterwards(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    told: str,
) -> None:
    """Asking is not beginning."""
    monkeypatch.chdir(tmp_path)
    path = write_study(tmp_path / "small.yaml", small_tree())
    assert main([*command, str(path)]) == 0
    assert told in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]
