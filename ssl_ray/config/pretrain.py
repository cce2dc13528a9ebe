"""The section `pretrain` of an experiment; the defaults are the recipe of MONAI's tutorial."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ssl_ray.config.common import Optimizer, Section, of_kinds, one_or_more
from ssl_ray.config.preparation import Stage
from ssl_ray.pretrain.tasks.masked.settings import Masked
from ssl_ray.pretrain.tasks.restoration.settings import Restoration

AnyTask = Annotated[Restoration | Masked, Field(discriminator="kind"), of_kinds("restoration")]
"""The settings of any pretraining task."""


class Source(Section):
    """One datalist of unlabelled volumes."""

    root: str
    datalist: str


class PretrainingOptimizer(Optimizer):
    """That of the recipe, also where the YAML gives it another learning rate alone."""

    name: Literal["adam", "adamw"] = "adam"


class Pretrain(Stage):
    """Self-supervised pretraining of the network's encoder."""

    sources: Annotated[tuple[Source, ...], one_or_more]
    patches_per_volume: PositiveInt = 2
    batch_size: PositiveInt = Field(8, description="patches a step, over all workers")
    epochs: PositiveInt = 300
    steps: PositiveInt | None = Field(None, description="with a schedule of their own; then `epochs` is not read")
    volumes: float = Field(1.0, gt=0, le=1, description="share of the unlabelled training volumes, drawn by seed")
    pretrainings: PositiveInt = Field(1, description="1: all runs start from the same; finetune.runs: each has its own")
    task: AnyTask = Restoration()
    weights: str | None = Field(None, description="a file to go on from: its encoder, and its decoder if of the task")
    optimizer: PretrainingOptimizer = PretrainingOptimizer()
    validate_every: PositiveInt = Field(2, description="epochs")
    picture_every: PositiveInt = Field(5, description="validations")
    checkpoint_every: PositiveInt | None = Field(None, description="steps; beside checkpoint_minutes")
    checkpoint_minutes: PositiveFloat = Field(5, description="since the last one; looked at when a step is logged")
    keep_checkpoints: int = Field(2, ge=2, description="of the newest; if the last is torn, the one before is used")
    log_every: PositiveInt = Field(10, description="steps")
    probe: bool = Field(True, description="at validations, what the tokens say of the labels; it selects nothing")
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
        if self.task.compares_patches and (least < most or self.batch_size % most or alone or self.microbatch):
            raise ValueError(
                "task: its contrastive loss is between the patches of a worker, so it needs a fixed number of workers "
                f"that divides batch_size, two patches a worker or more, and no microbatch; got workers "
                f"{self.workers}, batch_size {self.batch_size}, microbatch {self.microbatch}"
            )
        return self

    def drawn(self, available: int) -> int:
        """How many of the unlabelled training volumes are trained on."""
        return max(1, round(self.volumes * available))

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)
