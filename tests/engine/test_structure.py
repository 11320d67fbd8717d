"""Self-similarity against a slow reference, its likeness against a numerical derivative."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from registration_engine import structure
from registration_engine.structure import CHANNELS, likeness, noise_floor, self_similarity

SPACING = (1.0, 1.5, 2.0)
SHAPE = (19, 21, 23)


def blobs(shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
    """A smooth image with detail, sampled `shift_mm` (along i, j, k) further on."""
    k, j, i = np.indices(SHAPE).astype(np.float64)
    x, y, z = (n * s + d for n, s, d in zip((i, j, k), SPACING, shift_mm, strict=True))
    value = np.sin(x / 5.3) * np.cos(y / 7.1) + np.sin((z + x) / 9.7) + 0.3 * np.cos(y * x / 160)
    return torch.from_numpy(((value + 2.5) / 5).astype(np.float32))


def slow(image: np.ndarray, place: tuple[int, int, int], floor: float) -> list[float]:
    steps = [np.array(s) for s in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))]

    def patch(center: np.ndarray) -> np.ndarray:
        k, j, i = center
        return image[k - 1 : k + 2, j - 1 : j + 2, i - 1 : i + 2]

    distances = [
        float(((patch(np.array(place) + a) - patch(np.array(place) + b)) ** 2).mean())
        for a, b in combinations(steps, 2)
        if (a + b).any()
    ]
    distances = [d - min(distances) for d in distances]
    return [float(np.exp(-d / max(np.mean(distances), floor))) for d in distances]


def test_channels_are_what_the_slow_reference_has() -> None:
    image = blobs() + 0.02 * torch.from_numpy(np.random.default_rng(1).normal(size=SHAPE).astype(np.float32))
    floor = noise_floor(image)
    found = self_similarity(image, floor)

    assert found.shape == (CHANNELS, *SHAPE)
    for place in ((5, 6, 7), (2, 2, 2), (9, 10, 11), (16, 18, 20), (8, 9, 16)):
        expected = slow(image.double().numpy(), place, floor)
        assert found[:, *place].tolist() == pytest.approx(expected, abs=2e-4)


def test_contrast_turned_round_and_stretched_changes_nothing() -> None:
    image = blobs()
    turned = 0.9 - 0.4 * image

    there = self_similarity(turned, noise_floor(turned))

    assert torch.allclose(there, self_similarity(image, noise_floor(image)), atol=1e-3)


def test_what_is_constant_is_described_as_such() -> None:
    flat = torch.full(SHAPE, 0.4)
    assert torch.equal(self_similarity(flat, noise_floor(flat)), torch.ones(CHANNELS, *SHAPE))


@pytest.mark.parametrize("along", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.6, -0.5, 0.4)])
def test_the_force_is_the_derivative_along_a_shift(along: tuple[float, float, float]) -> None:
    image = blobs()
    floor = noise_floor(image)
    fixed = self_similarity(image, floor)
    weight = torch.zeros(SHAPE)
    weight[5:-5, 5:-5, 5:-5] = 1
    step = 0.05

    def moved(mm: float) -> tuple[float, Tensor]:
        away = (0.4 + mm * along[0], -0.3 + mm * along[1], 0.5 + mm * along[2])
        return likeness(fixed, blobs(away), weight, floor, SPACING)

    _, force = moved(0.0)
    numerical = (moved(step)[0] - moved(-step)[0]) / (2 * step)

    by_force = sum(float(force[axis].sum()) * along[axis] for axis in range(3)) * 2 / (CHANNELS * float(weight.sum()))
    assert by_force == pytest.approx(numerical, rel=0.1)


def test_equal_images_are_as_alike_as_can_be_and_exert_no_force() -> None:
    image = blobs()
    floor = noise_floor(image)
    value, force = likeness(self_similarity(image, floor), image, torch.ones(SHAPE), floor, SPACING)

    assert value == pytest.approx(0, abs=1e-9)
    assert float(force.abs().max()) < 1e-6


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    image, other = blobs(), blobs((0.7, -0.2, 0.4))
    floor, found = noise_floor(image), []
    for size in (3, 8, 100):
        monkeypatch.setattr(structure, "_SLAB", size)
        assert noise_floor(image) == pytest.approx(floor, rel=1e-5)
        described = self_similarity(image, floor)
        found.append((described, likeness(described, other, torch.ones(SHAPE), floor, SPACING)))

    for described, (value, force) in found[1:]:
        assert torch.allclose(described, found[0][0], atol=1e-5)
        assert value == pytest.approx(found[0][1][0], rel=1e-6)
        assert torch.allclose(force, found[0][1][1], atol=1e-5)
