"""One experiment, typed and validated: a study is described by one YAML file.

Everything in it is checked here, before anything expensive starts; the checks that need the data (datalists, volumes)
follow in `ssl_ray.data`. This module only describes; `ssl_ray.config.loading` goes from YAML to a `Study` and back.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ssl_ray.config.common import Optimizer, Section, Seed, of_kinds
from ssl_ray.config.finetune import Augmentation, EncoderTuning, Finetune, LabelledCohort, SegmentationLoss
from ssl_ray.config.preparation import Preparation
from ssl_ray.config.pretrain import Pretrain, Source
from ssl_ray.config.search import Search, check_space
from ssl_ray.networks.dynunet.settings import DynUnet
from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.unetr.settings import Unetr

__all__ = ["LocalCluster", "Network", "Optimizer", "Preparation", "Study", "Tracking"]
__all__ += ["Augmentation", "Finetune", "LabelledCohort", "Pretrain", "Search", "SegmentationLoss", "Source"]


Network = Annotated[Unetr | Primus | DynUnet, Field(discriminator="kind"), of_kinds("unetr")]
"""The settings of any network."""


class PhantomCohort(Section):
    """The synthetic cohort that a study makes for itself before it starts."""

    root: str
    unlabelled: PositiveInt
    labelled: PositiveInt
    validation: PositiveInt
    test: PositiveInt
    splits: tuple[PositiveInt, ...]
    seed: Seed = 0
    organs: tuple[str, ...] | None = Field(None, min_length=1, description="to label, in this order; else all of BTCV")
    modality: Literal["CT", "MRI"] = Field("CT", description="MRI: two channels, T1- and T2-weighted, of no unit")


class Tracking(Section):
    """Where MLflow keeps the runs; without a URI, at MLFLOW_TRACKING_URI, or else in SQLite under the output folder."""

    uri: str | None = Field(None, repr=False)
    experiment: str | None = Field(None, description="MLflow experiment; the study's name if left out")


class LocalCluster(Section):
    """The Ray cluster that is started where none is running; ignored on an existing one."""

    cpus: PositiveInt | None = None
    object_store_gigabytes: PositiveFloat = 1.0


class Study(Section):
    """One experiment file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str = Field("output", repr=False)
    cache: str | None = Field(None, repr=False, description="store of prepared volumes; <output>/cache if left out")
    scratch: str | None = Field(None, description="on each machine's own disk, for an output or cache that is remote")
    seed: Seed = 0
    on_bad_volume: Literal["fail", "skip"] = "fail"
    phantom: PhantomCohort | None = None
    network: Network = Unetr()
    pretrain: Pretrain
    finetune: Finetune
    search: Search | None = Field(None, description="in place of the grid")
    tracking: Tracking = Tracking()
    cluster: LocalCluster = LocalCluster()

    @model_validator(mode="after")
    def _pretrains_once_or_for_each_run(self) -> "Study":
        pretrainings, runs, files = self.pretrain.pretrainings, self.finetune.runs, self.finetune.weights
        if self.needs_weights and pretrainings not in (1, runs):
            raise ValueError(
                f"pretrain.pretrainings: must be 1 or as many as finetune.runs, as runs that share a pretraining with "
                f"some of the others would depend on each other; got {pretrainings} for {runs} runs"
            )
        if files and len(files) != pretrainings:
            raise ValueError(
                f"finetune.weights: must be as many files as pretrain.pretrainings, {pretrainings}, got {len(files)}"
            )
        return self

    @model_validator(mode="after")
    def _fits_its_network(self) -> "Study":
        network, tuned, patch_size = self.network, self.finetune, self.pretrain.patch_size
        network.check_patch("finetune.patch_size", tuned.patch_size)
        if network.pretrains:
            network.check_patch("pretrain.patch_size", patch_size)
            self.pretrain.task.check_patch(patch_size, math.prod(side // network.multiple[0] for side in patch_size))
        elif tuned.weights or set(tuned.grid.init) != {"random"}:
            raise ValueError(
                f"finetune.grid.init: a {network.kind} is not pretrained here, so that [random] is all that it can "
                f"start from, got {list(tuned.grid.init)}{' and finetune.weights' if tuned.weights else ''}"
            )
        elif tuned.encoder != EncoderTuning():
            raise ValueError(f"finetune.encoder: a {network.kind} has no encoder to tune, got {tuned.encoder}")
        ours, theirs = self.pretrain.preparation.channels, tuned.preparation.channels
        if self.pretrains and ours != theirs:
            raise ValueError(
                f"pretrain.preparation.channels: must be that of finetune.preparation, got {ours} and {theirs}"
            )
        if tuned.precision == "bfloat16" and not tuned.gpus_per_trial and tuned.patch_size[0] <= network.thin:
            raise ValueError(
                f"finetune.precision: on a CPU bfloat16 needs patches more than {network.thin} voxels deep, as "
                f"gradients are wrong otherwise (oneDNN); got patch_size {list(tuned.patch_size)}"
            )
        return self

    @model_validator(mode="after")
    def _can_be_searched(self) -> "Study":
        if self.search:
            tuned = self.finetune
            if tuned.runs > 1 or tuned.grid.lr or tuned.cohort.folds:
                raise ValueError(
                    "finetune: a search has one run, no folds, and draws rates by search.space.finetune.optimizer.lr; "
                    f"got runs {tuned.runs}, cohort.folds {tuned.cohort.folds}, grid.lr {tuned.grid.lr}"
                )
            given = {"size": tuned.sizes, "init": tuned.grid.init}
            check_space(self, self.search.space, given, makes_weights=not tuned.weights)
        return self

    @property
    def needs_weights(self) -> bool:
        """Whether cells of the grid start from pretrained weights."""
        return "pretrained" in self.finetune.grid.init

    @property
    def pretrains(self) -> bool:
        """Whether the grid needs weights that this study has to make; if not, its unlabelled volumes are not read."""
        return self.needs_weights and not self.finetune.weights
