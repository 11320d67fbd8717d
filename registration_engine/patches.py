"""The paper's patch-wise mutual information map (Appendix C), exact, at the price of one pass over the voxels.

Patches overlap, their voxels need not be counted again: joint histograms of disjoint blocks of one stride are counted
once, a patch is the sum of its blocks' histograms, and counts being whole numbers their n·log n is looked up. Numpy
alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from registration_engine.errors import InvalidRequestError, InvalidVolumeError

BINS = 16
PATCH, STRIDE = 16, 4  # voxels
SMALLEST = 512  # voxels of the domain in a patch
_LOW, _HIGH = 0.5, 99.5  # percentiles between which the bins lie
_LARGEST_SAMPLE = 4_000_000  # voxels looked at for the percentiles

Counts = npt.NDArray[np.int32]


def patch_mutual_information(
    fixed: npt.NDArray[np.float32],
    moving: npt.NDArray[np.float32],
    domain: npt.NDArray[np.bool_] | None = None,
    *,
    normalized: bool = True,
    patch: int = PATCH,
    stride: int = STRIDE,
    bins: int = BINS,
    smallest: int = SMALLEST,
) -> npt.NDArray[np.float32]:
    """Map where two images tell each other's intensities and where not; higher = better aligned.

    Patches start at every multiple of the stride and cover the volume; those at the far end may reach beyond it. A
    patch of fewer than `smallest` voxels of the domain does not count.

    Parameters
    ----------
    fixed, moving
        (Z, Y, X), same grid, any unit. Bins lie between the 0.5 and 99.5 percentiles of each whole image, what is
        beyond falls into the outer ones.
    domain
        (Z, Y, X), voxels that count; by default all.
    normalized
        2·I/(H_F + H_M), 0…1, 0 where either image is constant in the patch; else I in nat, as the paper prints it.
    patch, stride
        Sides in voxels; the patch is a multiple of the stride.

    Returns
    -------
    np.ndarray
        (Z, Y, X) float32: mean over the patches that hold the voxel; NaN outside the domain and where no patch counts.

    Raises
    ------
    InvalidVolumeError
        Shapes differ, or a voxel is not finite.
    InvalidRequestError
        The patch is no multiple of the stride, or there are fewer than 2 or more than 256 bins.
    """
    if patch < stride or stride < 1 or patch % stride:
        raise InvalidRequestError(f"Patch: got side {patch} and stride {stride}, expected a multiple of the stride")
    if not 2 <= bins <= 256:
        raise InvalidRequestError(f"Patch: got {bins} bins, expected 2 to 256")
    shape = fixed.shape
    domain = np.ones(shape, dtype=bool) if domain is None else domain
    if fixed.ndim != 3 or moving.shape != shape or domain.shape != shape:
        raise InvalidVolumeError(
            f"Patches: got fixed {shape}, moving {moving.shape}, domain {domain.shape}, expected one shape (Z, Y, X)"
        )
    reach = patch // stride
    blocks = tuple(max(-(-n // stride), reach) for n in shape)
    starts = tuple(n - reach + 1 for n in blocks)
    to_fixed, to_moving = _binning(fixed, "fixed", bins), _binning(moving, "moving", bins)
    entropy_of = _xlogx(patch**3)

    sums, covered = np.zeros(blocks), np.zeros(blocks)
    layers: list[Counts] = []
    for k in range(blocks[0]):
        slab = slice(k * stride, (k + 1) * stride)
        pair = to_fixed(fixed[slab]) * bins + to_moving(moving[slab])
        layers.append(_row_sums(_block_histograms(pair, domain[slab], blocks[1:], stride, bins), reach))
        if len(layers) < reach:
            continue
        joint = np.sum(layers, axis=0, dtype=np.int32)
        layers.pop(0)
        value, counts = _information(joint.reshape(*starts[1:], bins, bins), entropy_of, normalized, smallest)
        first = k - reach + 1
        for j in range(reach):
            for i in range(reach):
                at = (slice(first, k + 1), slice(j, j + starts[1]), slice(i, i + starts[2]))
                sums[at] += value
                covered[at] += counts
    with np.errstate(invalid="ignore"):
        means = (sums / covered).astype(np.float32)
    z, y, x = (np.arange(n) // stride for n in shape)
    return np.where(domain, means[np.ix_(z, y, x)], np.float32(np.nan))


def _binning(image: npt.NDArray[np.float32], name: str, bins: int) -> Callable[[npt.NDArray[np.float32]], Counts]:
    """How voxels of one whole image become bin numbers."""
    if not np.isfinite(image).all():
        raise InvalidVolumeError(f"Patches: {name} image holds NaN or infinite voxels, expected none")
    low, high = np.percentile(image.ravel()[:: max(1, image.size // _LARGEST_SAMPLE)], [_LOW, _HIGH])
    per_bin = np.float32(bins / (high - low)) if high > low else np.float32(0)

    def binned(voxels: npt.NDArray[np.float32]) -> Counts:
        return np.asarray(np.clip((voxels - np.float32(low)) * per_bin, 0, bins - 1), dtype=np.int32)

    return binned


def _block_histograms(
    pair: Counts, domain: npt.NDArray[np.bool_], blocks: tuple[int, ...], stride: int, bins: int
) -> Counts:
    """(blocks along Y, blocks along X, bins²) counts of one layer of blocks."""
    row = np.arange(pair.shape[1], dtype=np.int64) // stride * blocks[1]
    block = row[:, None] + np.arange(pair.shape[2]) // stride
    index = (block * bins**2 + pair)[domain]
    counts = np.bincount(index, minlength=blocks[0] * blocks[1] * bins**2)
    return counts.astype(np.int32).reshape(*blocks, bins**2)


def _row_sums(counts: Counts, reach: int) -> Counts:
    """Sums over `reach` neighbouring blocks along both axes."""
    rows = counts[: counts.shape[0] - reach + 1].copy()
    for n in range(1, reach):
        rows += counts[n : n + rows.shape[0]]
    both = rows[:, : counts.shape[1] - reach + 1].copy()
    for n in range(1, reach):
        both += rows[:, n : n + both.shape[1]]
    return both


def _information(
    joint: Counts, entropy_of: npt.NDArray[np.float64], normalized: bool, smallest: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Value of each patch of counts (Y, X, bins, bins), and whether it has voxels enough."""
    by_fixed, by_moving = joint.sum(-1), joint.sum(-2)
    total = by_fixed.sum(-1)
    counts = total >= max(smallest, 1)
    size = np.maximum(total, 1).astype(np.float64)
    # H = log N - sum(n log n) / N
    sums = [entropy_of[n].sum(-1) / size for n in (by_fixed, by_moving, joint.reshape(*total.shape, -1))]
    fixed, moving, both = (np.log(size) - s for s in sums)
    information = np.maximum(fixed + moving - both, 0)
    # One bin for all leaves rounding alone.
    information[np.minimum(fixed, moving) < 1e-12] = 0
    if normalized:
        information = 2 * information / np.maximum(fixed + moving, 1e-300)
    return np.where(counts, information, 0), counts


def _xlogx(largest: int) -> npt.NDArray[np.float64]:
    n = np.arange(largest + 1, dtype=np.float64)
    n[1:] *= np.log(n[1:])
    return n
