"""A discrete search for large motion: every shift within reach is tried everywhere, then neighbours agree.

It sees past the local optima that stop a gradient: organs that slide by several centimetres beside ribs that stay.

References
----------
Siebert, Hansen, Heinrich, Fast 3D registration with accurate optimisation and little learning for Learn2Reg 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from registration_engine import field as fields
from registration_engine.level import Level
from registration_engine.losses import local_correlation_map

_REACH_MM = 30.0
_WINDOW = 5
_STRIDE = 2  # nodes lie on every second voxel
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
    nodes = torch.zeros(3, *dissimilarity.shape[1:], device=shifts.device)
    unit = max(steps)
    for weight in _AGREEMENT:
        distance = sum(((nodes[c] - shifts[:, c].view(-1, 1, 1, 1)) / unit).square() for c in range(3))
        chosen = (dissimilarity + weight * distance).argmin(0)
        nodes = _averaged(shifts[chosen].movedim(-1, 0))
    return _spread(nodes, level)


def _dissimilarity(level: Level, shift: Tensor) -> Tensor:
    warped, weight = level.warped(shift.view(3, 1, 1, 1).expand_as(level.base))
    correlation = local_correlation_map(level.fixed.image[0], warped, weight, width=_WINDOW)
    return 1 - correlation[::_STRIDE, ::_STRIDE, ::_STRIDE]


def _averaged(nodes: Tensor) -> Tensor:
    """Mean over 3×3×3 nodes, twice."""
    for _ in range(2):
        nodes = torch.nn.functional.avg_pool3d(pad(nodes[None], (1,) * 6, mode="replicate"), 3, stride=1)[0]
    return nodes


def _spread(nodes: Tensor, level: Level) -> Tensor:
    """From the nodes to every voxel of the level, linear, then smooth over one node."""
    matrices = []
    for size in level.lattice.shape:
        positions = torch.arange(size).numpy() / _STRIDE
        matrices.append(fields.interpolation_matrix(len(range(0, size, _STRIDE)), positions, nodes.device))
    spacing = max(level.lattice.spacing_mm)
    return fields.smooth(fields.separable(nodes, *matrices), spacing, level.lattice)
