"""Studies on a cluster as it is run: jobs that are submitted to three machines."""

import logging
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import nibabel
import numpy as np
import pytest
from machines import LAPTOP, Machine, bare_python, clean_environment, copy_clone, machines
from moto.server import ThreadedMotoServer
from runs import SAVED, Outcome, outcome, wait_for, write
from studies import small_tree, write_study
from tiny_model import write_model

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
S3 = f"http://{LAPTOP}:9000"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Cluster:
    """Three machines with a Ray of Python without `ssl_ray`, and the laptop with a clone and the token."""

    laptop: Machine
    head: Machine
    clone: Path
    environment: dict[str, str]

    def command(self, verb: str, *words: str) -> list[str]:
        """`ray job VERB`, as it is typed on the laptop."""
        return self.laptop.command(
            str(BIN / "ray"), "job", verb, "--address", f"http://{self.head.address}:8265", *words
        )

    def submit(self, log: Path, name: str, *entrypoint: str) -> subprocess.Popen[bytes]:
        """A job that is followed to its end; what it prints goes to a file."""
        installed = self.clone / "experiments" / "cluster" / "runtime_env.yaml"
        options = ["--submission-id", name, "--working-dir", str(self.clone), "--runtime-env", str(installed)]
        with log.open("ab") as out:
            command = self.command("submit", *options, "--", *entrypoint)
            return subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)

    def ask(self, verb: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Another command about jobs, to its end."""
        command = self.command(verb, *words)
        return subprocess.run(command, env=self.environment | environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that trains nothing, two nodes of one CPU, and an object store on the laptop."""
    folder = tmp_path_factory.mktemp("machines")
    python = bare_python(folder / "python")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # What is missing comes from a package index, which these machines do not reach: nothing but `ssl_ray` is missing.
    pip = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    environment = clean_environment() | token | KEYS | pip | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{python}:{environment['PATH']}"
    with machines(folder, "head", "left", "right") as (laptop, (head, *others)):
        start = [str(python / "ray"), "start", "--object-store-memory=150000000"]
        address = f"{head.address}:6379"
        begun = head.run(*start, "--head", "--num-cpus=0", "--dashboard-host=0.0.0.0", env=environment)
        assert begun.returncode == 0, begun.stdout + begun.stderr
        joining = [other.command(*start, "--num-cpus=1", f"--address={address}") for other in others]
        processes = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for command in joining]
        assert [process.wait(120) for process in processes] == [0, 0]
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(LAPTOP, 9000, verbose=False)
        laptop.call(server.start)
        client = clean_environment() | token
        found = Cluster(laptop, head, copy_clone(folder / "clone"), client)
        wait_for(lambda: found.ask("list").returncode == 0, "the job server", 60)
        yield found
        server.stop()


def s3() -> Any:
    """A client of the object store, for use on its network."""
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "secret"}
    return boto3.client("s3", endpoint_url=S3, region_name="us-east-1", **keys)


def kept(laptop: Machine) -> list[int]:
    """Steps of the whole checkpoints in the object store."""

    def names() -> list[str]:
        return [found["Key"] for found in s3().list_objects_v2(Bucket="studies").get("Contents", [])]

    found = (re.search(r"/checkpoints/0*(\d+)/manifest\.json$", name) for name in laptop.call(names))
    return sorted(int(one[1]) for one in found if one)


def test_a_study_submitted_stopped_and_submitted_again(
    cluster: Cluster, undisturbed: Outcome, cohort: Path, tmp_path: Path
) -> None:
    """Volumes in a shared folder, output in an object store, nodes that install the upload: it ends as undisturbed."""
    cluster.laptop.call(lambda: s3().create_bucket(Bucket="studies"))
    places = {"output": f"s3://studies/out?endpoint_override={S3}", "cache": None, "scratch": "/tmp/ray/scratch"}
    path = write(tmp_path, cohort, study=places, workers=2, epochs=160)  # seconds from the first checkpoint to the end
    steps = ["finetune.steps=4", "finetune.validate_every=4", "finetune.optimizer.warmup_steps=0"]
    command = ["ssl-ray", "run", str(path), *(word for step in steps for word in ("--set", step))]
    refused = cluster.ask("list", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert refused.returncode != 0
    assert "authentication is enabled" in refused.stderr

    first = cluster.submit(tmp_path / "first.log", "first", *command)
    wait_for(lambda: kept(cluster.laptop) or first.poll() is not None, "a checkpoint in the object store")
    assert first.poll() is None, (tmp_path / "first.log").read_text()
    assert cluster.ask("stop", "first").returncode == 0
    assert first.wait(60) == 0
    assert "what is finished is kept, and the same command goes on" in (tmp_path / "first.log").read_text()
    assert "stopped" in cluster.ask("status", "first").stdout.lower()

    second = cluster.submit(tmp_path / "second.log", "second", *command)
    assert second.wait(300) == 0, (tmp_path / "second.log").read_text()
    text = (tmp_path / "second.log").read_text()
    assert "report:  s3://studies/out/faults/report.html" in text
    assert not re.search("Traceback|PreemptionWatcher|Error|Grad strides", text)

    tree = small_tree(tmp_path, cohort, name="faults") | places | {"scratch": str(cluster.head.tmp / "scratch")}
    found = outcome(write_study(tmp_path / "seen_from_here.yaml", tree))
    assert len(found.started) == 2
    assert SAVED <= found.started[1] < 320
    assert set(found.workers) == {2}, "one on each node, as none has more than one CPU"
    assert all(abs(found.losses[step] - loss) < 1e-3 for step, loss in undisturbed.losses.items())


def test_predict_as_a_job(cluster: Cluster, cohort: Path, tmp_path: Path) -> None:
    """Scans are spread over the nodes, which do not see the model; each label map lies on its scan's grid.

    A folder that every node would have for itself is refused.
    """
    write_model(cluster.head.tmp / "model")
    scans = [str(path) for path in sorted((cohort / "images").iterdir())[:3]]
    command = ["ssl-ray", "predict", "/tmp/ray/model", *scans, "--device", "cpu", "--workers", "2", "--output"]
    job = cluster.submit(tmp_path / "predict.log", "predict", *command, str(tmp_path / "cluster"))
    assert job.wait(120) == 0, (tmp_path / "predict.log").read_text()
    apart = cluster.submit(tmp_path / "apart.log", "apart", *command, "labels")
    assert apart.wait(120) == 1
    text = (tmp_path / "apart.log").read_text()
    assert "WARNING: in a submitted job the output folder 'labels' lies in Ray's copy of the working directory" in text
    assert re.search(r"output: /tmp/ray/\S+/labels is another folder on the node 10\.77\.0\.", text)
    written = sorted((tmp_path / "cluster").glob("*.nii.gz"))
    assert len(written) == 3
    for labels, scan in zip(written, scans, strict=True):
        there, here = nibabel.load(labels), nibabel.load(scan)
        assert there.shape == here.shape
        assert np.array_equal(there.affine, here.affine)
        assert len(np.unique(there.dataobj)) > 1
