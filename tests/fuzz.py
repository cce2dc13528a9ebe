"""Fuzzes the readers: `python tests/fuzz.py {nifti,datalist,yaml,weights} [--seconds S] [--runs N]`.

Coverage-guided by atheris where it is installed (`pip install atheris`), else by random mutation. A fault is anything
but a ValueError of one line that names the file, or a result that breaks its invariants; faults are told apart by
where they were raised. The last line is one JSON object with the counts; the exit code is 1 where there are faults.
"""

import argparse
import gzip
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

atheris: Any = None
if __name__ == "__main__":  # the tests use the same readers, without instruments
    with suppress(ImportError):
        import atheris  # type: ignore[no-redef]

with atheris.instrument_imports(include=["ssl_ray", "nibabel", "yaml"]) if atheris else nullcontext():
    import nibabel as nib
    import numpy as np
    from volumes import oblique_affine, smooth_ct

    from ssl_ray.config.loading import dump
    from ssl_ray.data import datalist
    from ssl_ray.data import nifti as volume
    from ssl_ray.errors import UserError
    from ssl_ray.study.experiment import load

SLOW = 5.0
"""Seconds for one small input that count as a fault."""


def read_nifti(content: bytes, _: Path) -> None:
    """As an image and as a label map."""
    path = Path("v.nii.gz")
    try:
        read = volume.read_nifti(path, content)
        assert read.voxels.ndim == 3 and min(read.voxels.shape) >= 2, read.voxels.shape  # noqa: PT018
        assert read.voxels.nbytes <= 8 * 1032 * len(content), read.voxels.shape
        assert np.isfinite(read.voxels).all()
        assert np.isfinite(np.linalg.inv(read.affine)).all()
        volume.read_label(path, content)
    except ValueError as error:
        refused(error, path)


def furnish(folder: Path) -> None:
    """Two volumes, a link out of the root and a FIFO, for datalists to name."""
    (folder / "root").mkdir()
    for name in ("root/a.nii", "root/b.nii", "x.nii"):
        (folder / name).touch()
    os.mkfifo(folder / "root" / "fifo.nii")
    (folder / "root" / "out.nii").symlink_to("../x.nii")
    (folder / "root" / "link.nii").symlink_to("a.nii")


def read_datalist(content: bytes, folder: Path) -> None:
    """In a folder that `furnish` has prepared."""
    path = folder / "root" / "list.json"
    path.write_bytes(content)
    try:
        listed = datalist.read_datalist(path.parent, path, labelled=False)
        cases = (*listed.training, *listed.validation, *listed.test)
        assert len({case.id for case in cases}) == len(cases) > 0
        for case in cases:
            assert os.path.isfile(case.image)
            assert os.path.realpath(case.image).startswith(f"{os.path.realpath(path.parent)}/")
    except ValueError as error:
        refused(error, path)


def read_yaml(content: bytes, folder: Path) -> None:
    """And write it again."""
    path = folder / "study.yaml"
    path.write_bytes(content)
    try:
        study = load(path)
    except ValueError as error:
        return refused(error, path, lines=200)
    path.write_text(dump(study))
    assert load(path) == study


def read_weights(content: bytes, folder: Path) -> None:
    """As safetensors and as a torch file."""
    from ssl_ray.networks import weight_files as weights  # seconds of import that the other targets do not pay

    for name in ("a.safetensors", "a.pt"):
        path = folder / name
        path.write_bytes(content)
        try:
            for value in weights.load_weights(path).values():
                assert value.isfinite().all() in (True, False)
            weights.load_metadata(path)
        except ValueError as error:
            refused(error, path)


def refused(error: ValueError, path: Path, lines: int = 1) -> None:
    """A refusal is one line that names the file."""
    assert type(error) in (ValueError, UserError), repr(error)
    message = str(error).splitlines()
    assert 1 <= len(message) <= lines, message
    assert all(line.startswith(f"{path}: ") and len(line) < 3000 for line in message), message


def seeds(target: str) -> list[bytes]:
    """Small valid inputs."""
    if target == "nifti":
        arrays = [np.ones((2, 3, 2), np.uint8), smooth_ct((4, 4, 4)), np.ones((2, 3, 2, 1), ">f4")]
        kinds = [nib.Nifti1Image, nib.Nifti2Image]
        plain = [kind(array, oblique_affine((1, 2, 3), 20)).to_bytes() for array in arrays for kind in kinds]
        return plain + [gzip.compress(content) for content in plain]
    if target == "datalist":
        tree = {"training": ["a.nii", {"image": "b.nii"}], "validation": [], "labels": {"0": "air", "1": "liver"}}
        odd = '{"training": ["link.nii", "out.nii", "fifo.nii", "../x.nii", 1e9, NaN, null, true, "\\ud800"]}'
        return [json.dumps(tree).encode(), odd.encode()]
    if target == "yaml":
        text = (Path(__file__).parents[1] / "experiments" / "demo.yaml").read_text()
        lines = (line.partition(" #")[0].rstrip() for line in text.splitlines())
        plain = "\n".join(line for line in lines if line and not line.startswith("#"))
        return [plain.encode(), b"a: &a [1, *a]\nb: {<<: *a}\n? !!int 0x1\n: !!timestamp 2001-01-01\n--- |\n x\n"]
    import torch
    from safetensors.torch import save

    import ssl_ray.networks.weight_files  # noqa: F401  # or the first input would count as slow

    found = []
    for zipped in (True, False):
        torch.save({"state_dict": {"a": torch.ones(2, 2)}}, file := io.BytesIO(), _use_new_zipfile_serialization=zipped)
        found.append(file.getvalue())
    return [*found, save({"a": torch.ones(2, 2)}, {"patch_size": "[96, 96, 96]"})]


def mutate(content: bytes, rng: random.Random, corpus: list[bytes]) -> bytes:
    """Some flips, deletions, repetitions, splices and interesting numbers."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 9)]
        elif kind == 2:
            data[place:place] = data[place : place + rng.randrange(40)] * rng.randrange(1, 4)
        elif kind == 3:
            other = rng.choice(corpus)
            start = rng.randrange(len(other) + 1)
            data[place : place + rng.randrange(40)] = other[start : start + rng.randrange(40)]
        elif kind == 4:
            number = rng.choice((0, 1, -1, 2**7, 2**15 - 1, 2**31 - 1, -(2**31), rng.getrandbits(31)))
            width = rng.choice((1, 2, 4, 8))
            low = number & (256**width - 1)
            data[place : place + width] = low.to_bytes(width, rng.choice(("little", "big")))
        else:
            del data[place:]
    return bytes(data[:20_000])


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "nifti": read_nifti,
    "datalist": read_datalist,
    "yaml": read_yaml,
    "weights": read_weights,
}


class Counter:
    """Runs the target, and keeps the first input of every fault."""

    def __init__(self, target: str, folder: Path, runs: int | None, seconds: float) -> None:
        self.target, self.folder, self.runs, self.end = target, folder, runs, time.monotonic() + seconds
        self.executions = self.accepted = 0
        self.faults: dict[str, dict[str, Any]] = {}

    @property
    def done(self) -> bool:
        """Whether the runs or the seconds are spent."""
        return time.monotonic() > self.end or (self.runs is not None and self.executions >= self.runs)

    def run(self, data: bytes) -> None:
        """One execution; for a packed target also the gzip of the input, which no mutation would find."""
        for content in (
            (data, gzip.compress(data, 1)) if self.target == "nifti" and data[:2] != b"\x1f\x8b" else (data,)
        ):
            self.executions += 1
            start, fault = time.monotonic(), None
            try:
                TARGETS[self.target](content, self.folder)
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(frame.filename).name}:{frame.lineno}"
                fault = f"{type(error).__name__} at {place}", f"{type(error).__name__}: {error}"[:300]
            if (took := time.monotonic() - start) > SLOW:
                fault = "slow", f"{took:.1f} s"
            if fault and fault[0] not in self.faults:
                self.faults[fault[0]] = {"message": fault[1], "input": content[:400].hex()}
                print(f"fault: {fault[0]}: {fault[1]}", flush=True)


def main() -> int:
    """Fuzz one target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, help="executions at most")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    furnish(folder)
    start = time.monotonic()
    counter = Counter(options.target, folder, options.runs, options.seconds)
    corpus = seeds(options.target)
    if atheris:
        _atheris(counter, corpus, options.seed)
    else:
        rng = random.Random(options.seed)
        while not counter.done:
            counter.run(mutate(rng.choice(corpus), rng, corpus))
    shutil.rmtree(folder)
    result = {
        "target": options.target,
        "engine": "atheris" if atheris else "mutation",
        "executions": counter.executions,
        "seconds": round(time.monotonic() - start, 1),
        "unique_faults": len(counter.faults),
        "faults": counter.faults,
        "ok": not counter.faults,
    }
    print(json.dumps(result), flush=True)
    return 1 if counter.faults else 0


def _atheris(counter: Counter, corpus: list[bytes], seed: int) -> None:
    """LibFuzzer ends the process by itself, so it runs in a fork that hands its counts back."""
    kept = counter.folder / "corpus"
    kept.mkdir()
    for number, content in enumerate(corpus):
        (kept / str(number)).write_bytes(content)
    result = counter.folder / "result.json"
    rng = random.Random(seed)
    pid = os.fork()
    if not pid:

        def one(data: bytes) -> None:
            counter.run(data)
            if counter.done:
                result.write_text(json.dumps([counter.executions, counter.faults]))
                os._exit(0)

        def mutator(data: bytes, size: int, _: int) -> bytes:
            native = atheris.Mutate(data, min(size, 20_000)) if data and rng.random() < 0.5 else data
            return mutate(native or corpus[0], rng, corpus)[:size]

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libFuzzer's progress
        limits = ["-timeout=60", "-rss_limit_mb=4096", "-max_len=20000", f"-artifact_prefix={counter.folder}/crash-"]
        atheris.Setup([sys.argv[0], str(kept), f"-seed={seed + 1}", *limits], one, custom_mutator=mutator)
        atheris.Fuzz()
        os._exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if result.exists():
        counter.executions, counter.faults = json.loads(result.read_text())
    else:
        inputs = [path.read_bytes()[:400].hex() for path in counter.folder.glob("crash-*")]
        counter.faults["process ended"] = {"message": f"ended with {status}", "input": (inputs or [""])[0]}


if __name__ == "__main__":
    sys.exit(main())
