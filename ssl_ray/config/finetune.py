"""The section `finetune` of an experiment; the defaults are the recipe of MONAI's tutorial."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ssl_ray.config.common import Optimizer, Section, Share, WindowBatch, one_or_more, rule
from ssl_ray.config.preparation import Stage

_Sizes = Annotated[tuple[PositiveInt, ...], one_or_more]
_control = rule(lambda inits: "permuted" not in inits or len(inits) == 3, "permuted is a control beside the other two")
_Files = Annotated[
    tuple[str, ...], BeforeValidator(lambda files: [files] if isinstance(files, str) else files), one_or_more
]
_Inits = Annotated[tuple[Literal["random", "pretrained", "permuted"], ...], one_or_more, _control]


class LabelledCohort(Section):
    """Labelled volumes: a pool that every run draws its own from, or published splits, which all runs share.

    The pool is one datalist, whose validation and test volumes are those of all runs. A split is a datalist too, or the
    ids of its training volumes out of `datalist`.
    """

    root: str
    classes: int = Field(ge=2, le=256, description="organs + background")
    pool: str | None = None
    sizes: _Sizes | None = Field(None, description="subjects to draw from the pool")
    splits: Annotated[dict[PositiveInt, str | tuple[str, ...]], one_or_more] | None = None
    datalist: str | None = None
    folds: int | None = Field(None, ge=3, description="of the pool's subjects, all of whom are scored in every run")

    @model_validator(mode="after")
    def _either(self) -> "LabelledCohort":
        given = [key for key in ("pool", "sizes", "splits") if getattr(self, key) is not None]
        if given not in (["pool", "sizes"], ["splits"]):
            raise ValueError(f"name either a 'pool' with the 'sizes' to draw, or published 'splits', got {given}")
        by_ids = [size for size, split in (self.splits or {}).items() if not isinstance(split, str)]
        if by_ids and self.datalist is None:
            raise ValueError(f"splits.{by_ids[0]} lists ids: name the list that they come from in 'datalist'")
        if self.folds and not self.pool:
            raise ValueError(f"folds: are of the subjects of a 'pool', which is not given, got {self.folds}")
        return self


class Augmentation(Section):
    """Random augmentation of a fine-tuning patch: the recipe's, and by `vary` what CNNs are trained with beside it."""

    flip_prob: Share = 0.1
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = (0, 1, 2)
    rotate_prob: Share = Field(0.1, description="by a multiple of 90 degrees")
    shift: NonNegativeFloat = 0.1
    shift_prob: Share = 0.5
    vary: bool = Field(False, description="rotation, scaling, noise, blur and gamma, about as in nnU-Net")


class SegmentationLoss(Section):
    """MONAI's DiceCELoss (softmax, one-hot)."""

    include_background: bool = Field(True, description="count background in the Dice term")
    batch: bool = Field(False, description="one Dice over the batch instead of one a patch, steadier for small organs")


class TrialOptimizer(Optimizer):
    """That of the recipe, also where the YAML gives it another learning rate alone."""

    weight_decay: float = Field(1e-5, ge=0)


class EncoderTuning(Section):
    """How the encoder is trained, whatever it starts from: all arms of a comparison alike."""

    freeze: Literal["none", "all"] | PositiveInt = Field("none", description="a number: in so many first steps alone")
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate of a block, as a share of the next one's")


class Grid(Section):
    """The cells that Ray Tune runs: every combination of these values, `runs` times."""

    sizes: _Sizes | None = Field(None, description="out of the cohort's splits or sizes; all of them if left out")
    init: _Inits = Field(("random", "pretrained"), description="permuted: pretrained, shuffled within each tensor")
    lr: Annotated[tuple[PositiveFloat, ...], one_or_more] | None = Field(
        None, description="learning rates; optimizer.lr alone if left out"
    )


class Finetune(Stage):
    """Segmentation over the grid."""

    cohort: LabelledCohort
    volumes_per_step: PositiveInt = 1
    patches_per_volume: PositiveInt = 4
    foreground_prob: Share = Field(0.5, description="share of patches centred on a labelled voxel")
    balance_organs: bool = Field(False, description="centre on every organ equally often, not by its volume")
    steps: PositiveInt = 30_000
    validate_every: PositiveInt = Field(100, description="steps")
    sliding_window_batch: WindowBatch = 4
    sliding_window_overlap: float = Field(0.25, ge=0, lt=1)
    surface_tolerance: PositiveFloat = Field(2.0, description="mm, for surface Dice")
    augmentation: Augmentation = Augmentation()
    loss: SegmentationLoss = SegmentationLoss()
    optimizer: TrialOptimizer = TrialOptimizer()
    encoder: EncoderTuning = EncoderTuning()
    grid: Grid = Grid()
    runs: PositiveInt = Field(1, description="each with a seed, a draw of the labelled volumes and a pretraining")
    margin: PositiveFloat = Field(0.02, description="foreground Dice; a smaller difference does not matter")
    primary: PositiveInt | None = Field(None, description="size that decides the headline; the smallest if left out")
    weights: _Files | None = Field(
        None, description="pretrained weights to start from instead of this study's own: a file, or one for each run"
    )
    max_concurrent_trials: PositiveInt | None = None
    cpus_per_trial: PositiveFloat = Field(1, description="all but one score volumes while the next is predicted")
    gpus_per_trial: NonNegativeFloat = 0
    max_failures: int = Field(2, ge=-1)
    checkpoint_minutes: float = Field(5, ge=0, description="at a validation; 0: at every one")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of labelled volumes (of subjects, where there is a pool) in the grid, ascending."""
        return tuple(sorted(self.grid.sizes or self._listed))

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates of the grid."""
        return self.grid.lr or (self.optimizer.lr,)

    @property
    def _listed(self) -> tuple[int, ...]:
        return self.cohort.sizes or tuple(self.cohort.splits or ())

    @model_validator(mode="after")
    def _fits(self) -> "Finetune":
        self.optimizer.check_warmup(self.steps)
        if self.cohort.folds and len(self.rates) > 1:
            rule = "one with cohort.folds, as who validates in one fold, and so would choose, is scored in another"
            raise ValueError(f"grid.lr: {rule}, got {list(self.rates)}")
        if self.gpus_per_trial > 1 and self.gpus_per_trial % 1:
            raise ValueError(f"gpus_per_trial must be a share of one GPU or a whole number, got {self.gpus_per_trial}")
        unknown = sorted(set(self.sizes) - set(self._listed))
        if unknown:
            raise ValueError(f"grid.sizes: {unknown} are not in the cohort, which has {sorted(self._listed)}")
        if self.primary is not None and self.primary not in self.sizes:
            raise ValueError(f"primary: must be one of the grid's sizes {list(self.sizes)}, got {self.primary}")
        return self
