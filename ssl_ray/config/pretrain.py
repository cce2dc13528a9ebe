"""The section `pretrain` of an experiment; the defaults are the recipe of MONAI's tutorial."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ssl_ray.config.common import Optimizer, Section, Share, one_or_more, rule
from ssl_ray.config.preparation import Stage

BoxSides = Annotated[
    tuple[PositiveInt, PositiveInt],
    rule(lambda sides: sides[0] <= sides[1], "the smallest side must not exceed the largest"),
]
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
    inpaint_boxes: PositiveInt = 6
    inpaint_size: BoxSides = (5, 32)
    outpaint_boxes: PositiveInt = 6
    outpaint_size: BoxSides = (20, 64)
    shuffle_prob: Share = 0.8
    shuffle_boxes: PositiveInt = 10
    shuffle_size: PositiveInt = 8


class Contrastive(Section):
    """A second view of every patch; the loss is then L1 + contrastive * L1."""

    enabled: bool = False
    temperature: PositiveFloat = 0.05


class PretrainingOptimizer(Optimizer):
    """That of the recipe, also where the YAML gives it another learning rate alone."""

    name: Literal["adam", "adamw"] = "adam"


class Pretrain(Stage):
    """Self-supervised pretraining of ViTAutoEnc."""

    sources: Annotated[tuple[Source, ...], one_or_more]
    patches_per_volume: PositiveInt = 2
    batch_size: PositiveInt = Field(8, description="patches a step, over all workers")
    epochs: PositiveInt = 300
    pretrainings: PositiveInt = Field(1, description="1: all runs start from the same; finetune.runs: each has its own")
    corruption: Corruption = Corruption()
    contrastive: Contrastive = Contrastive()
    optimizer: PretrainingOptimizer = PretrainingOptimizer()
    validate_every: PositiveInt = Field(2, description="epochs")
    picture_every: PositiveInt = Field(5, description="validations")
    checkpoint_every: PositiveInt | None = Field(None, description="steps; beside checkpoint_minutes")
    checkpoint_minutes: PositiveFloat = Field(5, description="since the last one; looked at when a step is logged")
    keep_checkpoints: int = Field(2, ge=2, description="of the newest; if the last is torn, the one before is used")
    log_every: PositiveInt = Field(10, description="steps")
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(1, description="[least, most]: as many as there are")
    shard: bool = Field(False, description="FSDP2 instead of DDP: workers share weights, gradients, optimizer state")
    microbatch: PositiveInt | None = Field(None, description="patches a worker computes at once; more are accumulated")
    gpu: bool = False
    cpus_per_worker: PositiveFloat = 1
    block_megabytes: PositiveFloat = Field(64, description="size of one Ray Data block")
    max_failures: int = Field(3, ge=-1, description="restarts after a fault; -1: no limit")

    @model_validator(mode="after")
    def _fits(self) -> "Pretrain":
        least, most = self.worker_range
        if least > most:
            raise ValueError(f"workers: the least must not exceed the most, got {[least, most]}")
        if self.batch_size < most:
            raise ValueError(f"batch_size must give every worker a patch, got {self.batch_size} for {most} workers")
        alone = self.batch_size == most
        if self.contrastive.enabled and (least < most or self.batch_size % most or alone or self.microbatch):
            raise ValueError(
                "contrastive.enabled: negatives are the other patches of a worker, so it needs a fixed number of "
                f"workers that divides batch_size, two patches a worker or more, and no microbatch; got workers "
                f"{self.workers}, batch_size {self.batch_size}, microbatch {self.microbatch}"
            )
        sizes = self.corruption
        box = max(sizes.inpaint_size[1], sizes.outpaint_size[1], sizes.shuffle_size)
        if box > min(self.patch_size):
            raise ValueError(f"corruption: a box of {box} voxels does not fit into patch_size {list(self.patch_size)}")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)
