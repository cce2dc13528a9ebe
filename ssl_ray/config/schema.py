"""One experiment, typed and validated; `experiment.py` reads it from YAML.

A study is described by one YAML file. Everything in it is checked here, before anything expensive starts; the checks
that need the data (datalists, volumes) follow in `ssl_ray.data`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

VIT_PATCH = 16
"""Side of a ViT token in voxels: MONAI's UNETR fixes it, and ViTAutoEnc wants a square number."""
VIT_LAYERS = 12
"""Transformer blocks: MONAI's UNETR takes its skip connections from the outputs of blocks 3, 6 and 9 of 12."""

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Precision = Literal["auto", "float32", "bfloat16"]
OnNonfinite = Literal["skip", "stop"]
"""What follows a step whose loss or gradient is not finite; the weights are never changed by it."""


def _three(value: Any) -> Any:
    return [value] * 3 if isinstance(value, int | float | str) else value


PatchSize = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_three)]
Spacing = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_three)]


class Strict(BaseModel):
    """A section of the YAML: unknown keys, NaN and infinity are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Preparation(Strict):
    """From NIfTI to the canonical array; every field is part of the cache key."""

    orientation: Literal["RAS", "LPS", "LAS"] | None = "RAS"
    spacing: Spacing = Field(description="mm")
    hu_window: tuple[float, float] = Field(description="HU that become 0 and 1; values outside are clipped")
    crop_foreground: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> "Preparation":
        if not self.hu_window[0] < self.hu_window[1]:
            raise ValueError(f"hu_window: the lower HU must be below the upper, got {list(self.hu_window)}")
        return self


class Source(Strict):
    """One datalist of unlabelled volumes."""

    root: str
    datalist: str


class PhantomCohort(Strict):
    """The synthetic cohort that a study makes for itself before it starts."""

    root: str
    unlabelled: Positive
    labelled: Positive
    validation: Positive
    test: Positive
    splits: tuple[Positive, ...]
    seed: Seed = 0


class Network(Strict):
    """Width of the ViT (768, 3072, 12: ViT-B) and of UNETR's convolutional decoder."""

    hidden_size: Positive = 768
    mlp_dim: Positive = 3072
    num_heads: Positive = 12
    feature_size: Positive = 16

    @model_validator(mode="after")
    def _divisible(self) -> "Network":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and {self.num_heads}"
            )
        return self


class Corruption(Strict):
    """Boxes in voxels; the defaults are the recipe's for 96³ patches."""

    outpaint_prob: Share = 0.5
    growing: bool = Field(False, description="a box's side is the next one's lower bound, as MONAI draws them")
    inpaint_boxes: Positive = 6
    inpaint_size: tuple[Positive, Positive] = (5, 32)
    outpaint_boxes: Positive = 6
    outpaint_size: tuple[Positive, Positive] = (20, 64)
    shuffle_prob: Share = 0.8
    shuffle_boxes: Positive = 10
    shuffle_size: Positive = 8

    @model_validator(mode="after")
    def _ordered(self) -> "Corruption":
        for name in ("inpaint_size", "outpaint_size"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the smallest side must not exceed the largest, got {[low, high]}")
        return self

    @property
    def largest_box(self) -> int:
        """The longest side in voxels that a box may have."""
        return max(self.inpaint_size[1], self.outpaint_size[1], self.shuffle_size)


class Optimizer(Strict):
    """Adam or AdamW, with a linear warm-up and then a constant or cosine learning rate."""

    name: Literal["adam", "adamw"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip_norm: PositiveFloat | None = None


class Contrastive(Strict):
    """Second view of every patch; total loss = L1 + contrastive * L1."""

    enabled: bool = False
    temperature: PositiveFloat = 0.05


class Pretrain(Strict):
    """Self-supervised pretraining of ViTAutoEnc."""

    HOW: ClassVar[set[str]] = {
        *("workers", "shard", "microbatch", "compile", "gpu", "cpus_per_worker", "block_megabytes", "max_failures"),
        *("log_every", "picture_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
        *("on_nonfinite", "max_skipped"),
    }
    """Settings of how a run is carried out, not of what it computes: they may change while it is interrupted."""

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
        2, description="newest ones; should one be torn, the one before"
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
        _check_patch(self.patch_size)
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


class LabelledCohort(Strict):
    """Labelled volumes: a datalist a split, or one datalist and the training ids of each split."""

    root: str
    classes: Annotated[int, Field(ge=2, le=256)] = Field(description="organs + background")
    splits: Annotated[dict[Positive, str | tuple[str, ...]], Field(min_length=1)]
    datalist: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "LabelledCohort":
        by_ids = [size for size, split in self.splits.items() if not isinstance(split, str)]
        if by_ids and self.datalist is None:
            raise ValueError(f"splits.{by_ids[0]} lists ids: name the list that they come from in 'datalist'")
        return self


class Augmentation(Strict):
    """Random augmentation of a fine-tuning patch; the defaults are the recipe's."""

    flip_prob: Share = 0.1
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = (0, 1, 2)
    rotate_prob: Share = 0.1
    shift: Annotated[float, Field(ge=0)] = 0.1
    shift_prob: Share = 0.5


class SegmentationLoss(Strict):
    """MONAI's DiceCELoss (softmax, one-hot); the defaults are the recipe's."""

    include_background: bool = Field(True, description="count background in the Dice term")
    batch: bool = Field(False, description="one Dice over the batch instead of one a patch, steadier for small organs")


class Grid(Strict):
    """The cells that Ray Tune runs: every combination."""

    splits: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = Field(
        None, description="sizes out of cohort.splits; all of them if left out"
    )
    init: Annotated[tuple[Literal["random", "pretrained"], ...], Field(min_length=1)] = ("random", "pretrained")
    lr: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1e-4,)
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)


class Finetune(Strict):
    """Segmentation with UNETR over the grid."""

    HOW: ClassVar[set[str]] = {
        *("max_concurrent_trials", "cpus_per_trial", "gpus_per_trial", "max_failures", "compile"),
        *("checkpoint_minutes", "on_nonfinite", "max_skipped"),
    }
    """Settings of how a trial is carried out, not of what it computes."""

    cohort: LabelledCohort
    preparation: Preparation
    patch_size: PatchSize = (96, 96, 96)
    volumes_per_step: Positive = 1
    patches_per_volume: Positive = 4
    foreground_prob: Share = Field(0.5, description="share of patches centred on a labelled voxel")
    balance_organs: bool = Field(False, description="centre on every organ equally often, not by its volume")
    steps: Positive = 30_000
    validate_every: Positive = Field(100, description="steps")
    sliding_window_batch: Positive = 4
    sliding_window_overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    surface_tolerance: PositiveFloat = Field(2.0, description="mm, for surface Dice")
    augmentation: Augmentation = Augmentation()
    loss: SegmentationLoss = SegmentationLoss()
    optimizer: Optimizer = Optimizer(name="adamw", weight_decay=1e-5)
    precision: Precision = "auto"
    grid: Grid = Grid()
    weights: str | None = Field(None, description="pretrained weights to start from instead of this study's own")
    max_concurrent_trials: Positive | None = None
    cpus_per_trial: PositiveFloat = Field(1, description="all but one score volumes while the next is predicted")
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0
    max_failures: Annotated[int, Field(ge=-1)] = 2
    compile: bool = Field(False, description="torch.compile; where that fails, it says so and goes on without")
    checkpoint_minutes: Annotated[float, Field(ge=0)] = Field(5, description="at a validation; 0: at every one")
    on_nonfinite: OnNonfinite = "skip"
    max_skipped: Positive = Field(10, description="steps in a row whose loss or gradient is not finite")

    @property
    def split_sizes(self) -> tuple[int, ...]:
        """Numbers of training volumes in the grid, ascending."""
        return tuple(sorted(self.grid.splits or self.cohort.splits))

    @model_validator(mode="after")
    def _fits(self) -> "Finetune":
        _check_patch(self.patch_size)
        if self.precision == "bfloat16" and not self.gpus_per_trial and self.patch_size[0] == VIT_PATCH:
            raise ValueError(
                f"precision: on a CPU bfloat16 needs patches more than {VIT_PATCH} voxels deep, as gradients are wrong "
                f"otherwise (oneDNN); got patch_size {list(self.patch_size)}"
            )
        unknown = sorted(set(self.split_sizes) - set(self.cohort.splits))
        if unknown:
            raise ValueError(f"grid.splits: {unknown} are not in cohort.splits, which has {sorted(self.cohort.splits)}")
        for name in ("splits", "init", "lr", "seeds"):
            values = getattr(self.grid, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"grid.{name}: a value stands twice in {list(values)}")
        return self


class Tracking(Strict):
    """Where MLflow keeps the runs; without a URI, in SQLite under the output folder."""

    uri: str | None = None
    experiment: str | None = Field(None, description="MLflow experiment; the study's name if left out")


class LocalCluster(Strict):
    """The Ray cluster that is started where none is running; ignored on an existing one."""

    cpus: Positive | None = None
    object_store_gigabytes: PositiveFloat = 1.0


class Study(Strict):
    """One experiment file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: str = "output"
    cache: str | None = Field(None, description="store of prepared volumes; <output>/cache if left out")
    scratch: str | None = Field(
        None, description="folder on each machine's own disk, used when output or cache is remote"
    )
    seed: Seed = 0
    on_bad_volume: Literal["fail", "skip"] = "fail"
    phantom: PhantomCohort | None = None
    network: Network = Network()
    pretrain: Pretrain
    finetune: Finetune
    tracking: Tracking = Tracking()
    cluster: LocalCluster = LocalCluster()

    @model_validator(mode="after")
    def _places(self) -> "Study":
        if "://" in self.output and not self.tracking.uri:
            raise ValueError(
                "output: in an object store there is no place for MLflow's database, so tracking.uri must name a server"
            )
        return self

    @property
    def pretrains(self) -> bool:
        """Whether the grid needs weights that this study has to make; if not, its unlabelled volumes are not read."""
        return "pretrained" in self.finetune.grid.init and not self.finetune.weights


def _check_patch(patch_size: tuple[int, int, int]) -> None:
    if any(side % VIT_PATCH for side in patch_size):
        raise ValueError(f"patch_size: every side must be a multiple of {VIT_PATCH} voxels, got {list(patch_size)}")
