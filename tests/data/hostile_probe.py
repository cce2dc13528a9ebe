"""Reads hostile input in a process of its own: one JSON line on stdin is a request, one on stdout its answer.

Every request is read by a fork of the imported process, under an alarm against hangs and a limit to the address space,
so that the worst that a reader can do to its input is to become one line of the answer.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from ssl_ray.cli import main as cli
from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Network, Preparation
from ssl_ray.data.datalist import read_datalist
from ssl_ray.data.nifti import Nifti, prepare, read_label, read_nifti
from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.unetr import build_unetr
from ssl_ray.networks.weight_files import load_metadata, load_weights
from ssl_ray.study.experiment import load
from ssl_ray.training.checkpoint import load_state

SECONDS = 30
"""Before a reader counts as hanging."""
MEGABYTES = 2048
"""Of address space that a reader may take beyond what the imports hold."""
NETWORK = Network(hidden_size=48, mlp_dim=96, num_heads=3, feature_size=4)
UNETR = build_unetr(NETWORK, (32, 32, 32), 3)


def digest(array: Any) -> str:
    """Shape and values of an array of voxels, as float32."""
    return f"{array.shape} {hashlib.sha256(np.ascontiguousarray(array, np.float32).tobytes()).hexdigest()}"


def _volume(volume: Nifti) -> dict[str, Any]:
    assert np.isfinite(volume.voxels).all()
    assert np.isfinite(np.linalg.inv(volume.affine)).all()
    return {"voxels": digest(volume.voxels), "affine": volume.affine.tolist()}


def _prepare(path: Path) -> dict[str, Any]:
    image = read_nifti(path)
    try:
        prepared = prepare(image, None, Preparation(spacing=2, hu_window=(-57, 164)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error  # as the cohort's preparation names it
    assert np.isfinite(prepared.affine).all()
    return {"shape": prepared.image.shape, "highest": int(prepared.image.max())}


def _datalist(path: Path) -> dict[str, Any]:
    listed = read_datalist(path.parent, path, labelled=False)
    cases = (*listed.training, *listed.validation, *listed.test)
    root = os.path.realpath(path.parent)
    assert all(case.image.is_file() and os.path.realpath(case.image).startswith(root + os.sep) for case in cases)
    return {"cases": len(cases)}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        study = load(path)
    except ValueError:
        assert cli(["run", str(path)]) == 2
        raise
    return {"study": dump(study)}


def _transfer(path: Path) -> dict[str, Any]:
    return {"share": transfer(load_weights(path), UNETR, str(path), load_metadata(path)).share}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "nifti": lambda path: _volume(read_nifti(path)),
    "label": lambda path: _volume(read_label(path)),
    "prepare": _prepare,
    "datalist": _datalist,
    "yaml": _yaml,
    "weights": lambda path: {"names": sorted(load_weights(path))},
    "metadata": lambda path: {"metadata": load_metadata(path)},
    "transfer": _transfer,
    "state": lambda path: {"names": sorted(load_state(path))},
}


def _read(reader: str, path: str) -> dict[str, Any]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    answer: dict[str, Any] = {"error": None, "message": ""}
    try:
        answer |= READERS[reader](Path(os.fsdecode(bytes.fromhex(path))))
    except BaseException as error:
        answer |= {"error": type(error).__name__, "message": str(error)}
    answer["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return answer | {"seconds": time.monotonic() - start}


def _fork(request: dict[str, str]) -> dict[str, Any]:
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEGABYTES * 2**20,) * 2)
        signal.alarm(SECONDS)
        with os.fdopen(send, "w") as stream:
            json.dump(_read(**request), stream)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as stream:
        text = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    answer: dict[str, Any] = json.loads(text) if text and not status else {"error": f"ended with {status}"}
    return answer


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)
