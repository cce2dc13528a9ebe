"""A plan as aligned lines for people."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ssl_ray.estimate.work import GridEstimate, PretrainingEstimate

if TYPE_CHECKING:
    from ssl_ray.estimate.study import StudyEstimate


def render(plan: "StudyEstimate") -> str:
    """For people: sections of aligned lines."""
    sections = [("Volumes", list(_volume_lines(plan)))]
    if plan.pretraining:
        sections.append((f"PretrainingEstimate on {plan.cluster.where}", list(_pretraining_lines(plan.pretraining))))
    sections.append((f"Fine-tuning on {plan.cluster.where}", list(_grid_lines(plan.grid))))
    sections.append(("Altogether", list(_total_lines(plan))))
    width = max(len(name) for _, lines in sections for name, _ in lines)
    blocks = [
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in lines)]) for title, lines in sections
    ]
    blocks += ["\n".join(["WARNINGS", *(f"  - {warning}" for warning in plan.warnings)])] if plan.warnings else []
    return "\n\n".join(blocks)


def _volume_lines(plan: "StudyEstimate") -> Iterator[tuple[str, str]]:
    found = plan.volumes
    if found.to_make:
        yield "synthetic", f"{found.volumes} volumes are still to be made, in about half a second of a core each"
    for group in found.groups:
        shape = " x ".join(f"{side:.0f}" for side in group.shape) if group.shape else "unknown"
        how = "in the store" if group.stored == group.volumes else "before the crop to the body"
        partly = f", {group.stored} in the store" if 0 < group.stored < group.volumes else ""
        needs = f", {size(group.bytes)}" if group.bytes is not None else ""
        yield group.name, f"{group.volumes:,} volumes of about {shape} voxels ({how}){needs}{partly}"
    yield "splits", ", ".join(f"{size}" for size in found.splits)
    sampled = sum(group.sampled for group in found.groups)
    stored = sum(group.stored for group in found.groups)
    exact = stored == found.volumes
    if plan.cache_bytes is None:
        yield "store", "size unknown: no header could be read"
    else:
        upper = "" if exact else "at most " if not found.to_make else "about "
        why = "" if exact or found.to_make else f"; {sampled} headers read, the rest taken as their mean"
        inside = "" if found.looked_into_store else "; a remote store is not looked into"
        yield (
            "store",
            f"{upper}{size(plan.cache_bytes)}, {stored:,} of {found.volumes:,} volumes are there{why}{inside}",
        )
    if plan.preparation_core_seconds is not None:
        yield "preparing the rest", f"about {duration(plan.preparation_core_seconds)} of one core"


def _pretraining_lines(work: PretrainingEstimate) -> Iterator[tuple[str, str]]:
    yield (
        "work",
        f"{work.steps:,} steps of {work.patches // work.steps} patches ({work.share} a worker), {work.epochs} epochs; "
        f"{work.validation_patches:,} for validation",
    )
    yield "arithmetic", f"{flop(work.flops_per_patch)} a trained patch, {flop(work.flops)} in all"
    if work.step_seconds:
        yield "step", f"{duration(work.step_seconds)}, {work.arithmetic_rate:,.0f} patches/s over all workers"
    yield "feed", _feed_line(work)
    if work.rate and work.storage_bytes_per_patch:
        yield "storage", f"{size(work.rate * work.storage_bytes_per_patch)}/s, until memory holds the whole store"
    yield "object store", f"{size(work.object_store_bytes)} of blocks of {size(work.block_bytes)} in flight"
    if work.workers > 1:
        yield "exchange", f"{size(work.exchanged_bytes)} a step from each worker to others, whose time is not counted"
    yield (
        "checkpoint",
        f"{size(work.checkpoint_bytes)} every {work.checkpoint_minutes:g} min, {work.checkpoints_kept} are kept",
    )
    if work.seconds:
        yield "takes", f"{duration(work.seconds)}, limited by {work.bottleneck}"


def _feed_line(work: PretrainingEstimate) -> str:
    if not work.rate or not work.bytes_per_second_per_worker or not work.reader_cores_needed:
        return f"{size(work.patch_bytes)} a patch"
    there = f", there are cores for {work.reader_rate:,.0f} patches/s" if math.isfinite(work.reader_rate) else ""
    cores = f"{max(0.1, work.reader_cores_needed):.1f} cores that read{there}"
    return f"{size(work.bytes_per_second_per_worker)}/s to each worker, {cores}"


def _grid_lines(grid: GridEstimate) -> Iterator[tuple[str, str]]:
    yield (
        "work",
        f"{grid.cells} trials, {grid.concurrent} at a time, of {grid.steps:,} steps of {grid.patches_per_step} "
        f"patches; {grid.validations} validations"
        + (f" of {grid.windows:,.0f} windows at most" if grid.windows else ""),
    )
    yield "arithmetic", f"{flop(grid.flops_per_step)} a step, {flop(grid.flops)} in all"
    if grid.step_seconds:
        yield "step", duration(grid.step_seconds)
    if grid.validation_seconds:
        yield "validation", f"{duration(grid.validation_seconds)} at most, metrics not counted"
    yield "checkpoint", f"{size(grid.checkpoint_bytes)} a trial"
    if grid.trial_seconds and grid.seconds:
        yield "takes", f"{duration(grid.trial_seconds)} a trial, {duration(grid.seconds)} in all"


def _total_lines(plan: "StudyEstimate") -> Iterator[tuple[str, str]]:
    if plan.seconds is not None:
        yield "takes", f"about {duration(plan.seconds)}, without start-up and the final evaluation's distances"
    else:
        yield "takes", "not estimated"
    for line in plan.basis:
        yield "from", line


def size(count: float) -> str:
    """Bytes."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def flop(count: float) -> str:
    """Floating-point operations."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def duration(seconds: float) -> str:
    """Seconds."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
