"""Preparing a volume for pretraining: ours against MONAI's own chain of transforms, a core.

    PYTHONPATH=. python experiments/benchmarks/prepare.py

Ours reads the file, checks it, resamples, crops, and writes it into the store with digests; MONAI's chain, the
tutorial's, ends with the cropped tensor in memory. `kept` adds what MONAI's `PersistentDataset` does with it. Both
results are compared, within the tolerance of tests/test_volume.py, on every volume. Each runs in a process of its own.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from cohort import PREPARATION, WINDOW, write_scan
from timing import Bench, Elsewhere, main

from ssl_ray.data.datalist import Case
from ssl_ray.data.patch import open_array
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.resample import AXIS_CODES
from ssl_ray.data.store import Store

FLOOR = 3.0


class Plain:
    """MONAI's chain, file after file."""

    def __init__(self, kept: Path) -> None:
        self._transform, self._kept = chain(), kept

    def prepare(self, files: list[Path]) -> int:
        """Up to the tensor in memory."""
        for file in files:
            self._transform({"image": str(file)})
        return len(files)

    def keep(self, files: list[Path]) -> int:
        """And into a file."""
        for file in files:
            torch.save(self._transform({"image": str(file)}), self._kept)
        return len(files)


def chain() -> Any:
    """The deterministic half of the published transforms, with the orientation of `PREPARATION`."""
    low, high = WINDOW.hu_window
    return mt.Compose(
        [
            mt.LoadImaged("image"),
            mt.EnsureChannelFirstd("image"),
            mt.Orientationd("image", axcodes=PREPARATION.orientation, labels=AXIS_CODES),
            mt.Spacingd("image", pixdim=PREPARATION.spacing, mode="bilinear"),
            mt.ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
            mt.CropForegroundd("image", source_key="image"),
        ]
    )


def real(bench: Bench) -> list[Path]:
    """Up to six volumes of a folder, the largest."""
    folder = Path(os.environ.get("SSL_RAY_BENCH_DATA", "../shared/data"))
    found = sorted(folder.rglob("images/*.nii.gz"), key=lambda path: -path.stat().st_size)
    return found[: 1 if bench.quick else 6]


def run(bench: Bench) -> None:
    """Synthetic volumes, then real ones where there are any."""
    shape = (96, 96, 40) if bench.quick else (320, 320, 100)
    synthetic = [
        write_scan(bench.folder / f"scan{seed}.nii.gz", shape, (0.94, 0.94, 3.0), seed)
        for seed in range(1 if bench.quick else 4)
    ]
    plain = Elsewhere(Plain, bench.folder / "kept.pt")
    for name, files in ((f"synthetic {'x'.join(map(str, shape))}", synthetic), ("real", real(bench))):
        if not files:
            print(f"{name}: no volumes here")
            continue
        fresh = iter(range(10**6))

        def ours(files: list[Path] = files, fresh: Any = fresh) -> int:
            store = Store(bench.folder / f"store{next(fresh)}")
            for file in files:
                prepare_case(Case(file.name, file, None), PREPARATION, store)
            return len(files)

        variants: dict[str, Callable[[], int]] = {
            "MONAI": lambda files=files: plain("prepare", files),  # type: ignore[misc]
            "MONAI, kept": lambda files=files: plain("keep", files),  # type: ignore[misc]
            "ours": ours,
        }
        differ(bench, name, files)
        plain("prepare", files[:1])  # reads its modules
        found = bench.compare(name, variants, 5, "volumes")
        floor = FLOOR if name != "real" else None
        bench.ratio(f"preparation, {name}", found["MONAI"], found["ours"], floor)
        bench.ratio(f"preparation, {name}, kept by both", found["MONAI, kept"], found["ours"])
    plain.stop()


def differ(bench: Bench, name: str, files: list[Path]) -> None:
    """Largest difference of the results in stored levels; other shapes are an error."""
    worst, store, transform = 0.0, Store(bench.folder / "compared"), chain()
    for file in files:
        volume, _ = prepare_case(Case(file.name, file, None), PREPARATION, store)
        expected = transform({"image": str(file)})["image"][0].numpy()
        stored = open_array(store, volume.key)
        if stored.shape != expected.shape:
            raise RuntimeError(f"{file}: {stored.shape}, MONAI has {expected.shape}")
        worst = max(worst, float(np.abs(stored - expected * np.float32(volume.levels)).max()))
    bench.floor(f"difference in levels, {name}", worst, at_most=0.5 + 1e-5 * 255)


if __name__ == "__main__":
    main(__doc__ or "", run)
