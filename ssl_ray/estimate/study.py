"""What `ssl-ray plan` finds out about a study, before anything is started or written."""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ssl_ray.config.schema import Study
from ssl_ray.estimate import probe
from ssl_ray.estimate.text import size
from ssl_ray.estimate.volumes import Survey, survey
from ssl_ray.estimate.work import Cluster, GridEstimate, PretrainingEstimate, estimate_grid, estimate_pretraining
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.places import Place, default_scratch
from ssl_ray.training.devices import DEVICES, Device

_MFU = {8: 0.16, 64: 0.31, 128: 0.34}
"""Share of an H100's bfloat16 peak that steps of ViT-B reached, by patches of 96³ a step: docs/performance.md.
Measured with `compile: true` on one worker. No other GPU, no UNETR and no float32 was measured."""
_PATCH_FLOPS = 119e9
"""FLOPs of training ViT-B on one such patch."""


@dataclass(frozen=True)
class StudyEstimate:
    """Everything about a study that is not run yet.

    `total_seconds` is None where a part is not known; `basis` tells where times come from, and what is not in them.
    """

    name: str
    volumes: Survey
    cluster: Cluster
    pretraining: PretrainingEstimate | None
    grid: GridEstimate
    total_seconds: float | None
    basis: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def estimate_study(study: Study, folders: Folders, gpu: str | None = None, with_probe: bool = True) -> StudyEstimate:
    """Read what is needed and time a few steps; nothing is written or started.

    Args:
        study: the experiment.
        folders: of the study.
        gpu: a key of `DEVICES`: estimate for this kind, one a worker, instead of what is here.
        with_probe: time steps, if no GPU is named.

    Raises:
        UserError: for all that a run would refuse before it prepares volumes.
    """
    volumes, readable = survey(study, folders)
    if study.finetune.weights:
        from ssl_ray.search.grid import check_transfer  # it loads Ray Tune

        check_transfer(study.finetune, study.network, Path(study.finetune.weights))
    device = DEVICES[gpu] if gpu else None
    cluster = _cluster(study, device)
    config, trial = study.pretrain, study.finetune
    warnings: list[str] = []
    trained = tuned = pretraining = None
    if with_probe and not device:
        if study.pretrains:
            call = partial(probe.probe_pretraining, study, folders, readable)
            trained = probe.attempt("pretraining", call, config.cpus_per_worker, config.gpu, cluster.gpus, warnings)
        call = partial(probe.probe_finetuning, study)
        tuned = probe.attempt("fine-tuning", call, trial.cpus_per_trial, trial.gpus_per_trial, cluster.gpus, warnings)
    basis = [
        f"{title}: {found.steps} steps on random patches, alone on {cluster.where} ({found.device}, {found.dtype})"
        for title, found in (("pretraining", trained), ("fine-tuning", tuned))
        if found
    ]
    if trained and trained.read_seconds is None:
        basis.append("pretraining: reading was not measured, as the store has none of the volumes here")
    if study.pretrains:
        pretraining = estimate_pretraining(study, volumes, cluster, trained)
        if device:
            pretraining, said = _on_device(pretraining, device, config.precision)
            basis.append(said)
    basis += ["fine-tuning: no hours, as UNETR was not measured on any GPU"] if device else []
    grid = estimate_grid(study, volumes, cluster, tuned)
    parts = [part.total_seconds for part in (pretraining, grid) if part]
    total = None if None in parts else sum(seconds for seconds in parts if seconds)
    if any(parts):
        basis.append("not counted: preparation, start-up, exchange between workers, metrics, the report")
    estimate = StudyEstimate(study.name, volumes, cluster, pretraining, grid, total, tuple(basis))
    return replace(estimate, warnings=(*warnings, *_warnings(study, estimate), *_room(study, folders, estimate)))


def _cluster(study: Study, device: Device | None) -> Cluster:
    if os.environ.get("RAY_ADDRESS"):
        import ray

        from ssl_ray.cluster.connect import connect

        connect(study.cluster)
        found = ray.cluster_resources()
        cpus, gpus, store = (found.get(key, 0.0) for key in ("CPU", "GPU", "object_store_memory"))
        return Cluster("the Ray cluster in RAY_ADDRESS", cpus, gpus, store)
    if device:
        world = study.pretrain.worker_range[1]
        return Cluster(f"{world} x {device.name}, with CPUs and memory as needed", None, world, None)
    cpus = study.cluster.cpus or os.cpu_count() or 1
    return Cluster("this machine", cpus, torch.cuda.device_count(), study.cluster.object_store_gigabytes * 2**30)


def _on_device(work: PretrainingEstimate, device: Device, precision: str) -> tuple[PretrainingEstimate, str]:
    """With times at a measured share of a named device's peak, and what they are based on."""
    mfu = max((share for patches, share in _MFU.items() if patches * _PATCH_FLOPS <= work.flops_per_step), default=None)
    if mfu is None or device.dtype(precision) != "bfloat16":
        return work, "pretraining: no hours, as neither float32 nor steps of so few FLOPs were measured"
    speed = mfu * device.peak("bfloat16")
    step, total = work.flops_per_step / speed, work.flops / speed / work.workers
    timed = replace(work, step_seconds=step, patches_per_second=work.patches_per_step / step, total_seconds=total)
    return timed, (
        f"pretraining: {mfu:.0%} of {device.name}'s {device.peak('bfloat16') / 1e12:g} TFLOP/s (dense, bfloat16), as "
        "measured with ViT-B on one H100, compiled, with one worker, in steps of no more FLOPs"
    )


def _warnings(study: Study, found: StudyEstimate) -> Iterator[str]:
    """Headers that cannot be read, and what of the machine is too small or too slow."""
    config, trial, work, cluster = study.pretrain, study.finetune, found.pretraining, found.cluster
    cpus = math.inf if cluster.cpus is None else cluster.cpus
    for name, group in found.volumes.groups.items():
        if group.bad:
            read = group.headers + len(group.bad)
            yield f"{name}: {len(group.bad)} of {read} headers cannot be read, e.g. {group.bad[0]}"
    if work:
        least = config.worker_range[0]
        if cpus < (needed := least * config.cpus_per_worker):
            yield f"{least} workers need {needed:g} CPUs, there are {cpus:g}: the study will not start"
        if config.gpu and cluster.gpus < least:
            yield f"{least} workers need a GPU each, there are {cluster.gpus:g}: the study will not start"
        if work.bottleneck == "reading":
            yield (
                f"reading: the cores that the workers leave read {work.read_patches_per_second:,.0f} patches/s, which "
                "is less than the workers train: more cores would make it faster"
            )
        if cluster.object_store_bytes is not None and cluster.object_store_bytes < work.object_store_bytes:
            yield (
                f"the object store ({size(cluster.object_store_bytes)}) is smaller than the "
                f"{size(work.object_store_bytes)} of blocks in flight and may spill to disk: raise "
                "cluster.object_store_gigabytes, or lower pretrain.block_megabytes"
            )
    if cluster.gpus < trial.gpus_per_trial or cpus < trial.cpus_per_trial:
        yield (
            f"a trial needs {trial.cpus_per_trial:g} CPUs and {trial.gpus_per_trial:g} GPUs, there are "
            f"{cpus:g} and {cluster.gpus:g}: the grid will not start"
        )


def _room(study: Study, folders: Folders, found: StudyEstimate) -> Iterator[str]:
    """Disks without room, as far as they can be seen from here."""
    place, work, grid = Place.parse(folders.cache), found.pretraining, found.grid
    cache = ("cache", place.local) if place.local else ("scratch", Path(study.scratch or default_scratch()))
    needs = [(*cache, "prepared volumes", found.volumes.missing_bytes or 0)]
    if folders.output.origin is None:
        kept = grid.trials * (2 * grid.weights_bytes + grid.optimizer_bytes)  # of now, and the best weights
        if work:  # a new checkpoint is written before an old one goes
            kept += (study.pretrain.keep_checkpoints + 1) * (work.weights_bytes + work.optimizer_bytes)
        needs.append(("output", folders.study, "checkpoints", kept))
    for key, folder, what, needed in needs:
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            yield f"{key}: {there} has {size(free)} free, {what} need up to {size(needed)} more"
