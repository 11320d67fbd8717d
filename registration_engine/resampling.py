"""Resampling through a displacement field, by SimpleITK, so that anyone's SimpleITK gives the same voxels.

SimpleITK is imported when first used: `register` runs where it is not installed.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from registration_engine.volume import DisplacementField, Grid, Volume

Interpolation = Literal["linear", "nearest"]


def warp(
    moving: Volume,
    field: DisplacementField | None,
    onto: Grid,
    *,
    outside: float = 0.0,
    interpolation: Interpolation = "linear",
) -> Volume:
    """Resample the moving image at x + displacement(x) for every voxel center x of a grid.

    ITK's border rule: a point counts as inside up to half a voxel beyond the outer centers. Where a grid reaches
    beyond the field's own, the displacement there is zero, as `itk::DisplacementFieldTransform` defines it.

    Parameters
    ----------
    field
        Total displacement, linear part included; trilinear between its vectors. None: the image where it lies.
    outside
        Value of points outside the moving image.
    """
    sitk = simpleitk()
    interpolators = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor}
    transform = sitk.Transform() if field is None else sitk.DisplacementFieldTransform(field_image(field))
    resampled = sitk.Resample(
        image_of(moving.voxels, moving.grid),
        onto.shape[::-1],
        transform,
        interpolators[interpolation],
        *_geometry(onto),
        outside,
        sitk.sitkFloat32,
    )
    return Volume(sitk.GetArrayFromImage(resampled), onto)


def reached(moving: Grid, field: DisplacementField | None, onto: Grid) -> npt.NDArray[np.bool_]:
    """The voxels (Z, Y, X) of a grid whose place, through a field, lies within an image of grid `moving`."""
    ones = Volume(np.ones(moving.shape, np.float32), moving)
    return np.asarray(warp(ones, field, onto, interpolation="nearest").voxels > 0)


def image_of(voxels: npt.NDArray[Any], grid: Grid) -> Any:
    """A SimpleITK image of an array (Z, Y, X) or, as a vector image, (Z, Y, X, C)."""
    image = simpleitk().GetImageFromArray(voxels, isVector=voxels.ndim == 4)
    origin, spacing, direction = _geometry(grid)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    return image


def field_image(field: DisplacementField) -> Any:
    """The field as the vector image that `sitk.DisplacementFieldTransform` takes; it consumes the image."""
    return image_of(field.vectors.astype(np.float64), field.grid)


def grid_of(image: Any) -> Grid:
    """The grid of a three-dimensional SimpleITK image."""
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = (directions * image.GetSpacing())[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    i, j, k = image.GetSize()
    return Grid((k, j, i), affine)


def simpleitk() -> Any:
    """The SimpleITK package."""
    import SimpleITK

    return SimpleITK


def _geometry(grid: Grid) -> tuple[list[float], list[float], list[float]]:
    """ITK's origin, spacing and row-major direction, axes (i, j, k)."""
    spacing = grid.spacing_mm[::-1]
    directions = grid.affine[:3, 2::-1] / spacing
    return grid.affine[:3, 3].tolist(), spacing.tolist(), directions.ravel().tolist()
