"""A made-up trunk as a function of place: HU at any point of the body, before and after contrast.

Coordinates are material, LPS millimetres: x to the patient's left, y to the back, z to the head, the origin in the
middle of the trunk. Every tissue is a signed distance, so an edge can be drawn as wide as a voxel is (partial volume)
and the body can be drawn at deformed coordinates without interpolating an image. Knows nothing of DICOM or breathing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Point = tuple[float, float, float]
Distance = Callable[[Array, Array, Array], Array]
Locate = Callable[[Point, Point], tuple[slice, ...]]
"""Part of the arrays at hand that may hold points of a box given by two corners (x, y, z)."""

EVERYWHERE: tuple[Point, Point] = ((-1e3, -1e3, -1e3), (1e3, 1e3, 1e3))


@dataclass(frozen=True)
class Tissue:
    """One structure; later ones are painted over earlier ones.

    Attributes
    ----------
    group
        What it belongs to: liver, lung vessels, bone …
    native, portal
        HU before contrast and in the portal venous phase.
    distance
        mm to the surface at (x, y, z), negative inside; exact near the surface at least to some per cent.
    low, high
        Corners of a box that holds the structure.
    grain
        Standard deviation of the tissue's own pattern, HU; it moves with the tissue.
    fork
        Where a piece of a vessel tree forks, if it is one and thick enough to be found by eye.
    """

    group: str
    native: float
    portal: float
    distance: Distance
    low: Point = EVERYWHERE[0]
    high: Point = EVERYWHERE[1]
    grain: float = 3.0
    fork: Point | None = None


@dataclass(frozen=True)
class Anatomy:
    """A body: its tissues in the order of painting, and the waves its pattern is made of."""

    tissues: tuple[Tissue, ...]
    waves: npt.NDArray[np.float32]
    """(n, 4): wave vector (x, y, z) in 1/mm and phase."""

    def hounsfield(
        self, x: Array, y: Array, z: Array, *, contrast: bool, edge_mm: float, locate: Locate | None = None
    ) -> Array:
        """HU at material points, free of noise; all arrays have one shape.

        Parameters
        ----------
        edge_mm
            Width over which an edge goes from one tissue to the next.
        locate
            Narrows the work on a tissue to a part of the arrays; everything by default.
        """
        hu = np.full(x.shape, -1000, np.float32)
        grain = np.zeros(x.shape, np.float32)
        for tissue in self.tissues:
            part = locate(tissue.low, tissue.high) if locate else (slice(None),)
            if x[part].size:
                inside = np.clip(0.5 - tissue.distance(x[part], y[part], z[part]) / edge_mm, 0, 1)
                hu[part] += inside * ((tissue.portal if contrast else tissue.native) - hu[part])
                grain[part] += inside * (tissue.grain - grain[part])
        pattern = sum(np.cos(kx * x + ky * y + kz * z + phase) for kx, ky, kz, phase in self.waves)
        return np.asarray(hu + grain * pattern * np.float32(np.sqrt(2 / len(self.waves))), np.float32)


def build(seed: int) -> Anatomy:
    """Make one body: the organs stand in the same place in every one, vessels, bowel and pattern follow the seed."""
    rng = np.random.default_rng(seed)
    tissues = [*_trunk(), *_chest(rng), *_bowel(rng), *_organs(), *_vessels(rng), *_cysts(rng), *_bones()]
    directions = rng.normal(size=(10, 3))
    directions *= (2 * np.pi / rng.uniform(7, 28, (10, 1))) / np.linalg.norm(directions, axis=1, keepdims=True)
    waves = np.column_stack([directions, rng.uniform(0, 2 * np.pi, 10)]).astype(np.float32)
    return Anatomy(tuple(tissues), waves)


def skin(x: Array, y: Array, z: Array) -> Array:
    """Distance to the body surface along the ray from the body's axis, mm, negative inside."""
    u = x / (163 + 5 * np.cos((z - 30) / 60))
    v = y / (108 + 2 * np.sign(y))
    q, uv = u * u + v * v, u * v
    # Squircle of Fernández-Guasti (1992) with squareness² 0.4: a trunk is boxier than an ellipse.
    radius = np.sqrt(0.5 * (q + np.sqrt(np.maximum(q * q - 1.6 * uv * uv, 0)))) + 1e-6
    from_axis = np.hypot(x, y)
    groove = 6 * np.exp(-((x / 16) ** 2)) * np.clip(y / 110, 0, 1)
    return np.asarray(from_axis - from_axis / radius + groove)


def cavity(x: Array, y: Array, z: Array) -> Array:
    """Distance to the inner side of the chest and belly wall, mm, negative inside."""
    return skin(x, y, z) + 30


def _above_diaphragm(x: Array, y: Array, z: Array) -> Array:
    """Roughly the distance to the diaphragm, negative above: two domes that fall towards the wall, deepest behind."""
    r = (x / 135) ** 2 + (y / 78) ** 2
    dome = 58 - 10 / (1 + np.exp(-(x - 10) / 12)) - 9 * np.exp(-(((x - 12) / 22) ** 2))
    return np.asarray(0.75 * (dome - (66 + 28 * np.clip(y / 78, -1, 1)) * np.minimum(r * r * r, 1.3) - z))


def _trunk() -> Iterator[Tissue]:
    """Skin, fat under it, the muscular wall, and the fat that fills the cavity."""
    yield Tissue("skin", 20, 30, skin)
    yield Tissue("fat", -105, -103, lambda x, y, z: skin(x, y, z) + 2, grain=7)
    yield Tissue("muscle", 52, 62, lambda x, y, z: skin(x, y, z) + 16 - 5 * np.clip(y / 90, -1, 0), grain=5)
    yield Tissue("fat", -100, -97, cavity, grain=8)
    for side in (-1, 1):
        yield _ellipsoid("muscle", (52, 62), (side * 33, 86, 0), (27, 17, 400), grain=9)
        psoas = partial(_cone, (side * 29.0, 58.0, 10.0), (side * 45.0, 50.0, -150.0), (7.0, 22.0))
        yield Tissue("muscle", 52, 62, psoas, (-75, 15, -180), (75, 85, 20), grain=6)


def _chest(rng: np.random.Generator) -> Iterator[Tissue]:
    """The base of the lungs with their vessels, the mediastinum, the heart and the diaphragm."""

    def lung(x: Array, y: Array, z: Array) -> Array:
        return np.maximum(cavity(x, y, z), _above_diaphragm(x, y, z))

    yield Tissue("lung", -850, -845, lung, (-200, -150, -60), (200, 150, 200), grain=12)
    for side in (-1, 1):
        for start, towards in (((50, -5, 150), (0.2, -0.35, -1)), ((52, 22, 150), (0.45, 0.3, -1))):
            mirror = np.array((side, 1, 1))
            twigs = _tree(rng, start * mirror, towards * mirror, 30, 5.5, lung, smallest_mm=1.2)
            yield from (_segment("lung vessels", (35, 130), twig, within=lung, grain=0) for twig in twigs)
    mediastinum = _ellipsoid("mediastinum", (-80, -75), (3, 10, 160), (27, 62, 112), grain=7)
    yield _cut(mediastinum, _above_diaphragm)
    heart = _ellipsoid("heart", (-70, -65), (20, -24, 100), (66, 50, 56), grain=5)
    yield _cut(heart, _above_diaphragm)
    yield _cut(_ellipsoid("heart", (42, 145), (22, -22, 100), (60, 44, 50), grain=4), _above_diaphragm)
    yield _ellipsoid("heart", (42, 172), (38, -26, 96), (26, 24, 32), grain=3)

    def sheet(x: Array, y: Array, z: Array) -> Array:
        return np.maximum(cavity(x, y, z), np.abs(_above_diaphragm(x, y, z)) - 1.5)

    yield Tissue("diaphragm", 45, 60, sheet, (-160, -100, -60), (160, 100, 75))
    yield _tube("oesophagus", (35, 55), [(18, 34, 160), (16, 22, 60), (28, 5, 44)], 7)


def _bowel(rng: np.random.Generator) -> Iterator[Tissue]:
    """Stomach, colon with stool and gas, loops of small bowel."""
    stomach = [(58, 12, 32), (62, -18, 8), (42, -42, -22), (8, -40, -36), (-16, -28, -32)]
    pieces = _pieces(stomach, [34, 30, 24, 17, 11])
    yield from _hollow("stomach", (38, 85), (18, 20), pieces, wall_mm=4, gas_in_front_of=-32)
    corners = [
        (-98, 30, -170), (-101, 18, -110), (-96, -8, -78), (-62, -46, -84), (-20, -54, -100), (25, -54, -98),
        (64, -48, -72), (96, -16, -34), (106, 22, -14), (105, 36, -60), (103, 36, -120), (98, 30, -170),
    ]  # fmt: skip
    colon = [_point(p) for a, b in pairwise(corners) for p in np.linspace(a, b, 4)[:3]]
    pieces = _pieces(colon, rng.uniform(11, 18, len(colon)).tolist())
    yield from _hollow("colon", (40, 75), (25, 25), pieces, wall_mm=2.5, gas_in_front_of=-50, grain=35)
    for _ in range(22):
        loop = [_point(rng.uniform((-70, -45, -165), (70, 20, -62)))]
        heading = rng.normal(size=3)
        for _ in range(6):
            heading = _unit(heading + 0.9 * rng.normal(size=3))
            loop.append(_point(np.clip(loop[-1] + 17 * heading, (-76, -52, -170), (76, 22, -52))))
        pieces = _pieces(loop, [11.5] * len(loop))
        yield from _hollow("bowel", (38, 95), (14, 16), pieces, wall_mm=2.5)


def _organs() -> Iterator[Tissue]:
    """Pancreas, spleen, kidneys, liver and gallbladder."""
    pancreas = [(-28, -8, -36), (-12, -12, -14), (22, -2, -6), (55, 18, 4), (82, 30, 12)]
    yield _tube("pancreas", (40, 100), pancreas, 10, grain=9)
    spleen = _ellipsoid("spleen", (48, 120), (98, 34, 18), (29, 46, 44), grain=5)
    hollow = _ellipsoid("", (0, 0), (58, 14, 26), (30, 30, 46))
    yield _cut(spleen, cavity, _below_diaphragm, lambda x, y, z: -hollow.distance(x, y, z))
    kidneys = [_ellipsoid("kidney", (33, 185), (side * 62, 41, z), (27, 25, 54)) for side, z in ((-1, -58), (1, -44))]
    for side, kidney in zip((-1, 1), kidneys, strict=True):
        z = -58 if side < 0 else -44
        yield kidney
        yield _ellipsoid("kidney", (31, 150), (side * 60, 40, z), (18, 16, 43))
        yield _ellipsoid("kidney", (-75, -70), (side * 48, 37, z), (17, 10, 26), grain=7)
        yield _ellipsoid("kidney", (8, 45), (side * 46, 37, z - 2), (10, 5, 14))
    right = kidneys[0].distance
    liver = Tissue("liver", 60, 112, _liver, (-150, -90, -80), (75, 90, 65), grain=6)
    yield _cut(liver, lambda x, y, z: 1.5 - right(x, y, z))
    yield _ellipsoid("gallbladder", (9, 9), (-44, -42, -34), (15, 17, 27), grain=1)


def _liver(x: Array, y: Array, z: Array) -> Array:
    """Two lobes under the diaphragm, in front of the spine, with the fissure between them."""
    right = _ellipsoid_distance((-66, 2, 0), (76, 76, 68), x, y, z)
    left = _ellipsoid_distance((6, -38, 22), (62, 33, 30), x, y, z)
    blend = np.clip(0.5 + (right - left) / 36, 0, 1)
    lobes = right + blend * (left - right) - 18 * blend * (1 - blend)
    back = -_ellipsoid_distance((8, 66, 0), (42, 52, 900), x, y, z)
    fissure = -_ellipsoid_distance((-14, -62, 0), (4, 22, 42), x, y, z)
    below = _below_diaphragm(x, y, z) + 0.5
    return np.asarray(np.maximum.reduce([lobes, back, fissure, below, cavity(x, y, z) + 2]))


def _vessels(rng: np.random.Generator) -> Iterator[Tissue]:
    """Aorta, vena cava and their branches; the portal and hepatic venous trees inside the liver."""
    yield _tube("vena cava", (40, 145), [(-26, 36, -170), (-24, 31, -20), (-25, 27, 44), (-18, 8, 78)], 11)
    for points in ([(-26, 30, -50), (-50, 40, -57)], [(-22, 29, -38), (10, 22, -36), (50, 38, -43)]):
        yield from _tubes("large vessels", (40, 155), points, 4.5)
    portal = [(5, 2, -150), (4, 2, -80), (5, 6, -20), (-14, 4, -2), (-36, -2, 6)]
    yield from _tubes("large vessels", (40, 170), portal[:3], 5.5)
    yield from _tubes("large vessels", (40, 170), portal[2:], 7.5)
    yield from _tubes("large vessels", (40, 170), [(5, 6, -20), (40, 20, -2), (78, 32, 14)], 4.2)
    hilum, confluence = (-36, -2, 6), (-27, 24, 42)  # where portal blood enters the liver, where all blood leaves it
    for hu, start, heading, length, radius in (
        (172, hilum, (-1, 0.5, 0.1), 26, 5.5),
        (172, hilum, (-1, -0.7, 0.5), 28, 5.5),
        (172, hilum, (0.7, -1, 0.5), 34, 5),
        (150, confluence, (-1, 0.1, -0.3), 28, 5),
        (150, confluence, (-0.5, -0.9, -0.3), 28, 5),
        (150, confluence, (0.5, -1, -0.1), 32, 4.5),
    ):
        for twig in _tree(rng, start, heading, length, radius, _liver, smallest_mm=1.5):
            yield _segment("liver vessels", (40, hu), twig, within=_liver)
    yield from _mesentery(rng)
    yield _tube("aorta", (40, 152), [(10, 32, -170), (11, 30, -20), (14, 29, 40), (26, 37, 170)], 10.5)
    for points in (
        [(11, 20, 6), (12, 6, 2)],
        [(12, 6, 2), (60, 20, 10)],
        [(12, 6, 2), (-18, -4, 2)],
        [(11, 22, -12), (10, 8, -40), (12, 0, -150)],
        [(16, 28, -34), (48, 38, -44)],
        [(5, 30, -40), (-50, 40, -56)],
    ):
        yield from _tubes("large vessels", (40, 150), points, 3.4)


def _mesentery(rng: np.random.Generator) -> Iterator[Tissue]:
    """Vessels in the fat between the loops of bowel."""
    for z in (-55, -75, -95, -118):
        for side in (-1, 1):
            heading = (side, rng.uniform(-0.7, 0), -0.6)
            for twig in _tree(rng, (4, 2, z), heading, 24, 2.8, cavity, smallest_mm=1.3):
                yield _segment("mesenteric vessels", (40, 150), twig, within=cavity, grain=0)


def _cysts(rng: np.random.Generator) -> Iterator[Tissue]:
    """Simple cysts in liver and kidneys, water in both phases."""
    for low, high, count, within in (
        ((-135, -60, -60), (45, 60, 50), 60, _liver),
        ((-85, 20, -105), (-40, 62, -10), 4, None),
        ((40, 20, -90), (85, 62, 5), 4, None),
    ):
        for centre in rng.uniform(low, high, (count, 3)):
            if within is None or within(*centre[:, None])[0] < -6:
                radius = rng.uniform(2.5, 7)
                yield _ellipsoid("cyst", (6, 7), _point(centre), (radius, radius, radius), grain=1)


def _bones() -> Iterator[Tissue]:
    """Vertebrae and discs, the spinal canal, ribs and breastbone; none of them breathes."""
    centre, period = (0.0, 63.0), 35.0

    def column(x: Array, y: Array, z: Array) -> Array:
        waist = 1 + 0.09 * np.cos(2 * np.pi * z / period)
        return _ellipsoid_distance((*centre, 0), (25, 19, 4000), x / waist, y + (waist - 1) * -30, z)

    def between(z: Array) -> Array:
        """Distance to the end plates, negative inside a vertebra."""
        return np.asarray(np.abs((z % period) - period / 2) - (period / 2 - 4.5))

    def rib(x: Array, y: Array, z: Array, half_mm: float) -> Array:
        tilted = ((z - 0.5 * y + 0.25 * np.abs(x) + 4) % 32) - 16
        ring = (np.hypot((skin(x, y, z) + 25) / 4, tilted / 6.5) - 1) * 4.5
        margin = np.maximum(-28 - 0.75 * y - z, np.where(y < 0, 48 - np.abs(x), -100))
        return np.asarray(np.maximum.reduce([ring + (4 - half_mm), margin, 26 - np.abs(x)]))

    def arch(x: Array, y: Array, z: Array) -> Array:
        ring = np.abs(_ellipsoid_distance((0, 89, 0), (12, 11, 4000), x, y, z)) - 2.5
        spine = _ellipsoid_distance((0, 101, 0), (4, 11, 4000), x, y, z)
        wings = _ellipsoid_distance((0, 84, 0), (42, 6, 4000), x, y, z)
        lower = np.abs(((z - 6) % period) - period / 2) - 9
        return np.asarray(np.maximum(np.minimum.reduce([ring, spine, np.maximum(wings, lower + 4)]), lower))

    near: tuple[Point, Point] = ((-48, 40, -400), (48, 125, 400))
    yield Tissue("bone", 80, 85, column, *near, grain=6)
    yield Tissue("bone", 520, 525, lambda x, y, z: np.maximum(column(x, y, z), between(z)), *near, grain=40)
    yield Tissue("bone", 190, 200, lambda x, y, z: np.maximum(column(x, y, z) + 2.5, between(z) + 2.5), *near, grain=35)
    yield Tissue("bone", 420, 425, arch, *near, grain=50)
    yield Tissue("canal", 22, 24, lambda x, y, z: _ellipsoid_distance((0, 89, 0), (9.5, 8.5, 4000), x, y, z), *near)
    yield Tissue("bone", 650, 650, partial(rib, half_mm=4), grain=60)
    yield Tissue("bone", 220, 225, partial(rib, half_mm=1.8), grain=40)
    yield _tube("bone", (280, 280), [(0, -84, 62), (0, -87, 170)], 8, grain=50)


# ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ellipsoid_distance(centre: Sequence[float], radii: Sequence[float], x: Array, y: Array, z: Array) -> Array:
    """First-order distance to an ellipsoid: k (k - 1) / |grad|, exact on the surface."""
    px, py, pz = x - centre[0], y - centre[1], z - centre[2]
    a, b, c = (1 / r for r in radii)
    k = np.sqrt((px * a) ** 2 + (py * b) ** 2 + (pz * c) ** 2) + 1e-6
    slope = np.sqrt((px * a * a) ** 2 + (py * b * b) ** 2 + (pz * c * c) ** 2) + 1e-9
    return np.asarray(k * (k - 1) / slope)


def _ellipsoid(group: str, hu: tuple[float, float], centre: Point, radii: Point, *, grain: float = 3) -> Tissue:
    low, high = np.subtract(centre, radii) - 4, np.add(centre, radii) + 4
    return Tissue(group, *hu, partial(_ellipsoid_distance, centre, radii), _point(low), _point(high), grain)


def _cone(a: Sequence[float], b: Sequence[float], radii: tuple[float, float], x: Array, y: Array, z: Array) -> Array:
    """Distance to the line from a to b, thickened from the first radius to the second."""
    px, py, pz = x - a[0], y - a[1], z - a[2]
    abx, aby, abz = np.subtract(b, a).tolist()
    t = np.clip((px * abx + py * aby + pz * abz) / (abx * abx + aby * aby + abz * abz + 1e-6), 0, 1)
    dx, dy, dz = px - t * abx, py - t * aby, pz - t * abz
    return np.asarray(np.sqrt(dx * dx + dy * dy + dz * dz) - radii[0] - t * (radii[1] - radii[0]))


@dataclass(frozen=True)
class _Twig:
    """One straight piece of a vessel tree."""

    start: Point
    end: Point
    radii: tuple[float, float]


def _pieces(path: Sequence[Point], radii: Sequence[float]) -> list[_Twig]:
    return [_Twig(*ends, thickness) for ends, thickness in zip(pairwise(path), pairwise(radii), strict=True)]


def _hollow(
    group: str, wall: tuple[float, float], content: tuple[float, float], pieces: Sequence[_Twig], *,
    wall_mm: float, gas_in_front_of: float | None = None, grain: float = 3,
) -> Iterator[Tissue]:  # fmt: skip
    """A gut: all of its wall, then what is in it, then the gas, which rises to the front of a body on its back."""
    yield from (_segment(group, wall, piece) for piece in pieces)
    lumen = [_Twig(p.start, p.end, (p.radii[0] - wall_mm, p.radii[1] - wall_mm)) for p in pieces]
    yield from (_segment(f"{group} lumen", content, piece, grain=grain) for piece in lumen)
    if gas_in_front_of is not None:
        y_level = gas_in_front_of
        gas = (_segment(f"{group} lumen", (-920, -920), piece, grain=5) for piece in lumen)
        yield from (_cut(bubble, lambda _x, y, _z: y - y_level) for bubble in gas)


def _segment(
    group: str, hu: tuple[float, float], twig: _Twig, *, within: Distance | None = None, grain: float = 3
) -> Tissue:
    line = partial(_cone, twig.start, twig.end, twig.radii)
    low = np.minimum(twig.start, twig.end) - max(twig.radii) - 4
    high = np.maximum(twig.start, twig.end) + max(twig.radii) + 4
    fork = twig.end if twig.radii[1] > 1.8 else None
    tissue = Tissue(group, *hu, line, _point(low), _point(high), grain, fork)
    return tissue if within is None else _cut(tissue, lambda x, y, z: within(x, y, z) + 2)


def _tubes(group: str, hu: tuple[float, float], points: Sequence[Point], radius: float) -> Iterator[Tissue]:
    yield from (_segment(group, hu, piece) for piece in _pieces(points, [radius] * len(points)))


def _tube(group: str, hu: tuple[float, float], points: Sequence[Point], radius: float, *, grain: float = 3) -> Tissue:
    """A bent tube as one tissue."""
    pieces = list(_tubes(group, hu, points, radius))
    low = np.min([piece.low for piece in pieces], axis=0)
    high = np.max([piece.high for piece in pieces], axis=0)

    def distance(x: Array, y: Array, z: Array) -> Array:
        return np.asarray(np.minimum.reduce([piece.distance(x, y, z) for piece in pieces]))

    return Tissue(group, *hu, distance, _point(low), _point(high), grain)


def _cut(tissue: Tissue, *others: Distance) -> Tissue:
    """The part of a tissue that is inside every other shape too."""

    def distance(x: Array, y: Array, z: Array) -> Array:
        shapes = [tissue.distance(x, y, z), *(other(x, y, z) for other in others)]
        return np.asarray(np.maximum.reduce(shapes))

    return replace(tissue, distance=distance)


def _below_diaphragm(x: Array, y: Array, z: Array) -> Array:
    return 2 - _above_diaphragm(x, y, z)


def _tree(
    rng: np.random.Generator,
    start: npt.ArrayLike,
    heading: npt.ArrayLike,
    length: float,
    radius: float,
    within: Distance,
    *,
    smallest_mm: float,
) -> Iterator[_Twig]:
    """Pieces of a tree that forks in two until its twigs are small or leave what they should stay in."""
    if radius < smallest_mm:
        return
    start, heading = np.asarray(start, np.float64), _unit(heading)
    for reach in (length, length / 2):
        end = start + reach * heading
        if float(within(*end[:, None])[0]) < -2:
            break
    else:
        return
    yield _Twig(_point(start), _point(end), (radius, 0.85 * radius))
    aside = _unit(np.cross(heading, rng.normal(size=3)))
    for sign in (-1, 1):
        turn = heading + sign * rng.uniform(0.45, 0.8) * aside + 0.15 * rng.normal(size=3)
        next_length = reach * rng.uniform(0.72, 0.92)
        yield from _tree(rng, end, turn, next_length, 0.79 * radius, within, smallest_mm=smallest_mm)


def _unit(vector: npt.ArrayLike) -> npt.NDArray[np.float64]:
    vector = np.asarray(vector, np.float64)
    return np.asarray(vector / np.linalg.norm(vector))


def _point(values: npt.NDArray[np.float64]) -> Point:
    x, y, z = (float(v) for v in values)
    return x, y, z
