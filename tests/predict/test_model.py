"""Model files: what is written is read, wherever it lies, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tiny_model import metadata, write_model

from ssl_ray.errors import UserError
from ssl_ray.networks.model_file import MODEL_FILE, read_metadata
from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.weight_files import load_metadata, load_weights
from ssl_ray.predict.model import read_model


def test_a_model_is_found_by_its_file_its_folder_and_a_folder_above(tmp_path: Path) -> None:
    """With equal weights and all that was told of it, to the last digit."""
    model = write_model(tmp_path / "cell")
    for place in (tmp_path / "cell" / MODEL_FILE, tmp_path / "cell", tmp_path):
        found = read_model(str(place))
        assert found.metadata == metadata()
        state = found.network.state_dict()
        assert all(torch.equal(state[name], value) for name, value in load_file(model.path).items())
    write_model(tmp_path / "other")
    with pytest.raises(UserError, match=r"there are 2: cell/model\.safetensors, other/model\.safetensors"):
        read_model(str(tmp_path))
    with pytest.raises(UserError, match="nowhere: no such model"):
        read_model(str(tmp_path / "nowhere"))


def test_mlflow_keeps_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact of a run is a model, and a run that is not there is the user's to mend."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    model, client = write_model(tmp_path / "cell"), MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.create_run(client.create_experiment("a", artifact_location=str(tmp_path / "artifacts"))).info.run_id
    client.log_artifact(run, str(model.path), "network")
    for place in (f"runs:/{run}/network", f"runs:/{run}/network/{MODEL_FILE}"):
        assert read_model(place).metadata == model.metadata
    with pytest.raises(UserError, match="MLflow has no such model"):
        read_model("runs:/0123456789abcdef/network")


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    """The metadata are one entry, with its keys sorted."""
    first, second = (write_model(tmp_path / name).path.read_bytes() for name in "ab")
    assert first == second
    told = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])["__metadata__"]
    assert list(told) == ["ssl_ray"]
    assert json.dumps(json.loads(told["ssl_ray"]), sort_keys=True) == told["ssl_ray"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"format": 2}, "must have format 1, got 2"),
        ({"patch_size": [16, 16, 17]}, "multiple of 16"),
        ({"organs": []}, "organs: "),
        ({"preparation": {"spacing": 3}}, "preparation.normalise: "),
        ({"network": {"kind": "vnet"}}, "network"),
        ({"inference": {"overlap": 1, "batch": 1, "precision": "float32"}}, "inference.overlap: "),
        ({"more": 1}, "more: "),
    ],
)
def test_metadata_of_no_model_are_refused(tmp_path: Path, change: dict[str, Any], rule: str) -> None:
    """With the file, the key and the rule, in one line."""
    told = json.loads(metadata().model_dump_json()) | change
    path = tmp_path / MODEL_FILE
    path.write_bytes(save({"a": torch.ones(1)}, {"ssl_ray": json.dumps(told)}))
    with pytest.raises(UserError) as error:
        read_metadata(path)
    assert str(error.value).startswith(f"{path}: ")
    assert rule in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """Every tensor must be there in its shape, and no other."""
    path = write_model(tmp_path).path
    for changed in (load_file(path) | {"more": torch.ones(1)}, dict([*load_file(path).items()][1:])):
        path.write_bytes(save(changed, {"ssl_ray": json.dumps(json.loads(metadata().model_dump_json()))}))
        with pytest.raises(UserError, match="not the weights of its unetr"):
            assert read_model(str(path)).network


def test_another_training_may_start_from_a_model(tmp_path: Path) -> None:
    """Its encoder is taken over, and its number of heads, which no shape shows, is checked."""
    model = write_model(tmp_path)
    told = model.metadata
    target = build_segmentation(told.network, told.patch_size, 1, 7)
    assert transfer(load_weights(model.path), target, "a", load_metadata(model.path)).prefix == "vit."
    heads = told.network.model_copy(update={"num_heads": 6})
    with pytest.raises(UserError, match="trained with num_heads 3, but this network has 6"):
        transfer(
            load_weights(model.path), build_segmentation(heads, told.patch_size, 1, 7), "a", load_metadata(model.path)
        )


def test_networks_of_other_kinds_are_models_too(tmp_path: Path) -> None:
    """Primus, with the settings that its weights belong to."""
    primus = Primus(token=8, hidden_size=48, layers=2, num_heads=4)
    model = write_model(tmp_path, network=primus)
    assert model.metadata.network == primus
    assert model.network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 4, 16, 16, 16)
