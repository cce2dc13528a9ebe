"""What holds the organs: skin, fat, muscles, lungs, heart and bones.

The frame of an average adult is in mm: x to the patient's right, y to the front, z to the head, with the first lumbar
vertebra at z = 0.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ssl_ray.phantom.canvas import Array, Canvas, ring, union

FAT, GAS, BONE = -103.0, -960.0, 230.0
"""HU."""


@dataclass(frozen=True)
class Body:
    """Depths in mm on the whole grid: of the skin, the cavity inside the ribs, and its part under the diaphragm."""

    skin: Array
    cavity: Array
    abdomen: Array


def spine(z: Any) -> Any:
    """The y of the vertebral bodies' centres at height z (mm): lumbar lordosis, thoracic kyphosis."""
    return -47 + 9 * (1 - ((z + 70) / 120) ** 2)


def draw_trunk(c: Canvas, adiposity: float, muscle: float, blood: float) -> Body:
    """Skin, fat, muscle wall, lungs, diaphragm and heart; `muscle` and `blood` are HU."""
    rng = c.rng
    x, y, z = c.points
    t = z / 100
    belly = rng.uniform(-8, 6) + 12 * adiposity
    width = 117 + 5 * adiposity + 6 * t * t
    cavity = ring(x, y - 8, width, 84 + belly * (1 - ((t + 0.5) / 1.8) ** 2), 2.4)
    wall = cavity - rng.uniform(8, 14) - 1.5 * c.lumps
    fat = 5 + 26 * adiposity * rng.uniform(0.7, 1.3)
    skin = wall - fat * (1 + 0.04 * c.lumps) - np.clip(-y / 4 - 10, 0, 13)
    for depth, hu in ((skin, 0.0), (skin + 2, FAT), (wall, muscle), (cavity, FAT)):
        c.paint((c.whole, depth), hu, texture=7)

    low, high, rise = np.maximum(8 - z, 0), np.maximum(z - 8, 0), rng.normal(0, 7, 2)
    right = np.sqrt(((x - 58) / 76) ** 2 + ((y - 4) / 84) ** 2 + (high / (90 + rise[0])) ** 2)
    left = np.sqrt(((x + 58) / 72) ** 2 + ((y - 4) / 80) ** 2 + (high / (78 + rise[1])) ** 2)
    dome = union(75 * (right - 1), 75 * (left - 1), 30) - low
    chest = np.maximum(cavity + 4, 3 - dome)
    c.paint((c.whole, chest), rng.uniform(-890, -800) + 420 * np.clip(c.grain - 1.5, 0, 1), texture=18)
    if rng.random() < 0.2:  # pleural effusion settles at the back
        c.paint((c.whole, np.maximum(chest, c.height + rng.uniform(25, 45))), 12)
    c.paint((c.whole, np.maximum(np.abs(dome + 1) - 2, cavity)), muscle)
    for shape, hu in (  # mediastinum, fat of the heart, heart
        (c.tube([(-3, -25, 50), (-3, -32, 190)], 32), FAT),
        (c.ellipsoid(c.near(-20, 38, 126, 5), (60, 48, 44), (0, 20, 0)), FAT),
        (c.ellipsoid(c.near(-22, 38, 128, 4), (52, 40, 37), (0, 20, 0)), blood),
    ):
        c.paint((shape[0], np.maximum(shape[1], 1 - dome[shape[0]])), hu)
    return Body(skin, cavity, np.maximum(cavity, dome))


def draw_skeleton(c: Canvas, body: Body, muscle: float) -> None:
    """Back muscles, ribs, vertebrae, sacrum and pelvis; `muscle` is HU."""
    rng = c.rng
    for side in (-1, 1):
        back = [(side * 33, spine(h) - 40, h) for h in (-200, -90, 0, 90, 190)]
        psoas = [(side * 24, -36, 25), (side * 38, -40, -40), (side * 50, -32, -110), (side * 68, -2, -190)]
        for (box, depth), cover in (  # mm between the muscle and the skin
            (c.tube(back, (28, 27, 24, 20, 18)), 5),
            (c.tube(psoas, np.array([6, 15, 21, 20]) * c.size()), 0),
            (c.tube([(side * 74, -66, 0), (side * 80, -62, -95)], 11), 0),
            (c.ellipsoid((side * 78, -72, -182), (52, 38, 66)), 10),
        ):
            c.paint((box, np.maximum(depth, body.skin[box] + cover) if cover else depth), muscle)

    x, y, z = c.points
    pitch, lean = rng.uniform(25, 31), rng.uniform(0.45, 0.65)
    along = z + lean * (y + 70)
    band = np.abs((along / pitch) % 1 - 0.5) * pitch - 5.5
    cage = np.maximum(rng.uniform(8, 26) - along, (y - 15) * 1.2 - 20 - z)
    ribs = np.maximum(np.maximum(np.abs(body.cavity - 4.5) - 3.5, band), cage)
    c.paint((c.whole, ribs), np.where(y > 45, 110, 420 * c.size(0.8, 1.25)), texture=20)

    marrow = _draw_vertebrae(c)
    c.paint(c.ellipsoid((0, -62, -172), (44, 17, 34), (-25, 0, 0)), 260, texture=20)
    box, bowl = c.ellipsoid((0, 2, -192), (112, 84, 100))
    x, y, z = (p[box] for p in c.points)
    ilium = np.maximum.reduce(
        [np.abs(bowl) - 5.5, 34 - np.abs(x), y - 40 - 0.3 * z - 45, z + 98 + np.abs(y + 5) * 0.25]
    )
    c.paint((box, ilium), 480, texture=30)
    c.paint((box, ilium + 3), marrow, texture=20)


def _draw_vertebrae(c: Canvas) -> float:
    """Bodies, discs, arches and processes down to the sacrum; gives back the HU of the marrow."""
    box = c.box(np.array([-46.0, -118.0, -160.0]), np.array([46.0, 0.0, 220.0]))
    x, y, z = (p[box] for p in c.points)
    y = y - spine(z)
    step = ((z / c.rng.uniform(33, 37) + c.rng.uniform()) % 1 - 0.5) * 35
    below = -158 - z
    body = np.maximum(ring(x, y, 23 - 3 * z / 150, 18, 2.3), below)
    marrow = BONE * c.size(0.65, 1.3)
    c.paint((box, body), 90)
    c.paint((box, np.maximum(body, np.abs(step) - 14)), 480)
    c.paint((box, np.maximum(body + 2.5, np.abs(step) - 12)), marrow, texture=20)
    arch = np.maximum(np.maximum(ring(x, y + 27, 15, 14), below), np.abs(step + 4) - 12)
    spinous = np.maximum(np.maximum(np.abs(x) - 3.5, np.abs(y + 50) - 13), np.abs(step + 6) - 9)
    lateral = np.maximum(np.maximum(np.abs(y + 24) - 4.5, np.abs(x) - 38), np.abs(step + 1) - 6)
    for part in (arch, np.maximum(spinous, below), np.maximum(lateral, below)):
        c.paint((box, part), 400, texture=20)
    c.paint((box, np.maximum(ring(x, y + 27, 9, 8), below)), 30)
    return marrow
