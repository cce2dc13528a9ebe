"""`ray job submit` to a cluster with token authentication, as a user of a cluster does it."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from machines import copy_clone
from runs import Outcome, assert_same, outcome, saved, wait_for, write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = [
    "phantom.unlabelled=6",
    "phantom.labelled=2",
    "phantom.validation=1",
    "phantom.test=1",
    "phantom.splits=[2]",
    "finetune.cohort.pool=labelled_2.json",
    "finetune.cohort.sizes=[2]",
    "finetune.runs=1",
    "finetune.steps=4",
    "finetune.validate_every=4",
    "finetune.optimizer.warmup_steps=0",
    "pretrain.optimizer.warmup_steps=0",
    "pretrain.epochs=4",
]


Head = tuple[str, dict[str, str]]
"""Address of the job server, and the environment that holds its token."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head node of its own, reachable only with its token; ended by its process group."""
    port, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of Ray's sockets must stay short
    token = secrets.token_hex(32)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_") or "health" in name.lower()
    }
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [
        f"--dashboard-agent-listen-port={free_port()}",
        "--num-cpus=2",
        "--object-store-memory=500000000",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]
    log = Path(folder) / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 90
        while not listening(dashboard) or submit(address, environment, "list").returncode:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        yield address, environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def submit(address: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", arguments[0], "--address", address, *arguments[1:]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=500)


def begin(address: str, environment: dict[str, str], *job: str) -> subprocess.CompletedProcess[str]:
    """Submit a job; the head answers before its job agent is up."""
    for _ in range(60):
        done = submit(address, environment, "submit", *job)
        if "No available agent" not in done.stderr:
            break
        time.sleep(1)
    return done


def test_the_demo_runs_as_a_submitted_job(head: Head, tmp_path: Path) -> None:
    """A job submitted with the token ends with the table and the report; without the token it is turned away."""
    address, environment = head
    settings = [*SMALL, f"output={tmp_path / 'output'}", f"phantom.root={tmp_path / 'data'}"]
    settings += [f"pretrain.sources=[{{root: {tmp_path / 'data'}, datalist: unlabelled.json}}]"]
    settings += [f"finetune.cohort.root={tmp_path / 'data'}"]
    options = [word for setting in settings for word in ("--set", setting)]
    working_dir = copy_clone(tmp_path / "project")
    job = ["--working-dir", str(working_dir), "--", "ssl-ray", "run", "experiments/demo.yaml", *options]
    done = begin(address, environment, *job)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "labelled volumes" in done.stdout
    assert (tmp_path / "output" / "demo" / "report.html").is_file()

    refused = submit(address, {**environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}, "list")
    assert refused.returncode != 0
    assert "succeeded" not in (refused.stdout + refused.stderr).lower()


def test_the_supervisor_of_a_job_killed(head: Head, undisturbed: Outcome, cohort: Path, tmp_path: Path) -> None:
    """A job whose supervisor and so its driver died, submitted again, ends as it would have."""
    address, environment = head
    path = write(tmp_path, cohort)
    job = ["--", sys.executable, "-m", "ssl_ray", "pretrain", str(path)]
    begun = begin(address, environment, "--no-wait", *job)
    assert begun.returncode == 0, begun.stderr
    wait_for(lambda: saved(tmp_path), "a checkpoint")
    (supervisor,) = processes(environment["RAY_AUTH_TOKEN"], "ray::JobSupervisor")
    drivers = processes(environment["RAY_AUTH_TOKEN"], "-m ssl_ray pretrain", str(path))  # the shell around it, too
    supervisor.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(drivers, timeout=60)[1], "Ray leaves no driver without a supervisor"
    again = begin(address, environment, *job)
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
    assert_same(outcome(path), undisturbed)


def processes(token: str, *words: str) -> list[psutil.Process]:
    """Processes of the cluster with this token whose command line has every word."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            text = " ".join(process.cmdline())
            if process.environ().get("RAY_AUTH_TOKEN") == token and all(word in text for word in words):
                found.append(process)
    return found
