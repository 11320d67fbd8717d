"""What a network minimises: the paper's losses, differentiable by autograd. Smaller = better.

Images are (Z, Y, X) in 0…1, `weight` is (Z, Y, X) in 0…1 and says which voxels count: masks, the margin a warp leaves
invalid, padding. Displacements are (3, Z, Y, X) in voxels, components (i, j, k). The gradient of a similarity reaches
the warped image; the fixed one and the weight are constants. `losses` holds the closed forms the field optimisation
uses, which build no graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from registration_engine.field import box_matrix, separable
from registration_engine.losses import FLAT

_COUNT_SCALE = 2**20  # float32 images are counted in integers: the sum does not depend on a device's order
_TINY = 1e-12
_BIAS_NAT = 0.03  # tolerated over-estimate of a slice's mutual information
_LEAST_BINS, _MOST_BINS = 8, 32


def multi_axis_mutual_information(
    fixed: Tensor,
    warped: Tensor,
    weight: Tensor,
    *,
    bins: int | None = None,
    slab: int = 1,
    by_weight: bool = True,
) -> Tensor:
    """Minus the mutual information in nat of corresponding slices, averaged over the slices of all three axes.

    Eq. 3 of the paper, with the minus sign it lacks in print. Each slice's joint table is filled with linear windows
    of both images and widened by [1 4 1]/6, so no tensor has a voxel's worth of bins; the gradient is a look-up in
    the table's derivative.

    Parameters
    ----------
    bins
        Size of the joint table along each axis, 4 or more; `bins_for` of the shape by default.
    slab
        Neighbouring slices whose tables are added, odd; more voxels per estimate where slices are small.
    by_weight
        Weigh each slice by the voxels that count in it. Otherwise each slice counts the same, as Eq. 3 prints it;
        empty ones count nothing either way.
    """
    chosen = bins_for(fixed.shape) if bins is None else bins
    apply: Callable[..., Tensor] = _MultiAxisMutualInformation.apply  # untyped in torch
    return apply(warped, fixed, weight, chosen, slab, by_weight)


def bins_for(shape: torch.Size | tuple[int, ...]) -> int:
    """Bins whose noise adds about 0.03 nat to the smallest slice, (B-1)²/2n of n voxels: 8 at 32², 32 from 128²."""
    z, y, x = shape
    smallest = min(z * y, y * x, z * x)
    return max(_LEAST_BINS, min(_MOST_BINS, round(math.sqrt(2 * _BIAS_NAT * smallest))))


class _MultiAxisMutualInformation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, warped: Tensor, fixed: Tensor, weight: Tensor, bins: int, slab: int, by_weight: bool
    ) -> Tensor:
        row, row_part = _binned(fixed, bins)
        column, column_part = _binned(warped, bins)
        cell = row.mul_(bins).add_(column)
        slope = torch.zeros_like(warped)
        total = torch.zeros((), dtype=torch.float64, device=warped.device)
        for axis in range(3):
            part, gradient = _axis_information(
                cell, row_part, column_part, weight, axis, bins=bins, slab=slab, by_weight=by_weight
            )
            total += part
            slope += gradient
        slices = sum(warped.shape)
        scale = weight.sum(dtype=torch.float64).clamp(min=_TINY) * 3 if by_weight else slices
        inside = (warped > 0) & (warped < 1)
        ctx.save_for_backward(-(slope * weight * inside * ((bins - 1) / scale)).to(warped.dtype))
        return -(total / scale).to(warped.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0], None, None, None, None, None


def _binned(image: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Lower bin (int64) and the share of the upper one."""
    position = image.clamp(0, 1) * (bins - 1)
    lower = position.to(torch.int64).clamp_(max=bins - 2)
    return lower, position - lower


def _axis_information(
    cell: Tensor,
    row_part: Tensor,
    column_part: Tensor,
    weight: Tensor,
    axis: int,
    *,
    bins: int,
    slab: int,
    by_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Sum of the slices' mutual information, weighed, and its derivative by the column position of each voxel."""
    slices, size = cell.shape[axis], bins * bins
    view = [1, 1, 1]
    view[axis] = slices
    index = (cell + torch.arange(slices, device=cell.device).view(view) * size).flatten()
    exact = weight.dtype == torch.float64
    counts = torch.zeros(slices * size, dtype=torch.float64 if exact else torch.int64, device=cell.device)
    for step, share in _corners(row_part, column_part, bins):
        amount = weight * share
        counts.scatter_add_(0, index + step, (amount if exact else (amount * _COUNT_SCALE).to(torch.int64)).flatten())
    table = counts.double().view(slices, size) / (1 if exact else _COUNT_SCALE)
    mass = table.sum(1)
    pool = box_matrix(slices, slab, cell.device).double()
    pooled = pool @ table
    pooled_mass = pooled.sum(1).clamp(min=_TINY)
    widen = _widening(bins, cell.device)
    joint = widen @ (pooled / pooled_mass[:, None]).view(slices, bins, bins) @ widen
    expected = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    log_ratio = torch.log((joint + _TINY) / (expected + _TINY))
    information = (joint * log_ratio).sum((1, 2))
    share_of_slice = mass if by_weight else (mass > 0).double()
    # Where a warped voxel moves within the table, the slices' masses stay: they are constants here.
    derivative = widen @ log_ratio @ widen * (share_of_slice / pooled_mass)[:, None, None]
    derivative = (pool @ derivative.view(slices, size)).flatten().to(weight.dtype)
    below = derivative[index + 1] - derivative[index]
    above = derivative[index + bins + 1] - derivative[index + bins]
    slope = torch.lerp(below.view(cell.shape), above.view(cell.shape), row_part)
    return (share_of_slice * information).sum(), slope


def _corners(row_part: Tensor, column_part: Tensor, bins: int) -> list[tuple[int, Tensor]]:
    both = row_part * column_part
    return [
        (0, 1 - row_part - column_part + both),
        (1, column_part - both),
        (bins, row_part - both),
        (bins + 1, both),
    ]


def _widening(bins: int, device: torch.device) -> Tensor:
    """[1 4 1]/6 with a reflected border: symmetric, rows and columns sum to one."""
    matrix = torch.eye(bins, dtype=torch.float64, device=device) * 4
    beside = torch.ones(bins - 1, dtype=torch.float64, device=device)
    matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    matrix[0, 0] = matrix[-1, -1] = 5
    return matrix / 6


def normalized_cross_correlation(fixed: Tensor, warped: Tensor, weight: Tensor) -> Tensor:
    """Minus the correlation of both images over the voxels that count, Eq. 4 of the paper: -1 … 1."""
    total = weight.sum().clamp(min=_TINY)
    f = fixed - (weight * fixed).sum() / total
    w = warped - (weight * warped).sum() / total
    variance = (weight * f * f).sum() * (weight * w * w).sum()
    return -(weight * f * w).sum() / (variance + _TINY).sqrt()


def local_normalized_cross_correlation(fixed: Tensor, warped: Tensor, weight: Tensor, *, width: int = 7) -> Tensor:
    """Minus the squared correlation over cubic windows, averaged over the voxels that count: -1 … 0.

    Parameters
    ----------
    width
        Voxels along each side of the window, odd. Windows of which less than a quarter counts are left out.
    """
    boxes = [box_matrix(n, width, fixed.device).to(fixed.dtype) for n in fixed.shape]
    f, w = (fixed - 0.5) * weight, (warped - 0.5) * weight
    products = torch.stack(
        [weight, f, w, weight * (fixed - 0.5) ** 2, weight * (warped - 0.5) ** 2, f * (warped - 0.5)]
    )
    count, sum_f, sum_w, sum_ff, sum_ww, sum_fw = separable(products, *boxes)
    size = count.clamp(min=1)
    covariance = sum_fw - sum_f * sum_w / size
    noise = FLAT * size
    variance_f = (sum_ff - sum_f.square() / size).clamp(min=0) + noise
    variance_w = (sum_ww - sum_w.square() / size).clamp(min=0) + noise
    used = weight * (count > width**3 / 4)
    mean: Tensor = (used * covariance.square() / (variance_f * variance_w)).sum() / used.sum().clamp(min=1)
    return -mean


def smoothness(displacement: Tensor, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Mean of |grad u|²: the squared forward differences of all components along all axes, summed, mm per mm.

    Parameters
    ----------
    spacing_mm
        (i, j, k) voxel sides; only their ratios matter.
    """
    total = displacement.new_zeros(())
    for axis in range(3):
        along = displacement.diff(dim=3 - axis) / spacing_mm[axis]
        for component in range(3):
            total = total + (along[component] * spacing_mm[component]).square().mean()
    return total


def divergence(displacement: Tensor) -> Tensor:
    """Mean of (div u)²: 0 where volumes are kept to first order.

    Forward differences. In voxels it is the same number as in mm per mm: component and axis share their voxel side.
    """
    inner = tuple(slice(None, n - 1) for n in displacement.shape[1:])
    along_i, along_j, along_k = (displacement[axis].diff(dim=2 - axis)[inner] for axis in range(3))
    return (along_i + along_j + along_k).square().mean()
