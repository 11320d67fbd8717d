"""Algebra of displacement fields: compose, smooth, resize, invert, measure.

Every field is (3, Z, Y, X) in lattice millimetres (see `spaces`). Linear filters along the three axes are dense
matrices: exact at the borders, their own adjoint when transposed, and faster than convolutions at these sizes.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from registration_engine.spaces import Lattice, linear_coordinates, sample, sampling_from_world, world_from_sampling
from registration_engine.volume import DisplacementField, Grid, Registration

_BLOCK = 32  # rows of a filter matrix taken together
_INVERSE_STEPS, _INVERSE_MM = 40, 0.005
_SLAB = 16  # slices worked on at a time, so that what lies between stays in the cache
NEGLIGIBLE_MM = 1e-9  # smaller components become zero: repeated smoothing would make denormal numbers, 20 times slower


def compose(outer: Tensor, inner: Tensor, lattice: Lattice) -> Tensor:
    """Displacement of (id + outer) ∘ (id + inner): ``inner(x) + outer(x + inner(x))``, outer continued constant."""
    return inner + sample(outer, lattice.displaced(inner))


def smooth(field: Tensor, sigma_mm: float, lattice: Lattice, *, sharpened: bool = False) -> Tensor:
    """Gaussian of one width in millimetres on all axes, renormalised at the border.

    Parameters
    ----------
    sharpened
        Apply 2G - G² in place of the Gaussian G along each axis: waves much longer than sigma_mm pass almost unchanged,
        short ones are held back as before. As a regulariser it acts on the bending of a field rather than its slope.

    References
    ----------
    Kaiser and Hamming, Sharpening the response of a symmetric nonrecursive filter by multiple use of the same filter,
    IEEE Transactions on Acoustics, Speech and Signal Processing 1977.
    """
    filters = [
        gaussian_matrix(n, sigma_mm / s, field.device)
        for n, s in zip(lattice.shape, lattice.spacing_mm[::-1], strict=True)
    ]
    if sharpened:
        filters = [2 * g - g @ g for g in filters]
    return hardshrink(separable(field, *filters), NEGLIGIBLE_MM)


def gradient(image: Tensor, spacing_mm: tuple[float, float, float]) -> Tensor:
    """(3, Z, Y, X), derivatives along (i, j, k) per mm of (1, Z, Y, X); central, one-sided at the border."""
    return torch.stack([_derivative(image[0], axis, spacing_mm[2 - axis]) for axis in (2, 1, 0)])


def jacobian_determinant(field: Tensor, spacing_mm: tuple[float, float, float]) -> Tensor:
    """Local volume change (Z, Y, X) of x → x + field(x); 1 = unchanged, <= 0 = folded.

    Central differences, one-sided at the border.

    References
    ----------
    Leow et al., Statistical properties of Jacobian maps, IEEE TMI 2007.
    """
    a, b, c = (gradient(field[n : n + 1], spacing_mm) for n in range(3))
    a[0] += 1
    b[1] += 1
    c[2] += 1
    return a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])


def smallest_determinant(field: Tensor, spacing_mm: tuple[float, float, float]) -> Tensor:
    """The smallest local volume change (Z, Y, X) in the cells around each voxel.

    One-sided differences towards every corner: where all are positive, the trilinear map folds nowhere between the
    voxels either, which central differences can miss.
    """
    slices = field.shape[1]
    lowest = torch.empty(field.shape[1:], device=field.device)
    for first in range(0, slices, _SLAB):
        last = min(first + _SLAB, slices)
        low, high = max(first - 1, 0), min(last + 1, slices)
        lowest[first:last] = _smallest_determinant(field[:, low:high], spacing_mm)[first - low : last - low]
    return lowest


def _smallest_determinant(field: Tensor, spacing_mm: tuple[float, float, float]) -> Tensor:
    lowest = torch.full(field.shape[1:], torch.inf, device=field.device)
    steps = []
    for axis in range(3):
        forward = field.diff(dim=axis + 1) / spacing_mm[2 - axis]
        forward[2 - axis] += 1
        first, last = forward.narrow(axis + 1, 0, 1), forward.narrow(axis + 1, forward.shape[axis + 1] - 1, 1)
        steps.append((torch.cat([forward, last], axis + 1), torch.cat([first, forward], axis + 1)))
    for k, j in product(*steps[:2]):
        normal = (j[1] * k[2] - j[2] * k[1], j[2] * k[0] - j[0] * k[2], j[0] * k[1] - j[1] * k[0])
        for i in steps[2]:
            torch.minimum(lowest, i[0] * normal[0] + i[1] * normal[1] + i[2] * normal[2], out=lowest)
    return lowest


def inverse(registration: Registration, onto: Grid, *, device: str = "cpu") -> DisplacementField:
    """Where each point of the moving image lies in the fixed image: the displacement back, for contours and doses.

    Fixed-point iteration on x = moving_from_fixed⁻¹ (y - displacement(x)), damped from the tenth step on.

    Parameters
    ----------
    onto
        Grid in moving space that the result is sampled on.

    Returns
    -------
    DisplacementField
        x_fixed - x_moving, mm LPS, at the voxel centers of `onto`. Beyond the fixed grid its outermost vectors
        continue.

    References
    ----------
    Chen et al., A simple fixed-point approach to invert a deformation field, Medical Physics 2008.
    """
    identity, from_sampling = Lattice.of(onto, torch.device(device)).identity, world_from_sampling(onto)
    y = linear_coordinates(identity, torch.from_numpy(from_sampling))
    back = np.linalg.inv(registration.moving_from_fixed)
    x = start = linear_coordinates(y, torch.from_numpy(back))
    if registration.displacement is not None:
        added = torch.tensor(registration.displacement, device=device).movedim(-1, 0)
        turn = torch.tensor(back[:3, :3], dtype=torch.float32, device=device)
        to_sampling = torch.from_numpy(sampling_from_world(registration.grid))
        for step in range(_INVERSE_STEPS):
            target = start - torch.tensordot(turn, sample(added, linear_coordinates(x, to_sampling)), dims=1)
            change = target - x
            x = x + (1.0 if step < _INVERSE_STEPS // 4 else 0.5) * change
            if float(change.abs().max()) < _INVERSE_MM:
                break
    return DisplacementField((x - y).movedim(0, -1).cpu().numpy(), onto)


def resize(image: Tensor, source: Grid, target: Grid, *, sigma_mm: float = 0.0) -> Tensor:
    """Resample (C, Z, Y, X) between grids that share their axes' directions, after a Gaussian of sigma_mm.

    Linear; positions outside `source` take its outermost voxel.
    """
    origin = source.indices(target.points_mm(np.zeros(3)))
    filters = []
    for axis in range(3):
        step = target.spacing_mm[axis] / source.spacing_mm[axis]
        positions = origin[axis] + step * np.arange(target.shape[axis])
        matrix = interpolation_matrix(source.shape[axis], positions, image.device)
        if sigma_mm > 0:
            sigma = sigma_mm / float(source.spacing_mm[axis])
            matrix = matrix @ gaussian_matrix(source.shape[axis], sigma, image.device)
        filters.append(matrix)
    return separable(image, *filters)


def separable(image: Tensor, along_z: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
    """Apply one (n_out, n_in) matrix along each axis of (C, Z, Y, X)."""
    channels, slices = image.shape[:2]
    out = torch.cat([torch.matmul(image[..., used], rows.T) for rows, used in _bands(along_x)], dim=-1)
    out = torch.cat([torch.matmul(rows, out[..., used, :]) for rows, used in _bands(along_y)], dim=-2)
    rows_out, columns_out = out.shape[2:]
    out = out.reshape(channels, slices, -1)
    out = torch.cat([torch.matmul(rows, out[:, used]) for rows, used in _bands(along_z)], dim=1)
    return out.reshape(channels, -1, rows_out, columns_out)


def _bands(matrix: Tensor) -> list[tuple[Tensor, slice]]:
    """The matrix by blocks of rows, each without the empty columns beside its band."""
    size = len(matrix)
    if size < 2 * _BLOCK or matrix.device.type != "cpu":
        return [(matrix, slice(None))]
    blocks = []
    for first in range(0, size, _BLOCK):
        rows = matrix[first : first + _BLOCK]
        columns = np.flatnonzero(rows.numpy().any(0))
        used = slice(int(columns[0]), int(columns[-1]) + 1)
        blocks.append((rows[:, used], used))
    return blocks


def gaussian_matrix(size: int, sigma: float, device: torch.device) -> Tensor:
    """(size, size) Gaussian of sigma voxels, cut at four sigma, each row summing to one."""
    if sigma < 1e-3:
        return torch.eye(size, device=device)
    position = torch.arange(size, dtype=torch.float64)
    distance = (position[:, None] - position).abs()
    weights = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance <= 4 * sigma)
    return (weights / weights.sum(dim=1, keepdim=True)).to(device, torch.float32)


def box_matrix(size: int, width: int, device: torch.device) -> Tensor:
    """(size, size), sums over windows of an odd width; nothing beyond the border."""
    position = torch.arange(size)
    return ((position[:, None] - position).abs() <= width // 2).to(device, torch.float32)


def interpolation_matrix(size: int, positions: np.ndarray, device: torch.device) -> Tensor:
    """(len(positions), size), linear interpolation at continuous indices, clamped to the outer centers."""
    clamped = np.clip(positions, 0, size - 1)
    lower = np.minimum(clamped.astype(int), max(size - 2, 0))
    upper = np.minimum(lower + 1, size - 1)
    rows = np.arange(len(positions))
    matrix = np.zeros((len(positions), size))
    np.add.at(matrix, (rows, lower), 1 - (clamped - lower))
    np.add.at(matrix, (rows, upper), clamped - lower)
    return torch.tensor(matrix, dtype=torch.float32, device=device)


def _derivative(image: Tensor, axis: int, spacing_mm: float) -> Tensor:
    out = torch.empty_like(image)
    size = image.shape[axis]
    inner = image.narrow(axis, 2, size - 2) - image.narrow(axis, 0, size - 2)
    out.narrow(axis, 1, size - 2).copy_(inner).mul_(0.5 / spacing_mm)
    first = image.narrow(axis, 1, 1) - image.narrow(axis, 0, 1)
    last = image.narrow(axis, size - 1, 1) - image.narrow(axis, size - 2, 1)
    out.narrow(axis, 0, 1).copy_(first).div_(spacing_mm)
    out.narrow(axis, size - 1, 1).copy_(last).div_(spacing_mm)
    return out
