"""The grid without Ray: what its MLflow run keeps."""

import contextlib
import json
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
from ssl_ray.search import grid
from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import CELLS, JOURNAL, Cell
from ssl_ray.search.proposals import Proposals
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.mirror import Mirror


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
