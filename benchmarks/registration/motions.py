"""Known motions: plain functions of a point, so that the truth is the displacement itself, not a stored image of it.

Every motion is a function from LPS mm (..., 3) of the fixed image to mm (..., 3), x_moving - x_fixed, drawn by seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from registration_engine import Grid

Points = npt.NDArray[np.float64]
Motion = Callable[[Points], Points]


def waves(grid: Grid, seed: int, *, largest_mm: float, wavelengths_mm: tuple[float, float]) -> Motion:
    """A smooth random deformation without direction: 24 plane waves per component.

    The largest displacement over the grid is `largest_mm`. Long waves are higher than short ones, as tissue is.
    """
    rng = np.random.default_rng((seed, 1))
    length = np.exp(rng.uniform(*np.log(wavelengths_mm), (3, 24)))
    heading = rng.normal(size=(3, 24, 3))
    heading *= (2 * np.pi / length / np.linalg.norm(heading, axis=-1))[..., None]
    phase, height = rng.uniform(0, 2 * np.pi, (3, 24)), length * rng.normal(size=(3, 24))
    center = grid.points_mm((np.array(grid.shape) - 1) / 2)

    def unscaled(points: Points) -> Points:
        x = points - center
        return np.stack([np.sin(x @ heading[c].T + phase[c]) @ height[c] for c in range(3)], axis=-1)

    coarse = np.stack(np.meshgrid(*[np.linspace(0, n - 1, 24) for n in grid.shape], indexing="ij"), -1)
    scale = largest_mm / np.linalg.norm(unscaled(grid.points_mm(coarse)), axis=-1).max()
    return lambda points: scale * unscaled(points)


def breathing(grid: Grid, seed: int) -> Motion:
    """Breathing-like: 12 to 20 mm along the body around a point near the middle, less to the sides, fading outwards."""
    rng = np.random.default_rng((seed, 2))
    extent = grid.spacing_mm * np.array(grid.shape)
    middle = grid.points_mm((np.array(grid.shape) - 1) / 2)
    head = grid.affine[:3, 0] / np.linalg.norm(grid.affine[:3, 0])
    side, front = (grid.affine[:3, n] / np.linalg.norm(grid.affine[:3, n]) for n in (2, 1))
    center = middle + head * rng.uniform(-0.1, 0.1) * extent[0] + side * rng.uniform(-0.1, 0.1) * extent[2]
    radii = np.array([0.62, 0.5, 0.42]) * extent * rng.uniform(0.9, 1.1, 3)
    along, forward, apart = rng.uniform(12, 20), rng.uniform(3, 7), rng.uniform(2, 4)
    bend = rng.uniform(-1, 1, 3)

    def motion(points: Points) -> Points:
        x = points - center
        k, j, i = (x @ axis / radius for axis, radius in zip((head, front, side), radii, strict=True))
        swell = np.exp(-1.3 * (k**2 + j**2 + i**2))[..., None]
        return np.asarray(
            swell
            * (
                (along * (1 + 0.15 * np.sin(3 * i + bend[0])))[..., None] * head
                - (forward * np.cos(1.5 * k + bend[1]))[..., None] * front
                + (apart * np.sin(2 * j + bend[2]))[..., None] * side
            )
        )

    return motion


def back(motion: Motion, points: Points) -> Points:
    """Where points of the moving image lie in the fixed one: inverse of x + motion(x), to a thousandth of a mm."""
    fixed = points - motion(points)
    for _ in range(100):
        missed = points - fixed - motion(fixed)
        if np.abs(missed).max() < 1e-3:
            return fixed
        fixed += missed
    raise ArithmeticError(f"inverse of a motion: {np.abs(missed).max():.4f} mm are missing after 100 steps")
