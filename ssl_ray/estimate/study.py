"""What `ssl-ray plan` finds out about a study."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssl_ray.config.schema import Study
from ssl_ray.estimate import probe
from ssl_ray.estimate import work as estimate
from ssl_ray.estimate.text import duration, size
from ssl_ray.estimate.volumes import Survey, preparation_seconds, survey
from ssl_ray.estimate.work import Cluster, GridEstimate, PretrainingEstimate
from ssl_ray.networks.flops import DEVICES, Device
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.places import Place, default_scratch


@dataclass(frozen=True)
class StudyEstimate:
    """Everything about a study that is not run yet; bytes, seconds, FLOP/s. `basis`: where the times come from."""

    name: str
    volumes: Survey
    cache_bytes: float | None
    preparation_core_seconds: float | None
    cluster: Cluster
    pretraining: PretrainingEstimate | None
    grid: GridEstimate
    seconds: float | None
    basis: tuple[str, ...]
    warnings: tuple[str, ...]

    def tree(self) -> dict[str, Any]:
        """For JSON: what is taken as enough, such as the CPUs around a named GPU, is None."""
        tree: dict[str, Any] = _finite(asdict(self))
        return tree


def make_plan(study: Study, folders: Folders, gpu: str | None = None, with_probe: bool = True) -> StudyEstimate:
    """Read what is needed and time a few steps; nothing is written or started.

    Args:
        study: the experiment.
        folders: of the study.
        gpu: a key of `DEVICES`: estimate for this kind, one a worker, instead of what is here.
        with_probe: time steps, if no GPU is named.

    Raises:
        ValueError: for all that a run would refuse before it prepares volumes.
    """
    pretrains = study.pretrains
    volumes = survey(study, folders, pretrains)
    if study.finetune.weights:
        from ssl_ray.search.grid import check_transfer

        check_transfer(study.finetune, study.network, Path(study.finetune.weights))
    device = DEVICES[gpu] if gpu else None
    cluster = _cluster(study, device)
    basis: list[str] = []
    warnings: list[str] = []
    timing, timings = None, None
    if device:
        basis += _named(study, device, pretrains)
    elif with_probe:
        timing, timings = _probe(study, pretrains, cluster, basis, warnings)
    pretraining = estimate.plan_pretraining(study, volumes, device, timing, cluster) if pretrains else None
    grid = estimate.plan_grid(study, volumes, device, timings, cluster)
    known = [part.seconds for part in (pretraining, grid) if part]
    core = preparation_seconds(volumes)
    total = sum(seconds for seconds in known if seconds is not None) if None not in known else None
    if total is not None and core is not None and math.isfinite(cluster.cpus):
        total += core / cluster.cpus
    plan = StudyEstimate(study.name, volumes, volumes.bytes, core, cluster, pretraining, grid, total, tuple(basis), ())
    warnings += _warnings(study, folders, plan, device)
    return replace(plan, warnings=tuple(warnings))


def _cluster(study: Study, device: Device | None) -> Cluster:
    world = study.pretrain.worker_range[1]
    if os.environ.get("RAY_ADDRESS"):
        import ray

        from ssl_ray.cluster.connect import connect

        connect(study.cluster)
        found = ray.cluster_resources()
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        return Cluster(
            f"the Ray cluster in RAY_ADDRESS ({nodes} node{'s' * (nodes > 1)})",
            found.get("CPU", 0.0),
            found.get("GPU", 0.0),
            found.get("object_store_memory", 0.0),
            found.get("memory", 0.0),
            nodes,
        )
    if device:
        return Cluster(
            f"{world} x {device.name}, one a worker, with CPUs and memory as needed",
            math.inf,
            world,
            math.inf,
            math.inf,
        )
    cpus = study.cluster.cpus or os.cpu_count() or 1
    store = study.cluster.object_store_gigabytes * 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Cluster("this machine", cpus, torch.cuda.device_count(), store, memory)


def _named(study: Study, device: Device, pretrains: bool) -> Iterator[str]:
    vit = "vit compiled" if study.pretrain.compile else "vit"
    parts = [("pretraining", vit, study.pretrain.precision)] if pretrains else []
    parts.append(("fine-tuning", "unetr", study.finetune.precision))
    for title, network, precision in parts:
        share, peak, dtype = estimate.utilisation(device, precision, network)
        graphed = network == vit and study.pretrain.worker_range[1] == 1
        yield (
            f"{title}: {share:.0%} of {peak / 1e12:g} TFLOP/s ({device.name}, dense, {dtype}), and at least "
            f"{duration(estimate.GRAPH_SECONDS if graphed else estimate.LAUNCH_SECONDS)} a step"
        )


def _probe(study: Study, pretrains: bool, cluster: Cluster, basis: list[str], warnings: list[str]) -> tuple[Any, Any]:
    """Timings of both networks, or None where there is no device or no room for a probe."""
    config = study.pretrain
    remote = bool(os.environ.get("RAY_ADDRESS"))
    found: dict[str, Any] = {"pretraining": None, "fine-tuning": None}
    tasks: list[tuple[str, Callable[[Study], Any], float, float]] = [
        ("fine-tuning", probe.probe_finetuning, study.finetune.cpus_per_trial, study.finetune.gpus_per_trial)
    ]
    if pretrains:
        tasks.insert(0, ("pretraining", probe.probe_pretraining, config.cpus_per_worker, float(config.gpu)))
    for title, function, cpus, gpus in tasks:
        if gpus > cluster.gpus:
            basis.append(f"{title}: no times, as there is no GPU to probe; name one with --gpu")
            continue
        try:
            found[title] = probe.on_worker(function, study, cpus, gpus) if remote else function(study)
        except TimeoutError as error:
            warnings.append(str(error))
            continue
        except torch.OutOfMemoryError as error:
            warnings.append(f"{title}: a step does not fit into the device's memory: {str(error).partition('. ')[0]}")
            continue
        timing = found[title] if title == "pretraining" else found[title][0]
        where = "a worker of the cluster" if remote else "this machine"
        basis.append(
            f"{title}: {timing.calls} steps on random patches on {where} ({timing.device}, {timing.dtype}): "
            f"{duration(timing.seconds)} each"
        )
    return found["pretraining"], found["fine-tuning"]


def _warnings(study: Study, folders: Folders, plan: StudyEstimate, device: Device | None) -> Iterator[str]:
    config, work, cluster = study.pretrain, plan.pretraining, plan.cluster
    for group in plan.volumes.groups:
        if group.bad:
            yield f"{group.name}: {len(group.bad)} of {group.sampled} headers cannot be read, e.g. {group.bad[0]}"
    if work:
        cpus = work.workers * config.cpus_per_worker
        if cluster.cpus < cpus:
            yield f"{work.workers} workers need {cpus:g} CPUs, there are {cluster.cpus:g}: the study will not start"
        if config.gpu and cluster.gpus < work.workers:
            yield f"{work.workers} workers need a GPU each, there are {cluster.gpus:g}: the study will not start"
        if work.reader_cores_needed and work.reader_rate < (work.arithmetic_rate or 0):
            yield (
                f"the workers could train {work.arithmetic_rate:,.0f} patches/s, but the cores that they leave read "
                f"about {work.reader_rate:,.0f}: "
                f"{math.ceil(work.reader_cores_needed)} cores beyond the workers' are needed"
            )
        if work.storage_rate and plan.cache_bytes:
            yield (
                f"the store of {size(plan.cache_bytes)} does not fit into the memory of {size(cluster.memory)}: at "
                f"{size(estimate.DISK_BYTES)}/s a machine, storage gives {work.storage_rate:,.0f} patches/s"
            )
        if cluster.object_store < work.object_store_bytes:
            yield (
                f"the object store ({size(cluster.object_store)}) is smaller than the "
                f"{size(work.object_store_bytes)} of blocks in flight and may spill to disk: raise "
                "cluster.object_store_gigabytes, or lower pretrain.block_megabytes"
            )
        if device and work.workers > 1:
            full = estimate.full_share(work.flops_per_patch, device, config.precision)
            if work.share < full:
                yield (
                    f"{work.share} patches a worker and step leave a GPU waiting for the host, {full} would take as "
                    "long: fewer workers, or a larger pretrain.batch_size, which changes the recipe, cost less"
                )
    trial = study.finetune
    if cluster.gpus < trial.gpus_per_trial or cluster.cpus < trial.cpus_per_trial:
        yield (
            f"a trial needs {trial.cpus_per_trial:g} CPUs and {trial.gpus_per_trial:g} GPUs, there are "
            f"{cluster.cpus:g} and {cluster.gpus:g}: the grid will not start"
        )
    yield from _room(study, folders, plan)


def _room(study: Study, folders: Folders, plan: StudyEstimate) -> Iterator[str]:
    """Warnings about disks, as far as they can be seen from here."""
    stored = sum(group.stored for group in plan.volumes.groups) / max(1, plan.volumes.volumes)
    needed = (plan.cache_bytes or 0.0) * (1 - stored)
    place = Place.parse(folders.cache)
    folder, key = (place.local, "cache") if place.local else (Path(study.scratch or default_scratch()), "scratch")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        yield f"{key}: {there} has {size(free)} free, the prepared volumes need up to {size(needed)} more"
    if plan.pretraining and folders.output.origin is None:
        kept = (plan.pretraining.checkpoints_kept + 1) * plan.pretraining.checkpoint_bytes
        kept += plan.grid.cells * plan.grid.checkpoint_bytes
        there = next(parent for parent in (folders.study, *folders.study.absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free
        if kept > free:
            yield f"output: {there} has {size(free)} free, checkpoints need up to {size(kept)}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
