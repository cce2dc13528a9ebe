"""Networks as MLflow's logged models: a file of weights with the code that reads it, and what it was scored on.

The weights are a safetensors file and the code is this package as it is installed here, so that nothing is pickled and
`mlflow.pyfunc.load_model` needs neither our sources nor our version of them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ssl_ray.tracking.client import Client, MlflowException, entities
from ssl_ray.tracking.run import NetworkFile

_NEEDS = (
    *("torch", "monai", "einops", "numpy", "scipy", "nibabel", "isal"),
    *("pyarrow", "pydantic", "pyyaml", "safetensors", "rich"),
)
"""Packages that the code of a model imports."""
LOADER = "ssl_ray.predict.pyfunc"
"""Module that reads a model's file; a room above this one, so that it is named and not imported."""
BEST = "best"
"""Alias of the version of a registered model that did best on validation."""


def told(context: str, name: str, source: str, volumes: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Volumes, each by its key and the patient or nothing, as a dataset of MLflow: `name`, digest, source, counts.

    `context`: pretraining, training, ...
    """
    return {
        "context": context,
        "name": name,
        "digest": hashlib.sha256(json.dumps(volumes).encode()).hexdigest()[:16],
        "source": source,
        "profile": {"volumes": len(volumes), "subjects": len({subject for _, subject in volumes if subject})},
    }


def dataset_input(one: Mapping[str, Any]) -> entities.DatasetInput:
    """What `told` told, as MLflow takes it."""
    source, profile = json.dumps({"uri": one["source"]}), json.dumps(one["profile"])
    dataset = entities.Dataset(one["name"], one["digest"], "local", source, profile=profile)
    return entities.DatasetInput(dataset, [entities.InputTag("mlflow.data.context", one["context"])])


def find_model(client: Client, run_id: str) -> entities.LoggedModel | None:
    """The model that a run has logged, whole or not; a run logs one."""
    experiment = client.get_run(run_id).info.experiment_id
    return next(iter(client.search_logged_models([experiment], f"source_run_id = '{run_id}'")), None)


def log_model(client: Client, run_id: str, made: NetworkFile) -> None:
    """Log the model with its run, or what is missing of it."""
    run = client.get_run(run_id)
    if (model := find_model(client, run_id)) is None:
        tags, kind = {"ssl_ray.digest": made.digest}, "segmenter" if made.segments else "encoder"
        model = client.create_logged_model(run.info.experiment_id, made.name, run_id, tags, model_type=kind)
    if model.status != entities.LoggedModelStatus.READY:
        with TemporaryDirectory(prefix="ssl-ray-model-") as scratch:
            folder = Path(scratch) / "model"
            _write(folder, made, model.model_id, run_id)
            client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, entities.LoggedModelStatus.READY)
    if model.model_id not in {one.model_id for one in run.outputs.model_outputs}:
        client.log_outputs(run_id, [entities.LoggedModelOutput(model.model_id, made.step)])


def _write(folder: Path, made: NetworkFile, model_id: str, run_id: str) -> None:
    """What MLflow keeps: `MLmodel`, `data/<weights>`, `code/ssl_ray`, an example, and what is to be installed."""
    from mlflow.models import Model, ModelSignature  # not above: they take a second, and most runs have no model
    from mlflow.pyfunc import save_model
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    example = np.linspace(-200, 300, 8**3, dtype=np.float32).reshape(8, 8, 8)
    if made.channels > 1:
        example = np.stack([example] * made.channels)
    affine = np.diag([*made.spacing, 1.0]).ravel().tolist()
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.float32), (*example.shape[:-3], -1, -1, -1))]),
        Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1)) if made.segments else TensorSpec(example.dtype, (-1,))]),
        ParamSchema([ParamSpec("affine", "double", affine, (-1,))]),  # 4 x 4, row by row
    )
    save_model(
        folder,
        mlflow_model=Model(model_id=model_id, run_id=run_id),
        loader_module=LOADER,
        data_path=made.weights,
        code_paths=[str(Path(__file__).parents[1])],
        signature=signature,
        input_example=example,
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _NEEDS],
    )


def register(client: Client, name: str, about: str, run_id: str, description: str) -> None:
    """Make the model of a run the best version of a registered model; nothing changes where it is that already."""
    if (model := find_model(client, run_id)) is None:
        return
    try:
        client.create_registered_model(name, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_registered_model(name, about)
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")  # a run has one model
    new = {"run_id": run_id, "description": description, "model_id": model.model_id}
    found = known[0] if known else client.create_model_version(name, model.artifact_location, **new)
    client.set_registered_model_alias(name, BEST, found.version)
