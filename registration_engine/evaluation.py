"""How good a registration is, measured from outside: overlap of labels, landmarks, volume change, invertibility.

Functions on arrays and volumes, the same for our own fields and anyone else's. Numpy alone; SimpleITK where surfaces
are measured. `metrics` is what the engine says about itself while it works.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from registration_engine.errors import InvalidRequestError, InvalidVolumeError
from registration_engine.volume import DisplacementField, Grid

Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]
_SMALLEST_DETERMINANT, _LARGEST_DETERMINANT = 0.01, 100.0  # where sdlogj is cut
_SLAB = 16  # slices at a time: nine derivatives of a whole volume would not fit
_LARGEST_FIT = 200_000  # voxels the affine part is fitted to


@dataclass(frozen=True)
class Overlap:
    """How one label of the fixed image and the same label carried over agree.

    Attributes
    ----------
    dice, iou
        2·|A∩B|/(|A|+|B|) and |A∩B|/|A∪B|, 0…1.
    hd95_mm
        The larger of the two directed 95th percentiles of distances between the surfaces, voxel centers; infinite
        where the label is in one image only.
    """

    label: int
    dice: float
    iou: float
    hd95_mm: float


@dataclass(frozen=True)
class VolumeChange:
    """What a map does to volumes over a region.

    Attributes
    ----------
    folding_fraction
        Share of voxels with det J <= 0 of the total map.
    sdlogj
        Standard deviation of ln det J of the map's non-affine part, det clipped to 0.01–100. The affine part is the
        one nearest to the map over the region, in the least squares sense.
    max_displacement_mm
        Largest displacement of the non-affine part.
    """

    folding_fraction: float
    sdlogj: float
    max_displacement_mm: float


def label_overlaps(
    fixed: npt.NDArray[Any],
    moving: npt.NDArray[Any],
    spacing_mm: npt.NDArray[np.float64],
    labels: Sequence[int] | None = None,
) -> list[Overlap]:
    """Compare two label images on one grid, label by label.

    Parameters
    ----------
    fixed, moving
        (Z, Y, X), whole numbers, 0 = background.
    spacing_mm
        (3,), along (Z, Y, X).
    labels
        Which; by default every one that occurs in either image. One that occurs in neither is left out.

    Raises
    ------
    InvalidVolumeError
        Shapes differ, a label is negative or no whole number.
    """
    if fixed.shape != moving.shape or fixed.ndim != 3:
        raise InvalidVolumeError(f"Labels: got shapes {fixed.shape} and {moving.shape}, expected one (Z, Y, X)")
    fixed, moving = _whole(fixed, "fixed"), _whole(moving, "moving")
    size = int(max(fixed.max(), moving.max())) + 1
    in_fixed, in_moving = (np.bincount(x.ravel(), minlength=size) for x in (fixed, moving))
    in_both = np.bincount(fixed[fixed == moving], minlength=size)
    wanted = range(1, size) if labels is None else [n for n in labels if 0 <= n < size]
    overlaps = []
    for label in wanted:
        a, b, both = int(in_fixed[label]), int(in_moving[label]), int(in_both[label])
        if a + b:
            distance = surface_distance_95(fixed == label, moving == label, spacing_mm)
            overlaps.append(Overlap(int(label), 2 * both / (a + b), both / (a + b - both), distance))
    return overlaps


def surface_distance_95(a: Mask, b: Mask, spacing_mm: npt.NDArray[np.float64]) -> float:
    """The larger directed 95th percentile of distances in mm between two surfaces; infinite where one is empty.

    A surface is the voxels of a mask with a face neighbour outside it; the border of the volume is no surface.
    """
    if not a.any() or not b.any():
        return float("inf")
    from registration_engine.resampling import simpleitk

    sitk = simpleitk()
    box = tuple(
        slice(max(int(hit[0]) - 1, 0), int(hit[-1]) + 2)
        for axis in range(3)
        for hit in [np.flatnonzero((a | b).any(axis=tuple(n for n in range(3) if n != axis)))]
    )
    surfaces = [_surface(a[box]), _surface(b[box])]
    if not surfaces[0].any() or not surfaces[1].any():
        return 0.0 if np.array_equal(a, b) else float("inf")
    directed = []
    for surface, other in (surfaces, surfaces[::-1]):
        image = sitk.GetImageFromArray(other.astype(np.uint8))
        image.SetSpacing(spacing_mm[::-1].tolist())
        distance = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
        directed.append(float(np.percentile(np.maximum(sitk.GetArrayViewFromImage(distance)[surface], 0), 95)))
    return max(directed)


def landmark_errors(field: DisplacementField, fixed_mm: Points, moving_mm: Points) -> npt.NDArray[np.float64]:
    """Target registration error in mm of each landmark: how far x + displacement(x) is from where it should be.

    Parameters
    ----------
    fixed_mm, moving_mm
        (n, 3), LPS mm, the same places in the fixed and in the moving image.

    Raises
    ------
    InvalidRequestError
        The lists differ in length, or a fixed landmark lies outside the field.
    """
    if fixed_mm.shape != moving_mm.shape or fixed_mm.ndim != 2 or fixed_mm.shape[1] != 3:
        raise InvalidRequestError(
            f"Landmarks: got {fixed_mm.shape} fixed and {moving_mm.shape} moving, expected two of one shape (n, 3)"
        )
    index = field.grid.indices(fixed_mm)
    outside = ((index < -0.5) | (index > np.array(field.grid.shape) - 0.5)).any(-1)
    if outside.any():
        first = int(np.argmax(outside))
        raise InvalidRequestError(
            f"Landmark {first + 1}: fixed point {fixed_mm[first].tolist()} lies outside the field "
            f"({int(outside.sum())} of {len(fixed_mm)} do), expected all inside"
        )
    return np.asarray(np.linalg.norm(fixed_mm + displacement_at(field, index) - moving_mm, axis=-1), dtype=np.float64)


def displacement_at(field: DisplacementField, index: Points) -> Points:
    """(n, 3) mm, trilinear, at continuous array indices (n, 3), order (k, j, i); constant beyond the outer centers."""
    last = np.array(field.grid.shape) - 1
    clamped = np.clip(index, 0, last)
    lower = np.minimum(clamped.astype(int), np.maximum(last - 1, 0))
    part = clamped - lower
    total = np.zeros((len(index), 3))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, part, 1 - part), axis=-1)
        at = np.minimum(lower + corner, last)
        total += weight[:, None] * field.vectors[at[:, 0], at[:, 1], at[:, 2]]
    return total


def jacobian_determinant(field: DisplacementField) -> npt.NDArray[np.float32]:
    """Local volume change (Z, Y, X) of x → x + displacement(x): 1 = unchanged, <= 0 = folded.

    Central differences, one-sided at the border.

    Raises
    ------
    InvalidVolumeError
        Fewer than 2 voxels along an axis.
    """
    return np.concatenate([determinant for _, determinant in _determinants(field)])


def volume_change(field: DisplacementField, region: Mask) -> VolumeChange:
    """Measure folding and regularity over a region (Z, Y, X) on the field's grid.

    Raises
    ------
    InvalidVolumeError
        The region is empty or has another shape.
    """
    rest = non_affine_part(field, region)
    folded, logs, longest = 0, [], 0.0
    for slab, determinant in _determinants(rest):
        inside = region[slab]
        if inside.any():
            found = determinant[inside].astype(np.float64)
            folded += int(np.count_nonzero(found <= 0))
            logs.append(np.log(np.clip(found, _SMALLEST_DETERMINANT, _LARGEST_DETERMINANT)))
            longest = max(longest, float(np.linalg.norm(rest.vectors[slab][inside], axis=-1).max()))
    every = np.concatenate(logs)
    return VolumeChange(folded / every.size, float(every.std()), longest)


def non_affine_part(field: DisplacementField, region: Mask) -> DisplacementField:
    """The field v of T = A∘(id + v), where T is the map and A the affine map nearest to it over the region."""
    _check_region(region, field.grid)
    back = np.linalg.inv(nearest_affine(field, region))
    vectors = np.empty_like(field.vectors)
    for k, x in _slices(field.grid):
        y = x + field.vectors[k]
        vectors[k] = y @ back[:3, :3].T + back[:3, 3] - x
    return DisplacementField(vectors, field.grid)


def nearest_affine(field: DisplacementField, region: Mask) -> npt.NDArray[np.float64]:
    """(4, 4) that is nearest to x → x + displacement(x) over a region, in the least squares sense.

    A region too flat to tell gives the nearest translation.
    """
    index = np.argwhere(region)
    index = index[:: max(1, len(index) // _LARGEST_FIT)]
    x = field.grid.points_mm(index.astype(np.float64))
    y = x + field.vectors[tuple(index.T)]
    affine, center = np.eye(4), x.mean(0)
    spread = x - center
    if np.linalg.matrix_rank(spread) == 3:
        affine[:3, :3] = np.linalg.lstsq(spread, y - y.mean(0), rcond=None)[0].T
    affine[:3, 3] = y.mean(0) - affine[:3, :3] @ center
    return affine


def inverse_consistency(
    forward: DisplacementField, backward: DisplacementField, region: Mask
) -> npt.NDArray[np.float64]:
    """Distance in mm between x and backward(forward(x)) for the region's voxels whose image lies within `backward`.

    Parameters
    ----------
    region
        (Z, Y, X) on the forward field's grid.
    backward
        From moving to fixed space, on any grid.

    Raises
    ------
    InvalidVolumeError
        The region is empty or has another shape, or none of it lands within `backward`.
    """
    _check_region(region, forward.grid)
    found = []
    for k, points in _slices(forward.grid):
        x = points[region[k]]
        y = x + forward.vectors[k][region[k]]
        at = backward.grid.indices(y)
        inside = ((at >= -0.5) & (at <= np.array(backward.grid.shape) - 0.5)).all(-1)
        y, x, at = y[inside], x[inside], at[inside]
        found.append(np.linalg.norm(y + displacement_at(backward, at) - x, axis=-1))
    errors = np.concatenate(found)
    if not errors.size:
        raise InvalidVolumeError("Backward field: no voxel of the region lands within it, expected some")
    return np.asarray(errors, dtype=np.float64)


def inverted(field: DisplacementField, *, iterations: int = 20) -> DisplacementField:
    """The inverse of a field on its own grid, by ITK's fixed-point iteration.

    Where the field folds there is none, and `inverse_consistency` of the two tells. Take the affine part out first.

    References
    ----------
    Chen et al., A simple fixed-point approach to invert a deformation field, Medical Physics 2008.
    """
    from registration_engine.resampling import field_image, simpleitk

    sitk = simpleitk()
    voxel = float(field.grid.spacing_mm.min())
    back = sitk.InvertDisplacementField(field_image(field), iterations, 1e-3 * voxel, 1e-4 * voxel, False)
    return DisplacementField(sitk.GetArrayFromImage(back), field.grid)


def _slices(grid: Grid) -> Iterator[tuple[int, Points]]:
    """LPS mm (Y, X, 3) of the voxel centers, slice by slice."""
    plane = np.moveaxis(np.indices(grid.shape[1:], dtype=np.float64), 0, -1)
    for k in range(grid.shape[0]):
        yield k, grid.points_mm(np.concatenate([np.full((*plane.shape[:2], 1), float(k)), plane], axis=-1))


def _determinants(field: DisplacementField) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """det J slab by slab."""
    if min(field.grid.shape) < 2:
        raise InvalidVolumeError(f"Field: got {field.grid.shape} vectors, expected 2 or more along each axis")
    slices = field.grid.shape[0]
    per_mm = np.linalg.inv(field.grid.affine[:3, :3]).astype(np.float32)
    for first in range(0, slices, _SLAB):
        last = min(first + _SLAB, slices)
        low, high = max(first - 1, 0), min(last + 1, slices)
        along = [np.gradient(field.vectors[low:high], axis=axis) for axis in range(3)]
        rates = np.stack(along, axis=-1)[first - low : last - low]
        matrix = rates @ per_mm + np.eye(3, dtype=np.float32)
        a, b, c = matrix[..., 0, :], matrix[..., 1, :], matrix[..., 2, :]
        yield slice(first, last), np.asarray((a * np.cross(b, c)).sum(-1), dtype=np.float32)


def _surface(mask: Mask) -> Mask:
    inner = mask.copy()
    for axis in range(3):
        before, after = [slice(None)] * 3, [slice(None)] * 3
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        inner[tuple(after)] &= mask[tuple(before)]
        inner[tuple(before)] &= mask[tuple(after)]
    return mask & ~inner


def _whole(labels: npt.NDArray[Any], name: str) -> npt.NDArray[np.int64]:
    whole: npt.NDArray[np.int64] = np.rint(labels).astype(np.int64)
    if not np.array_equal(whole, labels) or whole.min() < 0:
        raise InvalidVolumeError(f"Labels of the {name} image: got fractions or negative values, expected 0, 1, 2, …")
    return whole


def _check_region(region: Mask, grid: Grid) -> None:
    if region.shape != grid.shape:
        raise InvalidVolumeError(f"Region: got shape {region.shape}, expected the field's {grid.shape}")
    if not region.any():
        raise InvalidVolumeError("Region: got no voxel, expected a body to measure over")
