"""The section `pretrain` of an experiment; the defaults are the recipe of MONAI's tutorial."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from ssl_ray.config.common import (
    OnNonfinite,
    Optimizer,
    PatchSize,
    Positive,
    PositiveFloat,
    Precision,
    Preparation,
    Section,
    Share,
)


def _ascending(sides: tuple[int, int]) -> tuple[int, int]:
    if sides[0] > sides[1]:
        raise ValueError(f"the smallest side must not exceed the largest, got {list(sides)}")
    return sides


BoxSides = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
"""Smallest and largest side of a box, in voxels."""


class Source(Section):
    """One datalist of unlabelled volumes."""

    root: str
    datalist: str


class Corruption(Section):
    """What the network has to restore: boxes that are replaced by noise, and boxes whose voxels are shuffled.

    Sides are in voxels; the defaults are the recipe's for patches of 96³.
    """

    outpaint_prob: Share = 0.5
    growing: bool = Field(False, description="a box's side is the next one's lower bound, as MONAI draws them")
    inpaint_boxes: Positive = 6
    inpaint_size: BoxSides = (5, 32)
    outpaint_boxes: Positive = 6
    outpaint_size: BoxSides = (20, 64)
    shuffle_prob: Share = 0.8
    shuffle_boxes: Positive = 10
    shuffle_size: Positive = 8

    @property
    def largest_box(self) -> int:
        """The longest side in voxels that a box may have."""
        return max(self.inpaint_size[1], self.outpaint_size[1], self.shuffle_size)


class Contrastive(Section):
    """A second view of every patch; the loss is then L1 + contrastive * L1."""

    enabled: bool = False
    temperature: PositiveFloat = 0.05


class Pretrain(Section):
    """Self-supervised pretraining of ViTAutoEnc."""

    HOW: ClassVar[set[str]] = {
        *("workers", "shard", "microbatch", "compile", "gpu", "cpus_per_worker", "block_megabytes", "max_failures"),
        *("log_every", "picture_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
        *("on_nonfinite", "max_skipped"),
    }
    """Fields that say how a run is carried out, not what it computes: they may change before it goes on."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    preparation: Preparation
    patch_size: PatchSize = (96, 96, 96)
    patches_per_volume: Positive = 2
    batch_size: Positive = Field(8, description="patches a step, over all workers")
    epochs: Positive = 300
    corruption: Corruption = Corruption()
    contrastive: Contrastive = Contrastive()
    optimizer: Optimizer = Optimizer(name="adam")
    precision: Precision = "auto"
    validate_every: Positive = Field(2, description="epochs")
    picture_every: Positive = Field(5, description="validations")
    checkpoint_every: Positive | None = Field(None, description="steps; beside checkpoint_minutes")
    checkpoint_minutes: PositiveFloat = Field(5, description="since the last one; looked at when a step is logged")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(
        2, description="how many of the newest stay: if the last one is torn, the one before is used"
    )
    log_every: Positive = Field(10, description="steps")
    on_nonfinite: OnNonfinite = "skip"
    max_skipped: Positive = Field(10, description="steps in a row whose loss or gradient is not finite")
    workers: Positive | tuple[Positive, Positive] = Field(1, description="[least, most]: as many as the cluster holds")
    shard: bool = Field(
        False, description="FSDP2 instead of DDP: weights, gradients, optimizer state spread over several workers"
    )
    microbatch: Positive | None = Field(None, description="patches a worker computes at once; more are accumulated")
    compile: bool = Field(False, description="torch.compile; where that fails, it says so and goes on without")
    gpu: bool = False
    cpus_per_worker: PositiveFloat = 1
    block_megabytes: PositiveFloat = Field(64, description="size of one Ray Data block")
    max_failures: Annotated[int, Field(ge=-1)] = Field(3, description="restarts after a fault; -1: no limit")

    @model_validator(mode="after")
    def _fits(self) -> "Pretrain":
        least, most = self.worker_range
        if least > most:
            raise ValueError(f"workers: the least must not exceed the most, got {[least, most]}")
        if self.batch_size < most:
            raise ValueError(f"batch_size must give every worker a patch, got {self.batch_size} for {most} workers")
        if self.contrastive.enabled and (least < most or self.batch_size % most or self.microbatch):
            raise ValueError(
                "contrastive.enabled: negatives are the other patches of a worker, so it needs a fixed number of "
                f"workers that divides batch_size, and no microbatch; got workers {self.workers}, batch_size "
                f"{self.batch_size}, microbatch {self.microbatch}"
            )
        if self.corruption.largest_box > min(self.patch_size):
            raise ValueError(
                f"corruption: a box of {self.corruption.largest_box} voxels does not fit into patch_size "
                f"{list(self.patch_size)}"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)
