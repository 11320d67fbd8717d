"""Small made-up bodies whose deformation is known at every point: analytic intensities, nothing interpolated."""

from collections.abc import Callable

import numpy as np

from registration_engine import Grid, Volume

Map = Callable[[np.ndarray], np.ndarray]


def grid(shape=(30, 33, 36), spacing=(4.0, 4.0, 4.0), center=(0.0, 0.0, 0.0), rotation=None) -> Grid:
    """A grid whose middle lies at `center`; spacing along (k, j, i), axes z, y, x before the rotation."""
    affine = np.eye(4)
    axes = np.diag(spacing)[::-1]
    affine[:3, :3] = axes if rotation is None else rotation @ axes
    affine[:3, 3] = np.array(center) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def rotation(axis: tuple[float, float, float], degrees: float) -> np.ndarray:
    """(3, 3) by Rodrigues' formula."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def intensity(points: np.ndarray) -> np.ndarray:
    """A body at rest, 0…1 at world points (..., 3): an egg with unequal organs, grain of about 13 mm inside."""
    value = 0.45 * _egg(points, (0, 0, 0), (46, 36, 50))
    for center, radii, contrast in (
        ((16, -4, 10), (18, 14, 15), 0.3),
        ((-20, 6, 14), (11, 14, 10), -0.25),
        ((-12, -12, -20), (13, 8, 12), 0.45),
        ((18, 14, -18), (9, 8, 14), 0.25),
        ((2, 16, 24), (8, 6, 8), 0.5),
        ((-2, 20, 0), (6, 6, 30), 0.35),
    ):
        value = value + contrast * _egg(points, center, radii)
    x, y, z = np.moveaxis(points, -1, 0)
    grain = np.sin(x / 4.1 + y / 9) * np.sin(y / 3.7 - z / 11) * np.sin(z / 4.3 + x / 13)
    return value * (1 + 0.25 * grain)


def volume(on: Grid, *, through: Map = lambda x: x, contrast: Map = lambda v: v, noise=0.01, seed=0) -> Volume:
    """The body drawn at through(x) for every voxel centre x."""
    rng = np.random.default_rng(seed)
    points = on.points_mm(np.stack(np.meshgrid(*[np.arange(n) for n in on.shape], indexing="ij"), -1).astype(float))
    return Volume(contrast(intensity(through(points))) + noise * rng.normal(size=on.shape), on)


def breathing(amplitude_mm: float) -> Map:
    """x → x + a smooth displacement, mostly along z, largest near the middle, one to one."""

    def through(points: np.ndarray) -> np.ndarray:
        scaled = points / np.array([55.0, 45.0, 60.0])
        swell = amplitude_mm * np.exp(-1.5 * (scaled**2).sum(-1))
        return points + swell[..., None] * np.stack(
            [0.2 * np.sin(2 * scaled[..., 1]), -0.3 + 0 * swell, 0.9 + 0.1 * np.cos(2 * scaled[..., 0])], -1
        )

    return through


def _egg(points: np.ndarray, center: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    radius = np.linalg.norm((points - np.array(center)) / np.array(radii), axis=-1)
    return 1 / (1 + np.exp((radius - 1) * min(radii) / 1.2))
