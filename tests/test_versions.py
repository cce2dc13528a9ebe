"""The number of a stage's code is raised when, and only when, the same settings give other results.

After a change that is meant to change results: raise the stage's number, and put what the test found into `EXPECTED`.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from studies import small_study
from tiny_learner import make, steps
from volumes import oblique_affine, organ_labels, smooth_ct

from ssl_ray.config import depends
from ssl_ray.config.schema import Preparation
from ssl_ray.data import normalise
from ssl_ray.data.nifti import Nifti
from ssl_ray.data.store import Store, Volume
from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.finetune.patches import PatchSampler

EXPECTED: dict[str, tuple[int, object]] = {
    "prepare": (5, "09f2e89ef36c750926e831271cf9138db6f29d31bd54f71ade3d122269b91c79"),
    "pretrain": (1, [0.488073796, 0.488501877, 0.478133142, 0.478348911]),
    "finetune": (3, [1.833523989, 1.821411803, 1.728533506, 1.737327814]),
}
"""By stage: the number of its code, and what it gives."""


def pretraining_losses(folder: Path) -> list[float]:
    return steps(make(folder), 0, 4)


def finetuning_losses(folder: Path) -> list[float]:
    """On patches of one volume, stored as it is, so that they do not depend on the preparation."""
    shape = (24, 22, 20)
    image = ((smooth_ct(shape) + 1000) / 1700 * 255).astype(np.uint8)
    label = organ_labels(shape, 3)
    counts = {str(value): int(count) for value, count in enumerate(np.bincount(label.ravel()))}
    matrix = tuple(map(tuple, np.eye(4).tolist()))
    spacing = (1.0, 1.0, 1.0)
    stored = "uint8", 255, 1, {}, (), (0,)
    made = Volume("key", "a", "a", "a", "", shape, spacing, matrix, *stored, shape, counts, 2, {})
    store = Store(folder)
    volume = store.put(made, normalise.CanonicalVolume(image, label, 255, np.eye(4), (), (0,)))
    study = small_study(finetune={"cohort": {"classes": 3}, "augmentation": {"flip_prob": 0.5, "rotate_prob": 0.5}})
    sampler = PatchSampler((volume,), store, study.finetune, 0)
    learner = SegmentationLearner(study.finetune, study.network, torch.device("cpu"), 0)
    return [float(learner.step(*sampler.batch(step), 1e-2)[0]) for step in range(4)]


def prepared_digest() -> str:
    affine = oblique_affine((2.5, 2.5, 4.0), 20.0)
    image, label = smooth_ct((12, 11, 8), 1).astype(np.float32), organ_labels((12, 11, 8), 3, 1)
    settings = Preparation(spacing=(3, 3, 3), hu_window=(-57, 164))  # 8 bits: nothing lies near the next level
    made = normalise.prepare(Nifti(image, affine), Nifti(label.astype(np.float32), affine), settings)
    assert made.label is not None
    return hashlib.sha256(made.image.tobytes() + made.label.tobytes()).hexdigest()


@pytest.mark.parametrize("stage", EXPECTED)
def test_what_a_stage_gives_belongs_to_its_version(stage: str, tmp_path: Path) -> None:
    """Eight losses (to 1e-4, as other processors round otherwise), and the digest of a prepared volume."""
    number, expected = EXPECTED[stage]
    if stage == "prepare":
        version, found = normalise.VERSION, prepared_digest()
    elif stage == "pretrain":
        version, found = depends.VERSION["pretrain"], pretraining_losses(tmp_path)
    else:
        version, found = depends.VERSION["finetune"], finetuning_losses(tmp_path)
    assert version == number, f"the number was raised: what belongs to it is {found}"
    expected = expected if stage == "prepare" else pytest.approx(expected, rel=1e-4)
    assert found == expected, f"other results under the same number: raise VERSION of {stage!r}, or find the mistake"
