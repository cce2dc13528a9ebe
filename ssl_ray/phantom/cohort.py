"""A synthetic labelled cohort, CT or MRI, written as NIfTI with Decathlon datalists: to try the whole study on.

`anatomy` draws the bodies, this module puts them into a scanner, and the volumes into a folder.
"""

import gzip
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import orientations
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from ssl_ray.config.schema import PhantomCohort
from ssl_ray.console import track
from ssl_ray.errors import UserError
from ssl_ray.phantom.anatomy import ORGANS, draw
from ssl_ray.storage.files import UNIQUE, remove_stale, write_file

VERSION = 2
"""Part of phantom.json: raise it when the same parameters give other bytes."""

_STORED_AXES = ("RAS", "LAS", "LPS", "RPS", "LPI", "PIR", "ASL")
_HU = (-1000, -850, -103, 0, 40, 110, 210, 420)
"""Air, lung, fat, water, muscle, enhanced blood, marrow, bone."""
CONTRASTS = {"t1": (0, 0.06, 1, 0.2, 0.45, 0.6, 0.5, 0.1), "t2": (0, 0.05, 0.7, 1, 0.3, 0.5, 0.35, 0.05)}
"""By weighting, the signal of each of them."""


def synthesize(
    seed: int,
    index: int,
    *,
    spacing: float | None = None,
    modality: Literal["CT", "MRI"] = "CT",
    organs: Sequence[str] = ORGANS,
) -> tuple[nib.Nifti1Image, ...]:
    """Volume `index` of the cohort `seed`, a pure function of both: int16 HU, and uint8 labels on the same grid.

    `spacing` is an isotropic voxel size in mm, instead of the volume's own (3.3 to 4.3 mm in plane, 4 to 6 mm along the
    body). The patient, the pose and the stored axes stay the same. MRI has an image for each of `CONTRASTS`. The first
    of `organs` has label 1, and so on; the others are background.
    """
    streams = np.random.SeedSequence([seed, index]).spawn(4)
    scanner, patient, noise, coil = (np.random.default_rng(stream) for stream in streams)

    scale, fat = scanner.uniform((0.9, 0.9, 0.92), (1.1, 1.08, 1.08)), 5 + 26 * scanner.beta(1.7, 1.7)
    head, foot = scanner.uniform(125, 150), scanner.uniform(-185, -155)
    width, depth = 2 * (np.array([140, 115]) + fat) + scanner.uniform(15, 45)
    voxel = np.append(np.full(2, scanner.uniform(3.3, 4.3)), scanner.uniform(4, 6))
    if spacing is not None:
        voxel = np.full(3, spacing)
    shape = np.round(scale * (width, depth, head - foot) / voxel).astype(int)
    axes = [(np.arange(n) - (n - 1) / 2) * v for n, v in zip(shape, voxel, strict=True)]

    tilt = scanner.normal(0, 4, 3) * (scanner.random() < 0.6)
    gantry = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()
    pose = Rotation.from_euler("xyz", scanner.normal(0, (3, 3, 7)), degrees=True).as_matrix()
    shift = scanner.normal((0, -4, (head + foot) / 2), (4, 4, 0))
    hu, label = draw(patient, axes, np.diag(1 / scale) @ pose.T @ gantry, shift, fat)
    numbers = [organs.index(name) + 1 if name in organs else 0 for name in ORGANS]
    label = np.array([0, *numbers], np.uint8)[label]

    grain = scanner.uniform((0.45, 0.45, 0.2), (0.9, 0.9, 0.5))
    grainy = gaussian_filter(noise.standard_normal(hu.shape, np.float32), grain)
    image = gaussian_filter(hu, scanner.uniform(0.3, 0.6)) + grainy * (scanner.uniform(7, 26) / grainy.std())
    image = np.clip(np.round(image), -1024, 3071).astype(np.int16)
    images = [image] if modality == "CT" else _weighted(hu, coil)

    affine = nib.affines.from_matvec(gantry * voxel, scanner.normal(0, 60, 3))
    stored = orientations.axcodes2ornt(scanner.choice(_STORED_AXES))
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), stored)
    affine[:3, 3] -= affine[:3, :3] @ ((shape - 1) / 2)
    return tuple(nib.Nifti1Image(voxels, affine).as_reoriented(turn) for voxels in (*images, label))


def _weighted(hu: npt.NDArray[np.float32], rng: np.random.Generator) -> list[npt.NDArray[np.int16]]:
    """The images of a body (X, Y, Z) in HU, int16: of a scale that is anyone's guess, with Rician noise.

    Contrasts are only like those of MRI: tissues are told apart by their HU, so contrast medium shows as more water.
    """
    from monai.transforms import RandBiasField  # takes seconds to import, and CT does without

    made = []
    for signals in CONTRASTS.values():
        field = RandBiasField(prob=1, coeff_range=(-0.25, 0.25)).set_random_state(int(rng.integers(2**31)))
        clean = gaussian_filter(np.interp(hu, _HU, signals), rng.uniform(0.3, 0.6))
        shaded = np.asarray(field(clean[None].astype(np.float32)))[0]
        noise = rng.uniform(0.01, 0.03) * rng.standard_normal((2, *hu.shape), np.float32)
        scale = np.exp(rng.uniform(np.log(200), np.log(5000)))
        made.append(np.round(scale * np.hypot(shaded + noise[0], noise[1])).clip(0, 32767).astype(np.int16))
    return made


def validation_share(unlabelled: int) -> int:
    """How many of the unlabelled volumes `write_cohort` holds out for validation."""
    return max(2, round(unlabelled / 8))


def write_cohort(cohort: PhantomCohort) -> None:
    """Write a cohort and its datalists into its root, on all cores; go on where an interrupted call stopped.

    `images/` and `labels/` hold the volumes, `unlabelled.json` (one in eight, at least two, held out for validation)
    and `labelled_<n>.json` (n of `splits`) the Decathlon datalists, `phantom.json` the parameters. The training volumes
    of a smaller split are the first of a larger one; all share the validation and test volumes; no volume with labels
    is among the unlabelled. A number out of its range, and a root with a cohort of other parameters, is a UserError.
    """
    root, splits = Path(cohort.root), sorted(set(cohort.splits))
    if cohort.unlabelled < 3:
        raise UserError(f"phantom: unlabelled must be at least 3, got {cohort.unlabelled}")
    organs = cohort.organs or ORGANS
    if not set(organs) <= set(ORGANS) or len(set(organs)) < len(organs):
        raise UserError(f"phantom: organs must be of {', '.join(ORGANS)}, each once, got {', '.join(organs)}")
    if not splits or splits[-1] > cohort.labelled:
        raise UserError(f"phantom: splits must lie between 1 and labelled = {cohort.labelled}, got {splits}")
    numbers = cohort.model_dump(exclude={"root", "seed", "splits"}, exclude_defaults=True)
    parameters = json.dumps({"version": VERSION, "seed": cohort.seed, **numbers, "splits": splits})
    record = root / "phantom.json"
    if not record.exists():
        write_file(record, parameters.encode())
    elif (found := record.read_text().strip()) != parameters:
        raise UserError(f"phantom: {root} holds the cohort {found}, not the one asked for, {parameters}")

    # The unlabelled volumes come last: a cohort with more of them keeps every other volume as it was.
    ends = np.cumsum([0, cohort.test, cohort.validation, cohort.labelled, cohort.unlabelled]).tolist()
    cases: list[dict[str, Any]] = [{"image": f"images/phantom{i:04d}.nii.gz"} for i in range(ends[4])]
    if cohort.modality == "MRI":
        cases = [{"image": [f"images/phantom{i:04d}_{one}.nii.gz" for one in CONTRASTS]} for i in range(ends[4])]
    for i, case in enumerate(cases[: ends[3]]):
        case["label"] = f"labels/phantom{i:04d}.nii.gz"
    _write_volumes(cohort, cases)

    tests, validations, trainings, rest = (cases[a:b] for a, b in pairwise(ends))
    held_out = validation_share(cohort.unlabelled)
    lists: dict[str, Any] = {"unlabelled": {"training": rest[:-held_out], "validation": rest[-held_out:]}}
    shared = {"labels": dict(enumerate(("background", *organs))), "validation": validations, "test": tests}
    lists |= {f"labelled_{n}": {**shared, "training": trainings[:n]} for n in splits}
    for name, content in lists.items():
        if not (path := root / f"{name}.json").exists():
            contrasts = CONTRASTS if cohort.modality == "MRI" else ("CT",)
            header = {"name": f"phantom {cohort.seed}", "modality": dict(enumerate(contrasts))}
            write_file(path, json.dumps({**header, **content}, indent=1).encode())


def _write_volumes(cohort: PhantomCohort, cases: list[dict[str, Any]]) -> None:
    """Synthesize the volumes of which a file is missing."""
    root = Path(cohort.root)
    for folder in ("images", "labels"):
        remove_stale(root / folder, rf"\..+\.{UNIQUE}\.part", 24 * 3600)
    files = {i: [name for part in case.values() for name in np.ravel(part).tolist()] for i, case in enumerate(cases)}
    missing = {i: names for i, names in files.items() if not all((root / name).exists() for name in names)}
    with ProcessPoolExecutor() as pool:  # an error or Ctrl-C cancels the rest
        written = pool.map(partial(_write_volume, cohort), missing, missing.values())
        for _ in track("synthesizing volumes", written, len(missing)) if missing else ():
            pass


def _write_volume(cohort: PhantomCohort, index: int, names: list[str]) -> None:
    volumes = synthesize(cohort.seed, index, modality=cohort.modality, organs=cohort.organs or ORGANS)
    for name, nifti in zip(names, volumes, strict=False):
        write_file(Path(cohort.root) / name, gzip.compress(nifti.to_bytes(), 6, mtime=0))
