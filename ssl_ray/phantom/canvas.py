"""Solids painted on a voxel grid: the drawing tools of the synthetic cohort.

A solid is given by its *depth*: the approximate signed distance to its surface in mm, negative inside (the forms are
those of Quilez, "Distance functions"). Painting makes labels disjoint: the last one stays.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import BSpline, CubicSpline
from scipy.spatial.transform import Rotation

Array = npt.NDArray[Any]
Box = tuple[slice, slice, slice]
Shape = tuple[Box, Array]
"""A part of the grid, and the depth of a solid there (mm)."""

EXTENT = 640.0
"""Longest side of a grid, in mm."""


def _smooth(rng: np.random.Generator, axes: Sequence[Array], knot: float) -> Array:
    """Gaussian field of about unit variance on the grid of `axes` (mm), a cubic B-spline with knots `knot` mm apart.

    Its coefficients do not depend on the grid, so that a patient is the same at any spacing. The sparse products sum in
    a fixed order: with BLAS the bytes would depend on the number of threads.
    """
    n = 2 * int(EXTENT / knot / 2) + 5
    field = rng.standard_normal((n, n, n))
    for axis in axes:
        basis = BSpline.design_matrix(axis / knot + (n - 3) / 2, np.arange(-3, n + 1), 3)
        field = np.moveaxis((basis @ field.reshape(n, -1)).reshape(-1, *field.shape[1:]), 0, -1)
    return np.asarray(field / 0.33, np.float32)


def union(a: Array, b: Array, blend: float) -> Array:
    """Depth of two solids that merge over `blend` mm."""
    return np.asarray(np.minimum(a, b) - np.maximum(blend - np.abs(a - b), 0) ** 2 / (4 * blend))


def ring(x: Array, y: Array, a: Any, b: Any, power: float = 2.0) -> Array:
    """Depth of a superelliptic cylinder along z with half axes `a` and `b` mm, measured along the ray from its axis."""
    level = (np.abs(x / a) ** power + np.abs(y / b) ** power) ** (1 / power)
    return np.asarray(np.hypot(x, y) * (1 - 1 / np.maximum(level, 1e-3)))


class Canvas:
    """One patient on one grid: where the voxels lie in the body, and the HU and labels painted there so far."""

    def __init__(self, rng: np.random.Generator, axes: Sequence[Array], to_body: Array, shift: Array, up: Array):
        """Start with air.

        Args:
            rng: Draws the patient.
            axes: Positions of the voxels along the three grid axes, ascending, in mm from the grid's centre.
            to_body: 3 x 3; body point = `to_body` @ grid point + `shift` + a smooth random warp.
            shift: mm.
            up: Direction against gravity in grid coordinates: gas rises there.
        """
        self.rng, self.axes, self.shift, self.inverse = rng, axes, shift, np.linalg.inv(to_body)
        grid = np.meshgrid(*(axis.astype(np.float32) for axis in axes), indexing="ij", sparse=True)
        warp = [_smooth(rng, axes, 80) * np.float32(5) for _ in range(3)]
        self.blur = float(np.mean([axis[1] - axis[0] for axis in axes]))
        self.margin = max(float(np.abs(w).max()) for w in warp) + self.blur
        m = to_body.astype(np.float32)
        self.points = [w + m[i, 0] * grid[0] + m[i, 1] * grid[1] + m[i, 2] * grid[2] for i, w in enumerate(warp)]
        for p, s in zip(self.points, shift, strict=True):
            p += np.float32(s)
        self.height = sum((np.float32(u) * g for u, g in zip(up, grid, strict=True)), np.zeros_like(warp[0]))
        self.lumps, self.clumps = _smooth(rng, axes, 26), _smooth(rng, axes, 20)
        self.grain = _smooth(rng, axes, 9)
        self.hu = np.full(self.grain.shape, -1000, np.float32)
        self.label = np.zeros(self.grain.shape, np.uint8)
        self.whole: Box = self.box(np.full(3, -1e4), np.full(3, 1e4))

    def near(self, x: float, y: float, z: float, spread: float = 4.0) -> Array:
        """A point scattered about (x, y, z) with a standard deviation of `spread` mm."""
        return np.array([x, y, z]) + self.rng.normal(0, spread, 3)

    def size(self, low: float = 0.85, high: float = 1.18) -> float:
        """A random factor for lengths."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def box(self, low: Array, high: Array) -> Box:
        """The part of the grid that can hold body points between `low` and `high` (mm)."""
        corners = np.stack(np.meshgrid(*np.stack([low - self.margin, high + self.margin], 1), indexing="ij"), -1)
        ends = (corners.reshape(-1, 3) - self.shift) @ self.inverse.T
        slices = [slice(*np.searchsorted(a, [e.min(), e.max()])) for a, e in zip(self.axes, ends.T, strict=True)]
        return slices[0], slices[1], slices[2]

    def ellipsoid(self, centre: Any, radii: Any, turn: Sequence[float] = (0, 0, 0), box: Box | None = None) -> Shape:
        """An ellipsoid turned by `turn` degrees about x, y, z; its depth on its surroundings, or on `box`."""
        centre, r = np.asarray(centre, np.float32), np.asarray(radii, np.float32)
        m = Rotation.from_euler("xyz", turn, degrees=True).as_matrix().astype(np.float32)
        reach = np.sqrt((m**2) @ r**2) + 8
        box = box or self.box(centre - reach, centre + reach)
        p = [self.points[i][box] - centre[i] for i in range(3)]
        q = [(m[0, i] * p[0] + m[1, i] * p[1] + m[2, i] * p[2]) / r[i] for i in range(3)]
        k0 = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)
        k1 = np.sqrt((q[0] / r[0]) ** 2 + (q[1] / r[1]) ** 2 + (q[2] / r[2]) ** 2)
        return box, k0 * (k0 - 1) / np.maximum(k1, 1e-6)

    def tube(self, knots: Any, radii: Any) -> Shape:
        """A tube along the spline through `knots` (n x 3, mm); its radius goes through `radii` (n, or one)."""
        knots = np.asarray(knots, float)
        chord = np.r_[0, np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))]
        t = np.linspace(0, chord[-1], max(3, int(chord[-1] / 12)))
        line, r = CubicSpline(chord, knots)(t), np.interp(t, chord, np.broadcast_to(radii, len(knots)))
        reach = float(r.max()) + 8
        box = self.box(line.min(0) - reach, line.max(0) + reach)
        depth = np.full(self.hu[box].shape, 1e3, np.float32)
        for a, d, ra, dr in zip(line, np.diff(line, axis=0), r, np.diff(r), strict=False):
            part = self.box(np.minimum(a, a + d) - reach, np.maximum(a, a + d) + reach)
            p = [self.points[i][part] - np.float32(a[i]) for i in range(3)]
            e = d.astype(np.float32)
            along = np.clip((p[0] * e[0] + p[1] * e[1] + p[2] * e[2]) / np.float32(d @ d), 0, 1)
            far = np.sqrt(sum((p[i] - along * e[i]) ** 2 for i in range(3))) - np.float32(ra) - along * np.float32(dr)
            inner = depth[tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(part, box, strict=True))]
            np.minimum(inner, far, out=inner)
        return box, depth

    def paint(self, shape: Shape, hu: Any, label: int | None = 0, only: int | None = None, texture: float = 4) -> None:
        """Blend `hu` in over one voxel across the surface; set `label` (None: keep) inside, where `only` was."""
        box, depth = shape
        alpha = np.clip(0.5 - depth / np.float32(self.blur), 0, 1)
        if only is not None:
            alpha *= self.label[box] == only
        here = self.hu[box]
        here += alpha * (hu + np.float32(texture) * self.grain[box] - here)
        if label is not None:
            self.label[box][alpha >= 0.5] = label
