"""From NIfTI to the canonical array, and what pretraining and fine-tuning have in common."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from ssl_ray.config.common import OnNonfinite, PatchSize, Precision, Section, Spacing, of_kinds
from ssl_ray.data.normalisations.percentile.settings import Percentile
from ssl_ray.data.normalisations.window.settings import Window
from ssl_ray.data.normalisations.zscore.settings import ZScore

Normalise = Annotated[Window | Percentile | ZScore, Field(discriminator="kind"), of_kinds("window")]
"""The settings of any normalisation."""


class Preparation(Section):
    """From NIfTI to the canonical array; every field is part of the key under which the store keeps a volume."""

    orientation: Literal["RAS", "LPS", "LAS"] | None = "RAS"
    spacing: Spacing = Field(description="mm")
    normalise: Normalise = Field(description="hu_window: [low, high] is short for the kind window with this range")
    crop_foreground: bool = Field(True, description="to the body: what lies above the window's lower end or threshold")
    channels: PositiveInt = Field(1, description="images of a volume in the datalists, each normalised by itself")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or "hu_window" not in tree:
            return tree
        if "normalise" in tree:
            raise ValueError("hu_window is short for normalise: only one of them can be given")
        window = {"kind": "window", "hu_window": tree["hu_window"]}
        return {"normalise": window, **{key: value for key, value in tree.items() if key != "hu_window"}}


class Stage(Section):
    """What pretraining and fine-tuning have in common."""

    preparation: Preparation
    patch_size: PatchSize = (96, 96, 96)
    precision: Precision = "auto"
    compile: bool = Field(False, description="by torch.compile, which needs a C++ compiler")
    on_nonfinite: OnNonfinite = "skip"
    max_skipped: PositiveInt = Field(10, description="steps in a row whose loss or gradient is not finite")
