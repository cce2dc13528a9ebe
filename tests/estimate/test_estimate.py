"""What a study will take, told before it starts: exact where it can be, measured or unknown where it cannot."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import sliding_window_inference
from planned import write
from torch import Tensor

from ssl_ray.cli.main import main
from ssl_ray.config.schema import Study
from ssl_ray.estimate.measured import trial_seconds
from ssl_ray.estimate.probe import probe_finetuning
from ssl_ray.estimate.text import figure, render
from ssl_ray.estimate.volumes import Group, survey
from ssl_ray.estimate.work import count_windows, estimate_grid, estimate_pretraining
from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.networks.flops import network_cost
from ssl_ray.networks.registry import build_autoencoder, build_segmentation
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of
from ssl_ray.training.devices import DEVICES
from ssl_ray.training.optimizer import build_optimizer

ROOMY = {"cpus": 8, "gpus": 2}
UNTIMED = None, None
RECIPE = Path(__file__).parents[2] / "experiments" / "tcia_btcv.yaml"


def tree_of(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """The JSON of `ssl-ray plan`."""
    assert main(["plan", str(path), "--json", *options]) == 0
    tree: dict[str, Any] = json.loads(capsys.readouterr().out)
    return tree


def study_of(path: Path, *options: str) -> tuple[Study, dict[str, Group]]:
    study = load(path, options)
    return study, survey(study, folders_of(study))


def test_windows_are_counted_as_monai_lays_them() -> None:
    """Volumes smaller and larger than the patch, with and without a remainder."""
    for shape, overlap in (((20, 40, 33), 0.25), ((16, 16, 16), 0.5), ((10, 64, 17), 0.0)):
        seen: list[int] = []

        def network(windows: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(len(windows))
            return windows

        sliding_window_inference(torch.zeros(1, 1, *shape), (16, 16, 16), 4, network, overlap=overlap)
        assert count_windows(shape, (16, 16, 16), overlap) == sum(seen)


@pytest.mark.slow
def test_steps_and_flops_are_those_of_plain_arithmetic(cohort: Path, tmp_path: Path) -> None:
    """4 training volumes of 2 patches for 10 epochs, 2 validation volumes at 5 validations; 4 trials of 100 steps."""
    study, volumes = study_of(write(tmp_path, cohort), "finetune.validate_every=30")
    patch = network_cost(build_autoencoder, study.network, study.pretrain.patch_size)
    work = estimate_pretraining(study, volumes)
    assert work["steps"] == 4 * 2 * 10 // 4
    assert work["flops"] == 20 * 4 * patch.training + 2 * 2 * 5 * patch.forward
    assert work["flops_per_step"] == 4 * patch.training
    grid = estimate_grid(study, volumes, ROOMY, *UNTIMED)
    assert (grid["trials"], grid["validations"]) == (4, 4)
    patch = network_cost(build_segmentation, study.network, study.finetune.patch_size, 1, 14)
    windows, test = (
        group.volumes * count_windows(group.shape, (16, 16, 16), 0.25)
        for group in (volumes["labelled validation"], volumes["labelled test"])
        if group.shape
    )
    assert grid["windows_per_validation"] == windows
    assert grid["flops"] == 4 * (100 * 4 * patch.training + (5 * windows + test) * patch.forward)
    assert grid["total_seconds"] is None
    two, _ = study_of(tmp_path / "planned.yaml", "pretrain.task.contrastive.enabled=true")
    views = estimate_pretraining(two, volumes)
    assert views["flops_per_step"] == 2 * work["flops_per_step"]


def test_memory_is_that_of_the_networks_and_their_optimizers(cohort: Path, tmp_path: Path) -> None:
    """Bytes of all weights, and of the tensors that Adam holds after a step."""
    study, volumes = study_of(write(tmp_path, cohort))
    work, grid = estimate_pretraining(study, volumes), estimate_grid(study, volumes, ROOMY, *UNTIMED)
    for weights, moments, network in (
        (work["weights_bytes"], work["optimizer_bytes"], build_autoencoder(study.network, (16, 16, 16))),
        (grid["weights_bytes"], grid["optimizer_bytes"], build_segmentation(study.network, (16, 16, 16), 1, 14)),
    ):
        optimizer = build_optimizer(study.pretrain.optimizer, network.parameters())
        for weight in network.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        optimizer.step()
        held = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
        assert weights == sum(weight.nbytes for weight in network.parameters())
        assert moments == sum(moment.nbytes for moment in held)


def test_trials_that_run_at_once_share_the_time(cohort: Path, tmp_path: Path) -> None:
    """Four trials on two CPUs are two rounds, on one four."""
    study, volumes = study_of(write(tmp_path, cohort))
    one, two = (estimate_grid(study, volumes, ROOMY | {"cpus": cpus}, 0.5, 0.025) for cpus in (1, 2))
    assert (one["concurrent_trials"], two["concurrent_trials"]) == (1, 2)
    assert one["trial_seconds"] == two["trial_seconds"]
    assert one["trial_seconds"] > 100 * 0.5
    assert one["total_seconds"] == 4 * one["trial_seconds"]
    assert two["total_seconds"] == 2 * one["trial_seconds"]


def test_a_search_is_as_many_trials_as_it_trains(tmp_path: Path, cohort: Path) -> None:
    """A grid of two choices is two trials, not twenty samples."""
    path = write(tmp_path, cohort, search={"algorithm": "grid", "space": {"finetune.optimizer.lr": {"choice": [1, 2]}}})
    study, volumes = study_of(path, "finetune.grid.init=[random]", "finetune.grid.sizes=[2]")
    assert estimate_grid(study, volumes, ROOMY, 0.5, 0.025)["trials"] == 2


def test_trials_that_are_timed_on_a_whole_gpu_take_turns_on_it(tmp_path: Path, cohort: Path) -> None:
    """Without a share of one, four trials on two GPUs of a kind that is not here are two rounds."""
    study, volumes = study_of(write(tmp_path, cohort))
    named = {"cpus": None, "gpus": 2}
    assert study.finetune.gpus_per_trial == 0
    assert estimate_grid(study, volumes, named, 0.5, 0.025)["concurrent_trials"] == 2


def test_a_step_is_timed_as_most_of_them_are(tmp_path: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the encoder trained, where it is frozen at first; without, where it always is."""
    trained = []

    def look(learner: SegmentationLearner, *_: Any) -> None:
        encoder = learner.network.encoder
        trained.append(any(weight.requires_grad for weight in encoder.parameters()))

    monkeypatch.setattr(SegmentationLearner, "step", look)
    for freeze in ("none", 10, "all"):
        study, _ = study_of(write(tmp_path, cohort), f"finetune.encoder.freeze={freeze}")
        probe_finetuning(study)
    assert trained[:1] + trained[-1:] == [True, False]
    assert sum(trained) == 2 * len(trained) / 3


def test_nothing_is_written_and_nothing_started(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even the output folder; Ray and the tracking are not touched."""
    import ray

    from ssl_ray.tracking import tracker as tracking

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("started")

    path = write(tmp_path, cohort)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(tracking.Tracker, "__init__", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["plan", str(path)]) == 0
    text = capsys.readouterr().out
    assert "by steps on random patches, alone on this machine" in text
    assert not re.search(r"(step|trial|total) +-$", text, re.MULTILINE)
    assert sorted(tmp_path.iterdir()) == [path]


def test_people_read_the_figures_of_the_json(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With units, and a dash for what is not known."""
    tree = tree_of(write(tmp_path, cohort), capsys, "--no-probe")
    lines = render(tree | {"total_seconds": 7200.0}).splitlines()
    figures = {name.strip(): text for name, _, text in (line.strip().partition("  ") for line in lines)}
    assert figures["steps"].strip() == "100"
    assert figures["object store"].strip() == f"{tree['pretraining']['object_store_bytes'] / 1e3:.3g} kB"
    assert lines[1].split() == ["total", "2:00:00"]
    assert figures["step"].strip() == "-"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("bytes", 999_700, "1 MB"),
        ("bytes", 999_400, "999 kB"),
        ("flops", 1.23e21, "1.23 ZFLOP"),
        ("bytes", 0, "0 B"),
        ("steps", 99_970, "99,970"),
    ],
)
def test_no_figure_has_an_exponent(name: str, value: float, text: str) -> None:
    """Its unit grows with it, also where rounding makes it larger."""
    assert figure(name, value) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "pretrain.epochz=3"], "pretrain.epochz: unknown key"),
        (["--set", "pretrain.workers=9"], "batch_size must give every worker a patch"),
        (["--set", "pretrain.sources.0.datalist=none.json"], "none.json: cannot read the datalist"),
        (["--set", "finetune.cohort.classes=3"], "finetune.cohort.classes is 3"),
        (["--set", "finetune.weights=none.pt"], "none.pt: cannot read the weights"),
        (["--set", "pretrain.weights=none.pt"], "none.pt: cannot read the weights"),
    ],
)
def test_bad_input_is_one_line(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    """The same as `run` would say, and code 2."""
    assert main(["plan", str(write(tmp_path, cohort)), "--no-probe", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_an_unknown_gpu_ends_in_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the names that are known."""
    assert main(["plan", str(tmp_path / "x.yaml"), "--gpu", "abacus"]) == 2
    assert "h100" in capsys.readouterr().err


def test_a_named_gpu_needs_no_probe(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours come from a measured share of its peak: twice as many workers halve the pretraining."""
    own = {"patch_size": 96, "batch_size": 4096, "epochs": 4096, "precision": "auto"}
    vit_b = {"hidden_size": 768, "mlp_dim": 3072, "num_heads": 12}
    path = write(tmp_path, cohort, pretrain=own, network=vit_b)
    one, two = (tree_of(path, capsys, "--gpu", "A100", "--set", f"pretrain.workers={count}") for count in (2, 4))
    seconds = one["pretraining"]["flops"] / (0.34 * 312e12 * 2)
    assert one["pretraining"]["total_seconds"] == pytest.approx(seconds)
    assert two["pretraining"]["total_seconds"] == pytest.approx(seconds / 2)
    assert one["cluster"]["cpus"] is None
    assert one["total_seconds"] is one["grid"]["total_seconds"] is None  # no such small trial was measured


def test_trials_on_a_named_gpu_share_its_time(tmp_path: Path) -> None:
    """The recipe's: a step takes its measured share of the peak, and two trials on one GPU take twice as long each."""
    study = load(RECIPE, [])
    half = study.finetune.model_copy(update={"gpus_per_trial": 0.5})
    alone, shared = (trial_seconds(config, study.network, DEVICES["h200"]) for config in (study.finetune, half))
    assert alone[0] == pytest.approx(0.0308, rel=0.02), "as measured"
    assert shared == pytest.approx((2 * alone[0], 2 * alone[1]))


@pytest.mark.parametrize(("gpu", "sides"), [("a100", 16), ("v100", 96)])
def test_no_hours_are_told_without_a_measurement(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gpu: str, sides: int
) -> None:
    """Of small steps, and of float32."""
    own = {"patch_size": sides, "batch_size": 256, "precision": "auto"}
    found = tree_of(write(tmp_path, cohort, pretrain=own), capsys, "--gpu", gpu)
    assert found["pretraining"]["total_seconds"] is None
    assert found["total_seconds"] is None
    assert any("smaller steps" in line for line in found["basis"])


def test_what_the_machine_cannot_hold_is_said(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer GPUs and CPUs than workers, and an object store too small."""
    path = write(
        tmp_path,
        cohort,
        pretrain={"gpu": True, "workers": 2, "epochs": 100_000, "block_megabytes": 64},
        cluster={"object_store_gigabytes": 0.08, "cpus": 1},
    )
    found = tree_of(path, capsys)
    text = "\n".join(found["warnings"])
    assert "CPUs for 2 workers: 2 needed, 1 there" in text
    if torch.cuda.device_count() < 2:
        assert "GPUs for 2 workers: 2 needed" in text
    assert "cluster.object_store_gigabytes" in text
    assert found["pretraining"]["total_seconds"] is None or torch.cuda.is_available()


def test_a_full_disk_is_said(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the store and for the checkpoints, with the folder and what is free there."""
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    warnings = tree_of(write(tmp_path, cohort), capsys, "--no-probe")["warnings"]
    assert [warning.partition(": bytes")[0] for warning in warnings] == ["cache", "output"]
    assert all(f"on {tmp_path}: " in warning and warning.endswith("needed, 1 kB there") for warning in warnings)


def test_a_cluster_that_is_there_is_counted(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With RAY_ADDRESS, trials run at once on the cluster's CPUs, not on those of `cluster.cpus`."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0, "object_store_memory": 1e12})
    found = tree_of(write(tmp_path, cohort, cluster={"cpus": 99}), capsys, "--no-probe")
    assert (found["cluster"]["cpus"], found["cluster"]["gpus"]) == (3, 0)
    assert (found["grid"]["trials"], found["grid"]["concurrent_trials"]) == (4, 3)
