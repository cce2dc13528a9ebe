"""The files in experiments/cluster, as far as they can be checked without a cluster, and what a submission uploads."""

import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from machines import ROOT, copy_clone
from packaging.requirements import Requirement
from ray.job_submission import JobSubmissionClient

CLUSTER = ROOT / "experiments" / "cluster"
RAY_JOB = ROOT.parent / "shared" / "schemas" / "rayjob.v1.json"
LAUNCHER = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
DOCKERFILE = re.sub(r"\\\n", "", (CLUSTER / "Dockerfile").read_text())


def read_yaml(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def arguments(instruction: str) -> list[str]:
    """What follows an instruction of the Dockerfile, at each of its places."""
    return re.findall(rf"^{instruction} (.*)", DOCKERFILE, re.MULTILINE)


def unknown(value: Any, schema: dict[str, Any], place: str = "") -> Iterator[str]:
    """Fields that a schema of Kubernetes does not have, which jsonschema lets pass and the API server may drop."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown(item, schema.get("items", {}), f"{place}[{index}]")
    elif isinstance(value, dict) and "properties" in schema:
        for key, inner in value.items():
            if key in schema["properties"]:
                yield from unknown(inner, schema["properties"][key], f"{place}.{key}")
            else:
                yield f"{place}.{key}"


@pytest.mark.skipif(not RAY_JOB.is_file(), reason="no schema of KubeRay beside the repository")
def test_the_job_is_one_that_kuberay_takes() -> None:
    """All fields are known, with values of their types; a misspelt one would be found."""
    job, schema = read_yaml("rayjob.yaml"), json.loads(RAY_JOB.read_text())
    jsonschema.validate(job, schema)
    assert list(unknown(job, schema)) == []
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    assert list(unknown(job, schema)) == [
        ".spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].volumeMount"
    ]


@pytest.mark.skipif(not LAUNCHER.is_file(), reason="this Ray keeps the schema of its launcher elsewhere")
def test_the_launchers_file_is_one_that_ray_takes() -> None:
    """Ray's own schema allows no other key."""
    jsonschema.validate(read_yaml("launcher.yaml"), json.loads(LAUNCHER.read_text()))


def test_all_files_name_the_same_versions() -> None:
    """Ray refuses nodes of another version, and a client of another one may be refused; torch is that of the README."""
    (version,) = (text.removeprefix("RAY=") for text in arguments("ARG") if text.startswith("RAY="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    assert version in needed["ray"]
    assert read_yaml("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == version
    text = "".join(path.read_text() for path in CLUSTER.iterdir())
    assert set(re.findall(r"ray\[[\w,]+\]==([^'\"]+)", text)) == {version, "${RAY}"}
    assert set(re.findall(r"torch==([\d.]+)", text)) == set(
        re.findall(r"torch==([\d.]+)", (ROOT / "README.md").read_text())
    )


def test_the_image_is_pinned_and_names_no_registry() -> None:
    """What it is based on has a version; whoever builds it says where from, by the name."""
    (base,) = (text.removeprefix("BASE=") for text in arguments("ARG") if text.startswith("BASE="))
    assert arguments("FROM") == ["${BASE}"]
    assert ":${RAY}-py311-" in base
    images = re.findall(r"image: (?:&image )?([^*\s]+)", (CLUSTER / "rayjob.yaml").read_text())
    assert all("." not in name.partition("/")[0].partition(":")[0] for name in (base, *images)), "a host"
    for command in arguments("RUN"):
        assert command.startswith("pip install --no-cache-dir ")
        packages = re.sub(r'"', "", command).split()[3:]
        assert all("==" in name or name == ".[s3]" for name in packages)


def test_what_the_image_copies_can_be_installed(tmp_path: Path) -> None:
    """The wheel that is built from it has the report's templates and the command."""
    for names in arguments("COPY"):
        *sources, target = names.removeprefix("--chown=1000:100 ").split()
        for name in sources:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, tmp_path / target)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tmp_path)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("ssl_ray/report/templates/") for name in names)
    assert any(name.endswith("/entry_points.txt") for name in names)


def test_the_script_for_slurm_is_one_of_bash() -> None:
    """`test_slurm.py` runs it, where the system lets it make machines."""
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)


class JobServer(BaseHTTPRequestHandler):
    """Answers as Ray's job server does to a submission, and keeps what is uploaded."""

    uploaded: bytes = b""

    def answer(self, code: int, **body: Any) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self) -> None:
        version = {"ray_version": ray.__version__, "version": "4", "ray_commit": "", "session_name": ""}
        self.answer(200, **version) if self.path == "/api/version" else self.answer(404)

    def do_PUT(self) -> None:
        JobServer.uploaded = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200)

    def do_POST(self) -> None:
        self.answer(200, submission_id="one", job_id="one")

    def log_message(self, *_: Any) -> None:
        pass


def test_an_upload_is_small(tmp_path: Path) -> None:
    """A clone with gigabytes of packages, outputs and somebody's CT uploads what a job needs, in under 5 MB."""
    clone = copy_clone(tmp_path / "clone")
    with HTTPServer(("127.0.0.1", 0), JobServer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        client = JobSubmissionClient(f"http://127.0.0.1:{server.server_port}")
        environment = read_yaml("runtime_env.yaml") | {"working_dir": str(clone)}
        client.submit_job(entrypoint="ssl-ray run my_study.yaml", runtime_env=environment)
        server.shutdown()
    assert len(JobServer.uploaded) < 5 * 10**6
    names = set(zipfile.ZipFile(io.BytesIO(JobServer.uploaded)).namelist())
    needed = {"pyproject.toml", "README.md", "ssl_ray/data/store.py", "experiments/demo.yaml", "my_ct/labelled.json"}
    assert needed <= names
    assert not [name for name in names if name.startswith((".git/", ".venv", "output", "data/", "tests/"))]
    assert not [name for name in names if name.endswith((".nii.gz", ".safetensors", ".pyc", ".tar.xz"))]
