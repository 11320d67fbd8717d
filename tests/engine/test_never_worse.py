"""Never worse than no registration: random made-up pairs with a known map, and hopeless ones.

A few pairs by default; `PAIRS=500 pytest tests/engine/test_never_worse.py` is the long campaign.
"""

import os

import numpy as np
import pytest
from engine import bodies

from registration_engine import Preset, Registration, RegistrationError, Volume, register

PAIRS = int(os.environ.get("PAIRS", "5"))
QUICK = Preset("quick", voxels=16_000, iterations=(25, 15))


@pytest.mark.timeout(60 + 60 * PAIRS)
@pytest.mark.parametrize("seed", range(PAIRS))
def test_a_random_pair_is_never_worse_than_unregistered(seed):
    fixed, moving, through = _pair(seed)

    try:
        registration = register(fixed, moving, preset=QUICK, device="cpu")
    except RegistrationError:
        return

    before, after = _errors_mm(None, fixed, through), _errors_mm(registration, fixed, through)
    assert after <= before + 0.1 * fixed.grid.spacing_mm.max()
    assert registration.report.folding_fraction == 0


@pytest.mark.parametrize("hopeless", range(max(4, PAIRS // 25)))
def test_a_hopeless_pair_is_a_named_error(hopeless):
    fixed, moving, _ = _pair(1000 + hopeless)
    rng = np.random.default_rng(hopeless)
    spoil = (
        lambda: Volume(np.zeros(moving.grid.shape), moving.grid),
        lambda: Volume(np.full(moving.grid.shape, float(rng.normal())), moving.grid),
        lambda: Volume(np.where(rng.random(moving.grid.shape) < 0.01, np.nan, moving.voxels), moving.grid),
        lambda: Volume(moving.voxels[:3], bodies.grid((3, *moving.grid.shape[1:]), moving.grid.spacing_mm)),
        lambda: Volume(
            rng.normal(size=moving.grid.shape), bodies.grid(moving.grid.shape, moving.grid.spacing_mm, (900, 0, 0))
        ),
    )[(hopeless * 2) % 5]

    with pytest.raises(RegistrationError, match=r"image|Volume|Fixed and moving|field"):
        register(fixed, spoil(), preset=QUICK, device="cpu")


def _pair(seed: int) -> tuple[Volume, Volume, bodies.Map]:
    """A body seen twice: other grid, contrast, noise, field of view; shifted, turned a little, breathing."""
    rng = np.random.default_rng(seed)
    turn = bodies.rotation(rng.normal(size=3), rng.uniform(-12, 12))
    shift, amplitude = rng.uniform(-12, 12, 3), rng.uniform(0, 14)

    def through(points: np.ndarray) -> np.ndarray:
        return bodies.breathing(amplitude)(points) @ turn.T + shift

    def grid() -> object:
        spacing = rng.uniform(4, 6.5, 3)
        covered = rng.uniform(0.8, 1.25, 3) * np.array([118, 100, 118])
        return bodies.grid(tuple((covered / spacing).astype(int)), tuple(spacing), tuple(rng.uniform(-8, 8, 3)))

    power, inverted, scale = rng.uniform(0.5, 2), rng.random() < 0.4, 10 ** rng.uniform(0, 3)

    def contrast(value: np.ndarray) -> np.ndarray:
        positive = np.clip(value, 0, None) ** power
        return scale * np.where(inverted & (positive > 0.1), 1.2 - positive, positive)

    fixed = bodies.volume(grid(), through=through, noise=rng.uniform(0, 0.05), seed=seed)
    moving = bodies.volume(grid(), contrast=contrast, noise=scale * rng.uniform(0, 0.05), seed=seed + 1)
    return fixed, moving, through


def _errors_mm(registration: Registration | None, fixed: Volume, through: bodies.Map) -> float:
    """Mean error over the body; without a registration, of leaving everything where it is."""
    index = np.argwhere(fixed.voxels > 0.2)
    points = fixed.grid.points_mm(index.astype(float))
    found = 0 if registration is None else registration.total_field().vectors[tuple(index.T)]
    return float(np.linalg.norm(points + found - through(points), axis=1).mean())
