"""Similarities and their closed-form derivative by each voxel of the warped image. Larger = more alike.

All images are (Z, Y, X) in 0…1, `weight` is (Z, Y, X) in 0…1 and says which voxels count. Nothing here builds an
autograd graph. Each function returns (value, gradient); the gradient is that of the value, weights held constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from registration_engine.field import box_matrix, separable

_COUNT_SCALE = 2**20  # histogram counts are integers: their sum does not depend on the order of a device's atomics
_SLAB = 24  # slices worked on at a time, so that what lies between stays in the cache
_TINY = 1e-12
FLAT = 2e-6  # windows flatter than a seventh of a percent of the range count little


def mutual_information(fixed: Tensor, warped: Tensor, weight: Tensor, *, bins: int) -> tuple[float, Tensor]:
    """Mutual information in nat, Parzen windows: constant for the fixed image, linear for the warped one.

    The joint table is widened by [1 4 1]/6 along both axes, which makes the windows smooth at no cost per voxel.

    Parameters
    ----------
    bins
        Size of the joint table along each axis, 4 or more.

    References
    ----------
    Mattes et al., PET-CT image registration in the chest using free-form deformations, IEEE TMI 2003.
    """
    row = (fixed * bins).to(torch.int64).clamp_(0, bins - 1)
    position = warped.clamp(0, 1) * (bins - 1)
    column = position.to(torch.int64).clamp_(max=bins - 2)
    fraction = position - column
    index = row.mul_(bins).add_(column)

    total = weight.sum(dtype=torch.float64)
    upper = weight * fraction
    counts = torch.zeros(bins * bins, dtype=torch.int64, device=fixed.device)
    counts.scatter_add_(0, index.flatten(), ((weight - upper) * _COUNT_SCALE).to(torch.int64).flatten())
    counts.scatter_add_(0, index.flatten() + 1, (upper * _COUNT_SCALE).to(torch.int64).flatten())
    widen = _widening_matrix(bins, fixed.device)
    joint = widen @ (counts.double() / counts.sum().clamp(min=1)).view(bins, bins) @ widen

    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    log_ratio = torch.log((joint + _TINY) / (expected + _TINY))
    value = float((joint * log_ratio).sum())
    table = widen @ log_ratio @ widen
    slope = torch.zeros_like(table)
    slope[:, :-1] = (table[:, 1:] - table[:, :-1]) * (bins - 1)
    slope = (slope / total.clamp(min=1)).float()
    inside = (warped > 0) & (warped < 1)
    return value, torch.take(slope, index) * weight * inside


def local_correlation(fixed: Tensor, warped: Tensor, weight: Tensor, *, width: int) -> tuple[float, Tensor]:
    """Squared correlation over cubic windows, averaged over the voxels that count.

    Parameters
    ----------
    width
        Voxels along each side of the window, odd.

    References
    ----------
    Avants et al., Symmetric diffeomorphic image registration with cross-correlation, MedIA 2008.
    """
    share = weight / weight.sum().clamp(min=1)
    gradient = torch.empty_like(warped)
    value = 0.0
    slices, reach = len(fixed), width // 2
    slab = _SLAB if fixed.device.type == "cpu" else slices
    for first in range(0, slices, slab):
        last = min(first + slab, slices)
        # The gradient of a slice takes in the windows around `reach` slices beyond, and these as many again.
        low, high = max(first - 2 * reach, 0), min(last + 2 * reach, slices)
        near = slice(max(first - reach, 0) - low, min(last + reach, slices) - low)
        own = slice(first - low, last - low)
        w = _windows(fixed[low:high], warped[low:high], weight[low:high], width)
        used = w.enough * share[low:high]
        ratio = w.covariance / (w.variance_fixed * w.variance_warped)
        value += float((used[own] * ratio[own] * w.covariance[own]).sum(dtype=torch.float64))
        on_fixed = used.mul_(ratio).mul_(2)
        on_warped = w.covariance.div_(w.variance_warped).mul_(on_fixed)
        constant = w.mean_warped.mul_(on_warped).sub_(w.mean_fixed.mul_(on_fixed))
        boxes = [matrix[:, near] if axis == 0 else matrix for axis, matrix in enumerate(w.boxes)]
        parts = torch.stack([on_fixed[near], on_warped[near], constant[near]])
        adjoint = separable(parts, boxes[0][own], *boxes[1:])
        slope = (fixed[first:last] - 0.5).mul_(adjoint[0]) - (warped[first:last] - 0.5).mul_(adjoint[1])
        gradient[first:last] = slope.add_(adjoint[2]).mul_(weight[first:last])
    return value, gradient


def local_correlation_map(fixed: Tensor, warped: Tensor, weight: Tensor, *, width: int) -> Tensor:
    """The squared correlation (Z, Y, X) of the window around each voxel; 0 where too few of its voxels count."""
    w = _windows(fixed, warped, weight, width)
    return w.enough * w.covariance.square() / (w.variance_fixed * w.variance_warped)


class _Windows(NamedTuple):
    """Sums over the window around each voxel, (Z, Y, X); images are taken relative to 0.5."""

    boxes: list[Tensor]
    enough: Tensor
    mean_fixed: Tensor
    mean_warped: Tensor
    variance_fixed: Tensor
    variance_warped: Tensor
    covariance: Tensor


def _windows(fixed: Tensor, warped: Tensor, weight: Tensor, width: int) -> _Windows:
    boxes = [box_matrix(n, width, fixed.device) for n in fixed.shape]
    f, w = (fixed - 0.5).mul_(weight), (warped - 0.5).mul_(weight)
    count, sum_f, sum_w, sum_ff, sum_ww, sum_fw = separable(torch.stack([weight, f, w, f * f, w * w, f * w]), *boxes)
    enough = count > width**3 / 4
    count.clamp_(min=1)
    mean_f, mean_w = sum_f / count, sum_w / count
    noise = count.mul_(FLAT)
    return _Windows(
        boxes,
        enough,
        mean_f,
        mean_w,
        sum_ff.addcmul_(mean_f, sum_f, value=-1).clamp_(min=0).add_(noise),
        sum_ww.addcmul_(mean_w, sum_w, value=-1).clamp_(min=0).add_(noise),
        sum_fw.addcmul_(mean_f, sum_w, value=-1),
    )


def _widening_matrix(bins: int, device: torch.device) -> Tensor:
    """[1 4 1]/6 with a reflected border: symmetric, rows and columns sum to one."""
    matrix = torch.eye(bins, dtype=torch.float64, device=device) * 4
    matrix += torch.diag(torch.ones(bins - 1, dtype=torch.float64, device=device), 1)
    matrix += torch.diag(torch.ones(bins - 1, dtype=torch.float64, device=device), -1)
    matrix[0, 0] = matrix[-1, -1] = 5
    return matrix / 6
