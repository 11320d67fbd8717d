"""Deformable Spatial Registration, PS3.3 A.39.2 and C.20.3: the total map as one grid of vectors from fixed to moving.

Profile: one item, identity matrices before and after, the affine part folded into the grid, the grid aligned with
the LPS axes. It is the only form that every reader examined decodes right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import DeformableSpatialRegistrationStorage

from dicomnode.objects.common import Subject, code, decimal, matrix_item, registration_object
from dicomnode.objects.texts import long_string
from registration_engine import DisplacementField, Grid, Registration, Volume, warp

SPACING_MM = 4.0
TOLERANCE_MM = 0.2
LARGEST_BYTES = 64_000_000

_FINER, _FINEST_MM = 0.75, 0.1
_SLAB = 16


@dataclass(frozen=True, eq=False)
class SampledField:
    """The delivered field, and its largest distance from the engine's map over the fixed voxels."""

    field: DisplacementField
    max_error_mm: float
    tolerance_mm: float = TOLERANCE_MM


def sample_grid(
    registration: Registration,
    *,
    spacing_mm: float = SPACING_MM,
    tolerance_mm: float = TOLERANCE_MM,
    largest_bytes: int = LARGEST_BYTES,
) -> SampledField:
    """Sample the total map on an axis-aligned LPS grid around the fixed volume.

    The grid covers the fixed voxels' corners and one cell more. Beyond the fixed voxel centers the linear part goes on
    exactly and the displacement as its nearest neighbour. The spacing shrinks, down to the voxels' own, until the
    largest error is within `tolerance_mm`; no grid takes more than `largest_bytes`, so the error of the result may be
    larger: judge it.
    """
    while _bytes(_grid_around(registration.grid, spacing_mm)) > largest_bytes:
        spacing_mm *= 2
    while True:
        grid = _grid_around(registration.grid, spacing_mm)
        finer_mm = _FINER * spacing_mm
        while (finer := _grid_around(registration.grid, finer_mm)).shape == grid.shape and finer_mm > _FINEST_MM:
            finer_mm *= _FINER
        is_finest = finer_mm <= _FINEST_MM or _bytes(finer) > largest_bytes
        if registration.displacement is None:
            return SampledField(_total(registration, None, grid), 0.0, tolerance_mm)
        displacement = np.empty((*grid.shape, 3), dtype=np.float32)
        for k in range(grid.shape[0]):
            displacement[k] = interpolate(registration.displacement, registration.grid.indices(plane_of(grid, k)))
        largest = 0.0
        for error in _errors(registration, DisplacementField(displacement, grid)):
            largest = max(largest, error)
            if error > tolerance_mm and not is_finest:
                break
        else:
            return SampledField(_total(registration, displacement, grid), largest, tolerance_mm)
        spacing_mm = finer_mm


def interpolate(values: npt.NDArray[Any], index: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Trilinear values (..., C) of an array (Z, Y, X, C) at indices (..., 3), order (k, j, i), clamped to the array."""
    last = np.array(values.shape[:3]) - 1
    clamped = np.clip(index, 0, last)
    lower = np.minimum(clamped.astype(np.intp), np.maximum(last - 1, 0))
    upper = np.minimum(lower + 1, last)
    share = clamped - lower
    result = np.zeros((*index.shape[:-1], values.shape[3]))
    for corner in product((False, True), repeat=3):
        weight = np.where(corner, share, 1 - share).prod(axis=-1)
        k, j, i = np.moveaxis(np.where(corner, upper, lower), -1, 0)
        result += weight[..., None] * values[k, j, i]
    return result


def deformable_registration(subject: Subject, sampled: SampledField, *, is_inverse: bool = False) -> Dataset:
    """Write a field as a Deformable Spatial Registration object.

    Parameters
    ----------
    is_inverse
        The field leads from moving to fixed, and `subject` is the pair turned: its fixed series is the moving one.
    """
    kind, number, label = ("dsr inverse", 3500, "INVERSE REG") if is_inverse else ("dsr", 3000, "DEFORMABLE REG")
    text = "Inverse: total map from moving to fixed" if is_inverse else "Total map from fixed to moving"
    if is_inverse and sampled.max_error_mm > sampled.tolerance_mm:
        text = f"WARNING round trip error {sampled.max_error_mm:.1f} mm; {text}"
    dataset = registration_object(
        subject,
        DeformableSpatialRegistrationStorage,
        kind,
        number=number,
        label=label,
        text=f"WARNING {subject.warning}; {text}" if subject.warning else text,
    )
    item = Dataset()
    item.SourceFrameOfReferenceUID = subject.moving.frame_of_reference_uid
    item.ReferencedImageSequence = subject.moving.references()
    item.FrameOfReferenceTransformationComment = long_string(
        f"{'Inverse; round trip' if is_inverse else 'Total map; grid'} error at most {sampled.max_error_mm:.3f} mm"
    )
    item.RegistrationTypeCodeSequence = [code("125024", "Image Content-based Alignment")]
    item.PreDeformationMatrixRegistrationSequence = [matrix_item(np.eye(4), "RIGID")]
    item.PostDeformationMatrixRegistrationSequence = [matrix_item(np.eye(4), "RIGID")]
    item.DeformableRegistrationGridSequence = [_grid_item(sampled.field)]
    dataset.DeformableRegistrationSequence = [item]
    return dataset


def _grid_item(field: DisplacementField) -> Dataset:
    """PS3.3 C.20.3.1.3: columns fastest, then rows, then planes; x, y, z of each vector as 32-bit floats."""
    item = Dataset()
    item.ImageOrientationPatient = [decimal(value) for value in (1, 0, 0, 0, 1, 0)]
    item.ImagePositionPatient = [decimal(value) for value in field.grid.affine[:3, 3]]
    item.GridDimensions = list(field.grid.shape[::-1])
    item.GridResolution = field.grid.spacing_mm[::-1].tolist()
    item.VectorGridData = np.ascontiguousarray(field.vectors, dtype="<f4").tobytes()
    return item


def _grid_around(fixed: Grid, spacing_mm: float) -> Grid:
    """Axis-aligned grid of about this spacing over the fixed voxels' corners and one cell more, ascending k.

    Where the fixed axes are LPS axes themselves, nodes stand on voxel planes, at whole multiples of the voxel spacing:
    an axis sampled at the voxels' own spacing loses nothing. Else the grid is isotropic.
    """
    corners = fixed.points_mm(np.array(list(product((0.0, 1.0), repeat=3))) * fixed.shape - 0.5)
    low, high = corners.min(axis=0), corners.max(axis=0)
    spacing = np.full(3, spacing_mm)
    origin = low - spacing
    if _is_along_lps(fixed):
        voxel = np.abs(fixed.affine[:3, :3]).max(axis=1)
        spacing = voxel * np.maximum(np.rint(spacing_mm / voxel), 1)
        origin = low + voxel / 2 - spacing * (np.ceil(voxel / 2 / spacing) + 1)
    origin = np.array([float(str(decimal(value))) for value in origin])  # as Decimal String will hold it
    x, y, z = np.ceil((high - origin) / spacing - 1e-6).astype(int) + 2
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing)[:, ::-1]
    affine[:3, 3] = origin
    return Grid((int(z), int(y), int(x)), affine)


def _is_along_lps(grid: Grid) -> bool:
    """Whether leaning away from the LPS axes moves no voxel by more than a hundredth of a millimetre."""
    axes = np.abs(grid.affine[:3, :3])
    leaning = np.where(axes == axes.max(axis=0), 0, axes) @ grid.shape
    return bool(leaning.max() < 0.01)


def _bytes(grid: Grid) -> int:
    return int(np.prod(grid.shape, dtype=np.int64)) * 12


def _total(registration: Registration, displacement: npt.NDArray[np.float32] | None, grid: Grid) -> DisplacementField:
    """The displacement on `grid` with the linear part added."""
    linear = Registration(grid, registration.rigid, registration.moving_from_fixed, displacement, registration.report)
    return linear.total_field()


def _errors(registration: Registration, sampled: DisplacementField) -> Iterator[float]:
    """Largest error of each slab of fixed slices; the linear part is exact on any grid and takes no part."""
    assert registration.displacement is not None
    still = DisplacementField(np.zeros((2, 2, 2, 3), dtype=np.float32), Grid((2, 2, 2), np.eye(4)))
    slices, rows, columns = registration.grid.shape
    for first in range(0, slices, _SLAB):
        exact = registration.displacement[first : first + _SLAB]
        affine = registration.grid.affine.copy()
        affine[:3, 3] = registration.grid.points_mm(np.array([first, 0.0, 0.0]))
        slab = Grid((len(exact), rows, columns), affine)
        squares = np.zeros(slab.shape)
        for c in range(3):
            component = Volume(sampled.vectors[..., c], sampled.grid)
            squares += np.square(warp(component, still, slab).voxels - exact[..., c])
        yield float(np.sqrt(squares.max()))


def plane_of(grid: Grid, k: int) -> npt.NDArray[np.float64]:
    """LPS mm (rows, columns, 3) of one plane's nodes."""
    j, i = np.indices(grid.shape[1:], dtype=np.float64)
    return grid.points_mm(np.stack([np.full_like(j, k), j, i], axis=-1))
