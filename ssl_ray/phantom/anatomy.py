"""How a patient of the synthetic cohort looks: a table of structures, and the painter that draws it on a voxel grid.

The body of an average adult is in mm: x to the patient's right, y to the front, z to the head, with the first lumbar
vertebra at z = 0. Every form is given by its depth, the approximate signed distance to its surface in mm, negative
inside (Quilez, "Distance functions"). What is painted later lies in front, so labels never overlap.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.linalg import norm

Array = npt.NDArray[Any]
Box = tuple[slice, ...]
Form = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""An ellipsoid (x, y, z and three radii), or the knots of a tube (x, y, z and radius each), mm."""

ORGANS = (
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip
"""The organs of BTCV in its order: the label of an organ is its index + 1, 0 is background."""


@dataclass(frozen=True)
class Structure:
    """One row of the table.

    `hu` is the mean of all patients, or four: without contrast medium, and in its arterial, portal venous and delayed
    phase. A structure is the union of its `forms`, or all of `within`: an earlier structure that it does not leave, and
    under whose surface it stays by `inset` mm. A part of an organ has the organ's label. The place has a standard
    deviation of `jitter` mm; without it the size is the same for all, too. `fat` is a margin of fat around it, mm.
    """

    name: str
    hu: float | tuple[float, float, float, float]
    within: str = ""
    inset: float = 0.0
    jitter: float = 0.0
    fat: float = 0.0
    forms: tuple[Form, ...] = ()


FAT, GAS = -103.0, -900.0
_MUSCLE, _WALL, _BOWEL = (52, 58, 62, 60), (38, 80, 75, 60), (15, 25, 30, 60)
_ARTERY, _VEIN, _PORTAL = (42, 270, 155, 100), (40, 110, 140, 98), (40, 125, 165, 104)
_VERTEBRAE = tuple((-47 + 9 * (1 - ((z + 70) / 120) ** 2), z) for z in range(-150, 200, 35))
"""y and z of their centres: lumbar lordosis, thoracic kyphosis."""


def _column(x: float, y: float, radius: float) -> Form:
    """A tube along the spine, `y` mm in front of it."""
    return tuple((x, ahead + y, z, radius) for ahead, z in _VERTEBRAE)


def _renal(side: str, x: int, z: float) -> tuple[Structure, ...]:
    """What lies on one side, of which `x` is 1 or -1; the kidney's middle is at height `z`."""
    kidney, apex = f"{side} kidney", (x * 38, -22, z + 66, 4.6)
    limbs = ((x * 47, -36, z + 56, 3.6), (x * 39, -42, z + 58, 3.6), (x * 39, -21, z + 75, 3.6))
    ends = ((x * 52, -44, z + 22, 24), (x * 62, -38, z - 22, 25))
    return (
        Structure(kidney, (33, 180, 180, 140), "cavity", 3, jitter=4, fat=5, forms=(ends,)),
        Structure("renal cyst", 8, kidney, jitter=18, forms=((x * 70, -36, z - 6, 10, 10, 10),)),
        Structure("renal pelvis", FAT, jitter=2, forms=((x * 36, -30, z, 15, 10, 17),)),
        Structure(f"{side} adrenal gland", (28, 70, 68, 52), jitter=2, fat=2, forms=tuple((apex, p) for p in limbs)),
    )


TRUNK = (
    Structure("wall", _MUSCLE, forms=((0, 6, -20, 134, 106, 700),)),
    Structure("cavity", FAT, "wall", 13),
    Structure("lungs", -850, "cavity", 4, forms=((60, 4, 80, 80, 110, 200), (-60, 4, 80, 80, 110, 200))),
    Structure("mediastinum", FAT, "cavity", forms=(((-3, -30, 50, 32), (-3, -30, 220, 32)),)),
    Structure("heart", _VEIN, "cavity", 4, jitter=5, fat=6, forms=((-22, 36, 126, 54, 42, 42),)),
    Structure("diaphragm", _MUSCLE, "cavity", jitter=3, forms=((58, 6, -30, 78, 92, 132), (-56, 4, -35, 76, 90, 120))),
    Structure("abdomen", FAT, "diaphragm", 3),
    Structure("lower abdomen", FAT, "cavity", forms=((0, 4, -150, 130, 110, 150),)),
    Structure("back", _MUSCLE, "wall", jitter=2, forms=(_column(33, -38, 27), _column(-33, -38, 27))),
    Structure("psoas", _MUSCLE, jitter=2, forms=tuple(
        ((x * 24, -36, 25, 6), (x * 38, -40, -40, 16), (x * 60, -15, -190, 21)) for x in (1, -1))),
    Structure("vertebrae", 420, forms=tuple((0, y, z, 26, 21, 19) for y, z in _VERTEBRAE)),
    Structure("marrow", 210, "vertebrae", 3),
    Structure("arches", 380, forms=(_column(0, -29, 15), *((0, y - 32, z, 40, 6, 8) for y, z in _VERTEBRAE))),
    Structure("spinal canal", 30, forms=(_column(0, -27, 9),)),
    Structure("pelvis", 450, "wall", jitter=3, forms=tuple((x, -25, -185, 22, 58, 75) for x in (88, -88))),
)  # fmt: skip
"""What holds the organs, from the wall inwards. Skin and ribs follow from the wall, and are not in the table."""

INNER = (
    Structure("small bowel", _BOWEL, "cavity", 3, jitter=9, fat=2, forms=(
        ((-60, 20, -60, 14), (10, 40, -75, 14), (55, 20, -90, 14), (-10, 30, -105, 14), (-60, 15, -125, 14)),
        ((-50, 50, -90, 14), (20, 60, -110, 14), (60, 40, -130, 14), (0, 50, -150, 14), (-50, 45, -180, 14)),
        ((-20, 0, -75, 14), (-70, 20, -95, 14), (-20, 10, -140, 14), (50, 10, -160, 14), (-10, 20, -190, 14)))),
    Structure("colon", _BOWEL, "cavity", 3, jitter=5, fat=2, forms=(
        ((92, -22, -160, 22), (94, -20, -90, 22), (88, 10, -40, 19), (40, 62, -58, 17), (0, 66, -72, 17)),
        ((0, 66, -72, 17), (-50, 58, -52, 17), (-92, 12, -4, 16), (-98, -22, -60, 14), (-80, 0, -165, 15)))),
    Structure("colon gas", GAS, "colon", 4, jitter=12, forms=((0, 72, -70, 60, 14, 14),)),
    Structure("liver", (56, 68, 106, 88), "abdomen", 2, jitter=4, fat=1, forms=(
        (72, 2, 38, 70, 82, 76), (4, 44, 50, 76, 36, 36), (90, -2, -18, 30, 44, 62))),
    Structure("liver lesion", 35, "liver", jitter=45, forms=((75, 0, 40, 13, 13, 13),)),
    Structure("spleen", (48, 118, 116, 92), "abdomen", 2, jitter=4, fat=1, forms=((-86, -32, 38, 36, 54, 58),)),
    Structure("esophagus", _WALL, jitter=2, fat=2, forms=(
        ((-36, 2, 72, 9), (-20, -2, 84, 8.5), (-9, 0, 100, 9), (-9, -12, 150, 9), (-9, -28, 220, 9)),)),
    Structure("stomach", _WALL, "cavity", 6, jitter=4, fat=2, forms=(
        ((-50, -8, 60, 29), (-57, 22, 46, 31), (-50, 46, 16, 27), (-20, 54, -14, 21), (32, 34, -8, 11)),)),
    Structure("meal", 40, "stomach", 4),
    Structure("stomach gas", GAS, "stomach", 4, jitter=9, forms=((-50, 68, 30, 34, 24, 40),)),
    Structure("duodenum", _BOWEL, jitter=2, fat=2, forms=(
        ((32, 34, -8, 11), (52, 22, -14, 11), (54, 8, -42, 11), (34, 2, -66, 11), (-6, 4, -64, 11)),)),
    Structure("gallbladder", 10, jitter=4, fat=1, forms=(((57, 34, -4, 9), (58, 46, -14, 13), (60, 58, -24, 14)),)),
    *_renal("right", 1, -24),
    *_renal("left", -1, -10),
    Structure("pancreas", (40, 98, 94, 76), jitter=2, fat=2, forms=(
        ((34, 14, -34, 14), (27, 18, -16, 17), (8, 24, 0, 12), (-20, 20, 6, 13), (-46, 0, 10, 13), (-72, -20, 20, 9)),
    )),
    Structure("portal and splenic veins", _PORTAL, jitter=1, fat=1, forms=(
        ((14, 12, -2, 6), (-12, 10, 4, 5.5), (-28, 10, 8, 5.5), (-50, -9, 13, 5), (-78, -24, 30, 4.5)),
        ((14, 12, -2, 7.5), (28, 15, 12, 7.5), (44, 16, 26, 7.5)))),
    Structure("inferior vena cava", _VEIN, jitter=2, fat=1, forms=(
        ((21, -12, -108, 11.5), (21, -11, -10, 11.5), (22, -9, 30, 12), (25, 0, 62, 12), (24, 14, 104, 12)),)),
    Structure("aorta", _ARTERY, jitter=2, fat=1, forms=(
        ((-10, -9, -100, 8), (-10, -11, -10, 9.5), (-10, -16, 40, 10.5), (-10, -24, 90, 11), (-10, -56, 215, 12)),)),
)  # fmt: skip
"""Bowel, organs and vessels."""


def draw(rng: np.random.Generator, axes: list[Array], to_body: Array, shift: Array, fat: float) -> tuple[Array, Array]:
    """Draw one patient, with `fat` mm under the skin, on a voxel grid: HU (float32) and labels (uint8).

    `axes` are the positions of the voxels along the three grid axes, ascending, in mm from the grid's centre. A body
    point is `to_body` @ grid point + `shift` + a smooth random warp. As many random numbers are drawn on any grid: the
    spacing does not change the patient.
    """
    painter = _Painter(rng, axes, to_body, shift)
    wall = painter.depth(np.atleast_2d(TRUNK[0].forms[0]), ())
    painter.paint(wall - fat - 2, 0)
    painter.paint(wall - fat, FAT)
    for row in TRUNK:
        painter.add(row)
    along = painter.points[2] + 0.55 * (painter.points[1] + 70)
    ribs = np.maximum(np.abs(along % 28 - 14) - 5.5, np.abs(painter.depths["cavity"] - 6) - 4)
    painter.paint(np.maximum(ribs, 18 - along), 400)
    for row in INNER:
        painter.add(row)
    return painter.hu, painter.label


class _Painter:
    """A voxel grid in the body of one patient, and what has been painted so far."""

    def __init__(self, rng: np.random.Generator, axes: list[Array], to_body: Array, shift: Array):
        grid = np.stack(np.meshgrid(*axes, indexing="ij"))
        warp = [4 * _noise(rng, axes, to_body, 110) + _noise(rng, axes, to_body, 40) for _ in range(3)]
        body = np.einsum("ij,jxyz->ixyz", to_body, grid) + shift[:, None, None, None]
        self.points = (body + warp).astype(np.float32)
        slabs = [np.moveaxis(p, i, 0).reshape(len(axes[i]), -1) for i, p in enumerate(self.points)]
        self.spans = [(slab.min(1), slab.max(1)) for slab in slabs]
        self.grain = _noise(rng, axes, to_body, 14)
        self.voxel = float(np.mean([axis[1] - axis[0] for axis in axes]))
        self.hu, self.label = np.full(self.grain.shape, -1000, np.float32), np.zeros(self.grain.shape, np.uint8)
        self.rng, self.phase, self.strength = rng, rng.choice(4, p=[0.15, 0.2, 0.5, 0.15]), rng.uniform(0.75, 1.2)
        self.depths: dict[str, Array] = {}

    def add(self, row: Structure) -> None:
        """Paint a structure with the patient's own place, size and HU."""
        move, drift = self.rng.normal(0, row.jitter, 3), self.rng.normal(0, 4)
        size = 1 + self.rng.uniform(-0.13, 0.15) * (row.jitter > 0)
        forms = [np.hstack([form[:, :3] + move, form[:, 3:] * size]) for form in map(np.atleast_2d, row.forms)]
        box = self.around(forms, row.fat + self.voxel) if forms else ()
        depth = np.minimum.reduce([self.depth(form, box) for form in forms] or [np.full(self.hu.shape, -1000, "f4")])
        if row.fat:
            self.paint(np.maximum(depth - row.fat, self.depths["cavity"][box]), FAT, 0, box)
        if row.within:
            depth = np.maximum(depth, self.depths[row.within][box] + row.inset)
        native, enhanced = np.broadcast_to(row.hu, 4)[[0, self.phase]]
        label = next((ORGANS.index(name) + 1 for name in (row.name, row.within) if name in ORGANS), 0)
        self.paint(depth, native + (enhanced - native) * self.strength + drift, label, box)
        self.depths[row.name] = np.full(self.hu.shape, 1000, np.float32)
        self.depths[row.name][box] = depth

    def paint(self, depth: Array, hu: float, label: int = 0, box: Box = ()) -> None:
        """Blend `hu` in over one voxel across the surface, and set `label` inside."""
        here = self.hu[box]
        here += np.clip(0.5 - depth / self.voxel, 0, 1) * (hu + 6 * self.grain[box] - here)
        self.label[box][depth <= 0] = label

    def around(self, forms: list[Array], margin: float) -> Box:
        """The part of the grid that holds all forms and `margin` mm around them."""
        low = np.min([(form[:, :3] - form[:, 3:]).min(0) for form in forms], 0) - margin
        high = np.max([(form[:, :3] + form[:, 3:]).max(0) for form in forms], 0) + margin
        hits = [np.flatnonzero((b >= c) & (a <= d)) for (a, b), c, d in zip(self.spans, low, high, strict=True)]
        return tuple(slice(hit.min(initial=10**6), hit.max(initial=-1) + 1) for hit in hits)

    def depth(self, form: Array, box: Box) -> Array:
        """Depth of an ellipsoid or a tube on a part of the grid."""
        points, form = self.points[:, *box], form.astype(np.float32)[..., None, None, None]
        if len(form[0]) == 6:
            q, radii = (points - form[0, :3]) / form[0, 3:], form[0, 3:]
            far = norm(q, axis=0)
            return np.asarray(far * (far - 1) / np.maximum(norm(q / radii, axis=0), 1e-6))
        depth = np.full(points[0].shape, 1000, np.float32)
        for start, way in zip(form, np.diff(form, axis=0), strict=False):
            p, d = points - start[:3], way[:3]
            along = np.clip((p * d).sum(0) / (d * d).sum(), 0, 1)
            np.minimum(depth, norm(p - along * d, axis=0) - start[3] - along * way[3], out=depth)
        return depth


def _noise(rng: np.random.Generator, axes: list[Array], to_body: Array, wavelength: float) -> Array:
    """Band-limited noise of unit variance on the grid: 12 plane waves of about `wavelength` mm of the body."""
    waves, start = rng.normal(0, 3.6 / wavelength, (12, 3)) @ to_body, rng.uniform(0, 2 * np.pi, (12, 1))
    x, y, z = (np.exp(1j * np.outer(wave, axis)).astype(np.complex64) for wave, axis in zip(waves.T, axes, strict=True))
    plane = np.einsum("wi,wj->wij", x * np.exp(1j * start).astype(np.complex64), y)
    return np.asarray(np.einsum("wij,wk->ijk", plane, z).real / np.float32(np.sqrt(6)))
