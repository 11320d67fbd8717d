"""Images and registrations in physical space. Arrays are (Z, Y, X); points are (x, y, z) LPS millimetres.

Law: every class here is frozen, checks itself when built, and knows nothing of DICOM, files or devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from registration_engine.errors import InvalidVolumeError

LARGEST_VALUE = 1e18
"""Of a voxel: its square is still a float32."""

FARTHEST_MM = 1e6
"""From the origin of a grid's corner, and largest component of a displacement: a float32 still tells tenths there."""

FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular, orthogonal voxel grid in LPS millimetres.

    Parameters
    ----------
    shape
        (Z, Y, X), number of voxels.
    affine
        (4, 4) float64; array index (k, j, i, 1) → LPS mm (x, y, z, 1) of the voxel centre, highdicom's convention.

    Raises
    ------
    InvalidVolumeError
        The affine is singular, not finite, sheared, or reaches too far, or an axis has no voxel.
    """

    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
            raise InvalidVolumeError(
                f"Grid affine: got {self.affine!r}, expected a finite (4, 4) with last row 0 0 0 1"
            )
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InvalidVolumeError(f"Grid shape: got {self.shape}, expected three positive sizes (Z, Y, X)")
        axes = affine[:3, :3]
        spacing = np.linalg.norm(axes, axis=0)
        if (spacing <= 0).any():
            raise InvalidVolumeError(f"Grid spacing: got {spacing.tolist()} mm, expected positive values")
        shear = float(np.abs((axes / spacing).T @ (axes / spacing) - np.eye(3)).max())
        if shear > 1e-3:
            raise InvalidVolumeError(f"Grid axes are not orthogonal: largest cosine {shear:.4f}, expected below 0.001")
        extent = np.abs(axes) @ np.array(self.shape, dtype=np.float64)
        if (np.abs(affine[:3, 3]) + extent).max() > FARTHEST_MM:
            raise InvalidVolumeError(
                f"Grid: got its first voxel at {affine[:3, 3].tolist()} mm and an extent of {extent.tolist()} mm, "
                f"expected all within {FARTHEST_MM:.0f} mm of the origin"
            )
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @property
    def spacing_mm(self) -> npt.NDArray[np.float64]:
        """(3,), distance between voxel centres along the array axes (Z, Y, X)."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0), dtype=np.float64)

    @property
    def is_right_handed(self) -> bool:
        """Whether column × row × slice directions form a right-handed system."""
        return bool(np.linalg.det(self.affine[:3, 2::-1]) > 0)

    def points_mm(self, index: FloatArray) -> npt.NDArray[np.float64]:
        """LPS mm (..., 3) of array indices (..., 3), order (k, j, i)."""
        return np.asarray(index @ self.affine[:3, :3].T + self.affine[:3, 3], dtype=np.float64)

    def indices(self, points_mm: FloatArray) -> npt.NDArray[np.float64]:
        """Continuous array indices (..., 3), order (k, j, i), of LPS mm points (..., 3)."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(points_mm @ inverse[:3, :3].T + inverse[:3, 3], dtype=np.float64)

    def is_same_as(self, other: Grid, *, tolerance_mm: float = 1e-3) -> bool:
        """Whether both grids have one shape and every voxel centre within the tolerance."""
        corners = np.array([[k, j, i] for k in (0, 1) for j in (0, 1) for i in (0, 1)]) * (np.array(self.shape) - 1)
        return self.shape == other.shape and bool(
            np.abs(self.points_mm(corners) - other.points_mm(corners)).max() <= tolerance_mm
        )


@dataclass(frozen=True, eq=False)
class Volume:
    """One scalar image on a grid.

    Parameters
    ----------
    voxels
        (Z, Y, X); stored as float32, read-only.
    grid
        Where the voxels are.

    Raises
    ------
    InvalidVolumeError
        Shapes differ, or a voxel is not finite or beyond `LARGEST_VALUE`.
    """

    voxels: npt.NDArray[np.float32]
    grid: Grid

    def __post_init__(self) -> None:
        voxels = np.ascontiguousarray(self.voxels, dtype=np.float32)
        if voxels.shape != self.grid.shape:
            raise InvalidVolumeError(
                f"Volume: got voxels of shape {voxels.shape}, expected the grid's {self.grid.shape}"
            )
        bad = int(voxels.size - np.count_nonzero(np.isfinite(voxels)))
        if bad:
            raise InvalidVolumeError(f"Volume: {bad} of {voxels.size} voxels are NaN or infinite, expected none")
        if max(-float(voxels.min()), float(voxels.max())) > LARGEST_VALUE:
            raise InvalidVolumeError(
                f"Volume: got values from {voxels.min():g} to {voxels.max():g}, expected within {LARGEST_VALUE:g}"
            )
        if voxels is self.voxels:
            voxels = voxels.view()
        voxels.setflags(write=False)
        object.__setattr__(self, "voxels", voxels)


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """Total displacement x_moving - x_fixed, sampled on a grid in fixed space.

    Parameters
    ----------
    vectors
        (Z, Y, X, 3), mm, components (x, y, z); stored as float32, read-only.
    grid
        Where the vectors are; trilinear between them.

    Raises
    ------
    InvalidVolumeError
        Shapes differ, or a component is not finite or beyond `FARTHEST_MM`.
    """

    vectors: npt.NDArray[np.float32]
    grid: Grid

    def __post_init__(self) -> None:
        vectors = np.ascontiguousarray(self.vectors, dtype=np.float32)
        if vectors.shape != (*self.grid.shape, 3):
            raise InvalidVolumeError(f"Field: got shape {vectors.shape}, expected {(*self.grid.shape, 3)}")
        if not np.isfinite(vectors).all():
            raise InvalidVolumeError("Field: holds NaN or infinite components, expected none")
        if max(-float(vectors.min()), float(vectors.max())) > FARTHEST_MM:
            raise InvalidVolumeError(
                f"Field: got components from {vectors.min():g} to {vectors.max():g} mm, expected within {FARTHEST_MM:g}"
            )
        if vectors is self.vectors:
            vectors = vectors.view()
        vectors.setflags(write=False)
        object.__setattr__(self, "vectors", vectors)


@dataclass(frozen=True)
class Report:
    """What a registration did and how good it is. All similarities are larger = better.

    Attributes
    ----------
    preset, device, seed, model_sha256
        What was asked and with which weights; model_sha256 is None where no network took part.
    profile
        "full", or "lean" where the device had memory for half the resolution only.
    similarity_before, similarity_after
        Normalized mutual information 2·I/(H_F+H_M) over the overlap, before and after.
    folding_fraction
        Share of fixed-foreground voxels with det J <= 0 of the total map.
    sdlogj
        Standard deviation of ln det J of the displacement's non-affine part, det clipped to 0.01–100.
    max_displacement_mm
        Largest non-affine displacement over the fixed foreground.
    seconds
        Wall seconds per stage, in order.
    peak_memory_bytes
        Peak of the process (CPU) or of the device allocator (GPU).
    """

    preset: str
    device: str
    seed: int
    model_sha256: str | None
    similarity_before: float
    similarity_after: float
    folding_fraction: float
    sdlogj: float
    max_displacement_mm: float
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    profile: str = "full"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class Registration:
    """Where each point of the fixed image lies in the moving image.

    x_moving = moving_from_fixed @ x_fixed + displacement(x_fixed), all in LPS mm.

    Attributes
    ----------
    grid
        The fixed grid.
    rigid
        (4, 4) float64, orthonormal: the rigid stage alone, x_moving ≈ rigid @ x_fixed.
    moving_from_fixed
        (4, 4) float64, rigid or affine; the linear part of the map above.
    displacement
        (Z, Y, X, 3) float32, mm, components (x, y, z), or None where the preset is linear only.
    report
        Measurements of this registration.
    """

    grid: Grid
    rigid: npt.NDArray[np.float64]
    moving_from_fixed: npt.NDArray[np.float64]
    displacement: npt.NDArray[np.float32] | None
    report: Report

    def total_field(self) -> DisplacementField:
        """The whole map as one displacement field on the fixed grid, affine included."""
        k, j, i = np.meshgrid(*[np.arange(n, dtype=np.float64) for n in self.grid.shape], indexing="ij", sparse=True)
        total = np.empty((*self.grid.shape, 3), dtype=np.float32)
        linear = (self.moving_from_fixed - np.eye(4))[:3] @ self.grid.affine
        for c in range(3):
            total[..., c] = linear[c, 0] * k + linear[c, 1] * j + linear[c, 2] * i + linear[c, 3]
        if self.displacement is not None:
            total += self.displacement
        return DisplacementField(total, self.grid)
