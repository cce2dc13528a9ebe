"""What people and files get to see has no passwords."""

import time
from pathlib import Path

import pytest
import yaml
from studies import small_study, small_tree

from ssl_ray.config.loading import dump, flatten, parse
from ssl_ray.errors import UserError
from ssl_ray.study.parts import folders_of, run_params
from ssl_ray.text import check_encoded, reason, shown, without_password
from ssl_ray.tracking.uri import tracking_uri

SECRET = "wJalr/XUtnFEMI+K7MDENG@bPx"
URIS = [
    f"s3://AKIA:{SECRET}@bucket/cache",
    "https://hunter@server:5000",
    "postgresql+psycopg2://me:hunter@host:5432/mlflow?sslmode=require",
    "s3://bucket/x?region=eu&access_key=hunter&secret_key=hunter",
    "https://host/x?X-Amz-Security-Token=hunter&X-Amz-Signature=hunter",
    "https://account.blob/x?sv=1&sig=hunter",
    "s3:/me:hunter@bucket/as/a/path",
]


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("around", ["{}", "cannot read '{}' (gone)", '{{"uri": "{}", "mail": "a@b"}}', "x={}, y={}"])
def test_a_secret_is_left_out_of_any_text(uri: str, around: str) -> None:
    """As user, password or parameter, encoded or not; host and path stay, and once cleaned, a text stays as it is."""
    text = around.replace("{}", uri)
    clean = without_password(text)
    assert "hunter" not in clean
    assert not any(SECRET[at : at + 4] in clean for at in range(len(SECRET) - 3))
    assert without_password(clean) == clean
    for length in range(4, 60):
        assert "hunt" not in shown(text, length)
    assert "hunter" not in reason(OSError(text))


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me:hun ter@host/db",
        'https://me:hun"ter@host',
        "https://me:a/hun<ter@host",
        "sqlite:///x.db?password=hun'ter",
        "s3://bucket/x?secret_key=hun ter",
    ],
)
def test_a_secret_that_could_not_be_left_out_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a text has it, nobody sees where it ends. It is told with its key, and not shown; encoded, it is taken."""
    study = small_study(tmp_path)
    named = study.model_copy(update={"tracking": study.tracking.model_copy(update={"uri": uri})})
    unnamed = study.model_copy(update={"tracking": study.tracking.model_copy(update={"uri": None})})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for key, place in (
        ("tracking.uri", lambda: tracking_uri(named.tracking, folders_of(named))),
        ("MLFLOW_TRACKING_URI", lambda: tracking_uri(unnamed.tracking, folders_of(unnamed))),
        ("cache", lambda: folders_of(study.model_copy(update={"cache": uri}))),
    ):
        with pytest.raises(UserError, match=f"^{key}: .*percent-encoded") as caught:
            place()
        assert "ter" not in str(caught.value).replace("parameters", "").replace("characters", "")
    encoded = uri.replace(" ", "%20").replace('"', "%22").replace("<", "%3C").replace("'", "%27")
    for plain in (encoded, "/a b/x@y", "s3://bucket/a b@c"):
        check_encoded("key", plain)
        assert "hun" not in without_password(plain)


@pytest.mark.parametrize("piece", ["://", "://:", "://a:a", "?key", "&token", "?", ":/@", "a", "=", "?key="])
def test_a_hostile_text_takes_no_time(piece: str) -> None:
    """A long text without a space, as a value in a foreign file may have."""
    begin = time.process_time()
    without_password(piece * (100_000 // len(piece)))
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/#/experiments/1/runs/2",
        "http://host:5000/#/experiments/1/runs?compareRunsMode=CHART&viewStateShareKey=demo",
        "models:/study-segmenter@best",
        "s3://b/x?endpoint_override=http://h:1",
        "a@b.c",
    ],
)
def test_a_text_without_secrets_stays(text: str) -> None:
    """Hosts, ports, paths and addresses of mail are no passwords."""
    assert without_password(f"see {text} or 'x: {text}'") == f"see {text} or 'x: {text}'"


@pytest.mark.parametrize("uri", URIS)
def test_what_is_kept_of_an_experiment_has_no_password(uri: str, tmp_path: Path) -> None:
    """Neither the artifact, nor parameters, nor what Python shows of the settings; the experiment stays readable."""
    study = small_study(tmp_path, tracking={"uri": uri}, pretrain={"sources": [{"root": uri, "datalist": "x"}]})
    texts = [dump(study), str(flatten(study)), str(run_params(study, "pretrain")), repr(study.tracking)]
    if "?" not in uri and uri.startswith("s3://") and "/" not in uri[5 : uri.index("@")]:
        texts.append(repr(folders_of(small_study(tmp_path, cache=uri))))
    for text in texts:
        assert "hunter" not in text
        assert SECRET[:5] not in text
    assert parse(dump(study), "again").name == study.name


@pytest.mark.parametrize("key", ["output", "cache", "tracking"])
def test_a_mistake_beside_a_password_does_not_show_it(key: str) -> None:
    """A value of the wrong type, or a mistake in the YAML of that line, is told without the value's password."""
    tree = small_tree() | {key: ["s3://" + "user" * 3 + ":hunter" + "hunter" * 9 + "@bucket/x"]}
    broken = yaml.safe_dump(tree) + f"{key}x: s3://user:hunterhunterhunterhunterhunterhunterhunterhunter@bucket/x: ["
    for text in (yaml.safe_dump(tree), broken):
        with pytest.raises(UserError) as caught:
            parse(text, "study.yaml")
        assert "hunt" not in str(caught.value)
