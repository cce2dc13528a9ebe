"""The planes that a picture of a segmentation shows, and the picture."""

from io import BytesIO

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv
from matplotlib.image import imread
from scipy.ndimage import find_objects, label
from volumes import oblique_affine, organ_labels

from ssl_ray.evaluate.overlay import _around_outlines, draw
from ssl_ray.evaluate.planes import PLANES, Planes, cut, from_npz, to_npz

SHAPE = (20, 24, 16)
AFFINE = oblique_affine((0.8, 1.1, 2.5), 25)
"""Rotated by 25 degrees: the axes stay nearest to right, anterior, superior."""
IMAGE = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) / np.prod(SHAPE)


def box(*sides: slice, value: int = 1) -> np.ndarray:
    """A volume with one organ in a box."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[sides] = value
    return labels


def test_planes_go_through_the_largest_connected_disagreement() -> None:
    """Also where more voxels differ elsewhere, in small parts."""
    truth = box(slice(14, 17), slice(3, 6), slice(10, 14), value=2)  # 36 voxels in one piece
    truth[1:13:2, 10:22:2, 4] = 1  # 36 single voxels in one plane, and one more
    truth[1, 1, 1] = 1
    planes = cut(IMAGE, np.zeros_like(truth), truth, AFFINE)
    axial, coronal, sagittal = (layers[2] for layers in planes.layers)
    assert [int((one == 2).sum()) for one in (axial, coronal, sagittal)] == [9, 12, 12]
    np.testing.assert_array_equal(sagittal[::-1, ::-1].T, truth[14])
    np.testing.assert_array_equal(coronal[::-1, ::-1].T, truth[:, 3])
    np.testing.assert_array_equal(axial[::-1, ::-1].T, truth[:, :, 10])


@pytest.mark.parametrize("truth", [None, box(slice(2, 5), slice(2, 9), slice(3, 5))])
def test_planes_show_what_was_segmented_where_nothing_is_known_to_differ(truth: np.ndarray | None) -> None:
    """No truth, or a perfect prediction."""
    organ = box(slice(2, 5), slice(2, 9), slice(3, 5))
    planes = cut(IMAGE, organ, truth, AFFINE)
    assert [int(layers[1].sum()) for layers in planes.layers] == [21, 6, 14]
    assert [len(layers) for layers in planes.layers] == [2 if truth is None else 3] * 3


def test_an_empty_segmentation_is_cut_in_the_middle() -> None:
    """Nothing differs and nothing was found."""
    empty = np.zeros(SHAPE, np.uint8)
    planes = cut(IMAGE, empty, empty, AFFINE)
    low, high = np.percentile(
        np.concatenate([IMAGE[10].ravel(), IMAGE[:, 12].ravel(), IMAGE[:, :, 8].ravel()]), (0.5, 99.5)
    )
    expected = ((IMAGE[:, :, 8] - low) / (high - low) * 255).clip(0, 255)
    np.testing.assert_allclose(planes.layers[0][0][::-1, ::-1].T, expected, atol=0.51)


@pytest.mark.parametrize("axes", ["LPS", "SAL", "PRI"])
def test_planes_do_not_depend_on_how_the_voxels_lie(axes: str) -> None:
    """Turned and mirrored by nibabel, a volume gives the same picture, the patient's right on its left."""
    truth, prediction = organ_labels(SHAPE, 3, 1), organ_labels(SHAPE, 3, 2)
    to = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    turned = [nib.orientations.apply_orientation(one, to) for one in (IMAGE, prediction, truth)]
    affine = AFFINE @ nib.orientations.inv_ornt_aff(to, SHAPE)
    expected, found = cut(IMAGE, prediction, truth, AFFINE), cut(*turned, affine)
    np.testing.assert_allclose(found.spacing, (0.8, 1.1, 2.5))
    np.testing.assert_allclose([found.size(0), found.size(1), found.size(2)], [(26.4, 16), (40, 16), (40, 26.4)])
    for one, other in zip(expected.layers, found.layers, strict=True):
        np.testing.assert_array_equal(one, other)


def test_planes_come_back_from_their_file() -> None:
    """Of several volumes in their order, whatever they are called, with and without truth."""
    labels = organ_labels(SHAPE)
    given = {"a/b": cut(IMAGE, labels, None, AFFINE), "ü": cut(IMAGE, labels, labels, AFFINE)}
    found = from_npz(to_npz(given))
    assert list(found) == list(given)
    for one, other in zip(given.values(), found.values(), strict=True):
        assert one.spacing == other.spacing
        for layers, same in zip(one.layers, other.layers, strict=True):
            np.testing.assert_array_equal(layers, same)
    assert from_npz(to_npz({})) == {}


def outlines(prediction: np.ndarray, truth: np.ndarray | None) -> tuple[set[float], int]:
    """Hues that are drawn on a volume without contrast, to a tenth, and how many pixels are white."""
    picture = draw([cut(np.zeros(SHAPE), prediction, truth, AFFINE)], ["liver", "$spleen_"], ["$x_ of a patient"])
    pixels = imread(BytesIO(picture))[60:, :, :3].reshape(-1, 3)  # below the title
    hue, saturation, value = rgb_to_hsv(pixels).T
    return {*hue[(saturation > 0.5) & (value > 0.9)].round(1).tolist()}, int((pixels > 0.98).all(1).sum())


def test_a_picture_outlines_each_organ_in_a_colour_and_the_truth_in_white() -> None:
    """The prediction lies over the truth, so that what stays white was missed."""
    liver, spleen = (box(slice(3, 15), slice(4, 18), slice(3, 12), value=number) for number in (1, 2))
    nothing = np.zeros_like(liver)
    (one, _), (other, unknown), (both, hit), (_, missed) = (
        outlines(*pair) for pair in ((liver, None), (spleen, None), (spleen, spleen), (nothing, spleen))
    )
    assert len(one) == len(other) == 1
    assert one != other == both
    assert missed > 2 * max(hit, unknown)


def test_a_millimetre_is_as_long_in_every_plane_of_every_patient() -> None:
    """Or a small patient looked as large as a tall one, and an organ thinner in one plane than in another."""
    planes = []
    for x, y, z in ((20, 20, 20), (10, 40, 20)):
        shapes = (y, x), (z, x), (z, y)  # of axial, coronal, sagittal
        layers = (np.stack([np.full(shape, 255, np.uint8), np.zeros(shape, np.uint8)]) for shape in shapes)
        planes.append(Planes(tuple(layers), (2.0, 1.0, 4.0)))
    pixels = imread(BytesIO(draw(planes, (), ("", ""))))[..., :3].min(axis=2) > 0.9
    boxes = [[side.stop - side.start for side in box] for box in find_objects(label(pixels)[0])]
    found = sorted(box for box in boxes if min(box) > 20)
    expected = sorted([[20, 40], [80, 40], [80, 20], [40, 20], [80, 20], [80, 40]])
    scale = found[0][0] / expected[0][0]
    np.testing.assert_allclose(found, np.array(expected) * scale, atol=0.06 * 80 * scale)


def test_a_picture_takes_volumes_of_any_size() -> None:
    """Rows of another height and planes of another width than their neighbours', and a single voxel."""
    small = Planes(tuple(np.zeros((2, 1, 1), np.uint8) for _ in PLANES), (1.0, 1.0, 1.0))
    large = cut(IMAGE, organ_labels(SHAPE), None, AFFINE)
    picture = imread(BytesIO(draw([small, large], ["a", "b", "c"], ["small", "large"])))
    assert picture.shape[1] == 960


def test_a_picture_is_cut_to_what_is_outlined() -> None:
    """Thirty millimetres around it, in all planes alike; in a scan without labels nothing is cut."""
    truth = np.zeros((60, 50, 40), np.uint8)
    truth[30:34, 20:22, 15] = 1
    image = np.broadcast_to(np.arange(60, dtype=np.float32)[:, None, None], truth.shape)
    whole = cut(image, np.zeros_like(truth), truth, np.diag([3.0, 3.0, 6.0, 1.0]))
    axial, coronal, sagittal = _around_outlines(whole).layers
    x, y, z = slice(20, 44), slice(10, 32), slice(10, 21)  # of the voxels, 3, 3 and 6 mm wide
    plane = whole.layers[0][:, ::-1, ::-1]
    np.testing.assert_array_equal(axial[:, ::-1, ::-1], plane[:, y, x])
    np.testing.assert_array_equal(coronal[:, ::-1, ::-1], whole.layers[1][:, ::-1, ::-1][:, z, x])
    np.testing.assert_array_equal(sagittal[:, ::-1, ::-1], whole.layers[2][:, ::-1, ::-1][:, z, y])
    empty = cut(image, np.zeros_like(truth), None, np.diag([3.0, 3.0, 6.0, 1.0]))
    assert [layers.shape for layers in _around_outlines(empty).layers] == [layers.shape for layers in empty.layers]
