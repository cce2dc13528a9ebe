"""What a study will take, told before it starts: counts against the real things, and nothing left behind."""

import gzip
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.inferers import sliding_window_inference
from torch.utils.flop_counter import FlopCounterMode
from volumes import oblique_affine, smooth_ct, write_nifti

from ssl_ray.cli import main
from ssl_ray.config.schema import Network, Preparation
from ssl_ray.data.canonical import prepare
from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import Nifti
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.store import Store
from ssl_ray.estimate.probe import Timing
from ssl_ray.estimate.volumes import prepared_shape, survey
from ssl_ray.estimate.work import Cluster, count_windows, plan_grid, plan_pretraining
from ssl_ray.networks.flops import DEVICES, autoencoder_flops, known_device, unetr_flops
from ssl_ray.networks.unetr import build_autoencoder, build_unetr
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of

TINY = {"hidden_size": 48, "mlp_dim": 64, "num_heads": 3, "feature_size": 4}


def write_study(folder: Path, cohort: Path, **pretrain) -> Path:
    preparation = {"spacing": 6, "hu_window": [-175, 250]}
    tree = {
        "name": "planned",
        "output": str(folder / "output"),
        "network": TINY,
        "pretrain": {
            "sources": [{"root": str(cohort), "datalist": "unlabelled.json"}],
            "preparation": preparation,
            "patch_size": 16,
            "batch_size": 4,
            "epochs": 10,
            "corruption": {"inpaint_size": [2, 6], "outpaint_size": [4, 10], "shuffle_size": 3},
        }
        | pretrain,
        "finetune": {
            "cohort": {
                "root": str(cohort),
                "classes": 14,
                "splits": {2: "labelled_2.json", 4: "labelled_4.json"},
            },
            "preparation": preparation,
            "patch_size": 16,
            "steps": 100,
            "validate_every": 30,
        },
    }
    path = folder / "planned.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def tree_of(path: Path, capsys, *options: str) -> dict:
    assert main(["plan", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_autoencoders_flops_are_those_that_torch_counts():
    """For ViT-B and others, on cubes and other boxes, forward and in training, to the last operation."""
    small, wide = Network(**TINY), Network(hidden_size=192, mlp_dim=384, num_heads=3)
    for network, patch in ((small, (16, 32, 16)), (wide, (32, 48, 64)), (Network(), (96, 96, 96))):
        found = autoencoder_flops(network, patch)
        with torch.device("meta"):
            autoencoder = build_autoencoder(network, patch)
            with FlopCounterMode(display=False) as forward:
                restored = autoencoder(torch.zeros(1, 1, *patch))[0]
            with FlopCounterMode(display=False) as backward:
                restored.mean().backward()
        assert found.forward == forward.get_total_flops()
        assert found.training == forward.get_total_flops() + backward.get_total_flops()
    assert round(found.forward / 1e9, 1) == 40.1


def test_unetrs_flops_are_those_of_a_network_with_content():
    """Counting without content gives what a real step gives, and a batch is so many times a patch."""
    network, patch = Network(**TINY), (16, 32, 16)
    unetr = build_unetr(network, patch, 5)
    with FlopCounterMode(display=False) as counter:
        unetr(torch.rand(2, 1, *patch)).mean().backward()
    assert 2 * unetr_flops(network, patch, 5).training == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 9990", None),
    ],
)
def test_devices_are_known_by_the_name_that_torch_has_for_them(name, key):
    """Similar names are kept apart; of an unknown device no peak is claimed."""
    assert known_device(name) is (DEVICES[key] if key else None)


def test_a_device_without_bfloat16_computes_in_float32():
    """As `precision.resolve` decides where the device is there."""
    assert DEVICES["v100"].dtype("auto") == "float32"
    assert DEVICES["a100"].dtype("auto") == "bfloat16"
    assert DEVICES["a100"].peak(DEVICES["a100"].dtype("float32")) == 19.5e12


@pytest.mark.parametrize("orientation", ["RAS", None])
def test_the_prepared_grid_is_told_by_the_header_alone(orientation):
    """Oblique, flipped, stored along other axes: the shape is what the preparation makes."""
    preparation = Preparation(
        orientation=orientation, spacing=(2.0, 3.0, 5.0), hu_window=(-1000, 200), crop_foreground=False
    )
    for order in ([0, 1, 2], [2, 0, 1]):
        affine = oblique_affine((1.5, 2.0, 3.0), 12, flip=True)[:, [*order, 3]]
        voxels = np.ascontiguousarray(smooth_ct((20, 24, 28)).transpose(order)).astype(np.float32)
        made = prepare(Nifti(voxels, affine), None, preparation)
        assert np.abs(np.array(prepared_shape(voxels.shape, affine, preparation)) - made.image.shape).max() <= 1


def test_windows_are_counted_as_monai_lays_them():
    """Volumes smaller and larger than the patch, with and without a remainder."""
    for shape, overlap in (((20, 40, 33), 0.25), ((16, 16, 16), 0.5), ((10, 64, 17), 0.0)):
        seen = []

        def network(windows, seen=seen):
            seen.append(len(windows))
            return windows

        sliding_window_inference(torch.zeros(1, 1, *shape), (16, 16, 16), 4, network, overlap=overlap)
        assert count_windows(shape, (16, 16, 16), overlap) == sum(seen)


def test_a_cohort_is_counted_and_measured_by_its_headers(cohort, tmp_path, capsys):
    """Volumes by list and section; the upper bound of the store holds, and is not far off."""
    path = write_study(tmp_path, cohort)
    study = load(path, [])
    found = tree_of(path, capsys, "--no-probe")
    assert {
        group["name"].partition("/")[2] or group["name"]: group["volumes"] for group in found["volumes"]["groups"]
    } == {
        "unlabelled.json training": 4,
        "unlabelled.json validation": 2,
        "labelled training": 4,
        "labelled validation": 2,
        "labelled test": 1,
    }
    assert found["volumes"]["splits"] == {"2": 2, "4": 4}
    plan = found["pretraining"]
    assert plan["steps"] == 4 * 2 * 10 // 4
    assert plan["validation_patches"] == 2 * 2 * 5
    assert plan["seconds"] is None
    assert found["grid"]["cells"] == 4
    assert found["grid"]["validations"] == 4

    listed = json.loads((cohort / "unlabelled.json").read_text())
    store, size = Store(tmp_path / "elsewhere"), 0
    for entry in listed["training"]:
        image = cohort / entry["image"]
        volume, _ = prepare_case(Case(image.name, image), study.pretrain.preparation, store)
        size += sum(count for count, _ in volume.files.values())
    assert 0.5 * found["volumes"]["groups"][0]["bytes"] < size <= found["volumes"]["groups"][0]["bytes"] + 4 * 128


def test_what_the_store_holds_is_exact(cohort, tmp_path, capsys):
    """Bytes of the manifests instead of estimates; with another preparation they do not count."""
    path = write_study(tmp_path, cohort)
    study = load(path, [])
    size = 0
    for entry in json.loads((cohort / "unlabelled.json").read_text())["training"]:
        image = cohort / entry["image"]
        volume, _ = prepare_case(Case("x", image), study.pretrain.preparation, Store(folders_of(study).cache))
        size += sum(count for count, _ in volume.files.values())
    group = tree_of(path, capsys, "--no-probe")["volumes"]["groups"][0]
    assert (group["stored"], group["sampled"], group["bytes"]) == (4, 0, size)
    other = tree_of(path, capsys, "--no-probe", "--set", "pretrain.preparation.spacing=5")["volumes"]["groups"][0]
    assert (other["stored"], other["sampled"]) == (0, 4)


def test_a_synthetic_cohort_is_planned_before_it_is_made(cohort, tmp_path, capsys):
    """Its numbers and about its sizes are known; afterwards the plan says the same from the volumes."""
    numbers = {"unlabelled": 6, "labelled": 4, "validation": 2, "test": 1, "splits": [2, 4], "seed": 1}
    plans = []
    for root in (tmp_path / "absent", cohort):
        path = write_study(tmp_path, root)
        path.write_text(path.read_text() + yaml.safe_dump({"phantom": {"root": str(root), **numbers}}))
        plans.append(tree_of(path, capsys, "--no-probe"))
    before, after = plans
    assert before["volumes"]["to_make"]
    assert not after["volumes"]["to_make"]
    volumes = [[group["volumes"] for group in plan["volumes"]["groups"]] for plan in plans]
    assert volumes[0] == volumes[1]
    assert before["pretraining"]["steps"] == after["pretraining"]["steps"]
    assert 0.7 < before["cache_bytes"] / after["cache_bytes"] < 1.4
    assert not (tmp_path / "absent").exists()


def test_nothing_is_written_and_nothing_started(cohort, tmp_path, monkeypatch, capsys):
    """Not even the output folder; Ray and the tracking are not touched."""
    import ray

    from ssl_ray.tracking import tracker as tracking

    def refuse(*_, **__):
        raise AssertionError("started")

    path = write_study(tmp_path, cohort)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(tracking.Tracker, "__init__", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["plan", str(path)]) == 0
    text = capsys.readouterr().out
    assert "20 steps on random patches on this machine (CPU" in text
    assert "limited by" in text
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "pretrain.epochz=3"], "pretrain.epochz: unknown key"),
        (["--workers", "9"], "batch_size must give every worker a patch"),
        (["--set", "pretrain.sources.0.datalist=none.json"], "none.json: cannot read the datalist"),
        (["--set", "finetune.cohort.classes=3"], "beyond the 3 classes"),
    ],
)
def test_bad_input_is_one_line(cohort, tmp_path, capsys, options, message):
    """The same as `run` would say, and code 2."""
    assert main(["plan", str(write_study(tmp_path, cohort)), "--no-probe", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_an_unknown_gpu_ends_in_code_2(tmp_path, capsys):
    """The message has the names that it knows."""
    assert main(["plan", str(tmp_path / "x.yaml"), "--gpu", "abacus"]) == 2
    assert "h100" in capsys.readouterr().err


def test_a_bad_header_is_a_warning(tmp_path, cohort, capsys):
    """The plan goes on with the others, and names the file; a run would list it as well."""
    listed = json.loads((cohort / "unlabelled.json").read_text())
    for section in ("training", "validation"):
        for entry in listed[section]:
            target = tmp_path / "bad" / entry["image"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((cohort / entry["image"]).read_bytes())
    broken = tmp_path / "bad" / listed["training"][0]["image"]
    broken.write_bytes(gzip.compress(b"not a NIfTI"))
    (tmp_path / "bad" / "unlabelled.json").write_text(json.dumps(listed))
    path = write_study(tmp_path, cohort, sources=[{"root": str(tmp_path / "bad"), "datalist": "unlabelled.json"}])
    found = tree_of(path, capsys, "--no-probe")
    assert any(str(broken) in warning for warning in found["warnings"])
    assert found["volumes"]["groups"][0]["bytes"] > 0


def test_a_named_gpu_needs_no_probe(cohort, tmp_path, capsys):
    """Hours come from its peak: twice as many workers halve the pretraining, and the CPUs around it are enough."""
    path = write_study(tmp_path, cohort, patch_size=96, batch_size=4096, epochs=4096)
    vit_b = [f"network.{name}" for name in ("hidden_size=768", "mlp_dim=3072", "num_heads=12")]
    options = [word for option in vit_b for word in ("--set", option)]
    one, two = (tree_of(path, capsys, "--gpu", "A100", "--workers", count, *options) for count in ("2", "4"))
    assert one["pretraining"]["seconds"] == pytest.approx(2 * two["pretraining"]["seconds"])
    assert one["pretraining"]["bottleneck"] == "arithmetic"
    assert one["cluster"]["cpus"] is None
    assert "A100" in one["basis"][0]
    launches = tree_of(write_study(tmp_path, cohort), capsys, "--gpu", "a100", "--workers", "2")
    assert "kernel launches" in launches["pretraining"]["bottleneck"]
    assert any("patches a worker and step" in warning for warning in launches["warnings"])


@pytest.mark.parametrize(("microbatch", "passes"), [(None, 1), (1, 4)])
def test_sharded_weights_are_exchanged_in_every_pass(cohort, tmp_path, microbatch, passes):
    """Beside the gradients of DDP: weights are gathered for a pass forward and again for the one backward."""
    whole = load(write_study(tmp_path, cohort, batch_size=8, workers=2, microbatch=microbatch), [])
    parts = load(write_study(tmp_path, cohort, batch_size=8, workers=2, microbatch=microbatch, shard=True), [])
    cluster = Cluster("here", 8, 2, 1e9, 1e9)
    found = [
        plan_pretraining(one, survey(one, folders_of(one), True), None, None, cluster).exchanged_bytes
        for one in (whole, parts)
    ]
    assert found[1] / found[0] == pytest.approx((2 * passes + 1) / 2)


def test_the_slowest_part_is_named(cohort, tmp_path):
    """A fast device waits for few cores that read, then for the loop that deals out small blocks, then for itself."""
    study = load(write_study(tmp_path, cohort, patch_size=32, batch_size=64), [])
    volumes = survey(study, folders_of(study), True)
    timing = Timing(0.002, 20, "GPU", "bfloat16")
    few, many = (
        plan_pretraining(study, volumes, None, timing, Cluster("x", cpus, 1, 1e9, 1e12)) for cpus in (2.0, 100.0)
    )
    assert few.bottleneck is not None
    assert few.bottleneck.startswith("feed")
    assert few.rate == few.reader_rate
    assert many.bottleneck == "arithmetic"
    small = study.model_copy(update={"pretrain": study.pretrain.model_copy(update={"block_megabytes": 1})})
    looping = plan_pretraining(small, volumes, None, timing, Cluster("x", 100.0, 1, 1e9, 1e12))
    assert "block_megabytes" in str(looping.bottleneck)
    assert looping.rate is not None
    assert looping.rate < 32_000
    assert many.rate == pytest.approx(32_000)
    assert many.seconds is not None
    assert few.seconds is not None
    assert many.seconds < few.seconds
    crowded = plan_pretraining(study, volumes, None, timing, Cluster("x", 100.0, 1, 1e9, 1e3))
    assert crowded.bottleneck == "storage"
    assert crowded.rate == crowded.storage_rate


def test_what_the_machine_cannot_hold_is_said(cohort, tmp_path, capsys):
    """Fewer GPUs and CPUs than workers, an object store and a disk too small."""
    options = ["pretrain.gpu=true", "pretrain.workers=2", "cluster.object_store_gigabytes=0.001", "cluster.cpus=1"]
    path = write_study(tmp_path, cohort)
    found = tree_of(path, capsys, *(word for option in options for word in ("--set", option)))
    text = "\n".join(found["warnings"])
    assert "2 workers need 2 CPUs, there are 1" in text
    if torch.cuda.device_count() < 2:
        assert "2 workers need a GPU each" in text
    assert "object store" in text
    assert found["pretraining"]["seconds"] is None or torch.cuda.is_available()


def test_a_device_too_small_is_a_warning(cohort, tmp_path, monkeypatch, capsys):
    """What does not fit is told with the stage that it is of, and the rest is planned all the same."""
    from ssl_ray.estimate import probe

    def full(study):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(probe, "probe_pretraining", full)
    found = tree_of(write_study(tmp_path, cohort), capsys)
    assert found["warnings"] == ["pretraining: a step does not fit into the device's memory: CUDA out of memory"]
    assert found["pretraining"]["seconds"] is None
    assert found["grid"]["seconds"] > 0


def test_trials_that_run_at_once_share_the_time(cohort, tmp_path):
    """Four cells on two CPUs are two rounds, on one four."""
    study = load(write_study(tmp_path, cohort), [])
    volumes = survey(study, folders_of(study), True)
    timings = Timing(0.5, 5, "CPU", "float32"), Timing(0.1, 5, "CPU", "float32")
    one, two = (plan_grid(study, volumes, None, timings, Cluster("x", cpus, 0, 1e9, 1e12)) for cpus in (1.0, 2.0))
    assert (one.concurrent, two.concurrent) == (1, 2)
    assert one.trial_seconds == two.trial_seconds
    assert one.seconds == 4 * one.trial_seconds
    assert two.seconds == 2 * two.trial_seconds
    assert one.trial_seconds is not None
    assert one.trial_seconds > 100 * 0.5


def test_few_headers_are_read_of_many_volumes(cohort, tmp_path, monkeypatch):
    """A slow share is asked 200 times a list at most, however long it is."""
    root = tmp_path / "many"
    first = write_nifti(root / "v0000.nii", smooth_ct((20, 20, 20)), oblique_affine((2, 2, 2), 0))
    names = [first.name]
    for index in range(1, 500):
        name = f"v{index:04d}.nii"
        (root / name).write_bytes(first.read_bytes()[:400])  # a header is enough
        names.append(name)
    (root / "unlabelled.json").write_text(json.dumps({"training": names[:400], "validation": names[400:]}))
    path = write_study(tmp_path, cohort, sources=[{"root": str(root), "datalist": "unlabelled.json"}])
    read = []
    load_header = nib.load
    monkeypatch.setattr(nib, "load", lambda path: (read.append(path), load_header(path))[1])
    found = survey(load(path, []), folders_of(load(path, [])), True)
    training = found.groups[0]
    assert (training.volumes, training.sampled, training.bad) == (400, 200, ())
    assert len([path for path in read if "many" in str(path)]) == 300
    assert training.bytes == pytest.approx(2 * 400 * math.prod(training.shape))  # 425 HU need 16 bits
