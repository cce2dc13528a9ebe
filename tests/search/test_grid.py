"""The grid without Ray: what its MLflow run keeps."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from ray import cloudpickle, tune
from studies import small_study

from ssl_ray.data.splits import Splits
from ssl_ray.data.store import Store
from ssl_ray.finetune import trial
from ssl_ray.networks.model_file import MODEL_FILE
from ssl_ray.search import grid
from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import CELLS, JOURNAL, Cell
from ssl_ray.search.proposals import Proposals
from ssl_ray.storage.files import write_file
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.mirror import Mirror
from ssl_ray.storage.object_store import Place


class Away:
    """A tracker, and its run, of an MLflow that does not answer: what is logged is in `texts`."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.id = "run"

    def open(self, *_: Any) -> "Away":
        return self

    def read(self, *_: Any) -> None:
        return None

    def text(self, text: str, name: str) -> None:
        self.texts[name] = text


def test_cells_of_a_wider_grid_stay_known_while_mlflow_is_away(tmp_path: Path) -> None:
    """A grid that is taken up with fewer cells keeps the keys of the others, also where MLflow cannot be asked."""
    folders, tracker = Folders.of("study", str(tmp_path)), Away()
    jobs = {Cell.of(2, "random", 1e-3, run): SimpleNamespace(key=f"key{run}") for run in (0, 1)}
    for some in (jobs, dict(list(jobs.items())[:1])):
        grid._open("grid", some, folders, tracker, {}, "")  # type: ignore[arg-type]
        assert set(json.loads(tracker.texts[CELLS]).values()) == {"key0", "key1"}


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_trial_that_ends_leaves_no_copies_of_what_is_kept_elsewhere(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the disk of its node, which the driver does not reach; in a shared folder they stay until the driver knows."""
    folders, given = Folders.of("x", str(tmp_path / "out")), dict[str, Any]()
    config = small_study(finetune={"grid": {"init": ["random"]}}).finetune
    monkeypatch.setattr(grid, "check_resources", lambda *_: None)
    monkeypatch.setattr(tune, "Tuner", lambda trainable, **how: given.update(trainable=trainable) or mock.Mock())
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", reports.append)
    splits = Splits({2: ()}, (), (), ("organ",))
    cell, job = next(iter(grid.trial_jobs(config, small_study().network, 0, splits, {}, [], folders)[1].items()))
    mirror = Mirror(tmp_path / "out", Place(str(tmp_path / "kept")) if elsewhere else None)
    job = replace(job, mirror=mirror)

    def train() -> list[Any]:
        write_file(job.checkpoints / "4" / "state.pt", b"state")
        write_file(job.folder / MODEL_FILE, b"model")
        mirror.push(job.checkpoints)
        return []

    monkeypatch.setattr(trial, "Trial", lambda *_: SimpleNamespace(train=train, evaluate=dict, facts={}))
    grid.tune_cells(config, iter([(cell, job)]), 1, folders, "key", mock.MagicMock(TrialCallback))
    given["trainable"]({"cell": cell, "job": job})
    assert reports[-1]["digest"]
    assert job.checkpoints.exists() is not elsewhere
    assert mirror.kept(job.checkpoints).list() == {"4/state.pt": 5}


@pytest.mark.parametrize("cache", ["s3://me:hunter@bucket/cache?region=here", "/here/cache"])
def test_tune_writes_no_password_and_a_trial_has_it(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a trial's configuration and of how it is run, which Tune pickles into files, none holds a secret."""
    folders, given, trained = Folders.of("x", "/out", cache), dict[str, Any](), list[Any]()
    space = {"finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
    study = small_study(finetune={"grid": {"init": ["random"]}}, search={"space": space}, cache=cache)
    assert study.search
    config = study.finetune
    monkeypatch.setattr(grid, "check_resources", lambda *_: None)
    monkeypatch.setattr(tune, "Tuner", lambda trainable, **how: given.update(trainable=trainable, **how) or mock.Mock())
    monkeypatch.setattr(trial, "Trial", lambda job, _: trained.append(job) or mock.MagicMock())
    splits = Splits({2: ()}, (), (), ("organ",))
    _, jobs = grid.trial_jobs(config, study.network, 0, splits, {}, [], folders)
    stop = Proposals(study.search, config, study, tmp_path / JOURNAL, Mirror(tmp_path), "search").stop
    grid.tune_cells(config, iter(jobs.items()), 1, folders, "key", mock.MagicMock(TrialCallback), stop)
    assert not given["run_config"].stop("1", {})
    cell = given["tune_config"].search_alg.suggest("1")
    for written in (cell, given["run_config"].stop, given["tune_config"]):
        assert b"hunter" not in cloudpickle.dumps(written)
    with contextlib.suppress(FileNotFoundError):  # this one leaves no network
        given["trainable"](cell)
    (job,) = trained
    assert (job.data.store, job.key) == (Store(folders.cache), next(iter(jobs.values())).key)
