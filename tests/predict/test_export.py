"""A model that travels: MONAI runs the bundle without us and gives our labels, ONNX gives our logits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy import stats
from tiny_model import write_model
from volumes import oblique_affine, smooth_ct, write_nifti

from ssl_ray.cli.main import main
from ssl_ray.config.schema import Preparation
from ssl_ray.data.datalist import Case
from ssl_ray.errors import UserError
from ssl_ray.networks.dynunet.settings import DynUnet
from ssl_ray.networks.model_file import Metadata
from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.registry import build_autoencoder
from ssl_ray.networks.unetr.settings import Unetr
from ssl_ray.networks.weight_files import describe, export
from ssl_ray.predict import export as exporting
from ssl_ray.predict.case import Outputs, predict_case
from ssl_ray.predict.export import TOLERANCE, export_model
from ssl_ray.predict.model import read_model
from ssl_ray.predict.segment import Segmenter, manner_of

NETWORKS = {
    "unetr": Unetr(hidden_size=24, mlp_dim=48, num_heads=3, feature_size=4),
    "dynunet": DynUnet(filters=(4, 8, 12, 16)),
    "primus": Primus(token=8, hidden_size=24, layers=2, num_heads=2),
}
PATCH = (32, 32, 32)
CT = Preparation(spacing=(1.5, 1.5, 2), hu_window=(-175, 250))
MRI = Preparation(spacing=(2, 2, 2), normalise="zscore", orientation="LPS", channels=2)
ORGANS = ("$liver | left", "spleen", "aorta")
REQUIRED = {  # of meta_schema_20240725.json
    *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
    *("task", "description", "authors", "copyright", "network_data_format"),
}
TENSOR = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"}
SCHEMA = os.environ.get("MONAI_BUNDLE_SCHEMA", "")
"""Path of that schema, which comes from the network."""


def make_model(folder: Path, kind: str, preparation: Preparation = CT) -> Path:
    """A model that was never trained, in a trial's folder with the scores of three patients."""
    cases = [
        {"case": str(number), "subject": subject, "dice": [1, dice, dice, None], "original_dice": [dice, dice, None],
         "original_hd95": [2, 3, None], "original_surface_dice": [dice, 0.5, None]}
        for number, (subject, dice) in enumerate([("a", 0.5), ("b", 0.7), ("c", 0.9)])
    ]  # fmt: skip
    facts: dict[str, Any] = {
        "network": NETWORKS[kind],
        "patch_size": PATCH,
        "preparation": preparation,
        "organs": ORGANS,
        "data": {"training": (6, "0123456789abcdef"), "test": (3, "fedcba9876543210")},
        "scores": {"test": {"original_dice_foreground": 0.7, "original_dice/spleen": 0.7}},
    }
    model = write_model(folder, seed=1, **facts)
    (folder / "evaluation.json").write_text(json.dumps({"test": cases}))
    return model.path


def write_scans(folder: Path, channels: int) -> list[list[Path]]:
    """An oblique one of thick slices, one with half the spacing of the prepared grid, and a sheared one, flipped.

    The body goes from their first slice to their last; that of the second lies half a voxel beyond the last centre of
    the prepared grid.
    """
    sheared = oblique_affine((1.1, 1.3, 1.9), 0, flip=True)
    sheared[0, 1] = 0.3
    grids = [
        ((44, 38, 10), oblique_affine((0.8, 1.1, 5), 25)),
        ((70, 80, 40), np.diag([-0.75, 0.75, 1, 1])),
        ((40, 34, 22), sheared),
    ]
    scans = []
    for number, (shape, affine) in enumerate(grids):
        names = [f"scan{number}_{channel:04d}.nii.gz" for channel in range(channels)]
        scans.append([
            write_nifti(folder / name, smooth_ct((*shape[:2], shape[2] + 4), 10 * number + channel)[..., 2:-2], affine)
            for channel, name in enumerate(names if channels > 1 else [f"scan{number}.nii.gz"])
        ])  # fmt: skip
    return scans


def our_labels(place: Path, images: list[Path], output: Path) -> Any:
    """The label map that `ssl-ray predict` writes."""
    model = read_model(str(place))
    segmenter = Segmenter([model], manner_of(model.metadata)[0], torch.device("cpu"))
    predict_case(Case("case", images[0], others=tuple(images[1:])), segmenter, Outputs(output))
    return nib.load(output / "case.nii.gz")


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def run_bundle(bundle: Path, scans: Path, output: Path) -> None:
    """By MONAI's own command, in a Python that cannot import our package."""
    blocked = output.parent / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text("import sys\nsys.modules['ssl_ray'] = None\n")
    config = ["--config_file", "configs/inference.json", "--dataset_dir", str(scans), "--output_dir", str(output)]
    command = [sys.executable, "-m", "monai.bundle", "run", *config]
    environment = os.environ | {"PYTHONPATH": str(blocked), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "preparation"),
    [("unetr", CT), ("dynunet", CT), ("primus", MRI)],
    ids=["unetr", "dynunet", "primus-mri"],
)
def test_monai_alone_gives_our_labels(tmp_path: Path, kind: str, preparation: Preparation) -> None:
    """Voxel for voxel on the scan's own grid, with its affine, although MONAI has neither our code nor resampling."""
    place = make_model(tmp_path / "cell", kind, preparation)
    scans = write_scans(tmp_path / "scans", preparation.channels)
    export_model(str(place.parent), "bundle", tmp_path / "bundle")
    run_bundle(tmp_path / "bundle", tmp_path / "scans", tmp_path / "labels")
    for images in scans:
        ours = our_labels(place, images, tmp_path / images[0].stem)
        theirs = nib.load(tmp_path / "labels" / images[0].name.replace("_0000", ""))
        assert theirs.get_data_dtype() == np.uint8
        np.testing.assert_allclose(theirs.affine, ours.affine, atol=1e-5)
        labels = np.asarray(ours.dataobj)
        assert (np.diff(labels.astype(int), axis=0) != 0).mean() > 0.002
        assert labels[..., [0, -1]].any(axis=(0, 1)).all() or images == scans[2]
        np.testing.assert_array_equal(np.asarray(theirs.dataobj), labels)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_metadata_describe_the_network(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys of MONAI's schema are there, and the network takes and gives what they say (`verify_net_in_out`)."""
    from monai.bundle import verify_net_in_out

    bundle = tmp_path / "bundle"
    export_model(str(make_model(tmp_path / "cell", kind)), "bundle", bundle, authors="A. Radiologist")
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata.keys() >= REQUIRED
    image, pred = metadata["network_data_format"]["inputs"]["image"], metadata["network_data_format"]["outputs"]["pred"]
    assert image.keys() & pred.keys() >= TENSOR
    assert pred["channel_def"] == {"0": "background", "1": " $liver | left", "2": "spleen", "3": "aorta"}  # no code
    assert metadata["copyright"] == "Copyright (c) A. Radiologist"
    assert ("pydantic" in metadata["required_packages_version"]) == (bundle / "scripts").exists() == (kind == "primus")
    monkeypatch.syspath_prepend(str(bundle))
    files = {name: str(bundle / "configs" / f"{name}.json") for name in ("metadata", "inference")}
    verify_net_in_out("network_def", files["metadata"], files["inference"], device="cpu")


@pytest.mark.skipif(not Path(SCHEMA).is_file(), reason="MONAI_BUNDLE_SCHEMA does not name MONAI's schema, a download")
def test_the_metadata_are_valid(tmp_path: Path) -> None:
    """By `verify_metadata`, as MONAI's model zoo checks a bundle; the schema is read from a file instead of its URL."""
    from monai.bundle import verify_metadata

    export_model(str(make_model(tmp_path / "cell", "unetr")), "bundle", tmp_path / "bundle")
    path = tmp_path / "bundle" / "configs" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": Path(SCHEMA).absolute().as_uri()}))
    verify_metadata(str(path), tmp_path / "schema.json")


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    """Data, scores with Student's intervals over patients, organs in whatever characters, and what was not tested."""
    export_model(str(make_model(tmp_path / "cell", "dynunet")), "bundle", tmp_path / "a bundle")
    card = (tmp_path / "a bundle" / "docs" / "README.md").read_text()
    low, high = stats.t.interval(0.95, 2, 0.7, stats.sem([0.5, 0.7, 0.9]))
    assert f"| Dice of the organs, grid of the file | 0.700 ({max(low, 0):.3f} to {high:.3f}) |" in card
    assert f"| Dice, spleen | 0.700 ({low:.3f} to {high:.3f}) |" in card
    assert "| 1 | $liver \\| left |" in card
    assert "| training volumes | 6 (digest 0123456789abcdef) |" in card
    assert "hu_window | -175.0 to 250.0" in card
    assert "not tested on" in card
    assert "selected the weights" not in card
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {3}


@pytest.mark.parametrize("scores", [{}, {"validation": {"original_dice_foreground": 0.7}, "test": {}}])
def test_a_model_without_test_scores_has_a_card(tmp_path: Path, scores: dict[str, dict[str, float]]) -> None:
    """Which says what its scores are of, and that no other volume was looked at."""
    facts = {"patch_size": PATCH, "preparation": CT, "organs": ORGANS, "scores": scores}
    place = write_model(tmp_path / "cell", network=NETWORKS["dynunet"], **facts).path
    export_model(str(place), "bundle", tmp_path / "bundle")
    card = (tmp_path / "bundle" / "docs" / "README.md").read_text()
    assert "**Any volume that had no part in it**" in card
    assert ("the validation volumes above selected the weights" in card) == ("validation" in scores)
    assert ("It was not scored." in card) == (not scores)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("form", ["bundle", "safetensors"])
def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: exporting.Format, there: bool
) -> None:
    """So that the same command may be given again; a folder that was there, empty, stays."""
    encoder = tmp_path / "best.safetensors"
    export(encoder, build_autoencoder(NETWORKS["unetr"], PATCH).state_dict(), {})
    place, out = make_model(tmp_path / "cell", "dynunet") if form == "bundle" else encoder, tmp_path / "out"
    if there:
        out.mkdir()
    with monkeypatch.context() as broken:
        broken.setattr("ssl_ray.predict.bundle.model_card", raising(OSError("full")))
        broken.setattr("ssl_ray.networks.weight_files.write_file", raising(OSError("full")))
        with pytest.raises(OSError, match="full"):
            export_model(str(place), form, out)
    assert (list(out.iterdir()) == []) if there else not out.exists()
    assert all(path.is_file() for path in export_model(str(place), form, out))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_onnx_gives_the_logits_of_torch(tmp_path: Path, kind: str) -> None:
    """For other numbers of patches than it was traced with, and with the metadata inside."""
    import onnx
    import onnxruntime

    place = make_model(tmp_path / "cell", kind)
    (path,) = export_model(str(place), "onnx", tmp_path / "onnx")
    model, session = read_model(str(place)), onnxruntime.InferenceSession(path)
    for count in (1, 3):
        patches = torch.randn(count, 1, 32, 32, 32)
        with torch.inference_mode():
            expected = model.network.eval()(patches).numpy()
        (found,) = session.run(["logits"], {"patches": patches.numpy()})
        np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    (entry,) = graph.metadata_props
    told = json.loads(entry.value)
    assert told.pop("tolerance") == TOLERANCE
    assert Metadata.model_validate(told) == model.metadata


def test_safetensors_are_the_file_itself(tmp_path: Path) -> None:
    """Of a segmentation model to the byte; a pretrained encoder comes with the torch file of MONAI's notebooks."""
    place = make_model(tmp_path / "cell", "unetr")
    (copy,) = export_model(str(tmp_path / "cell"), "safetensors", tmp_path / "model")
    assert copy.read_bytes() == place.read_bytes()

    encoder = build_autoencoder(NETWORKS["unetr"], PATCH)
    (tmp_path / "pretrain").mkdir()
    told = describe(NETWORKS["unetr"], PATCH) | {"task": "restoration"}
    export(tmp_path / "pretrain" / "best.safetensors", encoder.state_dict(), told)
    safe, pickled = export_model(str(tmp_path / "pretrain"), "safetensors", tmp_path / "encoder")
    assert safe.read_bytes() == (tmp_path / "pretrain" / "best.safetensors").read_bytes()
    state = torch.load(pickled, weights_only=True)["state_dict"]
    with safe_open(safe, "pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in state.items())
    assert state.keys() == encoder.state_dict().keys()


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that holds something, an encoder as a network that segments, a package that is missing: in words."""
    place = make_model(tmp_path / "cell", "unetr")
    with pytest.raises(UserError, match="must be a new or an empty folder"):
        export_model(str(place), "safetensors", tmp_path / "cell")
    encoder = tmp_path / "best.safetensors"
    export(encoder, build_autoencoder(NETWORKS["unetr"], PATCH).state_dict(), {})
    with pytest.raises(UserError, match="not a segmentation model"):
        export_model(str(encoder), "bundle", tmp_path / "bundle")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    for form in ("onnx", "bundle"):
        with pytest.raises(UserError, match=r"pip install 'ssl-ray\[export\]'"):
            export_model(str(place), form, tmp_path / form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "best.safetensors", "cell"]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 and the files to open; 2 and one line where there is no such model."""
    place = make_model(tmp_path / "cell", "dynunet")
    assert main(["export", str(place), "--format", "safetensors", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "model.safetensors")
    assert main(["export", str(tmp_path / "none"), "--output", str(tmp_path / "more")]) == 2
    assert "no such model" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
