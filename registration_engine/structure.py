"""Self-similarity: how alike the neighbours of a place are, which images of different kinds have in common.

All images are (Z, Y, X). Nothing here builds an autograd graph.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import pad

_NEIGHBOURS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
_PAIRS = [(a, b) for a, b in combinations(_NEIGHBOURS, 2) if any(p + q for p, q in zip(a, b, strict=True))]
CHANNELS = len(_PAIRS)
_HALO = 2  # voxels that a descriptor looks beyond its own: one to the neighbour, one to the rim of its patch
_FLOOR = 1e-3  # of the mean noise: where nothing differs, nothing may be made of it
_SLAB = 8  # slices worked on at a time, so that what lies between stays in the cache


def noise_floor(image: Tensor) -> float:
    """The smallest local noise that is believed, from the image's own mean."""
    padded = _padded(image, _HALO)
    noise = sum(
        float(_patch_distances(slab)[1].sum(dtype=torch.float64)) for _, _, slab in _slabs(padded, len(image), _HALO)
    )
    return max(_FLOOR * noise / image.numel(), 1e-12)


def self_similarity(image: Tensor, floor: float) -> Tensor:
    """(12, Z, Y, X) in 0…1: how alike two of the six neighbours of each voxel are, for every two not opposite.

    The distance of the 3 x 3 x 3 patches around them, over the mean of all twelve as the local noise.

    References
    ----------
    Heinrich et al., Towards realtime multimodal fusion for image-guided interventions using self-similarities,
    MICCAI 2013.
    """
    found = torch.empty(CHANNELS, *image.shape, device=image.device)
    for first, last, slab in _slabs(_padded(image, _HALO), len(image), _HALO):
        found[:, first:last] = _described(slab, floor)
    return found


def likeness(
    fixed: Tensor, warped: Tensor, weight: Tensor, floor: float, spacing_mm: tuple[float, float, float]
) -> tuple[float, Tensor]:
    """How little two images' self-similarities differ, and its ascent direction by each voxel's displacement.

    Parameters
    ----------
    fixed
        (12, Z, Y, X), the self-similarity of the fixed image.
    warped, weight
        The warped moving image, and which voxels count.
    floor
        `noise_floor` of the moving image.

    Returns
    -------
    tuple[float, Tensor]
        Minus the mean squared difference over channels and voxels that count; and, (3, Z, Y, X), the sum over channels
        of difference times slope per mm along (i, j, k): its gradient, where descriptors move with the image, times
        half of what it is the mean over.
    """
    force = torch.empty(3, *warped.shape, device=warped.device)
    total = 0.0
    for first, last, slab in _slabs(_padded(warped, _HALO + 1), len(warped), _HALO + 1):
        there = _described(slab, floor)
        differs = fixed[:, first:last] - there[:, 1:-1, 1:-1, 1:-1]
        counts = weight[first:last]
        total += float((differs.square().sum(0) * counts).sum(dtype=torch.float64))
        along_x = there[:, 1:-1, 1:-1, 2:] - there[:, 1:-1, 1:-1, :-2]
        along_y = there[:, 1:-1, 2:, 1:-1] - there[:, 1:-1, :-2, 1:-1]
        along_z = there[:, 2:, 1:-1, 1:-1] - there[:, :-2, 1:-1, 1:-1]
        for axis, slope in enumerate((along_x, along_y, along_z)):
            force[axis, first:last] = slope.mul_(differs).sum(0).mul_(counts).div_(2 * spacing_mm[axis])
    return -total / (CHANNELS * max(float(weight.sum(dtype=torch.float64)), 1.0)), force


def _padded(image: Tensor, halo: int) -> Tensor:
    return pad(image[None, None], (halo,) * 6, mode="replicate")[0, 0]


def _slabs(padded: Tensor, slices: int, halo: int) -> list[tuple[int, int, Tensor]]:
    """First and last slice of each slab, and what of the padded image it looks at."""
    size = _SLAB if padded.device.type == "cpu" else slices
    bounds = [(first, min(first + size, slices)) for first in range(0, slices, size)]
    return [(first, last, padded[first : last + 2 * halo]) for first, last in bounds]


def _described(padded: Tensor, floor: float) -> Tensor:
    distances, noise = _patch_distances(padded)
    return distances.div_(noise.clamp_(min=floor)).neg_().exp_()


def _patch_distances(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve distances less their smallest, and their mean, within a halo of two voxels."""
    z, y, x = (n - 2 for n in padded.shape)
    at = {(k, j, i): padded[1 + k : 1 + k + z, 1 + j : 1 + j + y, 1 + i : 1 + i + x] for k, j, i in _NEIGHBOURS}
    distances = torch.stack([at[a] - at[b] for a, b in _PAIRS]).square_()
    for axis in (1, 2, 3):
        size = distances.shape[axis] - 2
        distances = sum((distances.narrow(axis, n, size) for n in (1, 2)), start=distances.narrow(axis, 0, size))
    distances = distances.mul_(1 / 27)
    distances -= distances.amin(0)
    return distances, distances.mean(0)
