"""What regions of a dynamic series take up over time, with and without its registration. Pure.

Law: regions come from the images alone, no anatomy is asked for. The same phases give the same regions and figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dicomnode.quality import Map, Mask, body_of, thinned
from registration_engine import DisplacementField, Grid, Volume, warp
from registration_engine.resampling import reached

LARGEST_VOXELS = 1_000_000
"""A finer reference grid is thinned to this size, finest axis first: a curve at each voxel is held."""
EDGE_MM = 15.0
"""A region is a cube of about this edge: it fits into an adult's aorta, and noise averages out."""
MOST_REGIONS, LEAST_SHARE = 4, 0.1
"""How many regions there are at most; where less than this share of the first's uptake is new, there is none."""
WHOLE = "Body"


@dataclass(frozen=True, eq=False)
class Moment:
    """One phase.

    Attributes
    ----------
    image
        As acquired, on its own grid, rescaled.
    is_registered
        False where its registration failed or was rejected; the reference is registered without a field.
    field
        The delivered field, total map from the reference to this phase.
    """

    image: Volume
    is_registered: bool
    field: DisplacementField | None = None


@dataclass(frozen=True, eq=False)
class Region:
    """Where a curve was taken: a mask (Z, Y, X), and the index (k, j, i) of its center."""

    name: str
    mask: Mask
    center: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Uptake:
    """Mean values of every region at every phase; NaN where there is none.

    Attributes
    ----------
    reference
        The reference phase on the measuring grid: its own, or thinned by whole voxels.
    regions
        `WHOLE` first: the body that every registered phase reaches. Then cubes wholly within it, as `measure_uptake`
        chooses them.
    before, after
        (regions, phases): the phase in its own place, and through its field.
    seconds
        From the beginning of the first phase to that of each; empty where the headers do not tell.
    """

    reference: Volume
    regions: tuple[Region, ...]
    before: npt.NDArray[np.float64]
    after: npt.NDArray[np.float64]
    seconds: tuple[float, ...]


def measure_uptake(
    reference: Volume, phases: int, moment: Callable[[int], Moment], *, seconds: tuple[float, ...] = ()
) -> Uptake | None:
    """Choose the regions and take the curves; None where no part of the body is reached by every registered phase.

    The regions beside the body are among all cubes of `EDGE_MM` (an odd number of voxels along each axis) that lie
    wholly within the body which every registered phase reaches. Uptake is a cube's mean at each registered phase, less
    that at the first of them; how much it is, its root mean square. The first region takes up most. Each next one is
    that of whose uptake most is left once the best combination of those before is taken away: vessel, kidney and
    liver, not the vessel thrice. There are `MOST_REGIONS` at most, and none of which less than `LEAST_SHARE` of the
    first one's uptake is left.

    Parameters
    ----------
    moment
        Gives the phase of a number from 0; asked twice for each, so that one is held at a time.

    References
    ----------
    Ren and Chang, Automatic spectral target recognition in hyperspectral imagery, IEEE TAES 2003: the choice.
    """
    grid, every = thinned(reference.grid, LARGEST_VOXELS)
    image = Volume(reference.voxels[every], grid)
    inside = body_of(image)
    means: list[Map] = []
    size = _cube(grid)
    for number in range(phases):
        at = moment(number)
        if at.is_registered:
            inside &= reached(at.image.grid, at.field, grid)
            means.append(_means(_seen(at.image, at.field, grid), size))
    if not inside.any():
        return None
    whole = Region(WHOLE, inside, _center(inside))
    regions = (whole, *_distinct(means, inside, size))
    before, after = (np.full((len(regions), phases), np.nan) for _ in range(2))
    for number in range(phases):
        at = moment(number)
        before[:, number] = _curve_points(at.image, None, grid, regions)
        if at.is_registered:
            after[:, number] = _curve_points(at.image, at.field, grid, regions)
    return Uptake(image, regions, before, after, seconds)


def _cube(grid: Grid) -> tuple[int, int, int]:
    """The odd number of voxels nearest to `EDGE_MM` along each axis."""
    z, y, x = (2 * int(np.rint((EDGE_MM / mm - 1) / 2)) + 1 for mm in grid.spacing_mm)
    return max(z, 1), max(y, 1), max(x, 1)


def _seen(image: Volume, field: DisplacementField | None, grid: Grid) -> Map:
    return warp(image, field, grid, outside=float(image.voxels.min())).voxels


def _means(values: npt.NDArray[np.float32], size: tuple[int, int, int]) -> Map:
    """Mean of the cube around each voxel; beyond the border the outermost voxels go on."""
    total = values.astype(np.float64)
    for axis, edge in enumerate(size):
        width = [(0, 0)] * 3
        width[axis] = (edge // 2 + 1, edge // 2)
        sums = np.cumsum(np.pad(total, width, mode="edge"), axis=axis)
        upper = np.take(sums, range(edge, sums.shape[axis]), axis)
        total = (upper - np.take(sums, range(sums.shape[axis] - edge), axis)) / edge
    return total.astype(np.float32)


def _distinct(means: list[Map], inside: Mask, size: tuple[int, int, int]) -> list[Region]:
    whole = _means(np.pad(inside, 1).astype(np.float32), size)[1:-1, 1:-1, 1:-1] > 1 - 1e-4
    centers = np.argwhere(whole)
    left = np.stack([each[whole] - means[0][whole] for each in means])  # (phases, cubes)
    found: list[Region] = []
    least = 0.0
    while len(found) < MOST_REGIONS and len(centers):
        power = np.einsum("pn,pn->n", left, left)
        best = int(power.argmax())
        if power[best] <= least:
            break
        least = least or LEAST_SHARE**2 * float(power[best])
        z, y, x = (int(n) for n in centers[best])
        mask = np.zeros(inside.shape, dtype=bool)
        mask[tuple(slice(n - edge // 2, n + edge // 2 + 1) for n, edge in zip((z, y, x), size, strict=True))] = True
        found.append(Region(f"Region {len(found) + 1}", mask, (z, y, x)))
        along = left[:, best] / np.sqrt(power[best])
        left -= along[:, None] * (along @ left)
    return found


def _center(mask: Mask) -> tuple[int, int, int]:
    z, y, x = (int(np.rint(each.mean())) for each in np.nonzero(mask))
    return z, y, x


def _curve_points(
    image: Volume, field: DisplacementField | None, grid: Grid, regions: tuple[Region, ...]
) -> list[float]:
    """Means over what the image reaches of each region."""
    values, there = _seen(image, field, grid), reached(image.grid, field, grid)
    found = [values[region.mask & there] for region in regions]
    return [float(each.mean(dtype=np.float64)) if each.size else float("nan") for each in found]
