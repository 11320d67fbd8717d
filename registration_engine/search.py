"""A discrete search for large motion: every shift within reach is tried everywhere, then neighbours agree.

It sees past the local optima that stop a gradient: organs that slide by several centimetres beside ribs that stay.

References
----------
Siebert, Hansen, Heinrich, Fast 3D registration with accurate optimisation and little learning for Learn2Reg 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, pad

from registration_engine.level import Level
from registration_engine.losses import local_correlation_map

_REACH_MM = 30.0
_WINDOW = 5
_AGREEMENT = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # weight of a step's squared distance to the neighbours' mean


def search(level: Level, *, spacing_mm: float) -> Tensor:
    """Find a rough displacement (3, Z, Y, X), lattice mm, within 30 mm.

    Parameters
    ----------
    spacing_mm
        Step of the shifts along every axis; an axis with larger voxels is searched by whole voxels.
    """
    steps = [max(s, spacing_mm) for s in level.lattice.spacing_mm]
    counts = [int(_REACH_MM // s) for s in steps]
    axes = [torch.arange(-n, n + 1) * s for n, s in zip(counts, steps, strict=True)]
    shifts = torch.cartesian_prod(*axes)
    shifts = shifts[shifts.square().sum(1) <= _REACH_MM**2].to(level.base.device)

    dissimilarity = torch.stack([_dissimilarity(level, shift) for shift in shifts])
    found = torch.zeros_like(level.base)
    unit = max(steps)
    for weight in _AGREEMENT:
        distance = sum(((found[c] - shifts[:, c].view(-1, 1, 1, 1)) / unit).square() for c in range(3))
        chosen = (dissimilarity + weight * distance).argmin(0)
        found = _averaged(shifts[chosen].movedim(-1, 0))
    return found


def _dissimilarity(level: Level, shift: Tensor) -> Tensor:
    warped, weight = level.warped(shift.view(3, 1, 1, 1).expand_as(level.base))
    return 1 - local_correlation_map(level.fixed.image[0], warped, weight, width=_WINDOW)


def _averaged(steps: Tensor) -> Tensor:
    """Mean over 3×3×3 voxels, twice."""
    for _ in range(2):
        steps = avg_pool3d(pad(steps[None], (1,) * 6, mode="replicate"), 3, stride=1)[0]
    return steps
