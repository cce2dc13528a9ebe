"""What `mlflow.pyfunc.load_model` gives, in a process that has none of our sources."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import NETWORK, PATCH, PREPARATION, write_model

from ssl_ray.data.nifti import Nifti
from ssl_ray.data.normalise import metadata, prepare
from ssl_ray.errors import UserError
from ssl_ray.evaluate.metrics import to_original_grid
from ssl_ray.networks.registry import build_autoencoder
from ssl_ray.networks.weight_files import describe, export
from ssl_ray.predict.embed import read_embedder
from ssl_ray.predict.model import read_model
from ssl_ray.predict.pyfunc import _load_pyfunc
from ssl_ray.predict.segment import Segmenter, manner_of
from ssl_ray.storage.files import file_digest
from ssl_ray.tracking.models import _write
from ssl_ray.tracking.run import NetworkFile

ALONE = """
import json, sys
sys.path = [place for place in sys.path if place != sys.argv[3]]
sys.meta_path = [one for one in sys.meta_path if "editable" not in getattr(one, "__name__", "")]
import mlflow.pyfunc, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
scan = np.load(sys.argv[2])
np.save(sys.argv[2] + ".labels", model.predict(scan["image"], params={"affine": scan["affine"].ravel().tolist()}))
np.save(sys.argv[2] + ".example", model.predict(model.input_example))
import ssl_ray
print(json.dumps([ssl_ray.__file__, [name for name in ("ray",) if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model")).path


def scan_of(affine: np.ndarray, shape: tuple[int, ...] = (30, 26, 14)) -> np.ndarray:
    return np.random.default_rng(0).normal(50, 150, shape).astype(np.float32)


OBLIQUE = np.array([[0, -5.5, 0.4, 90], [6.0, 0.3, 0, -70], [0.2, 0, 8.0, 30], [0, 0, 0, 1]])


def test_an_array_is_segmented_as_its_file_would_be(model_file: Path) -> None:
    """Turned, oblique and anisotropic: as a NIfTI of these voxels, prepared and brought back to its grid."""
    scan = scan_of(OBLIQUE)
    model = read_model(str(model_file))
    canonical = prepare(Nifti(np.asfortranarray(scan), OBLIQUE), None, model.metadata.preparation)
    segmenter = Segmenter([model], manner_of(model.metadata)[0], torch.device("cpu"))
    labels = segmenter(canonical.image, canonical.levels)
    expected = to_original_grid(labels, canonical.affine, scan.shape, OBLIQUE)
    found = _load_pyfunc(str(model_file)).predict(scan, {"affine": OBLIQUE.ravel().tolist()})
    assert found.dtype == np.uint8
    assert len(np.unique(found)) > 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scan", [np.zeros((4, 4)), np.zeros((2, 8, 8, 8)), np.full((8, 8, 8), np.nan)])
def test_what_is_no_scan_is_refused(model_file: Path, scan: np.ndarray) -> None:
    """With the shape that it must have."""
    with pytest.raises(UserError, match=r"must have shape \(X, Y, Z\) and be finite, got"):
        _load_pyfunc(str(model_file)).predict(scan)


@pytest.mark.parametrize(
    ("affine", "rule"),
    [
        (np.zeros(16), "sixteen numbers"),
        (np.eye(4)[:3].ravel(), "sixteen numbers"),
        (OBLIQUE.T.ravel(), "row by row"),
        (np.full(16, np.nan), "row by row"),
        (np.diag([0, 1, 1, 1.0]).ravel(), "must be finite"),
        (np.where(OBLIQUE == 90, np.nan, OBLIQUE).ravel(), "must be finite"),
        (np.diag([1e-4, 1e-4, 1e-4, 1]).ravel(), "voxel sides"),
    ],
)
def test_what_is_no_affine_is_refused(model_file: Path, affine: np.ndarray, rule: str) -> None:
    """As that of a file is, and with the order of its numbers."""
    with pytest.raises(UserError, match=rule):
        _load_pyfunc(str(model_file)).predict(scan_of(OBLIQUE), {"affine": affine.tolist()})


def test_an_encoder_gives_the_mean_of_its_tokens(tmp_path: Path) -> None:
    """One vector a scan, as `ssl-ray embed` has it for the file."""
    torch.manual_seed(0)
    path = tmp_path / "best.safetensors"
    autoencoder = build_autoencoder(NETWORK, PATCH)
    export(path, autoencoder.state_dict(), describe(NETWORK, PATCH) | metadata(PREPARATION))
    scan = scan_of(OBLIQUE)
    found = _load_pyfunc(str(path)).predict(scan, {"affine": OBLIQUE.ravel().tolist()})
    canonical = prepare(Nifti(np.asfortranarray(scan), OBLIQUE), None, PREPARATION)
    assert found.shape == (NETWORK.hidden_size,)
    np.testing.assert_array_equal(found, read_embedder(str(path))[0].tokens(canonical).features.mean(0))


@pytest.mark.slow
def test_mlflow_loads_it_without_our_sources(model_file: Path, tmp_path: Path) -> None:
    """In a process that does not find the checkout, the code beside the weights gives the same labels."""
    grid = read_model(str(model_file)).metadata.preparation
    network = NetworkFile("n02", str(model_file), file_digest(model_file), 1, True, 1, grid.spacing)
    _write(tmp_path / "model", network, "m-1", "r-1")
    scan = scan_of(OBLIQUE)
    np.savez(tmp_path / "scan.npz", image=scan, affine=OBLIQUE)
    checkout = str(Path(__file__).parents[2])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    arguments = [str(tmp_path / "model"), str(tmp_path / "scan.npz"), checkout]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    source, loaded = json.loads(done.stdout.splitlines()[-1])
    assert source.startswith(str(tmp_path / "model" / "code"))
    assert not loaded, "what trains is not needed"
    expected = _load_pyfunc(str(model_file)).predict(scan, {"affine": OBLIQUE.ravel().tolist()})
    np.testing.assert_array_equal(np.load(tmp_path / "scan.npz.labels.npy"), expected)
    assert np.load(tmp_path / "scan.npz.example.npy").shape == (8, 8, 8)
