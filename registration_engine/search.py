"""A discrete search for large motion: every shift within reach is tried everywhere, then neighbours agree.

It sees past the local optima that stop a gradient: organs that slide by several centimetres beside ribs that stay.

References
----------
Siebert, Hansen, Heinrich, Fast 3D registration with accurate optimisation and little learning for Learn2Reg 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, interpolate, pad

from registration_engine.level import Level
from registration_engine.losses import local_correlation_map

_AGREEMENT = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # weight of a step's squared distance to the neighbours' mean


def search(level: Level, around: Tensor, *, step_mm: float, steps: int, pooled: int, window: int) -> Tensor:
    """Find a rough displacement (3, Z, Y, X), lattice mm, in the neighbourhood of `around`.

    Parameters
    ----------
    around
        (3, Z, Y, X), lattice mm: every shift is added to it.
    step_mm, steps
        Step of the shifts along every axis, and how many of them in each direction; an axis with voxels of more than
        twice the step is searched by half voxels.
    pooled
        Voxels along each side of the blocks that move together.
    window
        Of the local correlation, voxels.
    """
    sides = [max(s / 2, step_mm) for s in level.lattice.spacing_mm]
    reach_mm = step_mm * steps
    axes = [torch.arange(-int(reach_mm // s), int(reach_mm // s) + 1) * s for s in sides]
    shifts = torch.cartesian_prod(*axes)
    shifts = shifts[shifts.square().sum(1) <= reach_mm**2 * 1.001].to(around.device)

    dissimilarity = torch.stack([_dissimilarity(level, around + s.view(3, 1, 1, 1), pooled, window) for s in shifts])
    found = torch.zeros((3, *dissimilarity.shape[1:]), device=around.device)
    for weight in _AGREEMENT:
        distance = sum(((found[c] - shifts[:, c].view(-1, 1, 1, 1)) / max(sides)).square() for c in range(3))
        chosen = (dissimilarity + weight * distance).argmin(0)
        found = _averaged(shifts[chosen].movedim(-1, 0))
    smooth = interpolate(found[None], scale_factor=pooled, mode="trilinear", align_corners=False)[0]
    z, y, x = level.lattice.shape
    return around + smooth[:, :z, :y, :x]


def _dissimilarity(level: Level, displacement: Tensor, pooled: int, window: int) -> Tensor:
    """1 - squared local correlation, averaged over blocks; the last block of an axis repeats its last voxels."""
    warped, weight = level.warped(displacement)
    values = 1 - local_correlation_map(level.fixed.image[0], warped, weight, width=window)
    lack_z, lack_y, lack_x = (-n % pooled for n in values.shape)
    values = pad(values[None, None], (0, lack_x, 0, lack_y, 0, lack_z), mode="replicate")
    return avg_pool3d(values, pooled)[0, 0]


def _averaged(steps: Tensor) -> Tensor:
    """Mean over 3×3×3 blocks, twice."""
    for _ in range(2):
        steps = avg_pool3d(pad(steps[None], (1,) * 6, mode="replicate"), 3, stride=1)[0]
    return steps
