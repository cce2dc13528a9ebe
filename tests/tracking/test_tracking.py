"""MLflow runs: found again by key, complete, in order."""

import shutil
import time

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient

from ssl_ray.config.schema import Study
from ssl_ray.study.parts import folders_of, run_params, tracker_of
from ssl_ray.tracking.tracker import PRETRAINING_RUN, rename_experiment


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty database of MLflow's, which takes seconds to make."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def study(tmp_path, database):
    (tmp_path / "output").mkdir()
    shutil.copyfile(database, tmp_path / "output" / "mlflow.db")
    preparation = {"spacing": 2, "hu_window": [0, 1]}
    tree = {
        "name": "tracked",
        "output": str(tmp_path / "output"),
        "pretrain": {"sources": [{"root": "x", "datalist": "x.json"}], "preparation": preparation},
        "finetune": {"cohort": {"root": "x", "classes": 2, "splits": {1: "x.json"}}, "preparation": preparation},
    }
    return Study.model_validate(tree)


def test_everything_arrives_in_order(study, tmp_path):
    """Two thousand points of two metrics, tags, a file and a text are there when the run is closed."""
    tracker = tracker_of(study)
    run = tracker.open("pretraining", "key", "name", run_params(study, "pretrain"))
    for step in range(2000):
        run.metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
    run.tags({"colour": "blue"})
    (tmp_path / "file.txt").write_text("content")
    run.artifact(tmp_path / "file.txt", "folder")
    run.text("words", "words.txt")
    run.close()
    found = tracker.client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["colour"] == "blue"
    assert found.data.params["pretrain.patch_size"] == "[96, 96, 96]"
    history = tracker.client.get_metric_history(run.id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / (step + 1)) for step in range(2000)]
    assert tracker.read(run.id, "folder/file.txt") == b"content"
    assert tracker.read(run.id, "words.txt") == b"words"


def test_a_run_is_found_again_by_its_key(study):
    """Opened again, it is the same run, with its last step known and its parameters as they were."""
    tracker = tracker_of(study)
    first = tracker.open("trial", "key", "name", {"split": 6, "workers": 1})
    first.metrics({"loss": 1.0}, 7)
    first.close("FAILED")
    assert tracker.finished("trial", "key") is None
    again = tracker_of(study).open("trial", "key", "name", {"split": 6, "workers": 2, "new": "x"})
    assert again.id == first.id
    assert max(again.logged("loss")) == 7
    assert again.logged("never") == set()
    again.close()
    done = tracker.finished("trial", "key")
    assert done == first.id
    assert tracker.client.get_run(done).data.params == {"split": "6", "workers": "1", "new": "x"}


def test_what_mlflow_refuses_is_told_and_the_rest_goes_on(study, monkeypatch, tmp_path):
    """Of a batch with a name and of tags with a value that MLflow does not take, all the others arrive."""
    said = []
    monkeypatch.setattr("ssl_ray.tracking.delivery.say", said.append)
    monkeypatch.setattr("ssl_ray.tracking.tracker.say", said.append)
    tracker = tracker_of(study)
    run = tracker.open("trial", "bad", "bad", {"long": "x" * 9000})
    for step in range(50):
        run.metrics({"good": step, "no$name" if step == 20 else "fine": 1.0}, step)
    run.tags({"colour": "blue", "long": "x" * 9000})
    run.artifact(tmp_path / "never_written.txt")
    run.text("words", "words.txt")
    run.close()
    assert tracker.settle() == 0
    assert list(tracker.history(run.id, "good")) == list(range(50))
    assert list(tracker.history(run.id, "fine")) == [step for step in range(50) if step != 20]
    found = tracker.client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["colour"] == "blue"
    assert len(found.data.params["long"]) == 6000
    assert tracker.read(run.id, "words.txt") == b"words"
    assert sum("MLflow refused something of run trial-bad" in line for line in said) == 2, "when it happens, at the end"


def test_what_was_refused_is_tried_again_by_the_next_process(study, monkeypatch):
    """Once the server takes it, it arrives, and the journal of the run is dropped."""
    tracker = tracker_of(study)
    refuse = {"log_batch": tracker.client.log_batch}

    def picky(run_id, metrics=(), **rest):
        if any(metric.step == 3 for metric in metrics):
            raise MlflowException("step 3 is unlucky", INVALID_PARAMETER_VALUE)
        refuse["log_batch"](run_id, metrics, **rest)

    monkeypatch.setattr(tracker.client, "log_batch", picky)
    run = tracker.open("trial", "key", "name", {})
    for step in range(6):
        run.metrics({"loss": step}, step)
    run.close()
    assert tracker.settle() == 0
    assert list(tracker.history(run.id, "loss")) == [0, 1, 2, 4, 5]
    tracker.stop()
    again = tracker_of(study)
    again.settle()
    deadline = time.monotonic() + 20
    while len(again.history(run.id, "loss")) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(again.history(run.id, "loss")) == [0, 1, 2, 3, 4, 5]
    (records,) = folders_of(study).study.glob("journal/*/trial-key/records.jsonl")
    assert records.stat().st_size == 0


def test_a_step_is_logged_once(study):
    """Replayed steps are dropped, within a process and in the next one; new metrics of an old step are not."""
    tracker = tracker_of(study)
    run = tracker.open("trial", "key", "name", {})
    for step in (1, 2, 3, 2, 3, 4):
        run.metrics({"loss": step}, step)
    run.close("FAILED")
    tracker.settle()
    tracker.stop()
    again = tracker_of(study).open("trial", "key", "name", {})
    assert again.logged("loss") == {1, 2, 3, 4}
    for step in (3, 4, 5):
        again.metrics({"loss": -step, "dice": step}, step)
    again.close()
    reader = tracker_of(study)
    points = reader.client.get_metric_history(again.id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, -5)]
    assert list(reader.history(again.id, "dice")) == [3, 4, 5]


def test_a_finished_run_taken_up_without_its_journal_has_no_step_twice(study):
    """What the journal has dropped is asked of MLflow before anything is sent."""
    tracker = tracker_of(study)
    run = tracker.open("grid", "key", "name", {})
    run.metrics({"share": 1.0}, 0)
    run.close()
    tracker.settle()
    again = tracker.open("grid", "key", "name", {})
    again.metrics({"share": 1.0}, 0)
    again.metrics({"share": 2.0}, 1)
    again.close()
    assert [point.step for point in tracker.client.get_metric_history(again.id, "share")] == [0, 1]
    assert again.id == run.id
    shutil.rmtree(folders_of(study).study / "journal")
    tracker.stop()
    elsewhere = tracker_of(study).open("grid", "key", "name", {})
    assert elsewhere.logged("share") == {0, 1}
    elsewhere.close()


def test_references_become_ids(study):
    """A parent and a tag that name runs which MLflow has not made yet end up as MLflow's ids of them."""
    tracker = tracker_of(study)
    tracker._delivery.stop()
    grid, pretraining = tracker.open("grid", "g", "g", {}), tracker.open("pretraining", "p", "p", {})
    trial = tracker.open("trial", "t", "t", {}, grid.id, {PRETRAINING_RUN: pretraining.id})
    assert "/" not in grid.id
    for run in (trial, pretraining, grid):
        run.close()
    assert tracker.finished("trial", "t") == trial.id
    tracker.stop()
    again = tracker_of(study)
    (found,) = again.runs(kind="trial", key="t")
    assert found.data.tags["mlflow.parentRunId"] == again.finished("grid", "g")
    assert found.data.tags[PRETRAINING_RUN] == again.finished("pretraining", "p")
    assert found.info.status == "FINISHED"


def test_a_run_deleted_in_mlflow_is_made_again(study):
    """With everything that its journal has, when it is taken up."""
    tracker = tracker_of(study)
    run = tracker.open("trial", "key", "name", {"a": 1})
    run.metrics({"loss": 1.0}, 1)
    run.text("words", "words.txt")
    run.close("FAILED")
    tracker.settle()
    old = run.id
    tracker.client.delete_run(old)
    again = tracker.open("trial", "key", "name", {"a": 1})
    again.metrics({"loss": 2.0}, 2)
    again.close()
    (found,) = tracker.runs(kind="trial", key="key")
    assert found.info.run_id == again.id != old
    assert found.info.status == "FINISHED"
    assert tracker.history(again.id, "loss") == {1: 1.0, 2: 2.0}
    assert tracker.read(again.id, "words.txt") == b"words"


def test_an_artifact_is_logged_as_it_was(study, tmp_path):
    """A file that changes or vanishes before it is delivered arrives as it was when it was logged."""
    tracker = tracker_of(study)
    tracker._delivery.stop()
    run = tracker.open("trial", "key", "name", {})
    for content in ("first", "second"):
        (tmp_path / "file.txt").write_text(content)
        run.artifact(tmp_path / "file.txt", content)
    (tmp_path / "file.txt").unlink()
    run.close()
    tracker.stop()
    again = tracker_of(study)
    assert [again.read(run.id, f"{folder}/file.txt") for folder in ("first", "second")] == [b"first", b"second"]


def test_an_experiment_gets_another_name(study):
    """What was still to be delivered is there under the new name, and the old name is free."""
    assert not rename_experiment(study.tracking, folders_of(study), "before")
    tracker = tracker_of(study)
    tracker._delivery.stop()
    run = tracker.open("trial", "key", "name", {})
    run.close()
    tracker.stop()
    assert rename_experiment(study.tracking, folders_of(study), "before")
    assert not rename_experiment(study.tracking, folders_of(study), "again")
    assert tracker_of(study).finished("trial", "key") is None


def test_a_missing_experiment_is_named(study):
    """The report of a study that never ran is a clear error."""
    with pytest.raises(ValueError, match="no MLflow experiment named 'tracked'"):
        tracker_of(study, create=False)


def test_a_deleted_experiment_is_named(study):
    """Before a training begins of which MLflow would take nothing."""
    tracker = tracker_of(study)
    tracker.client.delete_experiment(tracker.client.get_experiment_by_name(tracker.experiment).experiment_id)
    tracker.stop()
    with pytest.raises(ValueError, match="experiment 'tracked' is deleted"):
        tracker_of(study)
