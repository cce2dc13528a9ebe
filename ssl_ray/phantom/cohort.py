"""A synthetic labelled CT cohort, written as NIfTI with Decathlon datalists: something to try the whole study on.

Nothing here is a patient: `body` and `anatomy` draw the bodies, this module puts them into a scanner (field of view,
pose, spacing, table, blur, correlated noise, stored axes) and the volumes into a folder.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from ssl_ray.errors import UserError
from ssl_ray.phantom.anatomy import ORGANS, draw
from ssl_ray.phantom.canvas import Array, Canvas
from ssl_ray.storage.files import remove_stale, write_file

VERSION = 1
"""Part of phantom.json: raise it when the same parameters give other bytes."""

_STALE_SECONDS = 24 * 3600
_STORED_AXES = ("RAS", "LAS", "LPS", "RPS", "LPI", "PIR", "ASL")


def synthesize(seed: int, index: int, *, spacing: float | None = None) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Volume `index` of the cohort `seed`: a pure function of both.

    Args:
        seed: of the cohort, >= 0.
        index: of the volume, >= 0.
        spacing: isotropic voxel size in mm, instead of the volume's own (3.3 to 4.3 mm in plane, 4 to 6 mm along the
            body). The patient, the pose and the stored axes stay the same.

    Returns:
        The image (int16 HU, -1024 to 3071) and its labels (uint8, organ i of `ORGANS` is i + 1), on the same grid.
    """
    streams = np.random.SeedSequence([seed, index]).spawn(3)
    scanner, patient, noise = (np.random.default_rng(stream) for stream in streams)

    scale, adiposity = scanner.uniform((0.9, 0.9, 0.92), (1.1, 1.08, 1.08)), float(scanner.beta(1.7, 1.7))
    head, foot = scanner.uniform(125, 150), scanner.uniform(-185, -155)
    radius = np.array([140, 115]) + np.array([34, 44]) * adiposity
    size = np.array([*(2 * scale[:2] * radius + scanner.uniform(15, 45)), scale[2] * (head - foot)])
    voxel = np.array([0.0, 0.0, scanner.uniform(4, 6)]) + scanner.uniform(3.3, 4.3) * np.array([1, 1, 0])
    if spacing is not None:
        voxel = np.full(3, float(spacing))
    shape = np.round(size / voxel).astype(int)
    axes = [(np.arange(n) - (n - 1) / 2) * v for n, v in zip(shape, voxel, strict=True)]

    gantry = np.eye(3)
    if scanner.random() < 0.6:
        gantry = Rotation.from_euler("xyz", scanner.normal(0, 4, 3), degrees=True).as_matrix()
    pose = Rotation.from_euler("xyz", scanner.normal(0, (3, 3, 7)), degrees=True).as_matrix()
    to_body = np.diag(1 / scale) @ pose.T @ gantry
    shift = np.array([*scanner.normal(0, 4, 2), (head + foot) / 2]) - (0, 4, 0)
    canvas = Canvas(patient, axes, to_body, shift, up=gantry[1])
    draw(canvas, adiposity)

    bend = scanner.uniform(350, 900)
    if scanner.random() < 0.75:  # a hollow table under the body
        sag = canvas.height - (axes[0] ** 2 / (2 * bend)).astype(np.float32)[:, None, None]
        depth = np.abs(sag - np.percentile(sag[canvas.hu > -300], 0.2) + 14) - 10
        for side, hu in ((depth, 60), (depth + 3, -930)):  # a shell around foam
            alpha = np.clip(0.5 - side / voxel[1], 0, 1) * (canvas.hu < -500)
            canvas.hu += (alpha * (hu - canvas.hu)).astype(np.float32)

    sigma = scanner.uniform((0.45, 0.45, 0.2), (0.9, 0.9, 0.5))
    grainy = gaussian_filter(noise.standard_normal(canvas.hu.shape, np.float32), sigma)
    dose = scanner.uniform(7, 26) * np.where(canvas.hu < -900, 0.5, 1)
    image = gaussian_filter(canvas.hu, scanner.uniform(0.3, 0.6)) + grainy * (dose / grainy.std())
    image = np.clip(np.round(image), -1024, 3071).astype(np.int16)

    affine = np.eye(4)
    affine[:3, :3] = gantry * voxel
    affine[:3, 3] = scanner.normal(0, 60, 3) - affine[:3, :3] @ ((shape - 1) / 2)
    stored = orientations.axcodes2ornt(scanner.choice(_STORED_AXES))
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), stored)
    return _nifti(image, affine, turn), _nifti(canvas.label, affine, turn)


def _nifti(array: Array, affine: Array, turn: Array) -> nib.Nifti1Image:
    """The array as NIfTI, its axes permuted and flipped by `turn`."""
    image = nib.Nifti1Image(array, affine).as_reoriented(turn)
    image.set_sform(image.affine, code="scanner")
    image.set_qform(image.affine, code="scanner")
    image.header.set_xyzt_units("mm")
    return image


def validation_share(unlabelled: int) -> int:
    """How many of the unlabelled volumes `write_cohort` holds out for validation."""
    return max(2, round(unlabelled / 8))


def write_cohort(
    root: Path,
    *,
    unlabelled: int,
    labelled: int,
    validation: int,
    test: int,
    splits: Sequence[int],
    seed: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> None:
    """Write a cohort and its datalists into `root`; go on where an interrupted call stopped.

    `images/` and `labels/` hold the volumes, `unlabelled.json` (one in eight, at least two, held out for validation)
    and `labelled_<n>.json` (n of `splits`) the Decathlon datalists, `phantom.json` the parameters. The training volumes
    of a smaller split are the first of a larger one; all share the validation and test volumes; no volume with labels
    is among the unlabelled. Each volume takes about half a second on one core; all cores are used.

    Args:
        root: folder; made where missing.
        unlabelled: number of volumes without labels, at least 3.
        labelled: number of labelled volumes to train on.
        validation: number of labelled volumes to select by, at least 1.
        test: number of labelled volumes to report, at least 1.
        splits: numbers of labelled training volumes, each from 1 to `labelled`.
        seed: of the cohort, >= 0.
        progress: wraps the sequence of volumes that are still to be written, as tqdm does.

    Raises:
        UserError: when a number is out of its range, or `root` holds a cohort of other parameters.
    """
    for key, value, least in (("unlabelled", unlabelled, 3), ("validation", validation, 1), ("test", test, 1)):
        if value < least:
            raise UserError(f"phantom: {key} must be at least {least}, got {value}")
    splits = sorted(set(splits))
    if not splits or splits[0] < 1 or splits[-1] > labelled:
        raise UserError(f"phantom: splits must lie between 1 and labelled = {labelled}, got {splits}")
    counts = {"unlabelled": unlabelled, "labelled": labelled, "validation": validation, "test": test}
    parameters = {"version": VERSION, "seed": seed, **counts, "splits": splits}
    record = root / "phantom.json"
    if record.exists() and (found := json.loads(record.read_text())) != parameters:
        raise UserError(f"phantom: {root} holds the cohort {found}, not the one asked for, {parameters}")
    # The unlabelled volumes come last: a cohort with more of them keeps every other volume as it was.
    ends = np.cumsum([test, validation, labelled, unlabelled]).tolist()
    cases = [
        {key: f"{key}s/phantom{i:04d}.nii.gz" for key in ("image", "label")[: 2 if i < ends[2] else 1]}
        for i in range(ends[3])
    ]
    for folder in ("images", "labels"):
        remove_stale(root / folder, "*.part", _STALE_SECONDS)
    _write_json(record, parameters)
    _write_missing(root, cases, seed, progress)
    tests, validations, trainings, rest = (cases[a:b] for a, b in zip([0, *ends], ends, strict=False))
    header = {"name": f"phantom {seed}", "modality": {"0": "CT"}}
    labels = {str(i): name for i, name in enumerate(("background", *ORGANS))}
    for n in splits:
        parts = {"training": trainings[:n], "validation": validations, "test": tests}
        _write_json(root / f"labelled_{n}.json", {**header, "labels": labels, **parts})
    held_out = validation_share(unlabelled)
    _write_json(root / "unlabelled.json", {**header, "training": rest[:-held_out], "validation": rest[-held_out:]})


def _write_missing(
    root: Path, cases: list[dict[str, str]], seed: int, progress: Callable[[Iterable[Any]], Iterable[Any]] | None
) -> None:
    """Synthesize the volumes of which a file is missing, on all cores."""
    files = [[root / name for name in case.values()] for case in cases]
    missing = {i: paths for i, paths in enumerate(files) if not all(path.exists() for path in paths)}
    if not missing:
        return
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(missing))) as pool:
        futures = [pool.submit(_write_volume, paths, seed, i) for i, paths in missing.items()]
        try:
            for future in progress(futures) if progress else futures:
                future.result()
        except BaseException:  # Ctrl-C must not wait for hundreds of volumes
            pool.shutdown(cancel_futures=True)
            raise


def _write_volume(paths: Sequence[Path], seed: int, index: int) -> None:
    for nifti, path in zip(synthesize(seed, index), paths, strict=False):
        write_file(path, gzip.compress(nifti.to_bytes(), 6, mtime=0))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1).encode() + b"\n"
    if not path.exists() or path.read_bytes() != text:
        write_file(path, text)
