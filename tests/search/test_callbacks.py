"""What the MLflow run of a cell is told, without Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies import small_study

from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import NONFINITE, Cell
from ssl_ray.study.parts import run_params

CELL = Cell.of(6, "pretrained", 2e-3, 1)


class Told:
    """A tracker, its only run and a progress bar: all that they are told."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.labels: dict[str, str] = {}
        self.status = ""

    def open(self, kind: str, key: str, name: str, params: Any, parent: str, tags: dict[str, str]) -> "Told":
        self.params(params)
        self.tags(tags)
        return self

    def params(self, values: dict[str, Any]) -> None:
        self.values |= values

    def tags(self, values: dict[str, str]) -> None:
        self.labels |= values

    def close(self, status: str = "FINISHED") -> None:
        self.status = status

    def logged(self, *_: Any) -> set[int]:
        return set()

    def started(self, *_: Any) -> None: ...
    def metrics(self, *_: Any) -> None: ...
    def text(self, *_: Any) -> None: ...
    def update(self, *_: Any) -> None: ...


@pytest.mark.parametrize("nonfinite", [True, False])
def test_a_trial_is_described_and_says_why_it_failed(nonfinite: bool) -> None:
    """Size, start, rate, run, seed, precision and volumes; a loss that was not finite has a tag of its own."""
    study, told = small_study(finetune={"optimizer": {"lr": 1e-4}}), Told()
    data = SimpleNamespace(training=(1, 2), validation=(3,), test=())
    job = SimpleNamespace(data=data, seed=7, weights=Path("w"), folder=SimpleNamespace(key="key"))
    arguments: Any = (told, "grid", run_params(study, "finetune"), {CELL: job}, {Path("w"): "made by"}, told, 0)
    callback = TrialCallback(*arguments)
    trial = SimpleNamespace(trial_id="1", config={"cell": CELL}, last_result={"failure": "why", "nonfinite": nonfinite})
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, {"step": 0, "metrics": {"started_at": 0.0}, "precision": "bfloat16"})
    expected = {"size": 6, "init": "pretrained", "lr": 2e-3, "run": 1, "seed": 7, "precision": "bfloat16"}
    expected |= {"training_volumes": 2, "validation_volumes": 1, "test_volumes": 0, "finetune.optimizer.lr": 2e-3}
    assert expected.items() <= told.values.items()
    assert told.labels["ssl_ray.pretraining_run"] == "made by"
    assert not told.labels[NONFINITE], "of an earlier attempt"
    callback.on_trial_complete(0, [], trial)
    assert told.labels["ssl_ray.failure"] == "why"
    assert told.labels["ssl_ray.nonfinite"] == ("true" if nonfinite else "")
    assert (told.status, callback.failed) == ("FAILED", [CELL.name])
