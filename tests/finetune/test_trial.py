"""One UNETR training, without Ray: it starts from what it should, resumes exactly, and selects its best checkpoint."""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from events import after_steps, in_network, on_open, on_rename
from monai.networks.nets import UNETR
from safetensors import safe_open
from safetensors.torch import load_file
from studies import small_study
from torch import Tensor, nn
from volumes import oblique_affine, organ_labels, smooth_ct, write_nifti

from ssl_ray.config.finetune import EncoderTuning
from ssl_ray.config.schema import Study
from ssl_ray.data.datalist import Case
from ssl_ray.data.patch import open_array
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.store import Store
from ssl_ray.evaluate.planes import cut as cut_planes
from ssl_ray.evaluate.planes import from_npz
from ssl_ray.evaluate.scores import CaseScores
from ssl_ray.finetune.job import Record, TrialData, TrialJob
from ssl_ray.finetune.trial import Trial
from ssl_ray.networks.flops import network_cost
from ssl_ray.networks.registry import build_autoencoder, build_segmentation
from ssl_ray.networks.weight_files import describe, export
from ssl_ray.storage.files import write_file
from ssl_ray.storage.mirror import Mirror

CPU = torch.device("cpu")

Whole = tuple[list[Record], Path]
"""Records and folder of a trial."""


@pytest.fixture(scope="module")
def study() -> Study:
    return small_study(
        finetune={
            "cohort": {"classes": 3},
            "preparation": {"spacing": 3},
            "patches_per_volume": 2,
            "steps": 12,
            "validate_every": 4,
            "checkpoint_minutes": 0,
            "optimizer": {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 2},
        }
    )


@pytest.fixture(scope="module")
def data(study: Study, tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    """Four small labelled volumes on oblique, anisotropic grids."""
    tmp_path = tmp_path_factory.mktemp("data")
    store, volumes = Store(tmp_path / "cache"), []
    for number in range(4):
        affine = oblique_affine((2.5, 2.5, 4.0), 10.0 * number, flip=number % 2 == 1)
        image = write_nifti(tmp_path / f"image{number}.nii.gz", smooth_ct((24, 22, 16), number), affine)
        label = write_nifti(tmp_path / f"label{number}.nii.gz", organ_labels((24, 22, 16), 3, number), affine)
        case = Case(f"case{number}", image, label)
        volumes.append(prepare_case(case, study.finetune.preparation, store)[0])
    return TrialData(store, tuple(volumes[:2]), (volumes[2],), (volumes[3],), ("first", "second"))


KEY = "key of the cell"


def job(
    study: Study, data: TrialData, folder: Path, seed: int = 2, weights: Path | None = None, key: str = KEY
) -> TrialJob:
    """A cell; with seed 2 its Dice is better at every validation."""
    return TrialJob(study.finetune, study.network, seed, data, weights, folder, Mirror(folder), key)


def plain(records: Iterable[Record]) -> list[Record]:
    """Without what a clock says."""
    return [(step, {k: v for k, v in metrics.items() if not k.startswith("system/")}) for step, metrics in records]


def make(study: Study, data: TrialData, folder: Path, **options: Any) -> Trial:
    return Trial(job(study, data, folder, **options), CPU)


def start(study: Study, data: TrialData, folder: Path, **options: Any) -> Generator[Record, None, None]:
    """The records of a trial, which can be closed like a process that is killed; the last one is its evaluation."""
    trial = make(study, data, folder, **options)
    yield from trial.train()
    yield study.finetune.steps, trial.evaluate()


def reports(study: Study, data: TrialData, folder: Path, **options: Any) -> list[Record]:
    return plain(start(study, data, folder, **options))


def changed(study: Study, **settings: Any) -> Study:
    return study.model_copy(update={"finetune": study.finetune.model_copy(update=settings)})


def history(*runs: Iterable[Record]) -> dict[tuple[int, bool], dict[str, float]]:
    """What a driver keeps of a trial that was started several times: of every step, what came first."""
    kept: dict[tuple[int, bool], dict[str, float]] = {}
    for step, metrics in (record for run in runs for record in run):
        if "started_at" not in metrics:
            kept.setdefault((step, "selected/step" in metrics), metrics)
    return kept


def results(folder: Path) -> tuple[dict[str, Tensor], str]:
    return load_file(folder / "model.safetensors"), (folder / "evaluation.json").read_text()


def assert_same(folder: Path, other: Path) -> None:
    (weights, evaluation), (others, expected) = results(folder), results(other)
    assert evaluation == expected
    files = [(place / "model.safetensors").read_bytes() for place in (folder, other)]
    assert files[0] == files[1], "a digest of the file is one of the training"
    assert weights.keys() == others.keys()
    for name, value in others.items():
        assert torch.equal(weights[name], value), name


@pytest.fixture(scope="module")
def whole(study: Study, data: TrialData, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Records and folder of the trial that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    return reports(study, data, folder), folder


@pytest.mark.parametrize("tested", [True, False], ids=["test", "validation"])
def test_planes_of_the_volumes_that_count_are_kept(study: Study, data: TrialData, tmp_path: Path, tested: bool) -> None:
    """Of the test volumes, or the validation volumes where there is no test part: what the network sees, as it is."""
    study = changed(study, steps=2, validate_every=2)
    trial = make(study, data if tested else replace(data, test=()), tmp_path)
    list(trial.train())
    trial.evaluate()
    (volume,) = data.test if tested else data.validation
    ((name, planes),) = from_npz((tmp_path / "planes.npz").read_bytes()).items()
    assert name == volume.id
    label, image = (open_array(data.store, volume.key, one) for one in ("label", "image"))
    prediction = trial.learner.predict(torch.from_numpy(np.array(image, np.float32))[None] / volume.levels).numpy()
    expected = cut_planes(image, prediction, label, np.array(volume.affine))
    for layers, same in zip(planes.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(layers, same)


@pytest.mark.parametrize("minutes", [0, 1000], ids=["often", "rarely"])
@pytest.mark.parametrize("seen", [1, 5, 8, 13])
def test_a_trial_that_was_cut_off_ends_as_if_it_had_not_been(
    study: Study, data: TrialData, tmp_path: Path, whole: Whole, seen: int, minutes: int
) -> None:
    """Cut off after any record and started again, also from an older checkpoint, it says the same and ends the same."""
    study = changed(study, checkpoint_minutes=minutes)
    trial = start(study, data, tmp_path / "cut")
    first = plain(next(trial) for _ in range(seen))
    trial.close()
    rest = reports(study, data, tmp_path / "cut")
    step = first[-1][0]
    assert rest[0][1] == {"started_at": step // 4 * 4 if minutes == 0 or step == 12 else 0}
    assert history(first, rest) == history(whole[0])
    assert_same(tmp_path / "cut", whole[1])


def test_what_was_best_before_a_cut_stays_the_best(study: Study, data: TrialData, tmp_path: Path) -> None:
    """Where Dice falls from the first validation on, a trial that was cut off after the second selects the first."""
    whole = reports(study, data, tmp_path / "whole", seed=0)
    assert whole[-1][1]["selected/step"] == 4
    trial = start(study, data, tmp_path / "cut", seed=0)
    first = plain(next(trial) for _ in range(9))
    trial.close()
    assert history(first, reports(study, data, tmp_path / "cut", seed=0)) == history(whole)
    assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seen", [5, 10])
def test_a_cut_does_not_change_when_the_encoder_is_trained(
    study: Study, data: TrialData, tmp_path: Path, seen: int
) -> None:
    """Cut off before and after the step from which on it is, a trial ends as if it had not been."""
    study = changed(study, encoder=EncoderTuning(freeze=6, layer_decay=0.5))
    reports(study, data, tmp_path / "whole")
    trial = start(study, data, tmp_path / "cut")
    for _ in range(seen):
        next(trial)
    trial.close()
    reports(study, data, tmp_path / "cut")
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_what_the_driver_did_not_get_is_said_again(study: Study, data: TrialData, tmp_path: Path, whole: Whole) -> None:
    """Records between the last two checkpoints come again, so that a driver killed after the newer one loses none."""
    trial = start(study, data, tmp_path / "cut")
    first = plain(next(trial) for _ in range(9))
    trial.close()
    assert first[-1][0] == 8
    rest = reports(study, data, tmp_path / "cut")
    assert rest[0][1] == {"started_at": 8}
    assert history(first[:5], rest) == history(whole[0]), "the driver had got those up to step 4"


class CutError(Exception):
    pass


def cut(*_: Any) -> None:
    raise CutError


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    raise CutError


def in_validation(folder: Path) -> AbstractContextManager[None]:
    """While the network predicts, after the first validation."""

    def fault(network: nn.Module, image: Tensor) -> None:
        if not network.training and (folder / "checkpoints" / "00000004").exists():
            raise CutError

    return in_network(UNETR, fault)


FAULTS: dict[str, Callable[[Path], AbstractContextManager[None]]] = {
    "step": lambda folder: after_steps(6, cut),
    "validation": in_validation,
    "checkpoint": lambda folder: on_open(f"{folder}/checkpoints/.00000008-*/state.pt", half),
    "manifest": lambda folder: on_rename(f"{folder}/checkpoints/00000008", cut),
    "evaluation": lambda folder: on_open("*/label3.nii.gz", cut),
    "unetr": lambda folder: on_rename(f"{folder}/model.safetensors", cut),
    "evaluation.json": lambda folder: on_rename(f"{folder}/evaluation.json", cut),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_inside_leaves_nothing_half_done(
    study: Study, data: TrialData, tmp_path: Path, whole: Whole, fault: str
) -> None:
    """In a step, a validation, a write or the evaluation: no half-written result, and the next start ends the same."""
    first: list[Record] = []
    with FAULTS[fault](tmp_path / "cut"), pytest.raises(CutError):
        first.extend(start(study, data, tmp_path / "cut"))
    assert not (tmp_path / "cut" / "evaluation.json").exists()
    assert (tmp_path / "cut" / "model.safetensors").exists() == (fault == "evaluation.json")
    rest = reports(study, data, tmp_path / "cut")
    assert rest[0][1] == {"started_at": 12 if fault in ("evaluation", "unetr", "evaluation.json") else 4}
    assert history(plain(first), rest) == history(whole[0])
    assert_same(tmp_path / "cut", whole[1])
    assert not [path for path in (tmp_path / "cut").iterdir() if path.name.startswith(".")], "no rubbish is left"


def interrupted(study: Study, data: TrialData, folder: Path) -> None:
    """A trial with checkpoints at steps 4 and 8, cut off at 9."""
    trial = start(study, data, folder)
    assert [next(trial)[0] for _ in range(10)][-1] == 9
    trial.close()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["00000004", "00000008"]


def tear(path: Path) -> None:
    os.truncate(path / "state.pt", 1000)


def tamper(path: Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def unfinished(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [tear, tamper, unfinished])
def test_a_damaged_checkpoint_is_not_used(
    study: Study,
    data: TrialData,
    tmp_path: Path,
    whole: Whole,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    """The one before is, or step 0 when both are damaged; each is named in a warning, and the trial ends the same."""
    for name, victims, start in (("one", [8], 4), ("both", [4, 8], 0)):
        interrupted(study, data, tmp_path / name)
        for step in victims:
            damage(tmp_path / name / "checkpoints" / f"{step:08d}")
        caplog.clear()
        found = reports(study, data, tmp_path / name)
        assert found[0][1] == {"started_at": start}
        assert f"{victims[-1]:08d}" in caplog.text
        assert_same(tmp_path / name, whole[1])


def test_a_checkpoint_of_another_configuration_is_refused(
    study: Study, data: TrialData, tmp_path: Path, whole: Whole, caplog: pytest.LogCaptureFixture
) -> None:
    """Put into the folder, it is passed over with a message, and the trial starts from step 0."""
    interrupted(study, data, tmp_path / "cut")
    found = reports(study, data, tmp_path / "cut", key="another key")
    assert found[0][1] == {"started_at": 0}
    assert "another configuration" in caplog.text
    assert_same(tmp_path / "cut", whole[1])


@pytest.mark.parametrize(
    ("minutes", "seconds", "expected"),
    [
        (0, (0, 0), [4, 8, 12]),
        (5, (10, 10), [12]),
        (5, (80, 80), [4, 8, 12]),
        (5, (40, 40), [8, 12]),
        (5, (80, 10), [4, 12]),
    ],
)
def test_checkpoints_are_written_when_they_are_due(
    study: Study,
    data: TrialData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: int,
    seconds: tuple[int, int],
    expected: list[int],
) -> None:
    """At every validation with 0 minutes, else by the clock and at the end; each has the weights that were best."""
    now, written, dice = [0.0], [], iter([0.5, 0.4, 0.6])
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("ssl_ray.finetune.trial.time", clock)
    monkeypatch.setattr("ssl_ray.finetune.trial.aggregate", lambda cases, organs: {"dice_foreground": next(dice)})

    def save(folder: Path, state: dict[str, Any], mirror: Mirror) -> None:
        same = all(torch.equal(state["best_weights"][name], value) for name, value in state["model"].items())
        written.append((state["step"], state["best_step"], same))

    monkeypatch.setattr("ssl_ray.finetune.trial.save_latest", save)
    for step, _ in make(changed(study, checkpoint_minutes=minutes), data, tmp_path).train():
        now[0] += seconds[step > 4]
    best = {4: (4, 4, True), 8: (8, 4, False), 12: (12, 12, True)}
    assert written == [best[step] for step in expected]


def poisoned(study: Study, data: TrialData, folder: Path, steps: list[int], **settings: Any) -> Trial:
    """A trial whose images of some steps hold a NaN."""
    trial = make(changed(study, **settings), data, folder)
    batch = trial.sampler.batch

    def damaged(step: int) -> tuple[Tensor, Tensor]:
        images, labels = batch(step)
        if step in steps:
            images[0, 0, 3, 3, 3] = math.nan
        return images, labels

    object.__setattr__(trial.sampler, "batch", damaged)
    return trial


def test_a_step_that_is_not_finite_changes_nothing(
    study: Study, data: TrialData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its weights and moments are those before it, the loss of the rest is finite, and what it was is kept."""
    trial = poisoned(study, data, tmp_path, [5])
    states = {}
    for step, metrics in trial.train():
        states[step] = {name: value.clone() for name, value in trial.learner.network.state_dict().items()}
        assert metrics.get("skipped_steps", 0) == (step == 6)
        assert ("loss" in metrics) == (step not in (0, 6))
    for name, value in states[6].items():
        assert torch.equal(value, states[5][name]), name
        assert torch.isfinite(states[12][name]).all(), name
    assert any(not torch.equal(value, states[6][name]) for name, value in states[7].items())
    assert {float(state["step"]) for state in trial.learner.optimizer.state_dict()["state"].values()} == {11.0}
    assert "skipped step 6: loss nan, gradient norm nan; patches 10 to 11 of seed 2, volumes case" in caplog.text

    kept = load_file(tmp_path / "faults" / "step_0000006.safetensors")
    with safe_open(tmp_path / "faults" / "step_0000006.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert [patch["patch"] for patch in facts["patches"]] == [10, 11]
    assert {patch["volume"] for patch in facts["patches"]} <= {"case0", "case1"}
    again = make(study, data, tmp_path / "again")
    again.learner.network.load_state_dict(
        {name[6:]: value for name, value in kept.items() if name.startswith("model.")}
    )
    assert torch.isnan(again.learner.objective(kept["images"], kept["labels"]))
    whole = again.sampler.batch(facts["step"] - 1)[0]
    assert torch.equal(whole, torch.where(kept["images"].isnan(), whole, kept["images"])), "addressed by the step"


def test_the_mean_loss_is_of_the_finite_ones(study: Study, data: TrialData, tmp_path: Path) -> None:
    """A record over several steps leaves out those whose loss is not finite."""
    every = dict(poisoned(study, data, tmp_path / "every", [5], validate_every=12).train())
    fourth = dict(poisoned(study, data, tmp_path / "fourth", [5], validate_every=40).train())
    finite = [every[step]["loss"] for step in (5, 7, 8)]
    assert fourth[8]["loss"] == pytest.approx(np.mean(finite), rel=1e-6)
    assert fourth[8]["skipped_steps"] == every[6]["skipped_steps"] == 1


def test_an_infinite_loss_with_finite_gradients_changes_nothing_either(
    study: Study, data: TrialData, tmp_path: Path
) -> None:
    """The loss counts, not only the gradients."""
    trial = make(study, data, tmp_path)
    before = {name: value.clone() for name, value in trial.learner.network.state_dict().items()}
    trial.learner.objective.register_forward_hook(lambda module, arguments, loss: loss + math.inf)
    loss, norm = trial.learner.step(*trial.sampler.batch(0), 1e-3)
    assert loss == math.inf
    assert not torch.isfinite(norm)
    for name, value in trial.learner.network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("settings", "steps", "last"),
    [
        ({"on_nonfinite": "stop"}, [5], 5),
        ({"max_skipped": 2}, [1, 2, 4, 5, 7, 8, 9, 10], 9),
        ({"max_skipped": 2}, [2, 3, 5, 6, 8, 9], None),
    ],
)
def test_the_policy_says_when_a_trial_ends(
    study: Study, data: TrialData, tmp_path: Path, settings: dict[str, Any], steps: list[int], last: int | None
) -> None:
    """`stop` at the first, `skip` at more in a row than `max_skipped`; in the step itself, with three of them kept."""
    trial = poisoned(study, data, tmp_path, steps, **settings)
    seen = []
    if last is None:
        seen = [step for step, _ in trial.train()]
        assert seen[-1] == 12
    else:
        with pytest.raises(FloatingPointError, match=rf"the last one was step {last + 1}: loss nan.*volumes case"):
            seen.extend(step for step, _ in trial.train())
        assert seen[-1] == last
    assert len(list((tmp_path / "faults").glob("*.safetensors"))) == min(
        3, len(steps) if last is None else sum(s <= last for s in steps)
    )


def test_skipped_steps_in_a_row_are_counted_across_a_restart(study: Study, data: TrialData, tmp_path: Path) -> None:
    """Two before the checkpoint and one after it are three."""
    trial = poisoned(study, data, tmp_path, [2, 3, 4], max_skipped=2)
    for step, _ in trial.train():
        if step == 4:
            break
    with pytest.raises(FloatingPointError, match=r"^3 step"):
        list(poisoned(study, data, tmp_path, [2, 3, 4], max_skipped=2).train())


def test_pretrained_and_random_differ_in_the_encoder_alone(study: Study, data: TrialData, tmp_path: Path) -> None:
    """The encoder is that of the file; the decoder has the initial weights that the random trial of the seed has."""
    torch.manual_seed(99)
    autoencoder = build_autoencoder(study.network, study.finetune.patch_size)
    weights = tmp_path / "weights.safetensors"
    export(weights, autoencoder.state_dict(), describe(study.network, study.finetune.patch_size))
    random = make(study, data, tmp_path).learner.network.state_dict()
    pretrained = make(study, data, tmp_path, weights=weights).learner.network.state_dict()
    source = autoencoder.state_dict()
    for name, value in pretrained.items():
        if name.startswith("vit."):
            assert torch.equal(value, source[name.removeprefix("vit.")]), name
        else:
            assert torch.equal(value, random[name]), name
    assert not torch.equal(
        random["vit.patch_embedding.patch_embeddings.weight"], source["patch_embedding.patch_embeddings.weight"]
    )


@pytest.mark.slow
def test_seeds_differ_and_repeat(study: Study, data: TrialData, tmp_path: Path) -> None:
    """A seed gives the same curve again, another seed another one."""
    one = reports(study, data, tmp_path / "one")
    assert reports(study, data, tmp_path / "again") == one
    other = reports(study, data, tmp_path / "other", seed=1)
    assert [metrics.get("loss") for _, metrics in other] != [metrics.get("loss") for _, metrics in one]


def test_the_best_checkpoint_on_validation_is_scored(
    study: Study, data: TrialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selected is the step with the highest foreground Dice on validation, and its weights, not the last; scored with
    the name of the subject.
    """
    data = replace(data, test=tuple(replace(volume, subject="p3") for volume in data.test))
    trial = make(study, data, tmp_path)
    dice, kept = iter([0.2, 0.7, 0.5]), []
    monkeypatch.setattr("ssl_ray.finetune.trial.aggregate", lambda cases, organs: {"dice_foreground": next(dice)})
    for step, metrics in trial.train():
        if "validation/dice_foreground" in metrics:
            kept.append((step, {name: value.clone() for name, value in trial.learner.network.state_dict().items()}))
    monkeypatch.undo()
    metrics = trial.evaluate()
    assert metrics["selected/step"] == 8
    assert [step for step, _ in kept] == [4, 8, 12]
    for name, value in trial.learner.network.state_dict().items():
        assert torch.equal(value, kept[1][1][name]), name
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert tree["step"] == 8
    scored = [CaseScores(**case) for case in tree["test"]]
    assert [(case.case, case.subject) for case in scored] == [("case3", "p3")]
    expected = np.mean([score for score in scored[0].original_dice or () if score is not None])
    assert metrics["selected/test/original_dice_foreground"] == pytest.approx(expected)


@pytest.fixture
def many(data: TrialData) -> TrialData:
    """More volumes to score than a trial has CPUs; some of them twice, as their order matters to `published_dice`."""
    training, validation, test = data.training, data.validation, data.test
    return replace(data, validation=validation + training + test, test=test + validation + training)


def test_volumes_scored_in_threads_are_those_scored_in_turn(
    study: Study, data: TrialData, many: TrialData, tmp_path: Path
) -> None:
    """With three CPUs a trial ends as with one: the same scores in the same order."""
    found = {}
    for cpus in (0.5, 1, 3):
        trial = make(changed(study, cpus_per_trial=cpus), many, tmp_path / str(cpus))
        trial.best_weights = {name: value.clone() for name, value in trial.learner.network.state_dict().items()}
        found[cpus] = trial.evaluate(), (tmp_path / str(cpus) / "evaluation.json").read_text()
    assert found[3] == found[1] == found[0.5]
    tree = json.loads(found[3][1])
    assert [case["case"] for case in tree["validation"]] == ["case2", "case0", "case1", "case3"]
    assert [case["case"] for case in tree["test"]] == ["case3", "case2", "case0", "case1"]


def test_a_volume_that_cannot_be_scored_ends_the_trial(
    study: Study, many: TrialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the error of the first such volume, no result, and no thread that goes on."""
    trial = make(changed(study, cpus_per_trial=3), many, tmp_path)
    trial.best_weights = trial.learner.network.state_dict()
    threads = threading.active_count()

    def vanished(path: Path) -> None:
        raise ValueError(f"{path}: cannot read: gone")

    monkeypatch.setattr("ssl_ray.finetune.trial.read_label", vanished)
    with pytest.raises(ValueError, match=r"label2\.nii\.gz: cannot read: gone"):
        trial.evaluate()
    assert not (tmp_path / "evaluation.json").exists()
    assert threading.active_count() == threads


def test_records_tell_what_a_trial_uses(study: Study, data: TrialData, tmp_path: Path) -> None:
    """Rate, wait, memory and arithmetic of its steps, under the names that a pretraining has too."""
    names = ("system/seconds_per_step", "system/patches_per_second", "system/data_wait_percentage")
    clock: dict[str, list[float]] = {name: [] for name in names}
    for step, metrics in make(study, data, tmp_path).train():
        system = {name for name in metrics if name.startswith("system/")}
        assert len(system) == (5 if step else 0)
        for name, values in clock.items() if step else ():
            values.append(metrics[name])
        if step:
            rate = metrics["system/patches_per_second"]
            flops = network_cost(
                build_segmentation, study.network, study.finetune.patch_size, 1, study.finetune.cohort.classes
            ).training
            assert metrics["system/teraflops_per_second_per_worker"] == pytest.approx(rate * flops / 1e12)
            assert metrics["system/worker_memory_peak_megabytes"] > 50
    seconds, rates, waits = map(np.array, clock.values())
    np.testing.assert_allclose(rates * seconds, 2)
    assert ((waits >= 0) & (waits <= 100)).all()


def test_weights_of_another_network_stop_the_trial(study: Study, data: TrialData, tmp_path: Path) -> None:
    """An encoder of another width is an error that names the file, before any step."""
    other = study.network.model_copy(update={"hidden_size": 96})
    weights = tmp_path / "other.safetensors"
    export(weights, build_autoencoder(other, (16, 16, 16)).state_dict(), describe(other, (16, 16, 16)))
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        next(start(study, data, tmp_path, weights=weights))


def test_a_trial_keeps_the_precision_it_was_begun_in(
    study: Study, data: TrialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is settled where the trial begins; a machine that would choose otherwise goes on in the same."""
    study = changed(study, precision="auto")
    monkeypatch.setattr("ssl_ray.finetune.trial.precision_of", lambda *_: torch.bfloat16)
    assert make(study, data, tmp_path / "a").learner.dtype == torch.bfloat16
    monkeypatch.undo()
    assert make(study, data, tmp_path / "b").learner.dtype == torch.float32
    again = make(study, data, tmp_path / "a")
    assert (again.learner.dtype, again.config.precision) == (torch.bfloat16, "bfloat16")


def test_arms_compute_in_one_precision(
    study: Study, data: TrialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whatever machine, as their difference would not be that of the weights they start from; also where both begin
    at once, and the one that has looked in vain finds what the other has written meanwhile."""
    study, both = changed(study, precision="auto"), tmp_path / "both"
    arms = [replace(job(study, data, tmp_path / name), settled=both) for name in ("random", "pretrained")]
    monkeypatch.setattr("ssl_ray.finetune.trial.precision_of", lambda *_: torch.bfloat16)
    with on_open(f"{both}/.*.part", lambda _: write_file(both / "precision.txt", b"float32")):
        assert Trial(arms[0], CPU).config.precision == "float32"
    assert Trial(arms[1], CPU).config.precision == "float32"
    assert make(study, data, tmp_path / "alone").config.precision == "bfloat16"
