"""What the rooms below get of a study."""

from pathlib import Path

from studies import small_study

from ssl_ray.study.parts import experiment_yaml


def test_the_kept_experiment_has_no_password(tmp_path: Path) -> None:
    """Runs keep the resolved YAML as an artifact: a password in one of its URIs is left out."""
    changes = {"tracking": {"uri": "http://me:secret@server"}, "cache": "s3://key:secret@bucket/cache"}
    text = experiment_yaml(small_study(tmp_path, **changes))
    assert "http://server" in text
    assert "s3://bucket/cache" in text
    assert "secret" not in text
