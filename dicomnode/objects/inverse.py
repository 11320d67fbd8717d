"""The way back: where each point of the moving image lies in the fixed one, the delivered field inverted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dicomnode.objects.deformable import SampledField, plane_of, sample_grid
from registration_engine import DisplacementField, Grid, Registration, Volume, inverse, warp

_SLAB = 16
_BEYOND = 1e6
"""Farther than any displacement, mm: marks what lies beyond the delivered grid."""


def inverted(registration: Registration, sampled: SampledField, moving: Grid) -> SampledField:
    """The inverse of the delivered field, sampled around the moving volume.

    Parameters
    ----------
    registration
        For its linear part, which the iteration starts from.
    moving
        The moving volume's grid.

    Returns
    -------
    SampledField
        Total displacement from moving to fixed. Its error is that of the round trip: the largest distance of a moving
        voxel from where it comes back to, over those whose way leads through the delivered grid.
    """
    fixed_from_moving = np.asarray(np.linalg.inv(registration.moving_from_fixed), dtype=np.float64)
    rest = _beside_linear(sampled.field, registration.moving_from_fixed)
    exact = inverse(replace(registration, grid=sampled.field.grid, displacement=rest), moving)
    way_back = Registration(
        grid=moving,
        rigid=np.asarray(np.linalg.inv(registration.rigid), dtype=np.float64),
        moving_from_fixed=fixed_from_moving,
        displacement=_beside_linear(exact, fixed_from_moving),
        report=registration.report,
    )
    back = sample_grid(way_back)
    return replace(back, max_error_mm=max(_round_trips_mm(sampled.field, back.field, moving)))


def _beside_linear(field: DisplacementField, linear: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The vectors less the displacement of a (4, 4) map of points."""
    rest = np.empty_like(field.vectors)
    for k in range(field.grid.shape[0]):
        points = plane_of(field.grid, k)
        rest[k] = field.vectors[k] - (points @ (linear[:3, :3] - np.eye(3)).T + linear[:3, 3])
    return rest


def _round_trips_mm(there: DisplacementField, back: DisplacementField, moving: Grid) -> Iterator[float]:
    """Largest error of each slab of moving slices; 0 where none comes back through the delivered grid."""
    for first in range(0, moving.shape[0], _SLAB):
        affine = moving.affine.copy()
        affine[:3, 3] = moving.points_mm(np.array([first, 0.0, 0.0]))
        slab = Grid((min(_SLAB, moving.shape[0] - first), *moving.shape[1:]), affine)
        squares = np.zeros(slab.shape)
        for c in range(3):
            away = warp(Volume(back.vectors[..., c], back.grid), None, slab).voxels
            home = warp(Volume(there.vectors[..., c], there.grid), back, slab, outside=_BEYOND).voxels
            squares += np.square(away + home)
        yield float(np.sqrt(squares.max(initial=0.0, where=squares < _BEYOND)))
