"""How good a registration is: similarity over the overlap, folding, regularity. Nothing here changes a result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from registration_engine import field as fields

_SLAB = 24  # slices judged at a time: nine derivative images of a whole CT would not fit


@dataclass(frozen=True)
class Regularity:
    """What a displacement does to volumes over the foreground; see `Report`."""

    folding_fraction: float
    sdlogj: float
    max_displacement_mm: float


def normalized_mutual_information(fixed: Tensor, warped: Tensor, weight: Tensor, *, bins: int = 32) -> float:
    """2·I/(H_F + H_M) of two images in 0…1 over the voxels of weight 1; 0 = unrelated, 1 = each tells the other.

    References
    ----------
    Witten and Frank's symmetric uncertainty; Studholme et al. 1999 use the equivalent (H_F + H_M)/H_FM.
    """
    row = (fixed * bins).to(torch.int64).clamp_(0, bins - 1)
    column = (warped * bins).to(torch.int64).clamp_(0, bins - 1)
    index = row.mul_(bins).add_(column).flatten()
    counts = torch.zeros(bins * bins, dtype=torch.int64, device=fixed.device)
    counts.scatter_add_(0, index, (weight > 0).to(torch.int64).flatten())
    joint = counts.double().view(bins, bins)
    joint = joint / joint.sum().clamp(min=1)
    marginals = _entropy(joint.sum(0)) + _entropy(joint.sum(1))
    return 2 * (marginals - _entropy(joint)) / marginals if marginals > 0 else 0.0


def regularity(displacement: Tensor, foreground: Tensor, spacing_mm: tuple[float, float, float]) -> Regularity:
    """Judge a displacement (3, Z, Y, X) in lattice mm over foreground (1, Z, Y, X)."""
    slices = displacement.shape[1]
    folded, logs, longest = 0, [], 0.0
    for first in range(0, slices, _SLAB):
        last = min(first + _SLAB, slices)
        low, high = max(first - 1, 0), min(last + 1, slices)
        slab = displacement[:, low:high]
        inside = foreground[0, first:last] > 0
        if not inside.any():
            continue
        determinant = fields.jacobian_determinant(slab, spacing_mm)[first - low : last - low][inside]
        folded += int((determinant <= 0).sum())
        logs.append(determinant.clamp(0.01, 100).log().double())
        length = slab[:, first - low : last - low].square().sum(0).sqrt()
        longest = max(longest, float(length[inside].max()))
    if not logs:
        return Regularity(0.0, 0.0, 0.0)
    log = torch.cat(logs)
    return Regularity(folded / log.numel(), float(log.std(correction=0)), longest)


def _entropy(probabilities: Tensor) -> float:
    return float(-torch.special.xlogy(probabilities, probabilities).sum())
