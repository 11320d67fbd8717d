"""A simulated liver DCE-MRI of the paper's geometry: 30 phases of 256 × 256 × 32, motion and uptake known.

Drawn, not interpolated: phase t shows the anatomy of the reference at back(x), where x + motion_t(x) is the truth
for registering phase t to the reference.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.registration import motions
from benchmarks.registration.motions import Motion, Points
from registration_engine import Grid, Volume

PHASES, REFERENCE = 30, 15
SHAPE = (32, 256, 256)
_EXTENT_MM = (160.0, 450.0, 450.0)  # along (z, y, x)
_SECONDS = 6.0  # between phases
# name, center (x, y, z), radii, brightness before contrast, uptake (height, arrival s, rise s, fall s);
# later ones lie over earlier ones
_ORGANS = (
    ("body", (0, 0, 0), (190, 125, 400), 60, (8, 30, 60, 2000)),
    ("lung right", (-75, -10, 130), (80, 85, 95), 12, (0, 0, 1, 1)),
    ("lung left", (75, -10, 130), (75, 85, 95), 12, (0, 0, 1, 1)),
    ("spine", (0, 78, 0), (22, 24, 400), 80, (25, 25, 40, 600)),
    ("liver left", (5, -55, 22), (60, 42, 40), 105, (95, 38, 30, 400)),
    ("liver", (-70, -20, 10), (95, 78, 72), 105, (95, 38, 30, 400)),
    ("spleen", (105, 35, 15), (38, 45, 48), 90, (120, 26, 8, 250)),
    ("stomach", (78, -48, 15), (42, 40, 45), 40, (5, 40, 60, 900)),
    ("kidney right", (-60, 62, -62), (30, 26, 48), 98, (150, 24, 7, 300)),
    ("kidney left", (65, 62, -52), (30, 26, 48), 98, (150, 24, 7, 300)),
    ("gallbladder", (-62, -62, -48), (16, 18, 26), 120, (0, 0, 1, 1)),
    ("portal vein", (-30, -5, 2), (34, 9, 10), 115, (140, 32, 10, 160)),
    ("lesion", (-88, 12, -8), (13, 13, 13), 85, (140, 22, 6, 70)),
    ("lesion small", (-38, -48, 30), (9, 9, 9), 85, (60, 60, 60, 900)),
    ("aorta", (8, 42, 0), (11, 11, 400), 85, (260, 14, 3, 40)),
    ("vena cava", (-22, 32, 0), (13, 11, 400), 80, (160, 30, 8, 120)),
)


def grid(shape: tuple[int, int, int] = SHAPE) -> Grid:
    """450 mm field of view, 160 mm of slices; as in the paper 32 of 5 mm."""
    spacing = np.array(_EXTENT_MM) / shape
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing)[::-1]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def motion(phase: int) -> Motion:
    """Where points of the reference phase lie in another one: free breathing, deeper when the agent arrives."""
    depth = 9 * np.sin(2.4 * phase) + 5 * np.sin(0.9 * phase + 1) + (6 if 8 <= phase <= 12 else 0)
    depth -= 9 * np.sin(2.4 * REFERENCE) + 5 * np.sin(0.9 * REFERENCE + 1)

    def displacement(points: Points) -> Points:
        x, y, z = np.moveaxis(points, -1, 0)
        inside = np.exp(-(((x / 165) ** 2 + ((y + 10) / 105) ** 2) ** 2)) * np.exp(-(((z - 20) / 140) ** 2))
        lateral = 1 - 0.2 * np.tanh(x / 60)  # the right side breathes deeper
        return np.stack(
            [0.08 * depth * inside * np.sin(x / 60), -0.25 * depth * inside * np.clip((60 - y) / 180, 0, 1),
             -depth * inside * lateral], -1,
        )  # fmt: skip

    return displacement


def volume(phase: int, *, on: Grid | None = None, still: bool = False, noise: float = 3.0) -> Volume:
    """One phase; `still` draws its contrast where the reference has its organs, as a perfect registration would."""
    on = on or grid()
    voxels = np.empty(on.shape, np.float32)
    plane = np.moveaxis(np.indices(on.shape[1:], dtype=float), 0, -1)
    for k in range(on.shape[0]):
        points = on.points_mm(np.concatenate([np.full((*plane.shape[:2], 1), float(k)), plane], -1))
        voxels[k] = _drawn(points if still or phase == REFERENCE else motions.back(motion(phase), points), phase)
    rng = np.random.default_rng((phase, 3))
    voxels = np.hypot(voxels + noise * rng.normal(size=on.shape), noise * rng.normal(size=on.shape))
    return Volume(voxels, on)


def organ(name: str) -> npt.NDArray[np.bool_]:
    """(Z, Y, X) voxels of an organ in the reference phase."""
    on = grid()
    points = on.points_mm(np.moveaxis(np.indices(on.shape, dtype=float), 0, -1))
    center, radii = next((c, r) for n, c, r, *_ in _ORGANS if n == name)
    return np.asarray(_radius(points, center, radii) < 0.85)


def dome() -> npt.NDArray[np.bool_]:
    """(Z, Y, X) voxels of the upper sixth of the liver in the reference phase, where breathing tells most."""
    liver = organ("liver")
    slices = np.flatnonzero(liver.any((1, 2)))
    liver[: slices[-1] - max(1, len(slices) // 6)] = False
    return liver


def uptake(name: str, phase: int) -> float:
    """The enhancement of an organ at a phase, without what lies around it."""
    height, arrival, rise, fall = next(curve for n, *_, curve in _ORGANS if n == name)
    t = max(phase * _SECONDS - arrival, 0.0)
    return float(height * (1 - np.exp(-t / rise)) * np.exp(-t / fall))


def _drawn(points: Points, phase: int) -> npt.NDArray[np.float64]:
    x, y, z = np.moveaxis(points, -1, 0)
    value = np.zeros(points.shape[:-1])
    for name, center, radii, brightness, _ in _ORGANS:
        # 2.5 mm of partial volume at the borders
        share = 1 / (1 + np.exp(np.clip((_radius(points, center, radii) - 1) * min(radii) / 1.2, -60, 60)))
        value += (brightness + uptake(name, phase) - value) * share
    vessels = np.sin(x / 9 + np.sin(y / 17)) * np.sin(y / 8 - z / 21) * np.sin(z / 10 + x / 27)
    coil = 1 + 0.15 * np.sin(x / 150 + 0.5) * np.cos(y / 170)
    return np.maximum(value * (1 + 0.12 * vessels), 0) * coil


def _radius(points: Points, center: tuple[float, ...], radii: tuple[float, ...]) -> npt.NDArray[np.float64]:
    return np.asarray(np.linalg.norm((points - np.array(center)) / np.array(radii), axis=-1))
