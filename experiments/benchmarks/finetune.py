"""A step of fine-tuning and a validation: ours against a plain MONAI script of the same recipe, on one core.

    PYTHONPATH=. python experiments/benchmarks/finetune.py [--quick] [--float32]

The plain script is the tutorial's fine-tuning notebook: `CacheDataset` with the deterministic transforms' results,
`RandCropByPosNegLabeld` and augmentation, `UNETR` in float32, `DiceCELoss`, `AdamW`, `loss.item()` every step;
validation by `sliding_window_inference`, `AsDiscrete`, `DiceMetric`. Both train the same network on the same volumes
in memory or the page cache, in turns, each in a process of its own. Accuracy is not compared here: tests/test_trial.py
does that for the step, tests/test_metrics.py for the metrics.
"""

from collections.abc import Callable, Sequence
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from cohort import fill
from monai.data import CacheDataset, DataLoader, decollate_batch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNETR
from timing import Bench, Elsewhere, main

from ssl_ray.config.schema import Study
from ssl_ray.data.patch import open_array
from ssl_ray.data.store import Store, Volume
from ssl_ray.finetune.job import TrialData, TrialJob
from ssl_ray.finetune.trial import Trial
from ssl_ray.networks.unetr.settings import Unetr
from ssl_ray.storage.mirror import Mirror
from ssl_ray.training.prefetch import ahead

FLOOR = 1.5
CLASSES = 14


def study(bench: Bench, network: Unetr, side: int) -> Study:
    """The reference recipe's fine-tuning."""
    preparation = {"orientation": "RAS", "spacing": [1.5, 1.5, 2.0], "hu_window": [-175, 250]}
    nowhere = {"root": str(bench.folder), "datalist": "none.json"}
    boxes = {} if side == 96 else {"inpaint_size": [3, 10], "outpaint_size": [8, 20], "shuffle_size": 4}
    return Study.model_validate(
        {
            "name": "finetune",
            "output": str(bench.folder / "output"),
            "network": network.model_dump(),
            "pretrain": {
                "sources": [nowhere],
                "preparation": preparation,
                "patch_size": side,
                "task": {"corruption": boxes},
            },
            "finetune": {
                "cohort": {"root": str(bench.folder), "classes": CLASSES, "splits": {1: "none.json"}},
                "preparation": preparation,
                "patch_size": side,
                "precision": bench.precision,
            },
        }
    )


class Plain:
    """The notebook's training, written from MONAI's public interface."""

    def __init__(self, store: Store, volumes: Sequence[Volume], network: Unetr, side: int) -> None:
        self.size, keys = (side,) * 3, ["image", "label"]
        cases = []
        for volume in volumes:
            image = torch.from_numpy(open_array(store, volume.key).astype(np.float32) / volume.levels)
            label = torch.from_numpy(open_array(store, volume.key, "label").astype(np.float32))
            cases.append({"image": image[None], "label": label[None]})
        crop = mt.RandCropByPosNegLabeld(
            keys, label_key="label", spatial_size=self.size, pos=1, neg=1, num_samples=4, image_key="image"
        )
        flips = [mt.RandFlipd(keys, spatial_axis=[axis], prob=0.1) for axis in range(3)]
        rest = [mt.RandRotate90d(keys, prob=0.1, max_k=3), mt.RandShiftIntensityd("image", offsets=0.1, prob=0.5)]
        data = CacheDataset(cases, mt.Compose([crop, *flips, *rest, mt.ToTensord(keys)]), progress=False)
        self.loader = DataLoader(data, batch_size=1, shuffle=True, num_workers=0)
        self.validation = DataLoader(CacheDataset(cases[:1], mt.ToTensord(keys), progress=False), batch_size=1)
        self.model = UNETR(
            in_channels=1,
            out_channels=CLASSES,
            img_size=self.size,
            **network.model_dump(exclude={"kind"}),
            proj_type="conv",
            norm_name="instance",
            res_block=True,
            dropout_rate=0.0,
        )
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-5)

    def train(self, steps: int) -> int:
        """Some steps of the epoch loop."""
        self.model.train()
        done, total = 0, 0.0
        while done < steps:
            for batch in self.loader:
                loss = self.loss(self.model(batch["image"]), batch["label"])
                loss.backward()
                total += loss.item()
                self.optimizer.step()
                self.optimizer.zero_grad()
                done += 1
                if done == steps:
                    break
        return done

    def validate(self) -> int:
        """The notebook's `validation`."""
        post_label, post_pred = mt.AsDiscrete(to_onehot=CLASSES), mt.AsDiscrete(argmax=True, to_onehot=CLASSES)
        metric = DiceMetric(include_background=True, reduction="mean", get_not_nans=False)
        self.model.eval()
        with torch.no_grad():
            for batch in self.validation:
                outputs = sliding_window_inference(batch["image"], self.size, 4, self.model)
                truths = [post_label(one) for one in decollate_batch(batch["label"])]
                metric(y_pred=[post_pred(one) for one in decollate_batch(outputs)], y=truths)
                metric.aggregate().item()
        return 1


def run(bench: Bench) -> None:
    """Steps and validations of a tiny UNETR and of the recipe's."""
    tiny = Unetr(hidden_size=96, mlp_dim=192, num_heads=3, feature_size=8)
    networks = {"tiny": tiny} if bench.quick else {"tiny": tiny, "ViT-B": Unetr()}
    side, shape = (32, (60, 60, 50)) if bench.quick else (96, (200, 170, 130))
    for name, network in networks.items():
        made = study(bench, network, side)
        store = Store(bench.folder / f"store-{name}")
        volumes = fill(store, 2 if bench.quick else 3, shape, made.finetune.preparation, CLASSES)
        data = TrialData(store, tuple(volumes), tuple(volumes[:1]), (), tuple(f"organ {i}" for i in range(1, CLASSES)))
        folder, mirror = bench.folder / f"trial-{name}", Mirror(bench.folder)
        job = TrialJob(made.finetune, made.network, 0, data, None, folder, mirror, "key")
        trial = Trial(job, torch.device("cpu"))
        plain = Elsewhere(Plain, store, volumes, network, side)
        batches = ahead(trial._batch, range(10**6), threads=1)

        def ours(count: int, trial: Any = trial, batches: Any = batches) -> int:
            for _ in range(count):
                loss, norm = trial.learner.step(*next(batches), 1e-4)
                trial.watch.look(0, loss, norm)
            return count

        steps = 2 if name == "tiny" and not bench.quick else 1
        ours(1), plain("train", 1)
        variants: dict[str, Callable[[], int]] = {
            "MONAI": lambda plain=plain, steps=steps: plain("train", steps),  # type: ignore[misc]
            "ours": lambda ours=ours, steps=steps: ours(steps),  # type: ignore[misc]
        }
        found = bench.compare(f"step of 4 patches, {name}", variants, 4, "steps")
        bench.ratio(f"fine-tuning step, {name}", found["MONAI"], found["ours"], FLOOR)
        validating: dict[str, Callable[[], int]] = {
            "MONAI": lambda plain=plain: plain("validate"),  # type: ignore[misc]
            "ours": lambda trial=trial: len(trial._validate(0)) and 1,  # type: ignore[misc]
        }
        found = bench.compare(f"validation of a volume, {name}", validating, 3 if name == "tiny" else 2, "volumes")
        bench.ratio(f"validation, {name}", found["MONAI"], found["ours"])
        plain.stop()


if __name__ == "__main__":
    main(__doc__ or "", run)
