"""One UNETR training, without Ray: it starts from what it should, resumes exactly, and selects its best checkpoint."""

import json

import numpy as np
import pytest
import torch
from volumes import oblique_affine, organ_labels, smooth_ct, write_nifti

from ssl_ray.cohort.cache import Store, prepare_case
from ssl_ray.cohort.datalist import Case
from ssl_ray.config import Study
from ssl_ray.finetune.metrics import CaseScores
from ssl_ray.finetune.trial import Cell, TrialData, _Trial, run_trial
from ssl_ray.networks import build_autoencoder, describe, export

CPU = torch.device("cpu")


@pytest.fixture
def study():
    preparation = {"spacing": 3, "window": [-175, 250]}
    tree = {
        "name": "trial",
        "network": {"hidden_size": 48, "mlp_dim": 64, "num_heads": 3, "feature_size": 4},
        "pretrain": {"sources": [{"root": "x", "datalist": "x.json"}], "preparation": preparation},
        "finetune": {
            "cohort": {"root": "x", "classes": 3, "splits": {2: "x.json"}},
            "preparation": preparation,
            "patch_size": 16,
            "patches_per_volume": 2,
            "steps": 12,
            "validate_every": 4,
            "optimizer": {"schedule": "cosine", "warmup_steps": 2},
            "precision": "float32",
        },
    }
    return Study.model_validate(tree)


@pytest.fixture
def data(study, tmp_path):
    """Four small labelled volumes on oblique, anisotropic grids."""
    store, volumes = Store(tmp_path / "cache"), []
    for number in range(4):
        affine = oblique_affine((2.5, 2.5, 4.0), 10.0 * number, flip=number % 2 == 1)
        image = write_nifti(tmp_path / f"image{number}.nii.gz", smooth_ct((24, 22, 16), number), affine)
        label = write_nifti(tmp_path / f"label{number}.nii.gz", organ_labels((24, 22, 16), 3, number), affine)
        case = Case(f"case{number}", image, label)
        volumes.append(prepare_case(case, study.finetune.preparation, store)[0])
    return TrialData(store.folder, tuple(volumes[:2]), (volumes[2],), (volumes[3],), ("first", "second"))


CELL = Cell(2, "random", 2e-3, 0)


def reports(study, data, folder, cell=CELL, weights=None):
    found = list(run_trial(study, cell, data, weights, folder, CPU))
    return [(step, {k: v for k, v in metrics.items() if k != "seconds_per_step"}) for step, metrics in found]


def test_a_trial_that_was_cut_off_ends_as_if_it_had_not_been(study, data, tmp_path):
    """Stopped after its first validation and started again, it yields the same metrics and evaluation."""
    whole = reports(study, data, tmp_path / "whole")
    trial = run_trial(study, CELL, data, None, tmp_path / "cut", CPU)
    for _, metrics in trial:
        if "validation/dice_foreground" in metrics:
            trial.close()
            break
    rest = reports(study, data, tmp_path / "cut")
    assert rest[0][0] == 5, "it goes on after the validation at step 4"
    assert rest == whole[-len(rest) :]
    evaluations = [(tmp_path / name / "evaluation.json").read_text() for name in ("whole", "cut")]
    assert evaluations[0] == evaluations[1]


def test_pretrained_and_random_differ_in_the_encoder_alone(study, data, tmp_path):
    """The encoder is that of the file; the decoder has the initial weights that the random trial of the seed has."""
    torch.manual_seed(99)
    autoencoder = build_autoencoder(study.network, study.finetune.patch_size)
    weights = tmp_path / "weights.safetensors"
    export(weights, autoencoder.state_dict(), describe(study.network, study.finetune.patch_size))
    random = _Trial(study, CELL, data, None, tmp_path, CPU).model.state_dict()
    pretrained = _Trial(study, Cell(2, "pretrained", 2e-3, 0), data, weights, tmp_path, CPU).model.state_dict()
    source = autoencoder.state_dict()
    for name, value in pretrained.items():
        if name.startswith("vit."):
            assert torch.equal(value, source[name.removeprefix("vit.")]), name
        else:
            assert torch.equal(value, random[name]), name
    assert not torch.equal(
        random["vit.patch_embedding.patch_embeddings.weight"], source["patch_embedding.patch_embeddings.weight"]
    )


def test_seeds_differ_and_repeat(study, data, tmp_path):
    """A seed gives the same curve again, another seed another one."""
    one = reports(study, data, tmp_path / "one")
    assert reports(study, data, tmp_path / "again") == one
    other = reports(study, data, tmp_path / "other", Cell(2, "random", 2e-3, 1))
    assert [metrics.get("loss") for _, metrics in other] != [metrics.get("loss") for _, metrics in one]


def test_the_best_checkpoint_on_validation_is_scored(study, data, tmp_path, monkeypatch):
    """Selected is the step with the highest foreground Dice on validation, and its weights, not the last."""
    trial = _Trial(study, CELL, data, None, tmp_path, CPU)
    dice, kept = iter([0.2, 0.7, 0.5]), []
    monkeypatch.setattr("ssl_ray.finetune.trial.aggregate", lambda cases, organs: {"dice_foreground": next(dice)})
    for step, metrics in trial.train():
        if "validation/dice_foreground" in metrics:
            kept.append((step, {name: value.clone() for name, value in trial.model.state_dict().items()}))
    monkeypatch.undo()
    metrics = trial.evaluate()
    assert metrics["selected/step"] == 8
    assert [step for step, _ in kept] == [4, 8, 12]
    for name, value in trial.model.state_dict().items():
        assert torch.equal(value, kept[1][1][name]), name
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert tree["step"] == 8
    scored = [CaseScores.from_json(case) for case in tree["test"]]
    assert [case.case for case in scored] == ["case3"]
    expected = np.mean([score for score in scored[0].original_dice if score is not None])
    assert metrics["selected/test/original_dice_foreground"] == pytest.approx(expected)


def test_weights_of_another_network_stop_the_trial(study, data, tmp_path):
    """An encoder of another width is an error that names the file, before any step."""
    other = study.network.model_copy(update={"hidden_size": 96})
    weights = tmp_path / "other.safetensors"
    export(weights, build_autoencoder(other, (16, 16, 16)).state_dict(), describe(other, (16, 16, 16)))
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        next(run_trial(study, Cell(2, "pretrained", 2e-3, 0), data, weights, tmp_path, CPU))
