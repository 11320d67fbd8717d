import math
from itertools import product

import numpy as np
import pytest
import torch

from registration_engine.objectives import (
    bins_for,
    divergence,
    local_normalized_cross_correlation,
    multi_axis_mutual_information,
    normalized_cross_correlation,
    smoothness,
)

MI_OPTIONS = [{}, {"slab": 3}, {"by_weight": False}]


def images(shape=(6, 7, 8)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fixed, warped and weight, in double precision, away from the ends of the range."""
    generator = torch.Generator().manual_seed(5)
    fixed, warped, weight = (torch.rand(shape, dtype=torch.double, generator=generator) for _ in range(3))
    weight[0], weight[:, -1] = 0, 0
    return 0.05 + 0.9 * fixed, (0.05 + 0.9 * (0.5 * warped + 0.5 * fixed)).requires_grad_(), weight


@pytest.mark.parametrize("options", MI_OPTIONS, ids=str)
def test_the_closed_form_gradient_of_multi_axis_mi_is_that_of_its_value(options: dict) -> None:
    fixed, warped, weight = images((5, 4, 6))

    assert torch.autograd.gradcheck(
        lambda w: multi_axis_mutual_information(fixed, w, weight, bins=6, **options), warped, eps=1e-6, atol=1e-7
    )


def test_the_other_losses_have_the_gradient_of_their_value() -> None:
    fixed, warped, weight = images((4, 4, 5))
    displacement = torch.rand(3, 3, 4, 3, dtype=torch.double, requires_grad=True)

    assert torch.autograd.gradcheck(lambda w: normalized_cross_correlation(fixed, w, weight), warped)
    assert torch.autograd.gradcheck(
        lambda w: local_normalized_cross_correlation(fixed, w, weight, width=3), warped, atol=1e-7
    )
    assert torch.autograd.gradcheck(lambda u: smoothness(u, (1.0, 2.0, 3.0)), displacement)
    assert torch.autograd.gradcheck(divergence, displacement)


def slow_slice_mi(fixed: np.ndarray, warped: np.ndarray, weight: np.ndarray, bins: int) -> float:
    """Mutual information of one slab, voxel by voxel: linear windows, then [1 4 1]/6 with reflected ends."""
    table = np.zeros((bins, bins))
    for f, w, share in zip(fixed.ravel(), warped.ravel(), weight.ravel(), strict=True):
        row, column = (np.maximum(0, 1 - np.abs(np.arange(bins) - v * (bins - 1))) for v in (f, w))
        table += share * np.outer(row, column)
    for axis in (0, 1):
        padded = np.pad(table, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="symmetric")
        before, after = (np.take(padded, np.arange(bins) + step, axis) for step in (0, 2))
        table = (before + 4 * table + after) / 6
    joint = table / table.sum()
    marginals = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / marginals[seen])).sum())


@pytest.mark.parametrize("options", MI_OPTIONS, ids=str)
def test_multi_axis_mi_is_the_mean_of_the_slices_counted_slowly(options: dict) -> None:
    fixed, warped, weight = (t.detach().numpy() for t in images())
    half = options.get("slab", 1) // 2
    total, shares = 0.0, 0.0
    for axis in range(3):
        for number in range(fixed.shape[axis]):
            slab = [slice(None)] * 3
            slab[axis] = slice(max(number - half, 0), number + half + 1)
            mass = np.take(weight, number, axis).sum()
            share = mass if options.get("by_weight", True) else 1.0
            shares += share
            if mass > 0:
                total += share * slow_slice_mi(*(t[tuple(slab)] for t in (fixed, warped, weight)), bins=6)

    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        got = multi_axis_mutual_information(
            *(torch.tensor(t, dtype=dtype) for t in (fixed, warped, weight)), bins=6, **options
        )
        assert float(got) == pytest.approx(-total / shares, abs=tolerance)


def test_multi_axis_mi_of_known_images() -> None:
    ones = torch.ones(8, 8, 8)
    checker = torch.tensor([[[float((i + j + k) % 2) for i in range(8)] for j in range(8)] for k in range(8)])
    k, j, i = torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij")
    unrelated = (((i // 2) + (j // 2) + (k // 2)) % 2).float()

    assert float(multi_axis_mutual_information(checker, checker, ones, bins=8)) == pytest.approx(-math.log(2), abs=1e-6)
    assert float(multi_axis_mutual_information(checker, 1 - checker, ones, bins=8)) == pytest.approx(
        -math.log(2), abs=1e-6
    )
    assert float(multi_axis_mutual_information(checker, unrelated, ones, bins=8)) == pytest.approx(0, abs=1e-6)
    assert float(multi_axis_mutual_information(checker, checker, 0 * ones, bins=8)) == 0


@pytest.mark.parametrize(
    "loss", [multi_axis_mutual_information, normalized_cross_correlation, local_normalized_cross_correlation]
)
def test_voxels_of_weight_zero_neither_count_nor_move(loss) -> None:
    fixed, warped, _ = images((8, 9, 10))
    weight = torch.ones_like(fixed)
    weight[:3] = 0
    spoilt = warped.detach().clone()
    spoilt[:3] = torch.rand(3, 9, 10, dtype=torch.double)
    spoilt.requires_grad_()

    value = loss(fixed, spoilt, weight)
    value.backward()

    assert float(value.detach()) == pytest.approx(float(loss(fixed, warped, weight).detach()), abs=1e-12)
    assert not spoilt.grad[:3].any()
    assert spoilt.grad[3:].any()


def test_correlations_of_known_images() -> None:
    fixed, _, _ = images((8, 8, 8))
    ones = torch.ones_like(fixed)
    squeezed = 0.2 + 0.5 * fixed

    assert float(normalized_cross_correlation(fixed, squeezed, ones)) == pytest.approx(-1, abs=1e-9)
    assert float(normalized_cross_correlation(fixed, 1 - fixed, ones)) == pytest.approx(1, abs=1e-9)
    assert float(local_normalized_cross_correlation(fixed, 1 - fixed, ones, width=3)) == pytest.approx(-1, abs=1e-2)
    expected = -np.corrcoef(fixed.numpy().ravel(), fixed.flip(0).numpy().ravel())[0, 1]
    assert float(normalized_cross_correlation(fixed, fixed.flip(0), ones)) == pytest.approx(expected, abs=1e-9)


def test_local_correlation_is_the_mean_of_the_windows_counted_slowly() -> None:
    fixed, warped, weight = (t.detach().numpy() for t in images())
    values, shares = 0.0, 0.0
    for place in product(*(range(n) for n in fixed.shape)):
        window = tuple(slice(max(p - 1, 0), p + 2) for p in place)
        f, w, share = fixed[window], warped[window], weight[window]
        if share.sum() <= 27 / 4:
            continue
        mean_f, mean_w = np.average(f, weights=share), np.average(w, weights=share)
        floor = 2e-6 * share.sum()
        covariance = (share * (f - mean_f) * (w - mean_w)).sum()
        variances = ((share * (f - mean_f) ** 2).sum() + floor) * ((share * (w - mean_w) ** 2).sum() + floor)
        values += weight[place] * covariance**2 / variances
        shares += weight[place]

    got = local_normalized_cross_correlation(*(torch.tensor(t) for t in (fixed, warped, weight)), width=3)

    assert float(got) == pytest.approx(-values / shares, abs=1e-6)


def test_regularisers_of_linear_maps() -> None:
    k, j, i = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in (5, 6, 7)], indexing="ij")
    swelling = 0.1 * torch.stack([i, j, k])
    shear = torch.stack([0.3 * k, 0 * k, 0 * k])
    rotation = 0.1 * torch.stack([-j, i, 0 * k])

    assert float(smoothness(swelling)) == pytest.approx(3 * 0.1**2)
    assert float(divergence(swelling)) == pytest.approx(0.3**2)
    assert float(smoothness(shear)) == pytest.approx(0.3**2)
    # 0.3 voxels of 1 mm per voxel of 3 mm
    assert float(smoothness(shear, (1.0, 1.0, 3.0))) == pytest.approx(0.1**2)
    assert float(divergence(rotation)) == pytest.approx(0)


@pytest.mark.parametrize(
    ("shape", "bins"), [((32, 32, 32), 8), ((64, 64, 64), 16), ((128, 128, 128), 31), ((256, 256, 32), 22)]
)
def test_bins_fall_with_the_level(shape: tuple[int, int, int], bins: int) -> None:
    assert bins_for(shape) == bins
