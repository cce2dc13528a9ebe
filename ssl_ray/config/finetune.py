"""The section `finetune` of an experiment; the defaults are the recipe of MONAI's tutorial."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ssl_ray.config.common import VIT_PATCH, Optimizer, Section, Share, Stage, one_or_more


class LabelledCohort(Section):
    """Labelled volumes: one datalist for each split, or one datalist for all and the training ids of each split."""

    root: str
    classes: int = Field(ge=2, le=256, description="organs + background")
    splits: Annotated[dict[PositiveInt, str | tuple[str, ...]], one_or_more]
    datalist: str | None = None
    pool: str | None = None

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
    shift: NonNegativeFloat = 0.1
    shift_prob: Share = 0.5


class SegmentationLoss(Section):
    """MONAI's DiceCELoss (softmax, one-hot)."""

    include_background: bool = Field(True, description="count background in the Dice term")
    batch: bool = Field(False, description="one Dice over the batch instead of one a patch, steadier for small organs")


class Grid(Section):
    """The cells that Ray Tune runs: every combination of these values."""

    sizes: Annotated[tuple[PositiveInt, ...], one_or_more] | None = Field(
        None, description="out of cohort.splits; all of them if left out"
    )
    init: Annotated[tuple[Literal["random", "pretrained"], ...], one_or_more] = ("random", "pretrained")
    lr: Annotated[tuple[PositiveFloat, ...], one_or_more] = (1e-4,)


class Finetune(Stage):
    """Segmentation with UNETR over the grid."""

    HOW: ClassVar[set[str]] = Stage.HOW | {"max_concurrent_trials", "cpus_per_trial", "gpus_per_trial"}

    cohort: LabelledCohort
    volumes_per_step: PositiveInt = 1
    patches_per_volume: PositiveInt = 4
    foreground_prob: Share = Field(0.5, description="share of patches centred on a labelled voxel")
    balance_organs: bool = Field(False, description="centre on every organ equally often, not by its volume")
    steps: PositiveInt = 30_000
    validate_every: PositiveInt = Field(100, description="steps")
    sliding_window_batch: PositiveInt = 4
    sliding_window_overlap: float = Field(0.25, ge=0, lt=1)
    surface_tolerance: PositiveFloat = Field(2.0, description="mm, for surface Dice")
    augmentation: Augmentation = Augmentation()
    loss: SegmentationLoss = SegmentationLoss()
    optimizer: Optimizer = Optimizer(name="adamw", weight_decay=1e-5)
    grid: Grid = Grid()
    runs: PositiveInt = Field(1, description="each with a seed, a draw of the labelled volumes and a pretraining")
    margin: PositiveFloat = Field(0.02, description="foreground Dice; a smaller difference does not matter")
    primary: PositiveInt | None = Field(None, description="size that decides the headline; the smallest if left out")
    weights: str | None = Field(None, description="pretrained weights to start from instead of this study's own")
    max_concurrent_trials: PositiveInt | None = None
    cpus_per_trial: PositiveFloat = Field(1, description="all but one score volumes while the next is predicted")
    gpus_per_trial: NonNegativeFloat = 0
    max_failures: int = Field(2, ge=-1)
    checkpoint_minutes: float = Field(5, ge=0, description="at a validation; 0: at every one")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of labelled volumes in the grid, ascending."""
        return tuple(sorted(self.grid.sizes or self.cohort.splits))

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates of the grid."""
        return self.grid.lr

    @model_validator(mode="after")
    def _fits(self) -> "Finetune":
        if self.precision == "bfloat16" and not self.gpus_per_trial and self.patch_size[0] == VIT_PATCH:
            raise ValueError(
                f"precision: on a CPU bfloat16 needs patches more than {VIT_PATCH} voxels deep, as gradients are wrong "
                f"otherwise (oneDNN); got patch_size {list(self.patch_size)}"
            )
        unknown = sorted(set(self.sizes) - set(self.cohort.splits))
        if unknown:
            raise ValueError(f"grid.sizes: {unknown} are not in cohort.splits, which has {sorted(self.cohort.splits)}")
        return self
