"""What the MLflow run of a cell is told, without Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies import small_study

from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import FAILURE, NONFINITE, STOPPED, Cell
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
    def started(self, *_: Any) -> None: ...
    def update(self, *_: Any) -> None: ...


def callback_of(told: Told, **changes: Any) -> TrialCallback:
    """Of one cell, whose weights a run has made."""
    study = small_study(finetune={"optimizer": {"lr": 1e-4}, "steps": 30})
    data = SimpleNamespace(training=(1, 2), validation=(3,), test=())
    config, network = CELL.apply(study.finetune), study.network
    folder = SimpleNamespace(key="key", clear=lambda: told.labels.update(cleared="yes"))
    job = SimpleNamespace(config=config, network=network, data=data, seed=7, weights=Path("w"), folder=folder)
    arguments: Any = (told, "grid", run_params(study, "finetune"), {CELL: job}, {Path("w"): "made by"}, told, 0)
    return TrialCallback(*arguments, **changes)


@pytest.mark.parametrize("nonfinite", [True, False])
def test_a_trial_is_described_and_says_why_it_failed(nonfinite: bool) -> None:
    """Size, start, rate, run, seed, precision and volumes; a loss that was not finite has a tag of its own."""
    told = Told()
    callback = callback_of(told)
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


@pytest.mark.parametrize("over", [True, False])
def test_a_stopped_trial_is_no_failed_one(over: bool) -> None:
    """It ends as killed, with the step; what may go on later keeps its checkpoints."""
    told, heard = Told(), list[Any]()

    def tell(cell: Cell, metrics: Any) -> bool:
        heard.append((cell, metrics))
        return over

    callback = callback_of(told, tell=tell)
    result = {"step": 10, "metrics": {"validation/dice_foreground": 0.1, "lr": 1e-3}}
    trial = SimpleNamespace(trial_id="1", config={"cell": CELL}, last_result=result)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result)
    callback.on_trial_complete(0, [], trial)
    assert heard == [(CELL, {})]
    assert (told.status, told.labels[STOPPED], told.labels[FAILURE]) == ("KILLED", "at step 10", "")
    assert (callback.completed, callback.failed) == (0, [])
    assert told.labels.get("cleared", "no") == ("yes" if over else "no")
