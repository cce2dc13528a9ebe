"""A study whose output and store lie in an object store, here an S3 server on loopback."""

import shutil
from pathlib import Path
from uuid import uuid4

import pytest
from moto.server import ThreadedMotoServer
from runs import SAVED, assert_same, kill, outcome, saved, start, wait_for, write
from studies import place_database, small_tree, write_study

from ssl_ray.cli.main import main
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch):
    """URI of an empty bucket, and its server."""
    import boto3

    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3").create_bucket(Bucket="alone")  # moto's servers in one process share their buckets
    yield f"s3://alone/out?endpoint_override=http://{host}:{port}", server
    server.stop()


def test_a_pretraining_goes_on_from_the_object_store_alone(undisturbed, cohort, tmp_path, bucket):
    """Driver killed and the machine's own disk lost: the run goes on from the bucket and ends bit-identically."""
    uri, _ = bucket
    path = write(tmp_path, cohort, study={"output": uri, "cache": None, "scratch": str(tmp_path / "scratch")})
    study = load(path, [])
    first = start(path)
    manifests = folders_of(study).output.folder
    wait_for(lambda: saved(manifests), "a checkpoint")
    wait_for(lambda: kept(study), "a checkpoint in the bucket")
    kill(first)
    journal = folders_of(study).study / "journal"
    moved = shutil.move(journal, tmp_path / "journal")  # curves wait here for MLflow; see README
    shutil.rmtree(tmp_path / "scratch")
    folders_of(study).study.mkdir(parents=True)
    shutil.move(moved, journal)
    second = start(path)  # with a Ray of its own: that of the tests has no credentials in its environment
    assert second.wait(300) == 0, path.with_suffix(".log").read_text()[-3000:]
    assert_same(outcome(path), undisturbed)
    (folder,) = folders_of(study).study.glob("pretrain-*")
    assert {"best.pt", "best.safetensors"} <= set(folders_of(study).output.names(folder)), "for every machine"


def test_a_store_with_a_password_trains_and_nothing_on_disk_has_it(ray_cluster, cohort, tmp_path, bucket):
    """A search reads its volumes by the password in `cache`; neither its folder nor Ray's session holds it."""
    import ray

    uri, _ = bucket
    password = f"hunter{uuid4().hex}"
    tree = small_tree(
        tmp_path,
        cohort,
        cache=uri.replace("alone", f"me:{password}@alone"),
        scratch=str(tmp_path / "scratch"),
        finetune={"grid": {"init": ["random"]}, "steps": 2, "validate_every": 1},
        search={"scheduler": "asha", "samples": 1, "space": {"finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}},
    )
    place_database(tmp_path / "mlflow.db")
    path = write_study(tmp_path / "small.yaml", tree)
    assert main(["finetune", str(path)]) == 0
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    written = [one for folder in (tmp_path, session) for one in folder.rglob("*") if one.is_file() and one != path]
    assert {"params.pkl", "tuner.pkl", "model.safetensors"} <= {one.name for one in written}
    assert not [one for one in written if password.encode() in one.read_bytes()]


def test_a_lost_connection(cohort, tmp_path, bucket, capfd):
    """The server is gone: one line that names the place, exit code 2, before anything starts."""
    uri, server = bucket
    path = write(tmp_path, cohort, study={"output": uri, "cache": None, "scratch": str(tmp_path / "scratch")})
    server.stop()
    assert main(["pretrain", str(path)]) == 2
    printed = capfd.readouterr()
    assert not printed.out
    assert printed.err.startswith("ssl-ray: s3://alone/out: cannot be written to: ")
    assert printed.err.count("\n") == 1


def kept(study):
    """Steps of the checkpoints in the bucket."""
    (folder,) = folders_of(study).study.glob("pretrain-*")
    return [name for name in folders_of(study).output.names(folder / "checkpoints") if int(name) >= SAVED]
