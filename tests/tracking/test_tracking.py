"""MLflow runs: found again by key, complete, in order."""

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from outside import Said

from ssl_ray.config.schema import Tracking
from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.client import source
from ssl_ray.tracking.tracker import PRETRAINING_RUN, MissingExperiment, Tracker, rename_experiment
from ssl_ray.tracking.uri import tracking_uri

Track = Callable[..., Tracker]


def test_everything_arrives_in_order(track: Track, tmp_path: Path) -> None:
    """Two thousand points of two metrics, 150 parameters, tags, a file and a text are there when the run is closed."""
    tracker = track()
    run = tracker.open("pretraining", "key", "name", {f"param{number}": [number, "x"] for number in range(150)})
    for step in range(2000):
        run.metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
    run.tags({"colour": "blue"})
    (tmp_path / "file.txt").write_text("content")
    run.artifact(tmp_path / "file.txt", "folder")
    run.text("words", "words.txt")
    run.close()
    assert tracker.settle() == 0
    found = tracker.client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["colour"] == "blue"
    assert found.data.params == {f"param{number}": f"[{number}, 'x']" for number in range(150)}
    history = tracker.client.get_metric_history(run.id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / (step + 1)) for step in range(2000)]
    assert tracker.files(run.id, "folder") == ["folder/file.txt"]
    assert tracker.read(run.id, "folder/file.txt") == b"content"
    assert tracker.read(run.id, "words.txt") == b"words"


@pytest.mark.parametrize("name", ["a#d é&x=1;y", "a b"])
def test_everything_lands_inside_whatever_the_folder_is_called(name: str, database: Path, tmp_path: Path) -> None:
    """Database and artifacts lie in the output folder, and nothing beside it."""
    output = tmp_path / "home" / name
    output.mkdir(parents=True)
    shutil.copyfile(database, output / "mlflow.db")
    tracker = Tracker(Tracking(experiment="/Shared/../ct"), Folders.of("study", str(output)))
    run = tracker.open("pretraining", "key", "name", {})
    for step in (10**7 - 1, 10**7):
        run.text("words", f"step_{step:07d}.txt")
    run.close()
    assert tracker.settle() == 0
    assert tracker.files(run.id) == ["step_9999999.txt", "step_10000000.txt"], "in the order of steps"
    assert tracker.read(run.id, "step_10000000.txt") == b"words"
    tracker.stop()
    again = Tracker(Tracking(experiment="/Shared/../ct"), Folders.of("study", str(output)), create=False)
    assert again.finished("pretraining", "key") == run.id
    assert [path.name for path in (tmp_path / "home").iterdir()] == [name]
    assert {path.name for path in output.iterdir()} == {"mlflow.db", "artifacts", "study"}
    assert len(list(output.glob("artifacts/*/*/artifacts/*.txt"))) == 2


def test_a_database_that_cannot_be_opened_is_told_at_once(tmp_path: Path, folders: Folders) -> None:
    """By itself MLflow would try for 100 seconds, and once more."""
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"tracking\.uri: MLflow at sqlite:.* not answer .*unable to open database"):
        Tracker(Tracking(uri=f"sqlite:///{tmp_path}"), folders)
    assert time.monotonic() - begin < 10


@pytest.mark.slow
def test_a_database_is_whole_whoever_dies_while_making_it(folders: Folders) -> None:
    """A study that begins in an empty output is killed, two more begin at once: they and later ones have their runs."""
    output = folders.output.folder
    program = (
        "import sys; from ssl_ray.config.schema import Tracking; from ssl_ray.storage.folders import Folders\n"
        "from ssl_ray.tracking.tracker import Tracker\n"
        "sys.stdin.read(); Tracker(Tracking(), Folders.of(sys.argv[1], sys.argv[2])).stop()"
    )
    commands = [[sys.executable, "-c", program, name, str(output)] for name in ("killed", "b", "c")]
    killed, *others = [subprocess.Popen(command, stdin=subprocess.PIPE) for command in commands]
    killed.stdin.close()  # type: ignore[union-attr]
    runs.wait_for(lambda: [*output.glob("*mlflow.db*")], "a database", seconds=120)
    killed.kill()
    for other in others:
        other.stdin.close()  # type: ignore[union-attr]
    assert [other.wait(120) for other in others] == [0, 0]
    assert killed.wait(120) in (-signal.SIGKILL, 0), "it may have been faster"
    tracker = Tracker(Tracking(), folders)
    assert {"b", "c", folders.name} <= {one.name for one in tracker.client.search_experiments()}
    tracker.stop()


@pytest.mark.parametrize("name", ["a?b", "%41", "50%"])
def test_a_folder_that_no_uri_can_name_is_refused(name: str, tmp_path: Path) -> None:
    """MLflow's database would lie beside it."""
    with pytest.raises(UserError, match=rf"output: MLflow's database cannot lie at .*{re.escape(name)}.*tracking\.uri"):
        tracking_uri(Tracking(), Folders.of("x", str(tmp_path / name)))


def test_the_servers_variable_counts_where_the_study_names_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: Said, database: Path
) -> None:
    """MLFLOW_TRACKING_URI is taken, said and blamed; `tracking.uri` goes before it."""
    folders, remote = Folders.of("x", str(tmp_path / "output")), Folders.of("x", "s3://bucket/x", None, str(tmp_path))
    own = f"sqlite:///{shutil.copyfile(database, tmp_path / 'own.db')}"
    with pytest.raises(UserError, match=r"output: .*tracking\.uri must name a server"):
        tracking_uri(Tracking(), remote)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
    assert tracking_uri(Tracking(), remote) == tracking_uri(Tracking(uri=""), folders) == own
    Tracker(Tracking(), folders).stop()
    assert said.count(f"MLflow: {own} (out of MLFLOW_TRACKING_URI, as tracking.uri is not set)") == 1
    Tracker(Tracking(uri=own), folders).stop()
    assert said.count("MLFLOW_TRACKING_URI") == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter@127.0.0.1:9")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 \(out of MLFLOW_TRACKING_URI.* not answer"):
        Tracker(Tracking(), Folders.of("y", str(tmp_path / "output")))


def test_a_study_stays_where_it_was_begun_and_another_one_in_its_output_does_not(
    monkeypatch: pytest.MonkeyPatch, track: Track, folders: Folders, said: Said, database: Path
) -> None:
    """SQLite that other studies use does not overrule MLFLOW_TRACKING_URI; the study's own does, and that is said."""
    own, other = track().uri, Folders.of("other", str(folders.output.folder))
    server = f"sqlite:///{shutil.copyfile(database, folders.output.folder.parent / 'server.db')}"
    assert tracking_uri(Tracking(), other) == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert tracking_uri(Tracking(), other) == server
    assert tracking_uri(Tracking(experiment=folders.name), other) == own
    assert track().uri == own
    assert said.count(f"MLflow: {own} (where the study was begun, so MLFLOW_TRACKING_URI is not read)") == 1
    assert not said.count("not where the study was begun")
    for _ in range(2):
        Tracker(Tracking(uri=server), folders).stop()
    assert said.count("not where the study was begun; what was finished there is not known here") == 1
    (folders.output.folder / "mlflow.db").write_bytes(b"cannot be read")
    assert tracking_uri(Tracking(), folders) == own, "it may have been begun there"


@pytest.mark.parametrize("uri", [None, "sqlite:///{}/of/mine.db"])
def test_who_only_reads_makes_no_database(
    uri: str | None, tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report on a study that was never begun says so, and its output is as it was: MLFLOW_TRACKING_URI counts yet."""
    settings = Tracking(uri=uri and uri.format(tmp_path))
    with pytest.raises(MissingExperiment, match=r"MLflow experiment .* does not exist; run the study first"):
        Tracker(settings, folders, create=False)
    assert not [*tmp_path.iterdir()]
    assert not rename_experiment(settings, folders, "old")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert tracking_uri(Tracking(), folders) == "http://host"


@pytest.mark.parametrize("password", ["hunter", "'hunter", "hun'ter", "$(hunter)", r"hunter\\"])
def test_the_command_that_mlflow_shows_has_no_password(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shell wants quoted, the words are those that were typed, without it."""
    typed = [f"cache=s3://me:{password}@bucket/x y", f"tracking.uri=postgresql://me:{password}@host/db", "name=it's"]
    monkeypatch.setattr(sys, "argv", ["/bin/ssl-ray", "run", *typed])
    told = shlex.split(source()["mlflow.source.name"])
    assert told == ["ssl-ray", "run", "cache=s3://bucket/x y", "tracking.uri=postgresql://host/db", "name=it's"]


@pytest.mark.filterwarnings("ignore:.*sqlite.*")
def test_no_secret_is_in_the_journal_nor_in_its_name(track: Track, database: Path, folders: Folders) -> None:
    """Passwords change, and what was not delivered yet must be found again; none is written down."""
    for password in ("hunter", "hunter2"):
        run = track(f"sqlite:///{database}?password={password}").open("trial", "k", "k", {})
        run.tags({"failure": "no s3://me:hunter@bucket"})
        run.text("http://me:hunter@host", "x.txt")
    (home,) = (folders.study / "journal").iterdir()
    assert all(path.is_dir() or b"hunter" not in path.read_bytes() for path in home.rglob("*"))


def test_a_run_is_found_again_by_its_key(track: Track) -> None:
    """Opened again, it is the same run, with its last step known and its parameters as they were."""
    tracker = track()
    first = tracker.open("trial", "key", "name", {"split": 6, "workers": 1})
    first.metrics({"loss": 1.0}, 7)
    first.close("FAILED")
    assert tracker.settle() == 0
    assert tracker.finished("trial", "key") is None
    tracker = track()
    again = tracker.open("trial", "key", "name", {"split": 6, "workers": 2, "new": "x"})
    assert again.id == first.id
    assert again.logged("loss") == {7}
    assert again.logged("never") == set()
    again.close()
    assert tracker.settle() == 0
    assert tracker.finished("trial", "key") == first.id
    assert tracker.client.get_run(first.id).data.params == {"split": "6", "workers": "1", "new": "x"}


def test_what_mlflow_refuses_is_told_and_the_rest_goes_on(track: Track, said: Said, tmp_path: Path) -> None:
    """Of a batch with a name and of tags with a value that MLflow does not take, all the others arrive."""
    tracker = track()
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
    assert said.count("MLflow refused something of run trial-bad") == 1


def test_a_run_that_mlflow_does_not_make_blocks_no_other(
    track: Track, folders: Folders, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as finished all the same, and what it logged is kept."""
    tracker = track()
    create_run = tracker.client.create_run

    def picky(experiment: str, at: int, tags: dict[str, str], name: str) -> Any:
        if name == "unlucky":
            raise MlflowException("an unlucky name", INVALID_PARAMETER_VALUE)
        return create_run(experiment, at, tags, name)

    monkeypatch.setattr(tracker.client, "create_run", picky)
    for name in ("unlucky", "lucky"):
        run = tracker.open("trial", name, name, {"a": 1})
        run.metrics({"loss": 1.0}, 1)
        run.close()
    assert tracker.settle() == 0
    assert tracker.history(run.id, "loss") == {1: 1.0}
    assert said.count("run trial-unlucky: an unlucky name") == 1
    assert tracker.finished("trial", "unlucky")
    assert tracker.files("ssl-ray:trial-unlucky") == []
    (refused,) = folders.study.glob("journal/*/trial-unlucky/refused.jsonl")
    assert '{"loss": 1.0}' in refused.read_text()


def test_a_file_that_cannot_be_stored_blocks_nothing(
    track: Track, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where MLflow answers and the library for its object store is missing: it is told, and next time it arrives."""
    tracker = track()

    def missing(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'boto3'")

    monkeypatch.setattr(tracker.client, "log_artifact", missing)
    run, other = (tracker.open("trial", key, key, {}) for key in ("key", "other"))
    run.text("words", "words.txt")
    run.metrics({"loss": 1.0}, 1)
    run.close()
    other.close()
    assert tracker.finished("trial", "other")
    assert tracker.client.get_run(other.id).info.status == "FINISHED"
    assert run.waiting, "no other run waits for the file"
    assert tracker.settle() == 0
    assert tracker.history(run.id, "loss") == {1: 1.0}
    assert said.count("refused something of run trial-key: No module named 'boto3'") == 1
    assert said.count("does not answer") == 0
    tracker = track()
    assert tracker.settle() == 0
    assert tracker.read(run.id, "words.txt") == b"words"
    assert tracker.client.get_run(run.id).info.status == "FINISHED"


def test_a_lost_note_of_what_is_delivered(track: Track, folders: Folders, said: Said) -> None:
    """Everything is sent again but the files, whose copies are gone."""
    tracker = track()
    run = tracker.open("trial", "key", "name", {})
    run.text("words", "words.txt")
    run.close()
    assert tracker.settle() == 0
    tracker.stop()
    (note,) = folders.study.glob("journal/*/*/state.json")
    note.write_text("")
    tracker = track()
    assert tracker.settle() == 0
    assert said.count("refused") == 0
    assert tracker.read(run.id, "words.txt") == b"words"


def test_after_a_stop_nothing_is_sent(track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the request that is on its way."""
    tracker = track()
    began, sent = threading.Semaphore(0), []

    def slow(run_id: str, **_: Any) -> None:
        began.release()
        time.sleep(0.5)
        sent.append(run_id)

    monkeypatch.setattr(tracker.client, "update_run", slow)
    for key in "abc":
        tracker.open("trial", key, key, {})
    for _ in range(2):  # the second of a round of all three
        assert began.acquire(timeout=20)
    tracker.stop()
    assert len(sent) == 2


def test_a_step_is_logged_once(track: Track) -> None:
    """Replayed steps are dropped, within a process and in the next one; new metrics of an old step are not."""
    tracker = track()
    run = tracker.open("trial", "key", "name", {})
    for step in (1, 2, 3, 2, 3, 4):
        run.metrics({"loss": step}, step)
    run.close("FAILED")
    tracker.settle()
    tracker.stop()
    again = track().open("trial", "key", "name", {})
    known = again.logged("loss")
    assert known == {1, 2, 3, 4}
    known.add(5)  # the caller's own book
    for step in (3, 4, 5):
        again.metrics({"loss": -step, "dice": step}, step)
    again.close()
    reader = track()
    points = reader.client.get_metric_history(again.id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, -5)]
    assert list(reader.history(again.id, "dice")) == [3, 4, 5]


def test_a_finished_run_taken_up_without_its_journal_has_no_step_twice(track: Track, folders: Folders) -> None:
    """What the journal has dropped, or another machine has logged, is asked of MLflow before anything is sent."""
    tracker = track()
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
    tracker.stop()
    shutil.rmtree(folders.study / "journal")
    elsewhere = track().open("grid", "key", "name", {})
    elsewhere.metrics({"share": 1.0}, 0)
    assert elsewhere.logged("share") == {0, 1}
    elsewhere.close()
    assert [point.step for point in track().client.get_metric_history(run.id, "share")] == [0, 1]


def test_a_study_that_changes_machines_and_comes_back(track: Track, folders: Folders, tmp_path: Path) -> None:
    """Each machine has a journal of its own; no step that the other has logged is logged again."""
    here, there = tmp_path / "here", tmp_path / "there"
    for mine, others in (here, there), (there, here), (here, there):
        if (folders.study / "journal").exists():
            (folders.study / "journal").rename(others)
        if mine.exists():
            mine.rename(folders.study / "journal")
        tracker = track()
        run = tracker.open("trial", "key", "name", {})
        last = max(run.logged("loss"), default=0)
        for step in range(last, last + 3):
            run.metrics({"loss": step}, step)
        run.close("FAILED")
        assert tracker.settle() == 0
        tracker.stop()
    points = track().client.get_metric_history(run.id, "loss")
    assert [point.step for point in points] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("lost", ["the note", "the answer"])
def test_a_run_is_made_once(track: Track, folders: Folders, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """Also where the driver dies between MLflow's making it and writing its id, or where MLflow's answer gets lost."""
    tracker = track()
    create_run, cut = tracker.client.create_run, [ConnectionError("cut")] if lost == "the answer" else []

    def create(*what: Any) -> Any:
        run = create_run(*what)
        if cut:
            raise cut.pop()
        return run

    monkeypatch.setattr(tracker.client, "create_run", create)
    run = tracker.open("trial", "key", "name", {"a": 1})
    run.metrics({"loss": 1.0}, 1)
    assert run.logged("loss") == {1}
    if lost == "the note":
        assert tracker.settle() == 0
        tracker.stop()
        for note in folders.study.glob("journal/*/*/state.json"):
            note.unlink()
        tracker = track()
    tracker.open("trial", "key", "name", {"a": 1}).close()
    assert tracker.settle() == 0
    (found,) = tracker.runs(kind="trial")
    assert tracker.client.get_run(found.info.run_id).info.status == "FINISHED"
    assert len(tracker.client.get_metric_history(found.info.run_id, "loss")) == 1


def test_what_arrived_although_the_request_failed_is_there_once(track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a batch, then a whole one, are stored by requests that fail; points keep their order."""
    tracker = track()
    log_batch, failures = tracker.client.log_batch, [ConnectionError("cut"), ConnectionError("cut")]

    def cut(run_id: str, metrics: Sequence[Metric] = (), **rest: Any) -> None:
        log_batch(run_id, metrics[: len(metrics) // len(failures)] if failures else metrics, **rest)
        if metrics and failures:
            raise failures.pop()

    monkeypatch.setattr(tracker.client, "log_batch", cut)
    run = tracker.open("trial", "key", "name", {})
    for step in range(500):
        run.metrics({"loss": step, "lr": 0.1}, step)
    run.close()
    assert tracker.settle() == 0
    assert not failures
    for metric in ("loss", "lr"):
        points = tracker.client.get_metric_history(run.id, metric)
        assert [point.step for point in points] == list(range(500))


def test_references_become_ids(track: Track) -> None:
    """A parent and a tag that name runs which MLflow has not made yet end up as MLflow's ids of them."""
    tracker = track()
    tracker.stop()
    grid, pretraining = tracker.open("grid", "g", "g", {}), tracker.open("pretraining", "p", "p", {})
    trial = tracker.open("trial", "t", "t", {}, grid.id, {PRETRAINING_RUN: pretraining.id})
    assert "/" not in grid.id
    for run in (trial, pretraining, grid):
        run.close()
    assert tracker.finished("trial", "t") == trial.id
    again = track()
    (found,) = again.runs(kind="trial", key="t")
    parent = again.finished("grid", "g")
    assert parent
    assert found.data.tags["mlflow.parentRunId"] == parent
    assert found.data.tags[PRETRAINING_RUN] == again.finished("pretraining", "p")
    assert found.info.status == "FINISHED"
    assert [run.info.run_id for run in again.runs(parent=parent)] == [found.info.run_id]


def test_a_run_deleted_in_mlflow_is_a_new_one_when_it_is_opened(track: Track) -> None:
    """With what is logged from then on; one that is deleted while it is written gets nothing more, which is told."""
    tracker = track()
    for metric in ("before", "after"):
        run = tracker.open("trial", "key", "name", {"a": 1})
        run.metrics({metric: 1.0}, 1)
        run.close()
        tracker.settle()
        (found,) = tracker.runs(kind="trial", key="key")
        assert found.data.metrics == {metric: 1.0}
        tracker.client.delete_run(run.id)


def test_an_artifact_is_logged_as_it_was(track: Track, tmp_path: Path) -> None:
    """A file that changes or vanishes before it is delivered arrives as it was when it was logged."""
    tracker = track()
    tracker.stop()
    run = tracker.open("trial", "key", "name", {})
    for content in ("first", "second"):
        (tmp_path / "file.txt").write_text(content)
        run.artifact(tmp_path / "file.txt", content)
    (tmp_path / "file.txt").unlink()
    run.close()
    again = track()
    assert [again.read(run.id, f"{folder}/file.txt") for folder in ("first", "second")] == [b"first", b"second"]


def test_an_artifact_that_is_logged_while_its_run_is_finished(
    track: Track, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow gets the end of the run between the copying of the report and the note of it: the report arrives."""
    tracker = track()
    ending, copied, ended = threading.Event(), threading.Event(), threading.Event()
    copyfile, set_terminated = shutil.copyfile, tracker.client.set_terminated

    def copy(*paths: Any) -> None:
        copyfile(*paths)
        copied.set()
        assert ended.wait(20)
        time.sleep(0.5)  # the journal would be dropped by now

    def end(*what: Any) -> None:
        ending.set()
        assert copied.wait(20)
        set_terminated(*what)
        ended.set()

    monkeypatch.setattr(tracker.client, "set_terminated", end)
    run = tracker.open("grid", "key", "grid", {})
    run.metrics({"share": 1.0}, 0)
    (tmp_path / "report.html").write_text("report")
    run.close()
    assert ending.wait(20)
    with monkeypatch.context() as during:
        during.setattr(shutil, "copyfile", copy)
        run.artifact(tmp_path / "report.html", "report")
    assert tracker.settle() == 0
    assert tracker.read(run.id, "report/report.html") == b"report"
    assert said.count("refused") == 0


def test_an_experiment_gets_another_name(track: Track, folders: Folders) -> None:
    """What was still to be delivered is there under the new name, and the old name is free."""
    tracker = track()
    tracker.stop()
    tracker.open("trial", "key", "name", {}).close()
    assert rename_experiment(Tracking(), folders, "before")
    assert not rename_experiment(Tracking(), folders, "again")
    assert track().finished("trial", "key") is None


def test_a_missing_experiment_is_named(track: Track) -> None:
    """The report of a study that never ran is a clear error."""
    with pytest.raises(UserError, match="MLflow experiment 'test_a_missing_experiment"):
        track(create=False)


def test_a_deleted_experiment_is_named(track: Track) -> None:
    """Before a training begins of which MLflow would take nothing."""
    tracker = track()
    client = tracker.client
    client.delete_experiment(client.get_experiment_by_name(tracker.experiment).experiment_id)
    tracker.stop()
    with pytest.raises(UserError, match=r"experiment .* is deleted; restore it"):
        track()


def test_an_address_that_never_answered_is_refused(track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens, somebody stays silent or is not MLflow: an error within seconds that names setting and value."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        says = rf"tracking\.uri: MLflow at {uri.replace('user:secret@', '')} does not answer"
        with pytest.raises(UserError, match=rf"{says} \(Read timed out"):
            track(uri)
    with pytest.raises(UserError, match=rf"{says} \(Connection refused"):
        track(uri)
    with pytest.raises(UserError, match=r"tracking\.uri: MLflow at nonsense://x does not answer"):
        track("nonsense://x")
