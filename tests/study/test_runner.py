"""What a study finds out before anything expensive starts."""

import socket
from pathlib import Path

import pytest
from studies import small_tree, write_study

from ssl_ray.cli.main import main
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
