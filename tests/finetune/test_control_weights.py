"""Weights of a control: the script starts trials where the arms themselves start, at pretrained or at initial size."""

import runpy
from pathlib import Path

import pytest
import torch
from studies import small_tree, write_study

from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.networks.registry import build_autoencoder
from ssl_ray.networks.weight_files import describe, export
from ssl_ray.random import run_seed
from ssl_ray.study.experiment import load

SCRIPT = Path(__file__).parents[2] / "experiments" / "control_weights.py"
RUN, POSITIONS = 1, "vit.patch_embedding.position_embeddings"


@pytest.mark.parametrize("kind", ["shuffled", "rescaled"])
@pytest.mark.parametrize(
    ("pattern", "taken"),
    [("", {"positions", "rest"}), ("(?!)", set()), ("position_embeddings", {"positions"}), ("blocks|conv", {"rest"})],
)
def test_a_run_starts_where_its_arms_do(
    kind: str, pattern: str, taken: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it shuffled is the permuted arm, nothing the random one, number by number and the decoder too.

    Rescaled is the pretrained arm with tensors of the random one's size.
    """
    path = write_study(tmp_path / "study.yaml", small_tree())
    study = load(path)
    files = [tmp_path / f"{run}.safetensors" for run in range(RUN + 1)]
    for seed, file in enumerate(files):
        torch.manual_seed(100 + seed)
        size = study.pretrain.patch_size
        state = build_autoencoder(study.network, size, 1).state_dict()
        large = {name: 5 * torch.randn_like(value) for name, value in state.items()}
        export(file, large, describe(study.network, size))
    monkeypatch.setattr("sys.argv", [str(SCRIPT), kind, str(path), str(tmp_path / "made"), pattern, *map(str, files)])
    runpy.run_path(str(SCRIPT), run_name="__main__")

    def start(weights: Path | None, permuted: bool = False) -> dict[str, torch.Tensor]:
        seed, device = run_seed(study.seed, "finetune", RUN), torch.device("cpu")
        made = SegmentationLearner(study.finetune, study.network, device, seed, weights, permuted)
        return made.network.state_dict()

    random, given = start(None), start(files[RUN], permuted=kind == "shuffled")
    for name, value in start(tmp_path / "made" / f"run{RUN}.safetensors").items():
        of = "positions" if name == POSITIONS else "rest"
        if pattern.startswith("blocks") and not (".blocks." in name or ".conv" in name):
            of = "neither"
        expected = given[name] if of in taken else random[name]
        if kind == "rescaled" and of in taken and not torch.equal(expected, random[name]):  # the decoder is the same
            expected = expected * (torch.linalg.norm(random[name]) / torch.linalg.norm(expected))
            torch.testing.assert_close(value, expected)
        else:
            assert torch.equal(value, expected), name
    assert not torch.equal(random[POSITIONS], given[POSITIONS])
