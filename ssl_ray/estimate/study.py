"""What `ssl-ray plan` finds out about a study, before anything is started or written."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
import torch

from ssl_ray.cluster.connect import connect
from ssl_ray.config.schema import Study
from ssl_ray.data.store import Store
from ssl_ray.estimate.measured import pretraining_seconds, trial_seconds
from ssl_ray.estimate.probe import probe_finetuning, probe_pretraining
from ssl_ray.estimate.text import figure
from ssl_ray.estimate.volumes import Group, survey
from ssl_ray.estimate.work import Figures, estimate_grid, estimate_pretraining
from ssl_ray.pretrain.tasks.registry import check_start
from ssl_ray.search.grid import check_given
from ssl_ray.storage.folders import Folders
from ssl_ray.training.devices import DEVICES, Device

_BASIS = (
    "bytes: exact for prepared volumes, for others by headers before the crop; none for a cohort that is not made yet",
    "hours: by steps on random patches, alone on this machine; none with --no-probe or without the GPU that they need",
    "hours with --gpu: by the share of its peak that an H100 or H200 reached; none for what was not measured: other "
    "networks and tasks, float32, smaller steps; trials that share a GPU take turns on it, unless NVIDIA's MPS runs",
    "not in the hours: preparation, start-up, reading (MLflow shows data_wait), exchange, metrics, report",
)
_OF_A_SEARCH = "a search: all steps of all cells, and one pretraining; cells with other settings of it need one each"


def estimate_study(study: Study, folders: Folders, gpu: str | None = None, with_probe: bool = True) -> Figures:
    """Read what is needed and time a few steps; nothing is written or started. `basis` tells where figures come from.

    `gpu` is a key of `DEVICES`: estimate for this kind, one a worker, instead of timing steps on what is here. What a
    run would refuse before it prepares volumes is a UserError here, too.
    """
    groups = survey(study, folders)
    check_given(study.finetune, study.network)
    if study.pretrains and study.pretrain.weights:
        check_start(study.pretrain, study.network, study.pretrain.weights)
    device = DEVICES[gpu] if gpu else None
    cluster, work = _cluster(study, device), {}
    here, gpus = with_probe and not device, torch.cuda.is_available()
    tuned = trial_seconds(study.finetune, study.network, device) if device else (None, None)
    if here and (gpus or not study.finetune.gpus_per_trial):
        tuned = probe_finetuning(study)
    grid = estimate_grid(study, groups, cluster, *tuned)
    hours = grid["total_seconds"]
    if study.pretrains:
        work = estimate_pretraining(study, groups)
        flops = work["flops_per_step"] / work["workers"]
        step = pretraining_seconds(study.pretrain, study.network, flops, device) if device else None
        if here and (gpus or not study.pretrain.gpu):
            step = probe_pretraining(study)
        steps = study.pretrain.pretrainings * work["flops"] / work["flops_per_step"]
        work |= {"step_seconds": step, "total_seconds": step and step * steps}
        hours = hours and step and hours + work["total_seconds"]
    lacks = _lacks(study, folders, cluster, work, grid, groups)
    volumes = {name: asdict(group) for name, group in groups.items()}
    found = {"total_seconds": hours, "cluster": cluster, "volumes": volumes, "pretraining": work, "grid": grid}
    basis = [*_BASIS, *([_OF_A_SEARCH] if study.search else [])]
    return found | {"basis": basis, "warnings": list(lacks)}


def _cluster(study: Study, device: Device | None) -> Figures:
    """What the study will run on; None stands for as much as it needs."""
    local, store = study.cluster, study.cluster.object_store_gigabytes * 2**30
    figures: tuple[Any, ...] = "this machine", local.cpus or os.cpu_count(), torch.cuda.device_count(), store
    if device:
        figures = f"{device.name}, one a worker", None, study.pretrain.worker_range[1], None
    elif (os.environ.get("RAY_ADDRESS") or "local") != "local":
        connect(study.cluster)
        found = ray.cluster_resources()
        figures = "the Ray cluster", *(found.get(key, 0.0) for key in ("CPU", "GPU", "object_store_memory"))
    return dict(zip(("where", "cpus", "gpus", "object_store_bytes"), figures, strict=True))


def _lacks(
    study: Study, folders: Folders, cluster: Figures, work: Figures, grid: Figures, groups: dict[str, Group]
) -> Iterator[str]:
    """What of the machine is too small for the study to start or to end."""
    config, trial, least = study.pretrain, study.finetune, study.pretrain.worker_range[0]
    needs = [("CPUs for a trial", trial.cpus_per_trial, cluster["cpus"])]
    needs += [("GPUs for a trial", trial.gpus_per_trial, cluster["gpus"])]
    kept = grid["trials"] * (2 * grid["weights_bytes"] + grid["optimizer_bytes"])  # of now, and the best weights
    if work:
        needs += [(f"CPUs for {least} workers", least * config.cpus_per_worker, cluster["cpus"])]
        needs += [(f"GPUs for {least} workers", least * config.gpu, cluster["gpus"])]
        in_flight = "bytes of blocks in flight (cluster.object_store_gigabytes, pretrain.block_megabytes)"
        needs += [(in_flight, work["object_store_bytes"], cluster["object_store_bytes"])]
        # A new checkpoint is written before an old one goes.
        states = config.pretrainings * config.keep_checkpoints + 1
        kept += states * (work["weights_bytes"] + work["optimizer_bytes"])
    volumes = sum(group.missing_bytes or 0 for group in groups.values())
    cache = Store(folders.cache, folders.scratch).folder
    for key, folder, size in (("cache", cache, volumes), ("output", folders.study, kept)):
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        needs.append((f"{key}: bytes on {there}", size, shutil.disk_usage(there).free))
    for what, needed, found in needs:
        if found is not None and found < needed:
            yield f"{what}: {figure(what, needed)} needed, {figure(what, found)} there"
