"""Where numbers live, and the one home of the flips between the conventions.

Four spaces. *World*: LPS mm, points (x, y, z). *Index*: array indices (k, j, i) of a `Grid`. *Lattice*: millimetres
along a grid's own array axes, components (i, j, k) — column, row, slice direction — so that a displacement keeps its
unit on every level and along every voxel size. *Sampling*: what `grid_sample` wants, (i, j, k) in [-1, 1] with
align_corners. Tensors are channel first: images (1, Z, Y, X), displacements (3, Z, Y, X) in lattice millimetres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from registration_engine.volume import Grid

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Lattice:
    """The sampling positions of one grid on one device, ready for `sample`.

    Attributes
    ----------
    identity
        (3, Z, Y, X), sampling coordinates of the voxel centers.
    spacing_mm
        (i, j, k) distances between voxel centers.
    """

    identity: Tensor
    spacing_mm: tuple[float, float, float]

    @staticmethod
    def of(grid: Grid, device: torch.device) -> Lattice:
        """The lattice of a grid; every axis needs two voxels or more."""
        axes = [torch.linspace(-1.0, 1.0, n, device=device) for n in grid.shape]
        k, j, i = torch.meshgrid(*axes, indexing="ij")
        dk, dj, di = grid.spacing_mm.tolist()
        return Lattice(torch.stack([i, j, k]), (di, dj, dk))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        z, y, x = self.identity.shape[1:]
        return z, y, x

    def displaced(self, displacement: Tensor) -> Tensor:
        """Sampling coordinates (3, Z, Y, X) of x + displacement(x)."""
        sizes = reversed(self.shape)
        scale = [2.0 / ((n - 1) * s) for n, s in zip(sizes, self.spacing_mm, strict=True)]
        factors = torch.tensor(scale, device=displacement.device).view(3, 1, 1, 1)
        return torch.addcmul(self.identity, displacement, factors)


def sample(image: Tensor, coordinates: Tensor) -> Tensor:
    """Interpolate (C, Z, Y, X) linearly at sampling coordinates (3, Z', Y', X'); the outermost voxels continue."""
    # One batch entry per slice: PyTorch runs grid_sample in parallel over the batch only.
    slices = coordinates.shape[1]
    return grid_sample(
        image[None].expand(slices, *image.shape),
        coordinates.permute(1, 2, 3, 0)[:, None],
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )[:, :, 0].transpose(0, 1)


def sample_where_valid(layers: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate an image and tell where it has data.

    Parameters
    ----------
    layers
        (2, Z, Y, X): the image, and 1 where it is valid; or (1, Z, Y, X), valid everywhere.

    Returns
    -------
    tuple[Tensor, Tensor]
        The image (Z', Y', X'), continued beyond its border so that no false edge arises there, and a mask, true
        for points between valid voxels.
    """
    image, *valid = sample(layers, coordinates)
    inside = coordinates.detach().abs().amax(0) <= 1
    for mask in valid:
        inside &= mask.detach() > 0.99
    return image, inside


def share_inside(coordinates: Tensor, shape: torch.Size, *, fade: float) -> Tensor:
    """How much of each point counts as within a grid: 1 up to half a voxel beyond its outer centers, then falling.

    Differentiable, unlike the mask of `sample_where_valid`: what slips over the border can find back.

    Parameters
    ----------
    shape
        (Z, Y, X) of the grid.
    fade
        Voxels in which it falls to 0.
    """
    voxels = coordinates.new_tensor([(n - 1) / 2 for n in reversed(shape)]).view(3, 1, 1, 1)
    beyond = ((coordinates.abs() - 1) * voxels).amax(0) - 0.5
    return (1 - beyond / fade).clamp(0, 1)


def world_from_sampling(grid: Grid) -> Matrix:
    """(4, 4), sampling coordinates of a grid to LPS mm."""
    return np.asarray(grid.affine @ _index_from_sampling(grid), dtype=np.float64)


def sampling_from_world(grid: Grid) -> Matrix:
    """(4, 4), LPS mm to sampling coordinates of a grid."""
    return np.asarray(np.linalg.inv(world_from_sampling(grid)), dtype=np.float64)


def linear_coordinates(identity: Tensor, matrix: Tensor) -> Tensor:
    """Apply a (4, 4) to coordinates (3, Z, Y, X)."""
    m = matrix[:3].to(identity.device, torch.float32)
    return torch.addmm(m[:, 3:], m[:, :3], identity.reshape(3, -1)).view_as(identity)


def world_from_lattice(grid: Grid) -> Matrix:
    """(3, 3), turns a displacement's components (i, j, k) in lattice mm into (x, y, z) in LPS mm."""
    directions = grid.affine[:3, :3] / grid.spacing_mm
    return np.asarray(directions[:, ::-1], dtype=np.float64)


def centered_grid(grid: Grid, lower_mm: Matrix, upper_mm: Matrix, spacing_mm: Matrix) -> Grid:
    """A grid along the axes of `grid` that covers a box.

    Parameters
    ----------
    lower_mm, upper_mm
        (3,), millimetres from the first voxel center of `grid` along its axes (k, j, i); the box is covered and
        the surplus shared between both ends.
    spacing_mm
        (3,), order (k, j, i).
    """
    counts = np.maximum(np.ceil((upper_mm - lower_mm) / spacing_mm - 1e-6).astype(int) + 1, 2)
    first = (lower_mm + upper_mm - (counts - 1) * spacing_mm) / 2
    affine = grid.affine.copy()
    affine[:3, :3] = grid.affine[:3, :3] / grid.spacing_mm * spacing_mm
    affine[:3, 3] = grid.points_mm(first / grid.spacing_mm)
    shape = (int(counts[0]), int(counts[1]), int(counts[2]))
    return Grid(shape, affine)


def _index_from_sampling(grid: Grid) -> Matrix:
    """(4, 4): sampling (i, j, k) in [-1, 1] to index (k, j, i)."""
    half = (np.array(grid.shape) - 1) / 2
    matrix = np.zeros((4, 4))
    matrix[[0, 1, 2], [2, 1, 0]] = half
    matrix[:3, 3] = half
    matrix[3, 3] = 1
    return matrix
