"""The picture of a patch."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.ndimage import find_objects, label

from ssl_ray.pretrain.picture import draw_picture


@pytest.mark.parametrize("channels", [1, 2])
def test_a_millimetre_is_as_long_along_every_axis(tmp_path: Path, channels: int) -> None:
    """A ball in anisotropic voxels is round in all three planes, and as bright in a channel of a thousandth."""
    spacing = np.array([2.0, 1.0, 4.0])
    axes = [(np.arange(side) - (side - 1) / 2) * one for side, one in zip((20, 40, 10), spacing, strict=True)]
    ball = (sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")) < 12**2).astype(np.float32)
    truth = np.stack([ball, ball / 1000][:channels])
    draw_picture(tmp_path / "ball.png", {"truth": truth if channels > 1 else ball}, "", spacing.tolist())
    bright, count = label(imread(tmp_path / "ball.png")[..., :3].min(axis=2) > 0.95)
    sizes = [[part.stop - part.start for part in box] for box in find_objects(bright)]
    balls = [size for size in sizes if min(size) > 50]
    assert count >= len(balls) == 3 * channels
    for height, width in balls:
        assert abs(height - width) < 0.2 * max(height, width)
