"""The linear start: rigid, then affine, by mutual information at low resolution.

The rigid stage starts from the world coordinates as given, from coinciding centers, and from rotations spread over all
directions, because two frames of reference may have nothing to do with each other. A stage is kept only where it
raises the similarity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from registration_engine import field as fields
from registration_engine.errors import NoOverlapError
from registration_engine.losses import local_correlation, mutual_information
from registration_engine.metrics import normalized_mutual_information
from registration_engine.prepare import Prepared
from registration_engine.spaces import (
    Lattice,
    Matrix,
    linear_coordinates,
    sample_where_valid,
    sampling_from_world,
    world_from_lattice,
    world_from_sampling,
)
from registration_engine.volume import DisplacementField

_SCAN_VOXELS, _COARSE_VOXELS, _FINE_VOXELS = 6_000, 20_000, 100_000
_STEPS, _LOCAL_STEPS = 40, 25
_ROTATIONS = 600  # any rotation is within about 20 degrees of one of them
_REFINED = 4  # rotated starts followed up
_MARGIN_MM = 20.0
_BINS, _WINDOW = 24, 5
_LEAST_OVERLAP = 0.5  # of the smaller foreground: below it a similarity counts less, in proportion
_NO_OVERLAP = 0.05
# A turned patient must be clearly more similar: bodies and heads are nearly symmetric, mirrored fits come close.
_ROTATION_GAIN = 1.03
_STAGE_GAIN = 1.002


@dataclass(frozen=True, eq=False)
class LinearStart:
    """Both linear stages, (4, 4) float64, moving from fixed, LPS mm; `affine` is `rigid` where it did not help."""

    rigid: Matrix
    affine: Matrix
    centered: Matrix
    world_overlaps: bool


def align(
    fixed: Prepared,
    moving: Prepared,
    *,
    with_affine: bool,
    near: Matrix | None,
    progress: Callable[[float], None],
) -> LinearStart:
    """Find the linear map that makes the moving image most like the fixed one.

    Parameters
    ----------
    near
        (4, 4), moving from fixed, LPS mm: one more start; where it is the best one, no rotations are tried.

    Raises
    ------
    NoOverlapError
        No start brings enough of both images together.
    """
    body = fixed.cropped(_MARGIN_MM)
    spacing_mm = body.spacing_for(_FINE_VOXELS)
    fine = _Stage.of(body.reduced(spacing_mm), moving.reduced(spacing_mm), _FINE_VOXELS)
    coarse = _Stage.of(fine.fixed, fine.moving, _COARSE_VOXELS)
    scan = _Stage.of(coarse.fixed, coarse.moving, _SCAN_VOXELS)
    identity = np.eye(4)
    centered = _translation(fine.moving_center - fine.fixed_center)
    upright = [identity, centered, _translation(_middle(moving) - _middle(fixed))]
    start = max((coarse.climb(first, affine=False) for first in upright), key=coarse.score)
    told = None if near is None else coarse.climb(near, affine=False)
    progress(0.2)
    if told is not None and coarse.score(told) >= coarse.score(start):
        start = told
    else:
        turned = [centered @ _about(fine.fixed_center, r) for r in _rotations(_ROTATIONS)]
        ranked = sorted(turned, key=scan.score, reverse=True)[:_REFINED]
        best_turned = max((coarse.climb(first, affine=False) for first in ranked), key=coarse.score)
        if coarse.score(best_turned) > _ROTATION_GAIN * coarse.score(start):
            start = best_turned
    if coarse.overlap(start) < _NO_OVERLAP:
        raise NoOverlapError(
            f"Fixed and moving share {coarse.overlap(start):.1%} of the smaller body after every start, "
            f"expected {_NO_OVERLAP:.0%} or more"
        )
    progress(0.6)

    rigid = max((identity, start, fine.climb(start, affine=False)), key=fine.score)
    rigid = max((identity, rigid, fine.climb(rigid, affine=False, local=True)), key=fine.local_score)
    progress(0.8)
    affine = rigid
    if with_affine:
        # Mutual information alone would stretch one brain mask onto another: structure has the last word.
        start = max((rigid, fine.climb(rigid, affine=True)), key=fine.local_score)
        candidate = fine.climb(start, affine=True, local=True)
        if fine.local_score(candidate) > _STAGE_GAIN * fine.local_score(rigid):
            affine = candidate
    progress(1.0)
    return LinearStart(rigid, affine, centered, coarse.overlap(identity) >= _NO_OVERLAP)


def rigid_part(total: DisplacementField) -> Matrix:
    """(4, 4), the rigid map nearest to a total displacement in the least squares sense.

    References
    ----------
    Kabsch, A solution for the best rotation to relate two sets of vectors, Acta Cryst. A32, 1976.
    """
    thin = tuple(slice(None, None, max(1, n // 24)) for n in total.grid.shape)
    index = np.stack(
        np.meshgrid(*[np.arange(n)[t] for n, t in zip(total.grid.shape, thin, strict=True)], indexing="ij"), -1
    )
    points = total.grid.points_mm(index.reshape(-1, 3).astype(np.float64))
    moved = points + total.vectors[thin].reshape(-1, 3)
    center, moved_center = points.mean(0), moved.mean(0)
    u, _, vt = np.linalg.svd((moved - moved_center).T @ (points - center))
    rotation = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = moved_center - rotation @ center
    return matrix


@dataclass(frozen=True, eq=False)
class _Stage:
    """Both images at one resolution, the fixed one cut to its body."""

    fixed: Prepared
    moving: Prepared
    lattice: Lattice
    points: Tensor  # (4, Z, Y, X) float64, LPS mm and 1
    world_from_lattice: Tensor
    moving_layers: Tensor
    fixed_center: Matrix
    moving_center: Matrix
    smaller_body: float  # voxels of the fixed lattice
    spacing_mm: float

    @staticmethod
    def of(body: Prepared, moving: Prepared, voxels: int) -> _Stage:
        spacing_mm = body.spacing_for(voxels)
        small, small_moving = body.reduced(spacing_mm), moving.reduced(spacing_mm)
        moving_body = float(small_moving.foreground.sum()) * float(np.prod(small_moving.grid.spacing_mm))
        in_fixed_voxels = moving_body / float(np.prod(small.grid.spacing_mm))
        lattice = Lattice.of(small.grid, body.image.device)
        points = linear_coordinates(lattice.identity, torch.from_numpy(world_from_sampling(small.grid))).double()
        return _Stage(
            small,
            small_moving,
            lattice,
            torch.cat([points, torch.ones_like(points[:1])]),
            torch.from_numpy(world_from_lattice(small.grid).copy()),
            small_moving.layers(),
            small.center_mm(),
            small_moving.center_mm(),
            max(min(float(small.foreground.sum()), in_fixed_voxels), 1.0),
            spacing_mm,
        )

    def score(self, moving_from_fixed: Matrix) -> float:
        """Similarity over the overlap, scaled down where the overlap is small."""
        return self._score(*self._warped(torch.from_numpy(moving_from_fixed)))

    def overlap(self, moving_from_fixed: Matrix) -> float:
        """Body of the fixed image that the moving image covers, by the smaller of both bodies."""
        return self._overlap(self._warped(torch.from_numpy(moving_from_fixed))[1])

    def local_score(self, moving_from_fixed: Matrix) -> float:
        """Local correlation over the overlap, scaled down where the overlap is small."""
        warped, weight = self._warped(torch.from_numpy(moving_from_fixed))
        return self._local_correlation(warped, weight)[0]

    @torch.enable_grad()
    def climb(self, start: Matrix, *, affine: bool, local: bool = False) -> Matrix:
        """Follow the gradient of mutual information, or local correlation; the best position met, `start` included."""
        lever_mm = 0.3 * float(np.linalg.norm(np.array(self.fixed.grid.shape) * self.fixed.grid.spacing_mm))
        parameters = torch.zeros(12 if affine else 6, dtype=torch.float64)
        mean, square = torch.zeros_like(parameters), torch.zeros_like(parameters)
        base = torch.from_numpy(start)
        best, best_score = start, -math.inf
        steps = _LOCAL_STEPS if local else _STEPS
        for step in range(1, steps + 1):
            parameters.requires_grad_()
            matrix = base @ _moved(parameters, self.fixed_center, lever_mm)
            warped, weight = self._warped(matrix.detach())
            if local:
                score, slope = self._local_correlation(warped, weight)
            else:
                score = self._score(warped, weight)
                _, slope = mutual_information(self.fixed.image[0], warped, weight, bins=_BINS)
            if score > best_score:
                best, best_score = matrix.detach().numpy(), score
            # Through the (4, 4) alone: a gradient through the interpolation would cost more than all the rest.
            pull = slope * fields.gradient(warped[None], self.lattice.spacing_mm)
            moments = torch.tensordot(pull.double(), self.points, dims=([1, 2, 3], [1, 2, 3])).cpu()
            by_matrix = torch.linalg.inv(matrix.detach()[:3, :3]).T @ self.world_from_lattice @ moments
            (ascent,) = torch.autograd.grad((matrix[:3] * by_matrix).sum(), parameters)
            mean = 0.8 * mean + 0.2 * ascent
            square = 0.95 * square + 0.05 * ascent**2
            length_mm = 0.2 * self.spacing_mm * (1.02 + math.cos(math.pi * step / steps))
            direction = mean / (1 - 0.8**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-12)
            parameters = parameters.detach() + length_mm * direction
        return best

    def _warped(self, moving_from_fixed: Tensor) -> tuple[Tensor, Tensor]:
        """The moving image on the fixed lattice, and which of its voxels count."""
        left = torch.from_numpy(sampling_from_world(self.moving.grid))
        right = torch.from_numpy(world_from_sampling(self.fixed.grid))
        coordinates = linear_coordinates(self.lattice.identity, left @ moving_from_fixed @ right)
        warped, valid = sample_where_valid(self.moving_layers, coordinates)
        return warped, self.fixed.valid[0] * valid

    def _score(self, warped: Tensor, weight: Tensor) -> float:
        similarity = normalized_mutual_information(self.fixed.image[0], warped, weight, bins=_BINS)
        return similarity * self._share(weight)

    def _local_correlation(self, warped: Tensor, weight: Tensor) -> tuple[float, Tensor]:
        value, slope = local_correlation(self.fixed.image[0], warped, weight.float(), width=_WINDOW)
        return value * self._share(weight), slope

    def _share(self, weight: Tensor) -> float:
        return min(1.0, self._overlap(weight) / _LEAST_OVERLAP)

    def _overlap(self, weight: Tensor) -> float:
        return float((weight * self.fixed.foreground[0]).sum()) / self.smaller_body


def _moved(parameters: Tensor, center_mm: Matrix, lever_mm: float) -> Tensor:
    """(4, 4) about a point: translation 0–2, rotation 3–5, stretch and shear 6–11, all in mm at the lever's end."""
    turn = parameters[3:6] / lever_mm
    linear = torch.matrix_exp(torch.einsum("c,cij->ij", turn, _GENERATORS))
    if len(parameters) > 6:
        stretch = torch.zeros(3, 3, dtype=torch.float64)
        rows, columns = torch.triu_indices(3, 3)
        stretch = stretch.index_put((rows, columns), parameters[6:] / lever_mm)
        linear = linear @ torch.matrix_exp(stretch + stretch.T)
    center = torch.from_numpy(center_mm)
    offset = center + parameters[:3] - linear @ center
    top = torch.cat([linear, offset[:, None]], dim=1)
    return torch.cat([top, torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)])


_GENERATORS = torch.tensor(
    [[[0, 0, 0], [0, 0, -1], [0, 1, 0]], [[0, 0, 1], [0, 0, 0], [-1, 0, 0]], [[0, -1, 0], [1, 0, 0], [0, 0, 0]]],
    dtype=torch.float64,
)


def _rotations(count: int) -> list[Matrix]:
    """(3, 3) rotations spread evenly over all directions, by super-Fibonacci spirals.

    References
    ----------
    Alexa, Super-Fibonacci spirals: fast, low-discrepancy sampling of SO(3), CVPR 2022.
    """
    phi, psi = math.sqrt(2.0), 1.533751168755204288118041
    rotations = []
    for n in range(count):
        s = n + 0.5
        r, q = math.sqrt(s / count), math.sqrt(1 - s / count)
        a, b = 2 * math.pi * s / phi, 2 * math.pi * s / psi
        rotations.append(_from_quaternion(r * math.sin(a), r * math.cos(a), q * math.sin(b), q * math.cos(b)))
    return rotations


def _from_quaternion(x: float, y: float, z: float, w: float) -> Matrix:
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _about(center_mm: Matrix, rotation: Matrix) -> Matrix:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = center_mm - rotation @ center_mm
    return matrix


def _translation(offset_mm: Matrix) -> Matrix:
    matrix = np.eye(4)
    matrix[:3, 3] = offset_mm
    return matrix


def _middle(image: Prepared) -> Matrix:
    """(3,) LPS mm, middle of the image's field of view."""
    return image.grid.points_mm((np.array(image.grid.shape) - 1) / 2)
