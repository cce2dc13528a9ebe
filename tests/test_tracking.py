"""MLflow runs: found again by key, complete, in order."""

import pytest

from ssl_ray.config import Study
from ssl_ray.tracking import Tracker, study_params


@pytest.fixture
def study(tmp_path):
    preparation = {"spacing": 2, "window": [0, 1]}
    tree = {
        "name": "tracked",
        "output": str(tmp_path / "output"),
        "pretrain": {"sources": [{"root": "x", "datalist": "x.json"}], "preparation": preparation},
        "finetune": {"cohort": {"root": "x", "classes": 2, "splits": {1: "x.json"}}, "preparation": preparation},
    }
    return Study.model_validate(tree)


def test_everything_arrives_in_order(study, tmp_path):
    """Two thousand points of two metrics, tags, a file and a text are there when the run is closed."""
    tracker = Tracker(study)
    run = tracker.open("pretraining", "key", "name", study_params(study, "pretrain"))
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
    tracker = Tracker(study)
    first = tracker.open("trial", "key", "name", {"split": 6, "workers": 1})
    first.metrics({"loss": 1.0}, 7)
    first.close("FAILED")
    assert tracker.finished("trial", "key") is None
    again = Tracker(study).open("trial", "key", "name", {"split": 6, "workers": 2, "new": "x"})
    assert again.id == first.id
    assert again.last_step("loss") == 7
    assert again.last_step("never") == -1
    again.close()
    done = tracker.finished("trial", "key")
    assert done.info.run_id == first.id
    assert done.data.params == {"split": "6", "workers": "1", "new": "x"}


def test_what_mlflow_refuses_is_told_at_the_end(study):
    """A metric name that MLflow does not take makes `close` fail, after everything else was delivered."""
    tracker = Tracker(study)
    run = tracker.open("trial", "bad", "bad", {})
    run.metrics({"no$name": 1.0}, 1)
    run.text("words", "words.txt")
    with pytest.raises(RuntimeError, match="did not take everything"):
        run.close()
    assert tracker.read(run.id, "words.txt") == b"words"


def test_a_missing_experiment_is_named(study):
    """The report of a study that never ran is a clear error."""
    with pytest.raises(ValueError, match="no MLflow experiment named 'tracked'"):
        Tracker(study, create=False)
