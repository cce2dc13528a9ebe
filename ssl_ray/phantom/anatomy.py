"""The anatomy of the synthetic cohort: one patient, drawn as smooth solids, from the skin to the adrenals.

The frame of an average adult is in mm: x to the patient's right, y to the front, z to the head, with the first lumbar
vertebra at z = 0. What is painted later lies in front of what was there, so labels never overlap.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_ray.phantom.canvas import Array, Box, Canvas, Shape, ring, union

ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
"""The organs of BTCV in its order: the label of an organ is its index + 1, 0 is background."""

_LABEL = {organ: i + 1 for i, organ in enumerate(ORGANS)}
_TISSUES = ("aorta", "cava", "portal", "liver", "spleen", "cortex", "pancreas", "wall", "muscle", "adrenal", "urine")
_PHASES = (  # HU of _TISSUES without contrast, and in the arterial, portal venous and delayed phase
    (42, 40, 40, 56, 48, 33, 40, 38, 52, 28, 8),
    (290, 110, 125, 68, 118, 180, 98, 80, 58, 70, 10),
    (155, 140, 165, 106, 116, 180, 94, 75, 62, 68, 60),
    (100, 98, 104, 88, 92, 140, 76, 60, 60, 52, 330),
)
_FAT, _GAS, _BONE = -103.0, -960.0, 230.0


def _spine(z: Any) -> Any:
    """The y of the vertebral bodies' centres at height z (mm): lumbar lordosis, thoracic kyphosis."""
    return -47 + 9 * (1 - ((z + 70) / 120) ** 2)


class _Patient:
    """The random choices of one patient, and the painting of one region after the other."""

    def __init__(self, canvas: Canvas, adiposity: float):
        self.c, self.rng = canvas, canvas.rng
        rng = self.rng
        phase = rng.choice(4, p=[0.15, 0.2, 0.5, 0.15])
        native, enhanced = np.array(_PHASES[0]), np.array(_PHASES[phase])
        hu = native + (enhanced - native) * rng.uniform(0.75, 1.2) * rng.uniform(0.9, 1.1, len(native))
        self.tissue = dict(zip(_TISSUES, hu + rng.normal(0, 4, len(native)), strict=True))
        self.arterial = phase == 1
        if rng.random() < 0.2:
            self.tissue["liver"] -= rng.uniform(15, 50)  # fatty liver
        self.adiposity = adiposity
        self.drift = rng.normal(0, 4)  # of aorta and esophagus from their place beside the spine, mm
        self.kidneys = {side: (self.at(58 * side, -38, z, 6), self.size()) for side, z in ((1, -24), (-1, -10))}
        self.halo = 0.5 + 4 * self.adiposity  # visceral fat between neighbours, mm

    def at(self, x: float, y: float, z: float, spread: float = 4.0) -> Array:
        """A position scattered about (x, y, z)."""
        return np.array([x, y, z]) + self.rng.normal(0, spread, 3)

    def size(self, low: float = 0.85, high: float = 1.18) -> float:
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def organ(self, name: str, shape: Shape, hu: Any, lumps: float = 0.0, halo: float | None = None) -> Shape:
        """Paint an organ with a lumpy surface and a margin of fat; give the surface back."""
        box, depth = shape
        shape = box, depth + np.float32(lumps) * self.c.lumps[box]
        margin = self.halo if halo is None else halo
        fat = np.maximum(shape[1] - np.float32(margin), self.abdomen[box] + 3)  # the diaphragm is not displaced
        self.c.paint((box, fat), _FAT)
        self.c.paint(shape, hu, _LABEL.get(name, 0))
        return shape

    def gut(self, name: str, shape: Shape, wall: float, content: Any, lumps: float = 0.0) -> Shape:
        """A hollow organ: enhancing wall, content inside; the label covers both."""
        box, depth = self.organ(name, shape, self.tissue["wall"], lumps, self.halo / 2)
        self.c.paint((box, depth + wall), content, None, texture=8)
        return box, depth

    def inside(self, shape: Shape, margin: float) -> Shape:
        """The part of a solid at least `margin` mm inside the abdominal cavity."""
        return shape[0], np.maximum(shape[1], self.abdomen[shape[0]] + margin)

    def trunk(self) -> None:
        """Skin, fat, muscle wall, cavity, lungs, heart; fixes the abdominal cavity under the diaphragm."""
        c, rng, muscle = self.c, self.rng, self.tissue["muscle"]
        x, y, z = c.points
        t = z / 100
        belly = rng.uniform(-8, 6) + 12 * self.adiposity
        width = 117 + 5 * self.adiposity + 6 * t * t
        cavity = ring(x, y - 8, width, 84 + belly * (1 - ((t + 0.5) / 1.8) ** 2), 2.4)
        wall = cavity - rng.uniform(8, 14) - 1.5 * c.lumps
        fat = 5 + 26 * self.adiposity * rng.uniform(0.7, 1.3)
        skin = wall - fat * (1 + 0.04 * c.lumps) - np.clip(-y / 4 - 10, 0, 13)
        for depth, hu in ((skin, 0.0), (skin + 2, _FAT), (wall, muscle), (cavity, _FAT)):
            c.paint((c.whole, depth), hu, texture=7)
        self.cavity, self.skin = cavity, skin

        low, high, rise = np.maximum(8 - z, 0), np.maximum(z - 8, 0), rng.normal(0, 7, 2)
        right = np.sqrt(((x - 58) / 76) ** 2 + ((y - 4) / 84) ** 2 + (high / (90 + rise[0])) ** 2)
        left = np.sqrt(((x + 58) / 72) ** 2 + ((y - 4) / 80) ** 2 + (high / (78 + rise[1])) ** 2)
        dome = union(75 * (right - 1), 75 * (left - 1), 30) - low
        self.abdomen = np.maximum(cavity, dome)
        chest = np.maximum(cavity + 4, 3 - dome)
        c.paint((c.whole, chest), rng.uniform(-890, -800) + 420 * np.clip(c.grain - 1.5, 0, 1), texture=18)
        if rng.random() < 0.2:  # pleural effusion settles at the back
            c.paint((c.whole, np.maximum(chest, c.height + rng.uniform(25, 45))), 12)
        c.paint((c.whole, np.maximum(np.abs(dome + 1) - 2, cavity)), muscle)
        for shape, hu in (
            (c.tube([(-3, -25, 50), (-3, -32, 190)], 32), _FAT),
            (c.ellipsoid(self.at(-20, 38, 126, 5), (60, 48, 44), (0, 20, 0)), _FAT),
            (c.ellipsoid(self.at(-22, 38, 128, 4), (52, 40, 37), (0, 20, 0)), self.tissue["aorta"] * 0.9),
        ):
            c.paint((shape[0], np.maximum(shape[1], 1 - dome[shape[0]])), hu)

    def skeleton(self) -> None:
        """Back muscles, ribs, vertebrae, sacrum and pelvis."""
        c, rng, muscle = self.c, self.rng, self.tissue["muscle"]
        x, y, z = c.points
        for side in (-1, 1):
            back = c.tube([(side * 33, _spine(h) - 40, h) for h in (-200, -90, 0, 90, 190)], (28, 27, 24, 20, 18))
            c.paint((back[0], np.maximum(back[1], self.skin[back[0]] + 5)), muscle)
            psoas = [(side * 24, -36, 25), (side * 38, -40, -40), (side * 50, -32, -110), (side * 68, -2, -190)]
            c.paint(c.tube(psoas, np.array([6, 15, 21, 20]) * self.size()), muscle)
            c.paint(c.tube([(side * 74, -66, 0), (side * 80, -62, -95)], 11), muscle)
            gluteus = c.ellipsoid((side * 78, -72, -182), (52, 38, 66))
            c.paint((gluteus[0], np.maximum(gluteus[1], self.skin[gluteus[0]] + 10)), muscle)

        pitch, lean = rng.uniform(25, 31), rng.uniform(0.45, 0.65)
        along = z + lean * (y + 70)
        band = np.abs((along / pitch) % 1 - 0.5) * pitch - 5.5
        cage = np.maximum(rng.uniform(8, 26) - along, (y - 15) * 1.2 - 20 - z)
        ribs = np.maximum(np.maximum(np.abs(self.cavity - 4.5) - 3.5, band), cage)
        c.paint((c.whole, ribs), np.where(y > 45, 110, 420 * self.size(0.8, 1.25)), texture=20)

        box = c.box(np.array([-46.0, -118.0, -160.0]), np.array([46.0, 0.0, 220.0]))
        x, y, z = x[box], y[box] - _spine(z[box]), z[box]
        step = ((z / rng.uniform(33, 37) + rng.uniform()) % 1 - 0.5) * 35
        below = -158 - z
        body = np.maximum(ring(x, y, 23 - 3 * z / 150, 18, 2.3), below)
        marrow = _BONE * self.size(0.65, 1.3)
        c.paint((box, body), 90)
        c.paint((box, np.maximum(body, np.abs(step) - 14)), 480)
        c.paint((box, np.maximum(body + 2.5, np.abs(step) - 12)), marrow, texture=20)
        arch = np.maximum(np.maximum(ring(x, y + 27, 15, 14), below), np.abs(step + 4) - 12)
        spinous = np.maximum(np.maximum(np.abs(x) - 3.5, np.abs(y + 50) - 13), np.abs(step + 6) - 9)
        lateral = np.maximum(np.maximum(np.abs(y + 24) - 4.5, np.abs(x) - 38), np.abs(step + 1) - 6)
        for part in (arch, np.maximum(spinous, below), np.maximum(lateral, below)):
            c.paint((box, part), 400, texture=20)
        c.paint((box, np.maximum(ring(x, y + 27, 9, 8), below)), 30)

        c.paint(c.ellipsoid((0, -62, -172), (44, 17, 34), (-25, 0, 0)), 260, texture=20)
        box, bowl = c.ellipsoid((0, 2, -192), (112, 84, 100))
        x, y, z = (p[box] for p in c.points)
        ilium = np.maximum.reduce(
            [np.abs(bowl) - 5.5, 34 - np.abs(x), y - 40 - 0.3 * z - 45, z + 98 + np.abs(y + 5) * 0.25]
        )
        c.paint((box, ilium), 480, texture=30)
        c.paint((box, ilium + 3), marrow, texture=20)

    def bowel(self) -> None:
        """Colon and small bowel: unlabelled, with fluid, stool, contrast medium and gas."""
        c, rng = self.c, self.rng
        oral = rng.choice([15.0, 30.0, 220.0], p=[0.5, 0.3, 0.2])

        def content(box: Box, hu: float, gas: float) -> Array:
            return np.asarray(hu + (_GAS - hu) * np.clip(3 * (c.clumps[box] - gas), 0, 1))

        low, high = np.array([-80.0, -8.0, -185.0]), np.array([80.0, 72.0, -48.0])
        for _ in range(rng.integers(12, 20)):
            knots = [np.array([rng.uniform(-60, 60), rng.uniform(0, 65), rng.uniform(-170, -55)])]
            for _ in range(4):
                step = np.abs(knots[-1] + rng.normal(0, 26, 3) - low) + low  # a random walk between two mirrors
                knots.append(high - np.abs(high - step))
            shape = self.inside(c.tube(knots, rng.uniform(9, 14)), 3)
            self.gut("", shape, 2.5, content(shape[0], oral + rng.normal(0, 10), 1.5))
        droop = rng.uniform(0, 55)
        colon = (
            [self.at(92, -22, -150, 6), self.at(94, -20, -90, 6), self.at(92, -4, -38, 6), self.at(84, 32, -28, 6)],
            [self.at(84, 34, -30, 6), self.at(40, 66, -40 - droop / 2, 8), self.at(0, 70, -50 - droop, 8),
             self.at(-50, 62, -35 - droop / 2, 8), self.at(-92, 12, 4, 6)],
            [self.at(-92, 10, 4, 6), self.at(-100, -22, -40, 5), self.at(-98, -24, -100, 5), self.at(-80, 0, -165, 6)],
        )  # fmt: skip
        for knots, width, gas in zip(colon, (23, 18, 15), (0.6, 0.1, 0.9), strict=True):
            shape = self.inside(c.tube(knots, width * self.size(0.75, 1.2)), 3)
            stool = rng.uniform(-10, 70) + 60 * c.grain[shape[0]]
            self.gut("", shape, 2.5, stool + (_GAS - stool) * np.clip(3 * (c.clumps[shape[0]] - gas), 0, 1), 2.5)

    def lesions(self, name: str, chance: float, hu: float, size: tuple[float, float]) -> None:
        """Round lesions inside an organ; they belong to it, as in BTCV."""
        label = _LABEL[name]
        where = np.argwhere(self.c.label == label)
        for _ in range(self.rng.poisson(chance)):
            voxel = tuple(where[int(self.rng.random() * len(where))])
            shape = self.c.ellipsoid([p[voxel] for p in self.c.points], self.rng.uniform(*size, 3))
            self.c.paint(shape, hu, None, label)

    def upper(self) -> None:
        """Liver, spleen, stomach, duodenum, gallbladder."""
        c, rng, tissue = self.c, self.rng, self.tissue
        s, shift = self.size(), self.at(0, 0, 0, 5)
        box = c.box(np.array([-100.0, -110.0, -120.0]), np.array([160.0, 130.0, 130.0]))
        right = c.ellipsoid(np.add(shift, (70, 2, 40)), s * np.array([72, 79, 76]), box=box)[1]
        left = c.ellipsoid(np.add(shift, (2, 44, 50)), self.size(0.75, 1.25) * np.array([76, 35, 34]), (0, 12, 8), box)[
            1
        ]
        tip = c.ellipsoid(np.add(shift, (92, -2, -18)), (28, 42, rng.uniform(38, 80)), box=box)[1]
        fossa = c.ellipsoid(np.add(shift, (8, -12, -34)), (62, 74, 60), (0, 25, 0), box)[1]
        liver = np.maximum(union(union(right, left, 25), tip, 25), -fossa)
        renal = c.ellipsoid(self.kidneys[1][0] + (2, -22, -10), (38, 50, 64), (12, 0, 0), box)[1]
        self.organ("liver", self.inside((box, -union(-liver, renal, 12)), 2), tissue["liver"], 4)

        gullet = [(-42, 2, 68), (-24, 2, 80), *((-9 + self.drift, _spine(h) + 44, h) for h in (100, 150, 200))]
        shape = self.organ(
            "esophagus", c.tube(gullet, self.size() * np.array([9, 8.5, 9, 9, 9])), tissue["wall"], 1.5, 1
        )
        if rng.random() < 0.4:
            c.paint((shape[0], shape[1] + 5.5), _GAS / 2, None, _LABEL["esophagus"])

        s, drop = self.size(0.72, 1.15), rng.uniform(0, 45)
        knots = [self.at(-52, -14, 70, 6), self.at(-57, 22, 52, 7), self.at(-50, 48, 24 - drop / 3, 8),
                 self.at(-20, 56, -8 - drop, 8), self.at(14, 46, -10 - drop / 2, 6), (32, 34, -6)]  # fmt: skip
        shape = self.inside(c.tube(knots, s * np.array([33, 33, 28, 22, 17, 9])), 3)
        food = rng.choice([12.0, 55.0, 95.0, 240.0], p=[0.35, 0.35, 0.15, 0.15]) + rng.normal(0, 12)
        box, stomach = self.gut("stomach", shape, rng.uniform(3, 6), food + 20 * c.clumps[shape[0]], 3)
        top = c.height[box][stomach < 0].max()
        gas = np.maximum(stomach + 4, top - rng.uniform(0, 45) - c.height[box])
        c.paint((box, gas), _GAS, None)
        shift, s = self.at(0, 0, 0, 7), self.size(0.78, 1.35)
        box, spleen = c.ellipsoid(np.add(shift, (-92, -30, 38)), s * np.array([36, 50, 52]), (-25, 12, 0))
        hollow = c.ellipsoid(np.add(shift, (-42, 4, 34)), (42, 50, 72), box=box)[1]
        mottle = 22 * c.clumps[box] if self.arterial else 0.0
        self.organ("spleen", self.inside((box, np.maximum(spleen, -hollow)), 3), tissue["spleen"] + mottle, 3)
        loop = [(32, 34, -6), self.at(50, 22, -14), self.at(54, 8, -42), self.at(34, 2, -64), self.at(-6, 4, -62)]
        shape = c.tube(loop, 11 * self.size())
        self.gut("", shape, 3, rng.choice([15.0, 35.0, 220.0]) + 25 * c.grain[shape[0]])

        centre, s = self.at(58, 46, -12, 6), self.size(0.7, 1.3)
        axis = np.array([4, 24, -18]) * s
        shape = c.tube([centre - axis * 0.6, centre, centre + axis * 0.6], np.array([8, 13, 14]) * s)
        bile = rng.uniform(2, 18)
        self.organ("gallbladder", shape, bile, 1, 1)
        if rng.random() < 0.15:
            c.paint(c.ellipsoid(centre + axis * 0.4, (5, 5, 4)), 250, None, _LABEL["gallbladder"])

    def retroperitoneum(self) -> None:
        """Kidneys in their fat, pancreas, vessels, adrenals, esophagus."""
        c, rng, tissue = self.c, self.rng, self.tissue
        for name, side in (("right kidney", 1), ("left kidney", -1)):
            centre, s = self.kidneys[side]
            turn = (rng.normal(12, 6), side * rng.normal(14, 5), side * rng.normal(25, 10))
            radii = s * np.array([26, 25, 50])
            box, kidney = c.ellipsoid(centre, radii * (1.12 + 0.2 * self.adiposity), turn)
            c.paint(self.inside((box, kidney), 1), _FAT)
            kidney = c.ellipsoid(centre, radii, turn, box)[1]
            sinus = c.ellipsoid(centre - (side * 20, -9, 0), (13, 10, 19), turn, box)[1]
            shape = self.inside((box, np.maximum(kidney, -sinus)), 3)
            self.organ(name, shape, tissue["cortex"], 1.5, 0)
            if self.arterial:  # the medulla enhances later
                c.paint((box, shape[1] + 8), 85, None, _LABEL[name])
            c.paint(c.ellipsoid(centre - (side * 20, -9, 0), (5, 5, 13), turn), tissue["urine"])

        s = self.size()
        duct = [self.at(34, 14, -34, 3), self.at(27, 18, -16, 3), self.at(8, 24, 0, 1),
                self.at(-20, 20, 6), self.at(-46, 0, 10, 5), self.at(-72, -20, 20, 6)]  # fmt: skip
        pancreas = c.tube(duct, s * np.array([15, 17.5, 10.5, 12.5, 12.5, 10]))
        marbling = 14 * self.adiposity * c.grain[pancreas[0]]
        self.organ("pancreas", pancreas, tissue["pancreas"] - 10 * self.adiposity + marbling, 2.5, 1)

        s = self.size(0.85, 1.25)
        meet = self.at(14, 12, -2, 2)
        splenic = [meet, (-12, 10, 4), duct[3] + (-8, -9, 2), duct[4] + (-4, -9, 3), (-78, -24, 32)]
        branches = [self.at(72, 14, 34, 4), self.at(30, 38, 44, 4)]
        gate = self.at(44, 16, 26, 3)
        for branch in branches:
            c.paint(
                c.tube([gate, branch, branch + rng.normal(10, 8, 3)], 3.5 * s), tissue["portal"], None, _LABEL["liver"]
            )
        self.organ("", c.tube([meet, np.add(meet, (2, 2, -30)), (6, 26, -110)], 5 * s), tissue["portal"], halo=1)
        self.organ(
            "portal and splenic veins", c.tube(splenic, s * np.array([5.5, 5, 4.5, 4.5, 4])), tissue["portal"], halo=1
        )
        self.organ("portal and splenic veins", c.tube([meet, (28, 15, 12), gate], 7 * s), tissue["portal"], halo=1)

        for side in (-1, 1):
            c.paint(
                c.tube([(side * 12, -14, 64), (side * 15, -20, 20), (side * 15, -26, -25)], (5, 7, 4)), tissue["muscle"]
            )
        s, drift = self.size(0.9, 1.2), (self.drift, rng.normal(0, 4))
        fork = rng.uniform(-112, -92)

        def front(side: float, gap: float, heights: Sequence[float]) -> list[tuple[float, float, float]]:
            return [(side + drift[side > 0], _spine(h) + 19 + gap, h) for h in heights]

        cava = [*front(21, 10, (fork - 8, -60, -10, 30)), (25, 0, 62), (24, 14, 104)]
        c.paint(c.tube([cava[0], (42, -30, fork - 50), (66, 2, -200)], 8 * s), tissue["cava"])
        self.organ("inferior vena cava", c.tube(cava, 11.5 * self.size()), tissue["cava"], 1.2, 1)
        for end in ((78, 20, 66), (50, 40, 70), (60, -30, 60)):
            vein = c.tube([(25, 4, 74), self.at(*end, 5)], (5, 2.5))
            c.paint(vein, tissue["portal"], None, _LABEL["liver"])
        aorta = front(-10, 11, (fork, -60, -10, 40, 80, 130, 200))
        for x in (42, -50):
            c.paint(c.tube([aorta[0], (x * 0.8, -28, fork - 45), (x * 1.35, 4, -200)], 6.5 * s), tissue["aorta"])
        c.paint(c.tube([aorta[2], (-6, 14, -24), (0, 22, -90)], 4 * s), tissue["aorta"])
        shape = self.organ(
            "aorta", c.tube(aorta, s * np.array([8, 8.5, 9.5, 10.5, 11, 11.5, 12])), tissue["aorta"], 0, 1
        )
        if rng.random() < 0.4:  # calcified wall
            patch = np.maximum(np.abs(shape[1] + 1) - 1.5, 5 * (1.2 - c.grain[shape[0]]))
            c.paint((shape[0], patch), 600, None, _LABEL["aorta"])
        for side in (1, -1):
            c.paint(
                c.tube([self.kidneys[side][0] - (side * 18, -8, 0), (side * 20, -4, -12)], 4), tissue["cava"], only=0
            )

        for name, side, y in (("right adrenal gland", 1, -26.0), ("left adrenal gland", -1, -20.0)):
            centre, s = self.kidneys[side]
            x, z = side * (34 if side > 0 else 36), np.clip(centre[2] + 44 * s, 22, 52)
            apex, r = self.at(x, y + 3, z, 2), rng.uniform(3.5, 4.9)
            limbs = [c.tube([apex, apex + np.array([side * dx, dy, dz])], (r + 0.6, r - 0.6))
                     for dx, dy, dz in ((10, -14, -10), (1, -20, -8), (1, 1, 9))]  # fmt: skip
            for limb in limbs:
                c.paint((limb[0], limb[1] - 2.5), _FAT)
            for limb in limbs:
                c.paint(limb, tissue["adrenal"], _LABEL[name])


def draw(canvas: Canvas, adiposity: float) -> None:
    """Draw a patient, lean (0) to obese (1): the organs of `ORGANS` among bones, muscles, fat, lungs and bowel."""
    patient = _Patient(canvas, adiposity)
    patient.trunk()
    patient.skeleton()
    patient.bowel()
    patient.upper()
    patient.retroperitoneum()
    patient.lesions("liver", 0.9, patient.tissue["liver"] - 45, (5, 18))
    patient.lesions("spleen", 0.15, 15, (5, 12))
    patient.lesions("right kidney", 0.4, 8, (5, 14))
    patient.lesions("left kidney", 0.4, 8, (5, 14))
