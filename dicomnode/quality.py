"""How good one registration is: figures and maps, measured on the very field that is delivered. Pure.

Law: nothing here decides. `verdict` holds the thresholds, `objects` write down what was measured; the same input gives
the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from registration_engine import DisplacementField, Grid, Registration, Volume, evaluation, warp
from registration_engine.patches import patch_mutual_information
from registration_engine.resampling import reached

Mask = npt.NDArray[np.bool_]
Map = npt.NDArray[np.float32]

LARGEST_VOXELS = 16_000_000
"""A finer fixed grid is thinned to this size, finest axis first: it bounds memory and time."""
FELL = 0.02
"""A voxel's patch-wise NMI fell where it is lower than before by more than this."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one registration; NaN where there was nothing to measure.

    "Body" is what is brighter than air in the fixed image, voxels of the measuring grid. Every figure but the
    similarities and the rigid stage is of the delivered field, total map x_fixed → x_moving.

    Attributes
    ----------
    similarity_before, similarity_after
        Normalized mutual information 2·I/(H_F+H_M) over the overlap, as the engine reports it; 0…1, higher = better.
    patch_nmi_before, patch_nmi_after
        Mean of the patch-wise NMI map (the paper's Appendix C) over the body that the moving image reaches both times.
    patch_nmi_fell_fraction
        Share of those voxels whose patch-wise NMI is lower than before by more than `FELL`.
    overlap_fraction
        Share of the body that the moved image reaches.
    folding_fraction
        Share of the field's nodes within the fixed volume with det J <= 0.
    jacobian_min, jacobian_p01, jacobian_median, jacobian_p99, jacobian_max
        Of det J over the body; 1 = unchanged, 1.1 = the moving image's tissue is 10 % larger there.
    sdlogj
        Standard deviation of ln det J over the body, det clipped to 0.01–100. A linear part leaves it as it is.
    displacement_mean_mm, displacement_p95_mm, displacement_max_mm
        Length of the total displacement over the body.
    nonlinear_mean_mm, nonlinear_p95_mm, nonlinear_max_mm
        The same of what goes beyond the linear stage: v of T = A∘(id + v).
    rotation_deg, translation_mm
        Of the rigid stage: its angle, and how far it moves the body's center.
    inverse_consistency_mean_mm, inverse_consistency_p95_mm, inverse_consistency_max_mm
        Distance of x from inverse(T)(T(x)) over the field's nodes within the body; the inverse is T's own, numerical.
    grid_error_mm
        Largest distance of the delivered field from the engine's map over the fixed voxels.
    """

    similarity_before: float
    similarity_after: float
    patch_nmi_before: float
    patch_nmi_after: float
    patch_nmi_fell_fraction: float
    overlap_fraction: float
    folding_fraction: float
    jacobian_min: float
    jacobian_p01: float
    jacobian_median: float
    jacobian_p99: float
    jacobian_max: float
    sdlogj: float
    displacement_mean_mm: float
    displacement_p95_mm: float
    displacement_max_mm: float
    nonlinear_mean_mm: float
    nonlinear_p95_mm: float
    nonlinear_max_mm: float
    rotation_deg: float
    translation_mm: float
    inverse_consistency_mean_mm: float
    inverse_consistency_p95_mm: float
    inverse_consistency_max_mm: float
    grid_error_mm: float

    def as_dict(self) -> dict[str, float | None]:
        """Plain values for JSON, None for NaN."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Figures:
        """What `as_dict` gave."""
        found = {each.name: values[each.name] for each in fields(Figures)}
        return Figures(**{name: math.nan if value is None else float(value) for name, value in found.items()})


@dataclass(frozen=True, eq=False)
class Measured:
    """What takes long to measure: the figures, and the patch-wise NMI as `Quality` has it."""

    figures: Figures
    patches: tuple[Map, Map]


@dataclass(frozen=True, eq=False)
class Quality:
    """The figures, and the images and maps (Z, Y, X) they were taken from, all on `fixed.grid`.

    Attributes
    ----------
    fixed
        The fixed image on the measuring grid: its own, or thinned by whole voxels.
    unmoved, registered
        The moving image there, without and with the delivered field.
    body, overlap
        What is brighter than air in the fixed image; what the moved image reaches.
    patches
        Patch-wise NMI before and after; NaN outside the measured part of the body.
    jacobian
        det J of the total map.
    displacement, nonlinear
        Length in mm of the total displacement, and of what goes beyond the linear stage.
    """

    figures: Figures
    fixed: Volume
    unmoved: Volume
    registered: Volume
    body: Mask
    overlap: Mask
    patches: tuple[Map, Map]
    jacobian: Map
    displacement: Map
    nonlinear: Map

    @property
    def measured(self) -> Measured:
        """What `measure` need not do again."""
        return Measured(self.figures, self.patches)


def measure(
    fixed: Volume,
    moving: Volume,
    registration: Registration,
    delivered: DisplacementField,
    *,
    grid_error_mm: float,
    measured: Measured | None = None,
) -> Quality:
    """Measure one registration.

    Parameters
    ----------
    delivered
        The total field that the objects carry, on any grid around the fixed volume.
    grid_error_mm
        How far it is from the engine's map at most.
    measured
        Of a former call with the same arguments; made anew where None.

    Raises
    ------
    InvalidVolumeError
        The fixed image is constant or has fewer than four voxels along an axis.
    """
    grid, every = thinned(fixed.grid, LARGEST_VOXELS)
    image = Volume(fixed.voxels[every], grid)
    body = body_of(image)
    outside = float(moving.voxels.min())
    unmoved, registered = (warp(moving, field, grid, outside=outside) for field in (None, delivered))
    overlap = reached(moving.grid, delivered, grid)
    seen = body & overlap
    at_start = seen & reached(moving.grid, None, grid)
    # Without overlap at the start there is nothing to compare with.
    domain = at_start if at_start.any() else seen
    if measured is not None:
        first, second = measured.patches
    else:
        first, second = (patch_mutual_information(image.voxels, each.voxels, domain) for each in (unmoved, registered))

    determinant = evaluation.jacobian_determinant(delivered)
    jacobian = _on(grid, delivered.grid, determinant)
    rest = _beyond(registration, delivered)
    displacement, nonlinear = _length(delivered, grid), _length(rest, grid)
    before, after = (patch[domain & np.isfinite(patch)] for patch in (first, second))
    figures = (
        measured.figures
        if measured is not None
        else Figures(
            similarity_before=float(registration.report.similarity_before),
            similarity_after=float(registration.report.similarity_after),
            patch_nmi_before=_mean(before),
            patch_nmi_after=_mean(after),
            patch_nmi_fell_fraction=_mean(after < before - FELL),
            overlap_fraction=_mean(overlap[body]),
            folding_fraction=_mean(determinant[_within(fixed.grid, delivered.grid)] <= 0),
            **dict(zip(_JACOBIAN, _percentiles(jacobian[body], (0, 1, 50, 99, 100)), strict=True)),
            sdlogj=float(np.log(np.clip(jacobian[body], 0.01, 100), dtype=np.float64).std())
            if body.any()
            else math.nan,
            **_lengths("displacement", displacement[body]),
            **_lengths("nonlinear", nonlinear[body]),
            **_rigid(registration.rigid, image, body),
            **_lengths("inverse_consistency", _inconsistency(rest, body, grid)),
            grid_error_mm=float(grid_error_mm),
        )
    )
    return Quality(
        figures, image, unmoved, registered, body, overlap, (first, second), jacobian, displacement, nonlinear
    )


def thinned(grid: Grid, largest: int) -> tuple[Grid, tuple[slice, slice, slice]]:
    """Every nth voxel, the finest axes first, until no more than `largest` are left: the grid, and which they are."""
    steps = np.ones(3, dtype=int)
    while np.prod(-(-np.array(grid.shape) // steps)) > largest:
        spacing = grid.spacing_mm * steps
        steps[spacing < 1.2 * spacing.min()] *= 2
    affine = grid.affine.copy()
    affine[:3, :3] *= steps
    z, y, x = -(-np.array(grid.shape) // steps)
    return Grid((int(z), int(y), int(x)), affine), (
        slice(None, None, steps[0]),
        slice(None, None, steps[1]),
        slice(None, None, steps[2]),
    )


def body_of(image: Volume) -> Mask:
    """What is brighter than air in an image (Z, Y, X). Raises InvalidVolumeError as `measure` does."""
    from registration_engine import prepare  # brings torch, which only workers have a need of

    return prepare.body(image)


_JACOBIAN = ("jacobian_min", "jacobian_p01", "jacobian_median", "jacobian_p99", "jacobian_max")


def _on(grid: Grid, own: Grid, values: npt.NDArray[np.float32]) -> Map:
    """A map resampled, trilinear."""
    return warp(Volume(values, own), None, grid).voxels


def _length(field: DisplacementField, grid: Grid) -> Map:
    squares = np.zeros(grid.shape, dtype=np.float32)
    for c in range(3):
        squares += np.square(_on(grid, field.grid, field.vectors[..., c]))
    return np.sqrt(squares)


def _beyond(registration: Registration, delivered: DisplacementField) -> DisplacementField:
    """v of T = A∘(id + v), A the linear stage."""
    back = np.linalg.inv(registration.moving_from_fixed)
    vectors = np.empty_like(delivered.vectors)
    for k, plane in enumerate(_planes(delivered.grid)):
        vectors[k] = (plane + delivered.vectors[k]) @ back[:3, :3].T + back[:3, 3] - plane
    return DisplacementField(vectors, delivered.grid)


def _inconsistency(rest: DisplacementField, body: Mask, grid: Grid) -> npt.NDArray[np.float64]:
    """A being exact, the distance of T's inverse from T is that of v's."""
    at_nodes = _within(grid, rest.grid)
    index = np.rint(grid.indices(rest.grid.points_mm(np.argwhere(at_nodes).astype(np.float64)))).astype(int)
    at_nodes[at_nodes] = body[tuple(np.clip(index, 0, np.array(grid.shape) - 1).T)]
    if not at_nodes.any():
        return np.empty(0)
    return evaluation.inverse_consistency(rest, evaluation.inverted(rest), at_nodes)


def _within(fixed: Grid, nodes: Grid) -> Mask:
    """The nodes that lie within the voxels of the fixed grid."""
    inside = np.empty(nodes.shape, dtype=bool)
    for k, plane in enumerate(_planes(nodes)):
        index = fixed.indices(plane)
        inside[k] = ((index >= -0.5) & (index <= np.array(fixed.shape) - 0.5)).all(-1)
    return inside


def _planes(grid: Grid) -> Iterator[npt.NDArray[np.float64]]:
    """LPS mm (Y, X, 3) of each slice."""
    plane = np.moveaxis(np.indices((1, *grid.shape[1:]), dtype=np.float64), 0, -1)[0]
    for k in range(grid.shape[0]):
        plane[..., 0] = k
        yield grid.points_mm(plane)


def _rigid(rigid: npt.NDArray[np.float64], image: Volume, body: Mask) -> dict[str, float]:
    cosine = (np.trace(rigid[:3, :3]) - 1) / 2
    shares = [body.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    center = image.grid.points_mm(np.array([share @ np.arange(len(share)) for share in shares]) / max(body.sum(), 1))
    moved = rigid[:3, :3] @ center + rigid[:3, 3] - center
    return {
        "rotation_deg": math.degrees(math.acos(min(max(float(cosine), -1.0), 1.0))),
        "translation_mm": float(np.linalg.norm(moved)),
    }


def _lengths(name: str, values: npt.NDArray[Any]) -> dict[str, float]:
    p95, largest = _percentiles(values, (95, 100))
    return {f"{name}_mean_mm": _mean(values), f"{name}_p95_mm": p95, f"{name}_max_mm": largest}


def _percentiles(values: npt.NDArray[Any], which: tuple[int, ...]) -> list[float]:
    return [float(p) for p in np.percentile(values, which)] if values.size else [math.nan] * len(which)


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else math.nan
