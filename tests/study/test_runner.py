"""What a study finds out before anything expensive starts."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies import small_study, small_tree, write_study

from ssl_ray.cli.main import main
from ssl_ray.errors import UserError
from ssl_ray.pretrain.driver import Pretrained
from ssl_ray.storage.folders import Folders
from ssl_ray.study import runner, stages


def test_a_wrong_address_of_mlflow_is_told_before_volumes_are_prepared(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Preparing may take hours; it does not need MLflow, and what follows does."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(runner, "connect", lambda _: None)
    monkeypatch.setattr(stages, "prepare_cohorts", lambda *_: pytest.fail("volumes are prepared"))
    path = write_study(tmp_path / "small.yaml", small_tree(tmp_path, cohort, tracking={"uri": uri}))
    assert main(["run", str(path)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"tracking.uri: MLflow at {uri} does not answer" in told


def test_trials_that_do_not_fit_are_told_before_days_of_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights are there already, their trials may be, too, and a machine without a GPU may report on them."""
    study, folders, tracker = small_study(), Folders.of("x", str(tmp_path)), SimpleNamespace()
    run_id: list[str | None] = [None]
    known = Pretrained(tmp_path / "best.safetensors", "key")
    known.weights.touch()

    def refuse(_: Any) -> None:
        raise UserError("need 1 GPU")

    monkeypatch.setattr(stages, "recipe_of", lambda *_: SimpleNamespace(seed=0))
    for name in ("run_params", "dump"):
        monkeypatch.setattr(stages, name, lambda *_: {})
    monkeypatch.setattr(stages.identity, "record", lambda *_: None)
    monkeypatch.setattr(stages.identity, "told", lambda *_: "")
    monkeypatch.setattr(stages, "known_pretraining", lambda *_: Pretrained(known.weights, "key", run_id[0]))
    monkeypatch.setattr(stages, "pretrain", lambda *_: known)
    monkeypatch.setattr(stages, "check_room", refuse)
    prepared: Any = SimpleNamespace(training=(1,), validation=(2,), probed=None)
    with pytest.raises(UserError, match="need 1 GPU"):
        stages._make_weights(study, folders, tracker, prepared, trials=True)  # type: ignore[arg-type]
    assert stages._make_weights(study, folders, tracker, prepared, trials=False)[0] == known  # type: ignore[arg-type]
    run_id[0] = "finished"
    assert stages._make_weights(study, folders, tracker, prepared, trials=True)[0] == known  # type: ignore[arg-type]
