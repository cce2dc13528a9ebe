"""Pretraining as people write it today from MONAI's public interface: the other side of pretrain.py.

    torchrun --standalone --nproc-per-node 1 experiments/benchmarks/plain_pretrain.py --root DIR ...

The recipe of the tutorial's multi-GPU script with one view: `CacheDataset` with every transform, `DistributedSampler`,
`DataLoader` with workers, DDP that looks for unused parameters (MONAI's blocks have some), float32, Adam, the loss read
and printed every step. It is not meant to be slow: the crop that would be thrown away is used, and the cache is filled
once. Times of all steps and the validation losses go to `--out` as JSON.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.data import CacheDataset, DataLoader, load_decathlon_datalist
from monai.networks.nets import ViTAutoEnc
from monai.transforms import (
    Compose,
    CopyItemsd,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    OneOf,
    Orientationd,
    RandCoarseDropoutd,
    RandCoarseShuffled,
    RandSpatialCropSamplesd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler


def transforms(side: int, inside: list[int], outside: list[int], shuffle: int) -> Compose:
    """The published transforms with one view."""
    paint: dict[str, Any] = {"keys": "image", "prob": 1.0, "holes": 6}
    return Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacingd("image", pixdim=(2.0, 2.0, 2.0), mode="bilinear"),
            ScaleIntensityRanged("image", a_min=-57, a_max=164, b_min=0.0, b_max=1.0, clip=True),
            CropForegroundd("image", source_key="image"),
            SpatialPadd("image", spatial_size=(side,) * 3),
            RandSpatialCropSamplesd("image", roi_size=(side,) * 3, random_size=False, num_samples=2),
            CopyItemsd("image", times=1, names=["gt_image"]),
            OneOf(
                [
                    RandCoarseDropoutd(**paint, spatial_size=inside[0], dropout_holes=True, max_spatial_size=inside[1]),
                    RandCoarseDropoutd(
                        **paint, spatial_size=outside[0], dropout_holes=False, max_spatial_size=outside[1]
                    ),
                ]
            ),
            RandCoarseShuffled("image", prob=0.8, holes=10, spatial_size=shuffle),
        ]
    )


def main() -> None:
    """Train for some epochs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=json.loads, required=True, help="what pretrain.py sets, as JSON")
    options = parser.parse_args()
    recipe = options.recipe
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(recipe["seed"] + rank)
    transform = transforms(recipe["side"], recipe["inside"], recipe["outside"], recipe["shuffle"])
    loaders = {}
    for name in ("training", "validation"):
        cases = load_decathlon_datalist(options.root / "unlabelled.json", False, name, options.root)
        data = CacheDataset(cases, transform, num_workers=1, progress=False)
        sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=name == "training")
        count = recipe["volumes"] // world
        loaders[name] = DataLoader(
            data,
            batch_size=count,
            sampler=sampler,
            num_workers=recipe["loader_workers"],
            drop_last=name == "training",
        )
    side = (recipe["side"],) * 3
    model: Any = ViTAutoEnc(
        in_channels=1, img_size=side, patch_size=(16, 16, 16), proj_type="conv", **recipe["network"]
    )
    model = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe["lr"])
    recon = torch.nn.L1Loss()
    found: dict[str, list[Any]] = {"steps": [], "validations": []}
    step = 0
    for epoch in range(recipe["epochs"]):
        model.train()
        loaders["training"].sampler.set_epoch(epoch)
        for batch in loaders["training"]:
            optimizer.zero_grad()
            restored, _ = model(batch["image"])
            loss = recon(restored, batch["gt_image"])
            loss.backward()
            optimizer.step()
            step += 1
            found["steps"].append((time.time(), len(restored) * world, mean(loss)))
            if rank == 0:
                print(f"epoch {epoch} step {step} loss {found['steps'][-1][2]:.4f}", flush=True)
        if (epoch + 1) % recipe["validate_every"] == 0:
            found["validations"].append((time.time(), step, validate(model, loaders["validation"], recon)))
    if rank == 0:
        options.out.write_text(json.dumps(found))
    dist.destroy_process_group()


@torch.no_grad()
def validate(model: Any, loader: Any, recon: Any) -> float:
    """Mean loss over the validation volumes, cropped and corrupted anew."""
    model.eval()
    losses = [mean(recon(model(batch["image"])[0], batch["gt_image"])) for batch in loader]
    return sum(losses) / len(losses)


def mean(loss: torch.Tensor) -> float:
    """Over ranks."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return float(loss.item() / dist.get_world_size())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
