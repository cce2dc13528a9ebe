"""The section `finetune` of an experiment; the defaults are the recipe of MONAI's tutorial."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from ssl_ray.config.common import (
    VIT_PATCH,
    OnNonfinite,
    Optimizer,
    PatchSize,
    Positive,
    PositiveFloat,
    Precision,
    Preparation,
    Section,
    Seed,
    Share,
)


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"a value appears twice in {list(values)}")
    return values


_OneOrMore = Field(min_length=1)
_Different = AfterValidator(_different)


class LabelledCohort(Section):
    """Labelled volumes: one datalist for each split, or one datalist for all and the training ids of each split."""

    root: str
    classes: Annotated[int, Field(ge=2, le=256)] = Field(description="organs + background")
    splits: Annotated[dict[Positive, str | tuple[str, ...]], Field(min_length=1)]
    datalist: str | None = None

    @model_validator(mode="after")
    def _ids_have_a_list(self) -> "LabelledCohort":
        by_ids = [size for size, split in self.splits.items() if not isinstance(split, str)]
        if by_ids and self.datalist is None:
            raise ValueError(f"splits.{by_ids[0]} lists ids: name the list that they come from in 'datalist'")
        return self


class Augmentation(Section):
    """Random augmentation of a fine-tuning patch."""

    flip_prob: Share = 0.1
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = (0, 1, 2)
    rotate_prob: Share = 0.1
    shift: Annotated[float, Field(ge=0)] = 0.1
    shift_prob: Share = 0.5


class SegmentationLoss(Section):
    """MONAI's DiceCELoss (softmax, one-hot)."""

    include_background: bool = Field(True, description="count background in the Dice term")
    batch: bool = Field(False, description="one Dice over the batch instead of one a patch, steadier for small organs")


class Grid(Section):
    """The cells that Ray Tune runs: every combination of these values."""

    splits: Annotated[tuple[Positive, ...], _OneOrMore, _Different] | None = Field(
        None, description="sizes out of cohort.splits; all of them if left out"
    )
    init: Annotated[tuple[Literal["random", "pretrained"], ...], _OneOrMore, _Different] = ("random", "pretrained")
    lr: Annotated[tuple[PositiveFloat, ...], _OneOrMore, _Different] = (1e-4,)
    seeds: Annotated[tuple[Seed, ...], _OneOrMore, _Different] = (0,)


class Finetune(Section):
    """Segmentation with UNETR over the grid."""

    HOW: ClassVar[set[str]] = {
        *("max_concurrent_trials", "cpus_per_trial", "gpus_per_trial", "max_failures", "compile"),
        *("checkpoint_minutes", "on_nonfinite", "max_skipped"),
    }
    """Fields that say how a trial is carried out, not what it computes: they may change before it goes on."""

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
        if self.precision == "bfloat16" and not self.gpus_per_trial and self.patch_size[0] == VIT_PATCH:
            raise ValueError(
                f"precision: on a CPU bfloat16 needs patches more than {VIT_PATCH} voxels deep, as gradients are wrong "
                f"otherwise (oneDNN); got patch_size {list(self.patch_size)}"
            )
        unknown = sorted(set(self.split_sizes) - set(self.cohort.splits))
        if unknown:
            raise ValueError(f"grid.splits: {unknown} are not in cohort.splits, which has {sorted(self.cohort.splits)}")
        return self
