"""`ssl-ray check`: what the volumes of a study show, one by one, and what looks wrong with them."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import nibabel as nib
import numpy as np

from ssl_ray.config.schema import Preparation
from ssl_ray.console import track
from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import content_digest
from ssl_ray.data.normalisations.intensities import measure, sampled
from ssl_ray.data.prepare import read_case
from ssl_ray.data.resample import canonical_grid
from ssl_ray.errors import UserError

_READERS = min(4, os.cpu_count() or 1)
"""Volumes that are read at once, as each takes up to 16 bytes a voxel."""
_COARSER, _LARGER, _CLIPPED = 3, 10, 0.25
"""What is told: voxels so many times the median, organs so many times theirs, and the share that a window clips."""
_ENOUGH = 5
"""Volumes that an organ's median is taken of, at least."""


@dataclass(frozen=True)
class Look:
    """What one volume shows; nothing but `refused` where a run could not use it, for this reason.

    `spacing` is of the scan, along its own axes, and `extent` of its canonical grid before the crop to the body, along
    R, A, S; both in mm. 99 % of the scan lie within `ends`, in its own unit, and 99 % of what is labelled within
    `labelled`. `organs` are in ml by label value, and `clipped` is the share of each that lies outside of what the
    normalisation keeps. `content` is the scan's digest.
    """

    part: str
    case: Case
    spacing: tuple[float, ...] = ()
    extent: tuple[float, ...] = ()
    ends: tuple[float, float] = (0.0, 0.0)
    labelled: tuple[float, float] = (0.0, 0.0)
    organs: Mapping[int, float] = field(default_factory=dict)
    clipped: Mapping[int, float] = field(default_factory=dict)
    content: str = ""
    refused: str = ""


class Finding(NamedTuple):
    """What looks wrong; `refused`: a run would not take it."""

    place: str
    what: str
    refused: bool = False


def look_at(
    cases: Sequence[tuple[str, Case]], preparations: Mapping[str, Preparation], classes: int
) -> tuple[Look, ...]:
    """Read cases, each with its part of the study, with the checks that a run makes when it prepares them."""

    def look(one: tuple[str, Case]) -> Look:
        part, case = one
        try:
            return _look(part, case, preparations[part], classes)
        except UserError as error:
            return Look(part, case, refused=str(error))

    with ThreadPoolExecutor(_READERS) as pool:
        return tuple(track("reading volumes", pool.map(look, cases), len(cases)))


def _look(part: str, case: Case, preparation: Preparation, classes: int) -> Look:
    image, label, others = read_case(case)
    found, *_ = [measure(scan.voxels, preparation.normalise) for scan in (image, *others)]
    ends = np.percentile(sampled(image.voxels), (0.5, 99.5)).tolist()
    organs, clipped, labelled = {}, {}, (0.0, 0.0)
    if label:
        values = label.voxels.astype(np.uint8)
        inside = values > 0
        low, high = (found.zero + end * (found.one - found.zero) for end in preparation.normalise.storage.ends)
        kept = image.voxels[inside]
        counts = np.bincount(values[inside], minlength=classes)
        outside = np.bincount(values[inside], (kept < low) | (kept > high), len(counts))
        if len(counts) > classes:
            beyond = f"label {len(counts) - 1} is beyond the {classes} classes (0..{classes - 1})"
            raise UserError(f"{case.label}: {beyond}")
        ml = abs(float(np.linalg.det(image.affine[:3, :3]))) / 1000
        organs = {value: float(count) * ml for value, count in enumerate(counts) if count}
        clipped = {value: float(outside[value] / counts[value]) for value in organs}
        if organs:
            labelled = tuple(np.percentile(kept[:: 1 + kept.size // 100_000], (0.5, 99.5)).tolist())
    shape = canonical_grid(image.voxels.shape, image.affine, preparation).shape
    extent = tuple(side * step for side, step in zip(shape, preparation.spacing, strict=True))
    spacing = tuple(nib.affines.voxel_sizes(image.affine).tolist())
    return Look(part, case, spacing, extent, tuple(ends), labelled, organs, clipped, content_digest(image))


def findings(
    looks: Sequence[Look], patches: Mapping[str, Sequence[float]], organs: Sequence[str], held_out: Collection[str]
) -> list[Finding]:
    """What looks wrong: first what a run would refuse.

    `patches` are the sides of a patch in mm, by part of the study; `held_out` are the parts that are not trained on.
    """
    whole = [look for look in looks if not look.refused]
    found = [_refusal(look) for look in looks if look.refused]
    found += [*_twice(whole, held_out), *_odd_grids(whole, patches), *_odd_organs(whole, organs)]
    return sorted(found, key=lambda one: not one.refused)


def sides(lengths: Iterable[float]) -> str:
    """Lengths along three axes."""
    return " x ".join(map(number, lengths))


def number(value: float) -> str:
    """A length, a volume or an intensity, in three digits or whole."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _file(look: Look) -> str:
    return str(look.case.image)


def _refusal(look: Look) -> Finding:
    """The reason, without the file that it begins with."""
    place, _, why = look.refused.partition(": ")
    named = place in map(str, (*look.case.images, look.case.label))
    return Finding(place, why, True) if named else Finding(_file(look), look.refused, True)


def _twice(looks: Sequence[Look], held_out: Collection[str]) -> Iterator[Finding]:
    """One scan under two names."""
    seen: dict[str, Look] = {}
    for look in looks:
        first = seen.setdefault(look.content, look)
        if first is not look and (look.part == first.part or look.part in held_out):
            what = f"the same scan as {_file(first)}, {look.part} here and {first.part} there"
            yield Finding(_file(look), what, look.part in held_out)


def _odd_grids(looks: Sequence[Look], patches: Mapping[str, Sequence[float]]) -> Iterator[Finding]:
    """Voxels unlike those of the others, and scans that a patch is larger than."""
    usual = np.median([sorted(look.spacing) for look in looks] or [[1.0] * 3], axis=0)
    for look in looks:
        ratio = np.array(sorted(look.spacing)) / usual
        if max(*ratio, *1 / ratio) > _COARSER:
            what = (
                f"voxels of {sides(sorted(look.spacing))} mm, where {sides(usual)} mm are usual: is the header right?"
            )
            yield Finding(_file(look), what)
        if any(side < of_patch for side, of_patch in zip(look.extent, patches[look.part], strict=True)):
            what = f"{sides(look.extent)} mm are less than a patch of {sides(patches[look.part])} mm: padded with zeros"
            yield Finding(_file(look), what)


def _odd_organs(looks: Sequence[Look], organs: Sequence[str]) -> Iterator[Finding]:
    """Organs that no volume has, or of an odd size; label maps without any; what the normalisation clips."""
    labelled = [look for look in looks if look.case.label]
    for look in labelled:
        if not look.organs:
            yield Finding(str(look.case.label), "a label map without any organ")
    for value, organ in enumerate(organs, 1):
        with_it = [look for look in labelled if value in look.organs]
        trained = [look for look in with_it if look.part == "labelled training"]
        if labelled and not trained:
            where = "training volume" if with_it else "volume"
            yield Finding(f"class {value}, {organ}", f"no {where} that was read has it, so that nothing learns it")
        if not with_it:
            continue
        if organ == f"label {value}" and any(other != f"label {n}" for n, other in enumerate(organs, 1)):
            yield Finding(f"class {value}", f"in {len(with_it)} volumes, without a name in the list, as others have")
        median = float(np.median([look.organs[value] for look in with_it]))
        for look in with_it if len(with_it) >= _ENOUGH else ():
            ratio = look.organs[value] / median
            if not 1 / _LARGER < ratio < _LARGER:
                what = f"{organ} has {number(look.organs[value])} ml, where {number(median)} are usual"
                yield Finding(str(look.case.label), f"{what}: another organ's label, or cut off?")
        clipped = float(np.mean([look.clipped[value] for look in with_it]))
        if clipped > _CLIPPED:
            what = f"{clipped:.0%} of its voxels lie outside of what the normalisation keeps"
            mend = "widen it, or without a unit take zscore (finetune.preparation.normalise)"
            yield Finding(f"class {value}, {organ}", f"{what}: {mend}")
