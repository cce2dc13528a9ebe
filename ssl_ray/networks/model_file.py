"""The file of a segmentation network, `model.safetensors`: its weights, and all that prediction has to know of them.

The metadata are one entry, `ssl_ray`, of sorted JSON: equal trainings leave equal files. A file may come from anywhere,
so what it says is checked. The driver reads it, too: MONAI takes seconds to import and is not here.
"""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, ValidationError, model_validator
from safetensors.torch import save
from torch import Tensor

from ssl_ray.config.common import PatchSize, Section, WindowBatch
from ssl_ray.config.schema import Network, Preparation
from ssl_ray.errors import UserError
from ssl_ray.networks.weight_files import ENTRY, read_entry
from ssl_ray.text import shown

MODEL_FILE = "model.safetensors"
"""In the folder of a trial."""

_PACKAGES = "ssl-ray", "torch", "monai"


class Inference(Section):
    """How whole volumes were segmented when the model was scored; sliding windows of its patch size.

    overlap: of neighbouring windows, as a share of the patch side.
    weighting: of a window's voxels: all alike, or those in its middle most.
    batch: windows at a time.
    """

    overlap: float = Field(ge=0, lt=1)
    weighting: Literal["constant", "gaussian"] = "constant"
    batch: WindowBatch
    precision: Literal["float32", "bfloat16"]


class Metadata(Section):
    """What a model was made of and how it is used.

    preparation_version: number of the code that prepared its volumes.
    organs: names of the classes 1, 2, ...; class 0 is background.
    flip_axes: axes of the canonical volume along which it was trained to see patches mirrored.
    surface_tolerance: mm, of the surface Dice that it was scored by.
    versions: of the packages that trained it.
    data: number of the volumes for `training`, `validation` and `test`, and the digest of their keys in the store.
    lineage: study, cell, init, size, run, fold, lr, seed, pretraining (its key), step (selected on validation).
    scores: means over the volumes of `validation` and `test`, by name, as `evaluate.scores.aggregate` gives them.
    """

    format: Literal[1] = 1
    network: Network
    patch_size: PatchSize
    preparation: Preparation
    preparation_version: int
    organs: Annotated[tuple[str, ...], Field(min_length=1, max_length=255)]
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()
    inference: Inference
    surface_tolerance: PositiveFloat
    versions: dict[str, str]
    data: dict[str, tuple[int, str]] = Field(default_factory=dict)
    lineage: dict[str, str | int | float | None]
    scores: dict[str, dict[str, float]]

    @model_validator(mode="after")
    def _takes_its_patches(self) -> "Metadata":
        self.network.check_patch("patch_size", self.patch_size)
        return self

    @property
    def classes(self) -> int:
        """Organs and background."""
        return len(self.organs) + 1


def model_content(weights: Mapping[str, Tensor], metadata: Metadata) -> bytes:
    """The bytes of a model file."""
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    return save(contiguous, {ENTRY: json.dumps(metadata.model_dump(mode="json"), sort_keys=True)})


def read_metadata(path: Path) -> Metadata:
    """What a model file says of itself; a UserError where it is none, or one of another version."""
    found = read_entry(path)
    if found.get("format") != 1:
        rule = f"not a segmentation model as a trial of this version of ssl_ray writes it as {MODEL_FILE}"
        raise UserError(f"{path}: {rule}: its metadata must have format 1, got {shown(found.get('format', 'none'))}")
    try:
        return Metadata.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: its metadata are damaged: {shown(key, 80)}: {shown(first['msg'])}") from None


def versions() -> dict[str, str]:
    """Versions of the packages that a model's numbers depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name.replace("-", "_")] = "unknown"
    return found
