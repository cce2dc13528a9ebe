"""The encoder's features of whole volumes, for retrieval and for other people's heads."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from ssl_ray.config.common import PatchSize
from ssl_ray.config.schema import Network, Preparation
from ssl_ray.data.datalist import Case
from ssl_ray.data.normalise import CanonicalVolume
from ssl_ray.errors import UserError
from ssl_ray.evaluate.sliding_window import centred, sliding_windows
from ssl_ray.networks.model_file import MODEL_FILE
from ssl_ray.networks.protocol import Encoder
from ssl_ray.networks.registry import build_encoder
from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.weight_files import load_metadata, load_weights, read_entry
from ssl_ray.predict.inputs import read_prepared
from ssl_ray.predict.model import find, fitted, read_model
from ssl_ray.storage.files import appearing, open_file
from ssl_ray.text import shown

_BATCH = 4
"""Patches at a time."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of a volume: their features (N, width) float32, their places (N, 3) in the grid and in mm (RAS+)."""

    features: NDArray[np.float32]
    places: NDArray[np.int32]
    centres: NDArray[np.float64]


@dataclass(frozen=True)
class Embedder:
    """A trained encoder, and how volumes are prepared for it."""

    encoder: Encoder
    preparation: Preparation

    def __call__(self, case: Case) -> Tokens:
        """The tokens of a case."""
        return self.tokens(read_prepared(case, self.preparation)[0])

    def on(self, device: torch.device) -> "Embedder":
        """The same, computing on a device."""
        return Embedder(self.encoder.to(device), self.preparation)

    @torch.inference_mode()
    def tokens(self, prepared: CanonicalVolume) -> Tokens:
        """The tokens that reach into a volume, which lies in the middle of as many whole patches as it takes."""
        encoder, size = self.encoder, prepared.image.shape[-3:]
        patch = [side * encoder.token for side in encoder.grid]
        whole = [length + -length % side for length, side in zip(size, patch, strict=True)]
        image, own = centred(torch.from_numpy(prepared.image).reshape(-1, *size), whole)
        windows, device = sliding_windows(whole, patch, 0), next(encoder.parameters()).device
        features = []
        for first in range(0, len(windows), _BATCH):
            some = torch.stack([image[:, *window] for window in windows[first : first + _BATCH]])
            tokens = encoder.encode(encoder.embed((some.float() / prepared.levels).to(device)))
            features.append(tokens.flatten(0, 1).float().cpu())
        inside = np.indices(encoder.grid).reshape(3, -1).T  # z fastest, as the tokens
        place = np.concatenate([inside + [side.start // encoder.token for side in window] for window in windows])
        voxel = place * encoder.token - [side.start for side in own]  # the first one of a token, in the volume
        reach = ((voxel + encoder.token > 0) & (voxel < size)).all(axis=1)
        centre = voxel[reach] + (encoder.token - 1) / 2
        centres = centre @ prepared.affine[:3, :3].T + prepared.affine[:3, 3]
        return Tokens(torch.cat(features).numpy()[reach], place[reach].astype(np.int32), centres)


def read_embedder(place: str) -> tuple[Embedder, Path]:
    """The encoder of a segmentation model or of a pretraining, and its file.

    Raises:
        UserError: for a network without encoder, and a file that does not say what its encoder is.
    """
    path = find(place, MODEL_FILE, "best.safetensors")
    entry = read_entry(path)
    if "format" in entry:
        model = read_model(str(path))
        encoder = getattr(model.network, "encoder", None)
        if not isinstance(encoder, Encoder):
            raise UserError(f"{path}: a {model.metadata.network.kind} has no encoder of tokens to take features from")
        return Embedder(encoder.eval(), model.metadata.preparation), path
    kinds = {kind.model_fields["kind"].default: kind for kind in get_args(get_args(Network)[0])}
    try:
        kind = kinds[entry["kind"]]
        network = kind.model_validate({key: _read(entry[key]) for key in kind.model_fields if key in entry})
        prepared = json.loads(entry["preparation"])
        preparation = Preparation.model_validate({key: prepared[key] for key in prepared if key != "version"})
        patch_size = TypeAdapter(PatchSize).validate_python(json.loads(entry["patch_size"]))
        network.check_patch("patch_size", patch_size)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        told = "its metadata do not say which encoder it is and how volumes are prepared for it"
        raise UserError(f"{path}: {told}, as a pretraining writes them: {shown(error, 200)}") from error
    build = partial(build_encoder, network, patch_size, preparation.channels)
    weights, metadata = load_weights(path), load_metadata(path)
    encoder = fitted(path, network.kind, build, lambda encoder: transfer(weights, encoder, str(path), metadata))
    return Embedder(encoder.eval(), preparation), path


def _read(value: str) -> Any:
    """A setting out of metadata, where `describe` wrote a string as it is, and anything else as JSON."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def write_features(
    outcomes: Iterable[tuple[Case, Tokens | UserError]], made_by: str, output: Path, tokens: bool
) -> tuple[int, dict[str, str]]:
    """Write features as Parquet, a row for each volume (their mean) or token -> number of rows, bad cases by image.

    `made_by`, the digest of the encoder's file, is kept in the metadata of the table. A UserError where there is
    another file that is no Parquet: a scan perhaps.
    """
    if output.exists():
        with open_file(output) as there:
            if there.read(4) != b"PAR1":
                raise UserError(f"{output}: is there already, and is no Parquet file; give another name")
    bad: dict[str, str] = {}
    numbers = [(name, pa.int32()) for name in ("i", "j", "k")] + [(name, pa.float64()) for name in ("x", "y", "z")]
    columns = [("case", pa.string()), *(numbers if tokens else []), ("features", pa.list_(pa.float32()))]
    schema = pa.schema(columns, metadata={"encoder_sha256": made_by})
    rows = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    # Opened by Python, whose errors name the file.
    with appearing(output) as part, part.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for case, found in outcomes:
            if isinstance(found, UserError):
                bad[str(case.image)] = str(found)
                continue
            table = _table(case.id, found, tokens)
            writer.write_table(pa.table(table, schema))
            rows += len(table["case"])
    return rows, bad


def _table(name: str, found: Tokens, tokens: bool) -> dict[str, Any]:
    """Columns of a volume's rows."""
    if not tokens:
        return {"case": [name], "features": [found.features.mean(0)]}
    grid = dict(zip("ijk", found.places.T, strict=True)) | dict(zip("xyz", found.centres.T, strict=True))
    return {"case": [name] * len(found.places), **grid, "features": list(found.features)}
