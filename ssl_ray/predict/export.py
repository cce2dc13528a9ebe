"""A model in the formats that other programs read."""

import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from ssl_ray.errors import UserError
from ssl_ray.networks.model_file import MODEL_FILE
from ssl_ray.networks.weight_files import ENTRY, export, load_weights, read_entry
from ssl_ray.predict.model import Model, find, read_model
from ssl_ray.storage.files import appearing, read_file, write_file
from ssl_ray.storage.object_store import Place

Format = Literal["bundle", "onnx", "safetensors"]

TOLERANCE = 1e-3
"""Of logits in ONNX against torch, in float32, as a share of the largest: sums are taken in another order."""
_NEEDED: dict[Format, tuple[str, ...]] = {
    "bundle": ("fire", "ignite"),  # MONAI's to run one
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "safetensors": (),
}
_ENCODER_FILE = "best.safetensors"
"""In the folder of a pretraining."""


def export_model(place: str, form: Format, folder: Path, authors: str = "") -> list[Path]:
    """Write the model at a place (`predict.model.find`) into an empty folder -> the files that a user opens.

    After an error the folder is empty, or not there, as before.

    Raises:
        UserError: where there is no such model, the folder holds something, or a package of the extra is missing.
    """
    missing = [name for name in _NEEDED[form] if find_spec(name) is None]
    if missing:
        raise UserError(f"--format {form} needs {', '.join(missing)}: pip install 'ssl-ray[export]'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: must be a new or an empty folder")
    new = not folder.exists()
    try:
        return _write(place, form, folder, authors)
    except BaseException:  # Ctrl-C, too
        for path in [folder] if new else [*folder.iterdir()]:
            Place(str(path)).remove()
        raise


def _write(place: str, form: Format, folder: Path, authors: str) -> list[Path]:
    if form == "safetensors":
        return _safetensors(place, folder)
    model = read_model(place)
    if form == "onnx":
        return [_onnx(model, folder / "model.onnx")]
    from ssl_ray.predict.bundle import write_bundle  # MONAI takes seconds to load

    write_bundle(model, folder, authors)
    return [folder / "docs" / "README.md", folder / "configs" / "inference.json"]


def _safetensors(place: str, folder: Path) -> list[Path]:
    """A segmentation model's file as it is; a pretrained encoder also as a torch file, for MONAI's notebooks."""
    path = find(place, MODEL_FILE, _ENCODER_FILE)
    told = read_entry(path)
    if "organs" in told:
        write_file(folder / MODEL_FILE, read_file(read_model(str(path)).path))
        return [folder / MODEL_FILE]
    folder.mkdir(parents=True, exist_ok=True)
    export(folder / _ENCODER_FILE, load_weights(path), told)
    return [folder / _ENCODER_FILE, (folder / _ENCODER_FILE).with_suffix(".pt")]


def _onnx(model: Model, path: Path) -> Path:
    """From patches (B, C, X, Y, Z), any B, to logits, with the metadata; kept only if it gives torch's logits."""
    import onnx
    import onnxruntime

    told, network = model.metadata, model.network.eval()
    patches = torch.rand(2, told.preparation.channels, *told.patch_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(patches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MONAI's DynUNet, what its heads keep for a loss
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # operators of torchvision, which no network here has
        program = torch.onnx.export(
            network,
            (patches,),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["patches"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    note = {**told.model_dump(mode="json"), "tolerance": TOLERANCE}
    onnx.helper.set_model_props(graph, {ENTRY: json.dumps(note, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as part:
        part.write_bytes(graph.SerializeToString())
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"patches": patches.numpy()})
        apart = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
        if not apart <= TOLERANCE:
            raise UserError(
                f"{path}: not kept, as its logits differ from torch's by {apart:.2g}, more than {TOLERANCE}"
            )
    return path
