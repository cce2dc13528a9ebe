"""Finds a trained model: a file, the folder of a cell, or what MLflow keeps."""

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ssl_ray.errors import UserError
from ssl_ray.networks.model_file import MODEL_FILE, Metadata, read_metadata
from ssl_ray.networks.weight_files import load_weights
from ssl_ray.text import shown

_Network = TypeVar("_Network", bound=nn.Module)
_REMOTE = ("runs:/", "models:/", "mlflow-artifacts:/")


@dataclass(frozen=True)
class Model:
    """A segmentation model: its file, and what that says of the weights."""

    path: Path
    metadata: Metadata

    @cached_property
    def network(self) -> nn.Module:
        """From patches to logits, with all weights or a UserError; once read, it goes along to other machines."""
        from ssl_ray.networks.registry import build_segmentation  # MONAI takes seconds to load

        told, weights = self.metadata, load_weights(self.path)
        build = partial(build_segmentation, told.network, told.patch_size, told.preparation.channels, told.classes)
        return fitted(self.path, told.network.kind, build, lambda network: network.load_state_dict(weights))


def fitted(path: Path, kind: str, build: Callable[[], _Network], load: Callable[[_Network], object]) -> _Network:
    """The network that `build` makes of what a file says, with the weights that `load` takes into it out of the file.

    A few bytes can promise a network of any size: a UserError where the weights do not fit one that has no memory yet.
    """
    try:
        with torch.device("meta"):
            promised = build()
        with warnings.catch_warnings(action="ignore"):  # that nothing is copied into it
            load(promised)
        network = build()
        load(network)
    except (RuntimeError, TypeError) as error:  # the latter by torch, of a side beyond 64 bits
        raise UserError(f"{path}: not the weights of its {kind}: {shown(error)}") from error
    return network


def read_model(place: str) -> Model:
    """The model at a place, whose metadata are checked; its weights are read when its network is asked for.

    `place`: a file, a folder with one model in it (a cell's), `runs:/<id>/<path>`, `models:/<name>@<alias>`.

    Raises:
        UserError: where there is no such place, no model, or one of another format.
    """
    path = find(place, MODEL_FILE)
    return Model(path, read_metadata(path))


def find(place: str, *names: str) -> Path:
    """The file of weights at a place: in a folder the one of these names, in it or else below it, that there is."""
    path = _download(place) if place.startswith(_REMOTE) else Path(place)
    if path.is_dir():
        here = [path / name for name in names if (path / name).is_file()]
        found = here or sorted(one for name in names for one in path.rglob(name))
        if len(found) != 1:
            rule = f"must be a folder with one {' or '.join(names)} in it or below it"
            first = ", ".join(str(one.relative_to(path)) for one in found[:3])
            raise UserError(f"{place}: {rule}; {f'there are {len(found)}: {first}' if found else 'there is none'}")
        return found[0]
    if not path.is_file():
        places = "a file, a folder, runs:/<id>/<path> or models:/<name>@<alias>"
        raise UserError(f"{place}: no such model: must be {places}")
    return path


def _download(uri: str) -> Path:
    """An artifact of MLflow, copied to this machine until this process ends.

    Where MLFLOW_TRACKING_URI is not set, that of the store that studies here have by default: MLflow itself would make
    an empty one.
    """
    if "MLFLOW_TRACKING_URI" not in os.environ:
        if not (store := Path("output/mlflow.db").absolute()).is_file():
            raise UserError(f"{uri}: set MLFLOW_TRACKING_URI, e.g. to sqlite:///<output folder>/mlflow.db")
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}"
    from ssl_ray.tracking.client import MlflowException, download_artifacts  # without MLflow's own bars of progress

    folder = tempfile.mkdtemp(prefix="ssl-ray-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return Path(download_artifacts(artifact_uri=uri, dst_path=folder))
    except (MlflowException, OSError) as error:
        raise UserError(f"{shown(uri)}: MLflow has no such model (see MLFLOW_TRACKING_URI): {shown(error)}") from error
