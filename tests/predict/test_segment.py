"""Segmenting prepared volumes, against MONAI's sliding window."""

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from tiny_model import PATCH, PREPARATION, metadata, write_model
from torch import Tensor

from ssl_ray.errors import UserError
from ssl_ray.evaluate.sliding_window import Window
from ssl_ray.predict.model import Model
from ssl_ray.predict.segment import Manner, Segmenter, check_agree, manner_of, numbers_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / str(seed), seed) for seed in range(2)]


def stored(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def monais(models: list[Model], image: NDArray[np.uint8], manner: Manner, flips: list[list[int]]) -> Tensor:
    """Means (classes, X, Y, Z) of MONAI's sliding window, of probabilities where there are several."""
    networks = [model.network.eval() for model in models]

    def mean(windows: Tensor) -> Tensor:
        views = [net(windows.flip(axes)).flip(axes) for net in networks for axes in flips]
        return torch.stack([view.softmax(1) for view in views]).mean(0) if len(views) > 1 else views[0]

    seen = torch.from_numpy(image).float() / 255
    with torch.no_grad():
        found: Tensor = sliding_window_inference(
            seen[None, None], PATCH, manner.batch, mean, overlap=manner.overlap, mode=manner.weighting
        )[0]
    return found


@pytest.mark.parametrize("shape", [(30, 21, 25), (19, 9, 33), (12, 40, 16)])
@pytest.mark.parametrize(
    ("count", "manner", "flips"),
    [
        (1, Manner(0.25, "constant", 3), [[]]),
        (1, Manner(0.5, "gaussian", 2), [[]]),
        (2, Manner(0.25, "gaussian", 4), [[]]),
        (1, Manner(0.25, "constant", 4, (1, 2)), [[], [-2], [-1], [-2, -1]]),
        (2, Manner(0.25, "constant", 4, (1,)), [[], [-2]]),
    ],
)
def test_labels_and_probabilities_are_monais(
    models: list[Model], shape: tuple[int, ...], count: int, manner: Manner, flips: list[list[int]]
) -> None:
    """One model or two, seen once or mirrored, however windows are weighted; every voxel's probabilities come once."""
    image, kept, times = stored(shape), np.full((4, *shape), np.nan, np.float16), np.zeros(shape, int)

    def keep(box: Window, values: NDArray[np.float16]) -> None:
        kept[:, *box] = values
        times[box] += 1

    segmenter = Segmenter(models[:count], manner, CPU)
    labels = segmenter(image, 255, keep)
    assert np.array_equal(labels, segmenter(image, 255)), "whoever asks for probabilities gets the same labels"
    means = monais(models[:count], image, manner, flips)
    best = means.topk(2, dim=0).values
    clear = (best[0] - best[1]).numpy() > 1e-4  # of other voxels rounding decides
    assert clear.mean() > 0.99
    assert np.array_equal(labels[clear], means.argmax(0).numpy()[clear])
    assert len(np.unique(labels)) > 1
    expected = means if segmenter.averages else means.softmax(0)
    np.testing.assert_allclose(kept, expected.numpy(), atol=2e-3)
    assert (times == 1).all()


def test_a_model_is_used_as_it_was_scored_unless_told_otherwise() -> None:
    """Then it is said what is other."""
    told = metadata()
    assert manner_of(told) == (Manner(0.25, "constant", 4), [])
    manner, notes = manner_of(told, gaussian=True, overlap=0.5)
    assert manner == Manner(0.5, "gaussian", 4)
    assert notes == ["windows are weighted gaussian, scored constant", "windows overlap by 0.5, scored by 0.25"]
    assert "preparation, scored by 1" in manner_of(metadata(preparation_version=1))[1][0]


def test_left_and_right_are_not_exchanged() -> None:
    """Views are mirrored along axes that the training mirrored; not from left to right where that is another organ."""
    manner, notes = manner_of(metadata(), mirrored=True)
    assert manner.flips == (1, 2)
    assert "not along x, as left and right are different labels (left kidney)" in notes[0]
    assert manner_of(metadata(organs=("spleen", "liver")), mirrored=True)[0].flips == (0, 1, 2)
    with pytest.raises(UserError, match="--tta: left and right are different labels"):
        manner_of(metadata(flip_axes=(0,)), mirrored=True)
    with pytest.raises(UserError, match="--tta: left and right"):  # which axis it is cannot be told
        manner_of(metadata(preparation=PREPARATION.model_copy(update={"orientation": None})), mirrored=True)
    with pytest.raises(UserError, match="--tta: the model was not trained on mirrored patches"):
        manner_of(metadata(flip_axes=()), mirrored=True)


def test_models_that_disagree_are_no_ensemble(tmp_path: Path, models: list[Model]) -> None:
    """Both are named, with what they disagree in."""
    check_agree(models)
    other = write_model(tmp_path, organs=("spleen", "right kidney", "left kidney"))
    with pytest.raises(UserError, match="must agree in organs") as error:
        check_agree([*models, other])
    assert str(models[0].path) in str(error.value)
    assert str(other.path) in str(error.value)


def test_organs_are_named() -> None:
    """A name that is none is refused with those that are."""
    organs = metadata().organs
    assert numbers_of(["right kidney", "spleen"], organs) == (1, 3)
    with pytest.raises(
        UserError, match="--keep-largest: liver is no organ of this model, which has spleen, left kidney,"
    ):
        numbers_of(["liver"], organs)
