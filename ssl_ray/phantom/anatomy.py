"""The organs of the synthetic cohort: one patient, drawn as smooth solids inside the body of `ssl_ray.phantom.body`.

What is painted later lies in front of what was there, so labels never overlap. All random numbers come from one
generator, so a line that draws one must not move past another such line, or every patient looks different.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ssl_ray.phantom.body import FAT, GAS, draw_skeleton, draw_trunk, spine
from ssl_ray.phantom.canvas import Array, Box, Canvas, Shape, union

ORGANS = (
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip
"""The organs of BTCV in its order: the label of an organ is its index + 1, 0 is background."""

_LABEL = {organ: i + 1 for i, organ in enumerate(ORGANS)}
_TISSUES = ("aorta", "cava", "portal", "liver", "spleen", "cortex", "pancreas", "wall", "muscle", "adrenal", "urine")
_PHASES = (  # HU of _TISSUES without contrast, and in the arterial, portal venous and delayed phase
    (42, 40, 40, 56, 48, 33, 40, 38, 52, 28, 8),
    (290, 110, 125, 68, 118, 180, 98, 80, 58, 70, 10),
    (155, 140, 165, 106, 116, 180, 94, 75, 62, 68, 60),
    (100, 98, 104, 88, 92, 140, 76, 60, 60, 52, 330),
)


class _Patient:
    """The random choices of one patient, and the painting of one organ after the other."""

    def __init__(self, canvas: Canvas, adiposity: float):
        self.c, self.rng, self.adiposity = canvas, canvas.rng, adiposity
        rng = self.rng
        phase = rng.choice(4, p=[0.15, 0.2, 0.5, 0.15])
        native, enhanced = np.array(_PHASES[0]), np.array(_PHASES[phase])
        hu = native + (enhanced - native) * rng.uniform(0.75, 1.2) * rng.uniform(0.9, 1.1, len(native))
        self.tissue = dict(zip(_TISSUES, hu + rng.normal(0, 4, len(native)), strict=True))
        self.arterial = phase == 1
        if rng.random() < 0.2:
            self.tissue["liver"] -= rng.uniform(15, 50)  # fatty liver
        self.drift = rng.normal(0, 4)  # of aorta and esophagus from their place beside the spine, mm
        self.kidneys = {side: (canvas.near(58 * side, -38, z, 6), canvas.size()) for side, z in ((1, -24), (-1, -10))}
        self.halo = 0.5 + 4 * adiposity  # visceral fat between neighbours, mm
        self.body = draw_trunk(canvas, adiposity, self.tissue["muscle"], self.tissue["aorta"] * 0.9)
        draw_skeleton(canvas, self.body, self.tissue["muscle"])

    def organ(self, name: str, shape: Shape, hu: Any, lumps: float = 0.0, halo: float | None = None) -> Shape:
        """Paint an organ with a lumpy surface and a margin of fat (`halo`, mm); give the surface back."""
        box, depth = shape
        shape = box, depth + np.float32(lumps) * self.c.lumps[box]
        margin = self.halo if halo is None else halo
        fat = np.maximum(shape[1] - np.float32(margin), self.body.abdomen[box] + 3)  # the diaphragm is not displaced
        self.c.paint((box, fat), FAT)
        self.c.paint(shape, hu, _LABEL.get(name, 0))
        return shape

    def gut(self, name: str, shape: Shape, wall: float, content: Any, lumps: float = 0.0) -> Shape:
        """A hollow organ: an enhancing wall of `wall` mm and its content; the label covers both."""
        box, depth = self.organ(name, shape, self.tissue["wall"], lumps, self.halo / 2)
        self.c.paint((box, depth + wall), content, None, texture=8)
        return box, depth

    def tube(self, tissue: str, knots: Any, radii: Any, label: int | None = 0, only: int | None = None) -> None:
        """A tube of one tissue without a margin of fat, such as a branch of a vessel; `label` as for `Canvas.paint`."""
        self.c.paint(self.c.tube(knots, radii), self.tissue[tissue], label, only)

    def inside(self, shape: Shape, margin: float) -> Shape:
        """The part of a solid at least `margin` mm inside the abdominal cavity."""
        return shape[0], np.maximum(shape[1], self.body.abdomen[shape[0]] + margin)

    def bowel(self) -> None:
        """Colon and small bowel: unlabelled, with fluid, stool, contrast medium and gas."""
        c, rng = self.c, self.rng
        oral = rng.choice([15.0, 30.0, 220.0], p=[0.5, 0.3, 0.2])

        def loop(knots: Any, radius: float, content: Callable[[Box], Any], gas: float, lumps: float = 0.0) -> None:
            """A loop of bowel: `content` gives HU on a box, and there is gas where the clumps are above `gas`."""
            box, depth = self.inside(c.tube(knots, radius), 3)
            fluid = content(box)
            self.gut("", (box, depth), 2.5, fluid + (GAS - fluid) * np.clip(3 * (c.clumps[box] - gas), 0, 1), lumps)

        low, high = np.array([-80.0, -8.0, -185.0]), np.array([80.0, 72.0, -48.0])
        for _ in range(rng.integers(12, 20)):
            knots = [np.array([rng.uniform(-60, 60), rng.uniform(0, 65), rng.uniform(-170, -55)])]
            for _ in range(4):
                step = np.abs(knots[-1] + rng.normal(0, 26, 3) - low) + low  # a random walk between two mirrors
                knots.append(high - np.abs(high - step))
            loop(knots, rng.uniform(9, 14), lambda box: oral + rng.normal(0, 10), 1.5)
        droop = rng.uniform(0, 55)
        colon = (
            [c.near(92, -22, -150, 6), c.near(94, -20, -90, 6), c.near(92, -4, -38, 6), c.near(84, 32, -28, 6)],
            [c.near(84, 34, -30, 6), c.near(40, 66, -40 - droop / 2, 8), c.near(0, 70, -50 - droop, 8),
             c.near(-50, 62, -35 - droop / 2, 8), c.near(-92, 12, 4, 6)],
            [c.near(-92, 10, 4, 6), c.near(-100, -22, -40, 5), c.near(-98, -24, -100, 5), c.near(-80, 0, -165, 6)],
        )  # fmt: skip
        for knots, width, gas in zip(colon, (23, 18, 15), (0.6, 0.1, 0.9), strict=True):
            loop(knots, width * c.size(0.75, 1.2), lambda box: rng.uniform(-10, 70) + 60 * c.grain[box], gas, 2.5)

    def liver(self) -> None:
        """Two lobes and the tip of the right one, without the fossa of the gallbladder and the right kidney."""
        c, rng = self.c, self.rng
        s, shift = c.size(), c.near(0, 0, 0, 5)
        box = c.box(np.array([-100.0, -110.0, -120.0]), np.array([160.0, 130.0, 130.0]))

        def part(centre: Any, radii: Any, turn: Sequence[float] = (0, 0, 0)) -> Array:
            return c.ellipsoid(centre, radii, turn, box)[1]

        right = part(np.add(shift, (70, 2, 40)), s * np.array([72, 79, 76]))
        left = part(np.add(shift, (2, 44, 50)), c.size(0.75, 1.25) * np.array([76, 35, 34]), (0, 12, 8))
        tip = part(np.add(shift, (92, -2, -18)), (28, 42, rng.uniform(38, 80)))
        fossa = part(np.add(shift, (8, -12, -34)), (62, 74, 60), (0, 25, 0))
        renal = part(self.kidneys[1][0] + (2, -22, -10), (38, 50, 64), (12, 0, 0))
        depth = np.maximum(union(union(right, left, 25), tip, 25), -fossa)
        self.organ("liver", self.inside((box, -union(-depth, renal, 12)), 2), self.tissue["liver"], 4)

    def upper(self) -> None:
        """Esophagus, stomach, spleen, duodenum, gallbladder."""
        c, rng, tissue = self.c, self.rng, self.tissue
        gullet = [(-42, 2, 68), (-24, 2, 80), *((-9 + self.drift, spine(h) + 44, h) for h in (100, 150, 200))]
        tube = c.tube(gullet, c.size() * np.array([9, 8.5, 9, 9, 9]))
        box, depth = self.organ("esophagus", tube, tissue["wall"], 1.5, 1)
        if rng.random() < 0.4:
            c.paint((box, depth + 5.5), GAS / 2, None, _LABEL["esophagus"])

        s, drop = c.size(0.72, 1.15), rng.uniform(0, 45)
        knots = [c.near(-52, -14, 70, 6), c.near(-57, 22, 52, 7), c.near(-50, 48, 24 - drop / 3, 8),
                 c.near(-20, 56, -8 - drop, 8), c.near(14, 46, -10 - drop / 2, 6), (32, 34, -6)]  # fmt: skip
        shape = self.inside(c.tube(knots, s * np.array([33, 33, 28, 22, 17, 9])), 3)
        food = rng.choice([12.0, 55.0, 95.0, 240.0], p=[0.35, 0.35, 0.15, 0.15]) + rng.normal(0, 12)
        box, stomach = self.gut("stomach", shape, rng.uniform(3, 6), food + 20 * c.clumps[shape[0]], 3)
        top = c.height[box][stomach < 0].max()
        c.paint((box, np.maximum(stomach + 4, top - rng.uniform(0, 45) - c.height[box])), GAS, None)

        shift, s = c.near(0, 0, 0, 7), c.size(0.78, 1.35)
        box, spleen = c.ellipsoid(np.add(shift, (-92, -30, 38)), s * np.array([36, 50, 52]), (-25, 12, 0))
        hollow = c.ellipsoid(np.add(shift, (-42, 4, 34)), (42, 50, 72), box=box)[1]
        mottle = 22 * c.clumps[box] if self.arterial else 0.0
        self.organ("spleen", self.inside((box, np.maximum(spleen, -hollow)), 3), tissue["spleen"] + mottle, 3)

        loop = [(32, 34, -6), c.near(50, 22, -14), c.near(54, 8, -42), c.near(34, 2, -64), c.near(-6, 4, -62)]
        shape = c.tube(loop, 11 * c.size())
        self.gut("", shape, 3, rng.choice([15.0, 35.0, 220.0]) + 25 * c.grain[shape[0]])

        centre, s = c.near(58, 46, -12, 6), c.size(0.7, 1.3)
        axis = np.array([4, 24, -18]) * s
        shape = c.tube([centre - axis * 0.6, centre, centre + axis * 0.6], np.array([8, 13, 14]) * s)
        self.organ("gallbladder", shape, rng.uniform(2, 18), 1, 1)
        if rng.random() < 0.15:  # a stone
            c.paint(c.ellipsoid(centre + axis * 0.4, (5, 5, 4)), 250, None, _LABEL["gallbladder"])

    def renal(self) -> None:
        """Kidneys in their fat, each with its sinus and pelvis."""
        c, rng = self.c, self.rng
        for name, side in (("right kidney", 1), ("left kidney", -1)):
            centre, s = self.kidneys[side]
            turn = (rng.normal(12, 6), side * rng.normal(14, 5), side * rng.normal(25, 10))
            radii, hilum = s * np.array([26, 25, 50]), centre - (side * 20, -9, 0)
            box, capsule = c.ellipsoid(centre, radii * (1.12 + 0.2 * self.adiposity), turn)
            c.paint(self.inside((box, capsule), 1), FAT)
            kidney = c.ellipsoid(centre, radii, turn, box)[1]
            sinus = c.ellipsoid(hilum, (13, 10, 19), turn, box)[1]
            shape = self.inside((box, np.maximum(kidney, -sinus)), 3)
            self.organ(name, shape, self.tissue["cortex"], 1.5, 0)
            if self.arterial:  # the medulla enhances later
                c.paint((box, shape[1] + 8), 85, None, _LABEL[name])
            c.paint(c.ellipsoid(hilum, (5, 5, 13), turn), self.tissue["urine"])

    def portal(self) -> None:
        """The pancreas, and the veins that meet behind it and lead into the liver."""
        c, rng, tissue = self.c, self.rng, self.tissue
        s = c.size()
        duct = [c.near(34, 14, -34, 3), c.near(27, 18, -16, 3), c.near(8, 24, 0, 1),
                c.near(-20, 20, 6), c.near(-46, 0, 10, 5), c.near(-72, -20, 20, 6)]  # fmt: skip
        pancreas = c.tube(duct, s * np.array([15, 17.5, 10.5, 12.5, 12.5, 10]))
        marbling = 14 * self.adiposity * c.grain[pancreas[0]]
        self.organ("pancreas", pancreas, tissue["pancreas"] - 10 * self.adiposity + marbling, 2.5, 1)

        s, meet = c.size(0.85, 1.25), c.near(14, 12, -2, 2)
        splenic = [meet, (-12, 10, 4), duct[3] + (-8, -9, 2), duct[4] + (-4, -9, 3), (-78, -24, 32)]
        branches = [c.near(72, 14, 34, 4), c.near(30, 38, 44, 4)]
        gate = c.near(44, 16, 26, 3)
        for branch in branches:
            self.tube("portal", [gate, branch, branch + rng.normal(10, 8, 3)], 3.5 * s, None, _LABEL["liver"])
        for name, knots, radii in (
            ("", [meet, np.add(meet, (2, 2, -30)), (6, 26, -110)], 5 * s),  # superior mesenteric vein
            ("portal and splenic veins", splenic, s * np.array([5.5, 5, 4.5, 4.5, 4])),
            ("portal and splenic veins", [meet, (28, 15, 12), gate], 7 * s),
        ):
            self.organ(name, c.tube(knots, radii), tissue["portal"], halo=1)

    def vessels(self) -> None:
        """Vena cava and aorta with their branches, between the crura of the diaphragm."""
        c, rng, tissue = self.c, self.rng, self.tissue
        for side in (-1, 1):
            self.tube("muscle", [(side * 12, -14, 64), (side * 15, -20, 20), (side * 15, -26, -25)], (5, 7, 4))
        s, drift = c.size(0.9, 1.2), (self.drift, rng.normal(0, 4))
        fork = rng.uniform(-112, -92)

        def front(side: float, gap: float, heights: Sequence[float]) -> list[tuple[float, float, float]]:
            """Points `gap` mm in front of the vertebral bodies."""
            return [(side + drift[side > 0], spine(h) + 19 + gap, h) for h in heights]

        cava = [*front(21, 10, (fork - 8, -60, -10, 30)), (25, 0, 62), (24, 14, 104)]
        self.tube("cava", [cava[0], (42, -30, fork - 50), (66, 2, -200)], 8 * s)
        self.organ("inferior vena cava", c.tube(cava, 11.5 * c.size()), tissue["cava"], 1.2, 1)
        for end in ((78, 20, 66), (50, 40, 70), (60, -30, 60)):  # hepatic veins
            self.tube("portal", [(25, 4, 74), c.near(*end, 5)], (5, 2.5), None, _LABEL["liver"])
        aorta = front(-10, 11, (fork, -60, -10, 40, 80, 130, 200))
        for x in (42, -50):  # iliac arteries
            self.tube("aorta", [aorta[0], (x * 0.8, -28, fork - 45), (x * 1.35, 4, -200)], 6.5 * s)
        self.tube("aorta", [aorta[2], (-6, 14, -24), (0, 22, -90)], 4 * s)  # superior mesenteric artery
        tube = c.tube(aorta, s * np.array([8, 8.5, 9.5, 10.5, 11, 11.5, 12]))
        box, depth = self.organ("aorta", tube, tissue["aorta"], 0, 1)
        if rng.random() < 0.4:  # calcified wall
            plaque = np.maximum(np.abs(depth + 1) - 1.5, 5 * (1.2 - c.grain[box]))
            c.paint((box, plaque), 600, None, _LABEL["aorta"])
        for side in (1, -1):  # renal veins
            self.tube("cava", [self.kidneys[side][0] - (side * 18, -8, 0), (side * 20, -4, -12)], 4, only=0)

    def adrenals(self) -> None:
        """Three limbs above each kidney."""
        c, rng = self.c, self.rng
        for name, side, y in (("right adrenal gland", 1, -26.0), ("left adrenal gland", -1, -20.0)):
            centre, s = self.kidneys[side]
            x, z = side * (34 if side > 0 else 36), np.clip(centre[2] + 44 * s, 22, 52)
            apex, r = c.near(x, y + 3, z, 2), rng.uniform(3.5, 4.9)
            limbs = [c.tube([apex, apex + np.array([side * dx, dy, dz])], (r + 0.6, r - 0.6))
                     for dx, dy, dz in ((10, -14, -10), (1, -20, -8), (1, 1, 9))]  # fmt: skip
            for box, depth in limbs:
                c.paint((box, depth - 2.5), FAT)
            for limb in limbs:
                c.paint(limb, self.tissue["adrenal"], _LABEL[name])

    def lesions(self, name: str, chance: float, hu: float, size: tuple[float, float]) -> None:
        """Round lesions inside an organ, on average `chance` of them; they belong to it, as in BTCV."""
        label = _LABEL[name]
        where = np.argwhere(self.c.label == label)
        for _ in range(self.rng.poisson(chance)):
            voxel = tuple(where[int(self.rng.random() * len(where))])
            shape = self.c.ellipsoid([p[voxel] for p in self.c.points], self.rng.uniform(*size, 3))
            self.c.paint(shape, hu, None, label)


def draw(canvas: Canvas, adiposity: float) -> None:
    """Draw a patient, lean (0) to obese (1): the organs of `ORGANS` among bones, muscles, fat, lungs and bowel."""
    patient = _Patient(canvas, adiposity)
    for region in (patient.bowel, patient.liver, patient.upper, patient.renal, patient.portal, patient.vessels):
        region()
    patient.adrenals()
    patient.lesions("liver", 0.9, patient.tissue["liver"] - 45, (5, 18))
    patient.lesions("spleen", 0.15, 15, (5, 12))
    patient.lesions("right kidney", 0.4, 8, (5, 14))
    patient.lesions("left kidney", 0.4, 8, (5, 14))
