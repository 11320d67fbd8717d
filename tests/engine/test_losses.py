import numpy as np
import pytest
import torch

from registration_engine.losses import local_correlation, mutual_information

SHAPE = (11, 13, 12)


def _pair(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two related smooth images away from 0 and 1, and a weight with a hole."""
    rng = np.random.default_rng(seed)
    coordinates = np.stack(np.meshgrid(*[np.linspace(0, 3, n) for n in SHAPE], indexing="ij"))
    base = np.sin(coordinates[0] * 2) * np.cos(coordinates[1]) + np.sin(coordinates[2] * 1.5)
    fixed = 0.5 + 0.2 * base + 0.02 * rng.normal(size=SHAPE)
    warped = 0.5 - 0.15 * base**2 + 0.1 * base + 0.02 * rng.normal(size=SHAPE)
    weight = np.ones(SHAPE)
    weight[:4, 5:, :3] = 0
    images = (np.clip(fixed, 0.01, 0.99), np.clip(warped, 0.01, 0.99), weight)
    first, second, third = (torch.tensor(x, dtype=torch.float32) for x in images)
    return first, second, third


def _slow_mutual_information(fixed: np.ndarray, warped: np.ndarray, weight: np.ndarray, bins: int) -> float:
    """Written voxel by voxel from the definition, in float64."""
    table = np.zeros((bins, bins))
    for f, w, counts in zip(fixed.ravel(), warped.ravel(), weight.ravel(), strict=True):
        position = w * (bins - 1)
        lower = min(int(position), bins - 2)
        table[min(int(f * bins), bins - 1), lower] += counts * (1 - (position - lower))
        table[min(int(f * bins), bins - 1), lower + 1] += counts * (position - lower)
    padded = np.pad(table, 1, mode="edge")
    wide = (padded[:-2] + 4 * padded[1:-1] + padded[2:]) / 6
    wide = (wide[:, :-2] + 4 * wide[:, 1:-1] + wide[:, 2:]) / 6
    p = wide / wide.sum()
    product = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / product[p > 0])).sum())


def _slow_local_correlation(fixed: np.ndarray, warped: np.ndarray, weight: np.ndarray, width: int) -> float:
    reach, total = width // 2, 0.0
    for k, j, i in np.argwhere(weight > 0):
        window = tuple(slice(max(c - reach, 0), c + reach + 1) for c in (k, j, i))
        used = weight[window] > 0
        if used.sum() <= width**3 / 4:
            continue
        f, w = fixed[window][used], warped[window][used]
        noise = 2e-6 * used.sum()
        covariance = ((f - f.mean()) * (w - w.mean())).sum()
        total += covariance**2 / ((((f - f.mean()) ** 2).sum() + noise) * (((w - w.mean()) ** 2).sum() + noise))
    return total / weight.sum()


def test_mutual_information_equals_its_definition():
    fixed, warped, weight = _pair(1)

    value, _ = mutual_information(fixed, warped, weight, bins=16)

    expected = _slow_mutual_information(*(x.double().numpy() for x in (fixed, warped, weight)), bins=16)
    assert value == pytest.approx(expected, abs=1e-5)


def test_local_correlation_equals_its_definition():
    fixed, warped, weight = _pair(2)

    value, _ = local_correlation(fixed, warped, weight, width=5)

    expected = _slow_local_correlation(*(x.double().numpy() for x in (fixed, warped, weight)), width=5)
    assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("slow", "fast", "size"),
    [
        (_slow_mutual_information, mutual_information, {"bins": 12}),
        (_slow_local_correlation, local_correlation, {"width": 5}),
    ],
    ids=["mutual information", "local correlation"],
)
def test_the_gradient_is_that_of_the_value(slow, fast, size):
    fixed, warped, weight = _pair(3)
    _, gradient = fast(fixed, warped, weight, **size)
    arrays = [x.double().numpy() for x in (fixed, warped, weight)]
    rng = np.random.default_rng(0)
    step = 1e-4

    predicted, measured = [], []
    for _ in range(24):
        k, j, i = (int(rng.integers(n)) for n in SHAPE)
        values = []
        for sign in (1, -1):
            moved = arrays[1].copy()
            moved[k, j, i] += sign * step
            values.append(slow(arrays[0], moved, arrays[2], *size.values()))
        measured.append((values[0] - values[1]) / (2 * step))
        predicted.append(float(gradient[k, j, i]))

    scale = np.abs(measured).max()
    assert scale > 0
    # A voxel whose value lies within the step of a bin edge sees two slopes: allow for one such in the sample.
    deviations = np.sort(np.abs(np.subtract(predicted, measured)) / scale)
    assert deviations[-2] < 0.02


def test_voxels_without_weight_have_no_say():
    fixed, warped, weight = _pair(4)
    changed = torch.where(weight > 0, warped, torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)))

    for loss, size in ((mutual_information, {"bins": 16}), (local_correlation, {"width": 5})):
        value, gradient = loss(fixed, warped, weight, **size)
        other, _ = loss(fixed, changed, weight, **size)

        assert value == pytest.approx(other, rel=1e-5)
        assert not gradient[weight == 0].any()


def test_mutual_information_sees_an_inverted_contrast_and_local_correlation_too():
    fixed, _, weight = _pair(5)

    for loss, size in ((mutual_information, {"bins": 16}), (local_correlation, {"width": 5})):
        same, _ = loss(fixed, fixed, weight, **size)
        inverted, _ = loss(fixed, 1 - fixed, weight, **size)
        shifted, _ = loss(fixed, fixed.roll(4, 2), weight, **size)

        assert inverted > 1.5 * shifted
        assert same > 1.5 * shifted
