"""Settings of the masked autoencoder; the defaults are MAE's, with a decoder as light as ViT-B leaves room for."""

from typing import Literal

from pydantic import Field, PositiveInt

from ssl_ray.config.common import TaskSettings


class Masked(TaskSettings):
    """Predict the voxels of dropped tokens; after fine-tuning one layer is as good as eight (He et al., table 1a)."""

    kind: Literal["masked"] = "masked"
    ratio: float = Field(0.75, gt=0, lt=1, description="share of the tokens that are dropped")
    loss: Literal["l1", "l2"] = "l2"
    normalise: bool = Field(False, description="within each token, targets have mean 0 and standard deviation 1")
    decoder_layers: PositiveInt = 2
    decoder_size: int = Field(384, gt=0, multiple_of=32, description="width; heads have 32, the MLP four times as many")

    def kept(self, tokens: int) -> int:
        """Of so many tokens, those that the encoder sees."""
        return round((1 - self.ratio) * tokens)

    def check_patch(self, patch_size: tuple[int, int, int], tokens: int) -> None:
        """Some tokens must be seen, and some dropped."""
        if not 0 < self.kept(tokens) < tokens:
            raise ValueError(
                f"pretrain.task.ratio: {self.ratio} of the {tokens} tokens of a patch {list(patch_size)} leaves "
                f"{self.kept(tokens)} to be seen; at least one must be seen and one dropped"
            )
