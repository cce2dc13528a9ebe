"""Networks as MLflow's logged models: there once, tied to what they scored, refused where their file is another one."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import LoggedModelStatus
from mlflow.models import Model
from outside import Proxy, Said, Server

from ssl_ray.storage.files import file_digest
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.models import told
from ssl_ray.tracking.run import NetworkFile, Run
from ssl_ray.tracking.tracker import Tracker

Track = Callable[..., Tracker]
VOLUMES = [(f"k{number}", f"p{number // 2}") for number in range(3)]
HELD_OUT = told("validation", "ct validation", "/data/ct", VOLUMES)


def made(folder: Path) -> NetworkFile:
    path = folder / "model.safetensors"
    path.write_bytes(b"weights" * 1000)
    return NetworkFile("n06", str(path), file_digest(path), 20, True, 2, (1.5, 1.5, 2.0))


def write(tracker: Tracker, network: NetworkFile) -> Run:
    """A trial with a network and its scores, as a training that goes on after a fault tells them once more."""
    for _ in range(2):
        run = tracker.open("trial", "key", "name", {})
        run.datasets([told("training", "ct training", "/data/ct", VOLUMES[:2]), HELD_OUT])
        run.model(network)
        scores = {"dice": 0.5, "selected/validation/dice": 0.5, "selected/step": 20.0}
        run.metrics(scores, 30, {"selected/validation": (HELD_OUT["name"], HELD_OUT["digest"])})
        run.close()
    return run


def assert_there_once(tracker: Tracker, run: Run) -> None:
    """The model with what it read and scored, however often it was sent."""
    client = tracker.client
    found = client.get_run(run.run_id)
    (model,) = client.search_logged_models([found.info.experiment_id])
    assert (model.name, model.model_type, model.status) == ("n06", "segmenter", LoggedModelStatus.READY)
    assert [(one.model_id, one.step) for one in found.outputs.model_outputs] == [(model.model_id, 20)]
    scores = {(one.key, one.value, one.dataset_name, one.dataset_digest) for one in model.metrics}
    tied = ("selected/validation/dice", 0.5, "ct validation", HELD_OUT["digest"])
    assert scores == {tied, ("dice", 0.5, None, None), ("selected/step", 20.0, None, None)}
    assert len(model.metrics) == 3
    assert [len(client.get_metric_history(run.run_id, key)) for key in found.data.metrics] == [1, 1, 1]
    inputs = {one.tags[0].value: one.dataset for one in found.inputs.dataset_inputs}
    assert inputs.keys() == {"training", "validation"}
    assert json.loads(inputs["validation"].profile) == {"volumes": 3, "subjects": 2}
    assert json.loads(inputs["validation"].source) == {"uri": "/data/ct"}


def test_a_network_is_there_once_and_registered_once(track: Track, tmp_path: Path, said: Said) -> None:
    """After a retry, a state file that was lost, and a second report."""
    tracker = track()
    run = write(tracker, made(tmp_path))
    assert tracker.settle() == 0
    assert_there_once(tracker, run)
    tracker.stop()
    (run.folder / "state.json").unlink()
    tracker = track()
    assert tracker.settle() == 0
    assert_there_once(tracker, run)
    for _ in range(2):
        tracker.register("ct-segmenter", "about", str(run.run_id), "the best")
    version = tracker.client.get_model_version_by_alias("ct-segmenter", "best")
    assert (version.version, version.description, version.run_id) == (1, "the best", run.run_id)
    assert len(tracker.client.search_model_versions("name = 'ct-segmenter'")) == 1
    assert not [*run.folder.glob("files/*/*")], "the journal holds no copy"
    assert said.count("refused") == 0


def test_what_mlflow_keeps_runs_no_pickle_and_needs_no_other_file(track: Track, tmp_path: Path) -> None:
    """Weights as they are, our package as code, a signature that says what comes in, and an example of it."""
    tracker = track()
    run = write(tracker, made(tmp_path))
    assert tracker.settle() == 0
    (model,) = tracker.client.search_logged_models([tracker.client.get_run(run.run_id).info.experiment_id])
    kept = Path(model.artifact_location.removeprefix("file://"))
    assert (kept / "data" / "model.safetensors").read_bytes() == b"weights" * 1000
    assert (kept / "code" / "ssl_ray" / "predict" / "pyfunc.py").is_file()
    assert not [path for path in kept.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".pyc")]
    told = Model.load(str(kept))
    assert (told.model_id, told.run_id) == (model.model_id, run.run_id)
    assert told.signature.inputs.inputs[0].shape == (2, -1, -1, -1)
    assert np.reshape(told.signature.params.params[0].default, (4, 4)).diagonal().tolist() == [1.5, 1.5, 2.0, 1.0]
    assert np.shape(told.load_input_example(str(kept))) == (2, 8, 8, 8)


@pytest.mark.parametrize("change", ["deleted", "overwritten"])
def test_a_file_that_is_no_longer_what_was_made_is_refused(
    track: Track, tmp_path: Path, said: Said, change: str
) -> None:
    """The run keeps its scores, and the reason is where refused records are."""
    tracker, network = track(), made(tmp_path)
    tracker.stop()
    path = Path(network.weights)
    run = write(tracker, network)
    path.unlink() if change == "deleted" else path.write_bytes(b"other")
    tracker = track()
    assert tracker.settle() == 0
    found = tracker.client.get_run(tracker.finished("trial", "key"))
    assert found.data.metrics["dice"] == 0.5
    assert not tracker.client.search_logged_models([found.info.experiment_id])
    assert "is gone, or another file than the run has made" in (run.folder / "refused.jsonl").read_text()


CUTS = [r"POST .*/logged-models$", r"PUT .*/artifacts/", r"(PATCH .*/logged-models/)|/outputs"]


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_an_answer_about_a_network_gets_lost(
    server: Server, track: Track, folders: Folders, tmp_path: Path, said: Said, cut: str
) -> None:
    """The server has done what it was asked and nobody heard of it: model, link and scores are there once."""
    proxy = Proxy(server.port)
    tracker = track(proxy.uri)
    proxy.cut, proxy.times = re.compile(cut.encode()), 2
    run = write(tracker, made(tmp_path))
    assert tracker.settle(60) == 0
    assert proxy.done > 0
    assert_there_once(tracker, run)
    assert said.count("refused") == 0
