"""Settings of restoration; the defaults are the recipe of MONAI's tutorial."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ssl_ray.config.common import Section, Share, TaskSettings, rule

BoxSides = Annotated[
    tuple[PositiveInt, PositiveInt],
    rule(lambda sides: sides[0] <= sides[1], "the smallest side must not exceed the largest"),
]
"""Smallest and largest side of a box, in voxels."""


class Corruption(Section):
    """What the network has to restore: boxes that are replaced by noise, and boxes whose voxels are shuffled.

    Sides are in voxels; the defaults are the recipe's for patches of 96³.
    """

    outpaint_prob: Share = 0.5
    growing: bool = Field(False, description="a box's side is the next one's lower bound, as MONAI draws them")
    inpaint_boxes: NonNegativeInt = Field(6, description="0 with outpaint_prob 0: shuffling alone")
    inpaint_size: BoxSides = (5, 32)
    outpaint_boxes: PositiveInt = 6
    outpaint_size: BoxSides = (20, 64)
    shuffle_prob: Share = 0.8
    shuffle_boxes: PositiveInt = 10
    shuffle_size: PositiveInt = 8

    @model_validator(mode="after")
    def _leaves_something_to_restore(self) -> "Corruption":
        if not (self.inpaint_boxes or self.outpaint_prob or self.shuffle_prob):
            raise ValueError("inpaint_boxes, outpaint_prob and shuffle_prob must not all be 0: nothing to restore")
        return self


class Contrastive(Section):
    """A second view of every patch; the loss is then L1 + contrastive * L1."""

    enabled: bool = False
    temperature: PositiveFloat = 0.05


class Restoration(TaskSettings):
    """Restore corrupted patches."""

    kind: Literal["restoration"] = "restoration"
    corruption: Corruption = Corruption()
    contrastive: Contrastive = Contrastive()

    @property
    def compares_patches(self) -> bool:
        """The contrastive loss does."""
        return self.contrastive.enabled

    def check_patch(self, patch_size: tuple[int, int, int], tokens: int) -> None:
        """Every box must fit."""
        sizes = self.corruption
        box = max(sizes.inpaint_size[1], sizes.outpaint_size[1], sizes.shuffle_size)
        if box > min(patch_size):
            raise ValueError(
                f"pretrain.task.corruption: a box of {box} voxels does not fit into patch_size {list(patch_size)}"
            )
