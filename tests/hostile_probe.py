"""Reads hostile input in a process of its own: a JSON line on stdin is a request, a JSON line on stdout its answer.

Each request is read under an alarm against hangs and a limit to the address space. What breaks either one, or crashes
the interpreter, ends this process, and the test that asked knows which input it was.
"""

import ctypes
import gc
import hashlib
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from ssl_ray.config.schema import Preparation
from ssl_ray.networks.unetr.settings import Unetr

SECONDS = 30
"""Before a reader counts as hanging."""
MEGABYTES = 2048
"""Of address space that a reader may take beyond what the process holds already."""
NETWORK = Unetr(hidden_size=48, mlp_dim=96, num_heads=3, feature_size=4)

Reader = Callable[[Path], dict[str, Any]]
READERS: dict[str, Callable[[], Reader]] = {}
"""By name, a function that imports what the reader needs, which is no part of what a row is measured by."""


def reader(make: Callable[[], Reader]) -> Callable[[], Reader]:
    @cache
    def once() -> Reader:
        read = make()
        gc.freeze()  # or each row would walk through the hundred thousand objects of torch again
        return read

    READERS[make.__name__] = once
    return once


def digest(array: Any) -> str:
    """Shape and values of an array of voxels, as float32."""
    return f"{array.shape} {hashlib.sha256(np.ascontiguousarray(array, np.float32).tobytes()).hexdigest()}"


def _volume(volume: Any) -> dict[str, Any]:
    assert np.isfinite(volume.voxels).all()
    assert np.isfinite(np.linalg.inv(volume.affine)).all()
    return {"voxels": digest(volume.voxels), "affine": volume.affine.tolist()}


@reader
def nifti() -> Reader:
    from ssl_ray.data.nifti import read_nifti

    return lambda path: _volume(read_nifti(path))


@reader
def label() -> Reader:
    from ssl_ray.data.nifti import read_label

    return lambda path: _volume(read_label(path))


@reader
def prepare() -> Reader:
    import ssl_ray.data.resample  # noqa: F401  # MONAI
    from ssl_ray.data.nifti import read_nifti
    from ssl_ray.data.normalise import prepare
    from ssl_ray.errors import UserError

    def read(path: Path) -> dict[str, Any]:
        image = read_nifti(path)
        try:
            prepared = prepare(image, None, Preparation(spacing=2, hu_window=(-57, 164)))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error  # as the cohort's preparation names it
        assert np.isfinite(prepared.affine).all()
        return {"shape": prepared.image.shape, "highest": int(prepared.image.max())}

    return read


@reader
def datalist() -> Reader:
    from ssl_ray.data.datalist import read_datalist

    def read(path: Path) -> dict[str, Any]:
        listed = read_datalist(path.parent, path, labelled=False)
        cases = (*listed.training, *listed.validation, *listed.test)
        root = os.path.realpath(path.parent)
        images = [image for case in cases for image in case.images]
        assert all(image.is_file() and os.path.realpath(image).startswith(root + os.sep) for image in images)
        return {"cases": len(cases)}

    return read


@reader
def yaml() -> Reader:
    from ssl_ray.cli.main import main
    from ssl_ray.config.loading import dump
    from ssl_ray.study.experiment import load

    def read(path: Path) -> dict[str, Any]:
        try:
            study = load(path)
        except ValueError:
            assert main(["run", str(path)]) == 2
            raise
        return {"study": dump(study)}

    return read


@reader
def weights() -> Reader:
    from ssl_ray.networks.weight_files import load_weights

    return lambda path: {"names": sorted(load_weights(path))}


@reader
def metadata() -> Reader:
    from ssl_ray.networks.weight_files import load_metadata

    return lambda path: {"metadata": load_metadata(path)}


@reader
def transfer() -> Reader:
    from ssl_ray.networks.registry import build_segmentation
    from ssl_ray.networks.transfer import transfer
    from ssl_ray.networks.weight_files import load_metadata, load_weights

    unetr = build_segmentation(NETWORK, (32, 32, 32), 1, 3)
    return lambda path: {"share": transfer(load_weights(path), unetr, str(path), load_metadata(path)).share}


@reader
def model() -> Reader:
    import ssl_ray.networks.primus.network
    import ssl_ray.networks.unetr.network  # noqa: F401  # MONAI
    from ssl_ray.predict.model import read_model

    return lambda path: {"kind": type(read_model(str(path)).network).__name__}


@reader
def embedder() -> Reader:
    import ssl_ray.networks.primus.network
    import ssl_ray.networks.unetr.network  # noqa: F401  # MONAI
    from ssl_ray.predict.embed import read_embedder

    return lambda path: {"grid": read_embedder(str(path))[0].encoder.grid}


@reader
def state() -> Reader:
    from ssl_ray.training.checkpoint import load_state

    return lambda path: {"names": sorted(load_state(path))}


@reader
def fault() -> Reader:
    """Does to this process what the content of the file says, to test the tests."""

    def read(path: Path) -> dict[str, Any]:
        kind = path.read_text()
        if kind == "memory":
            bytearray((MEGABYTES + 1) * 2**20)
        elif kind == "peak":
            bytearray(100 * 2**20)
        elif kind != "none":
            signal.raise_signal(signal.Signals[kind])
        return {}

    return read


def _megabytes(field: str) -> float:
    """A field of proc(5)'s status: VmRSS is the memory in use, VmHWM its peak, VmSize the address space."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def _answer(name: str, path: Path) -> dict[str, Any]:
    read = READERS[name]()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier rows freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM begins again at VmRSS
    before = _megabytes("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (int((_megabytes("VmSize") + MEGABYTES) * 2**20), resource.RLIM_INFINITY))
    signal.alarm(SECONDS)
    answer: dict[str, Any] = {"error": None, "message": ""}
    try:
        answer |= read(path)
    except BaseException as error:
        answer |= {"error": type(error).__name__, "message": str(error)}
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return answer | {"megabytes": _megabytes("VmHWM") - before}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a reader prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        path = Path(os.fsdecode(bytes.fromhex(request["path"])))
        with chdir(path.parent if path.parent.is_dir() else "/"):
            print(json.dumps(_answer(request["reader"], path)), file=answers, flush=True)
