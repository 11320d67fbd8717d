"""Both images at one resolution, ready to be compared under a displacement."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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
from registration_engine.structure import noise_floor, self_similarity


@dataclass(frozen=True, eq=False)
class Level:
    """Both images at one resolution and the linear map between their sampling coordinates."""

    fixed: Prepared
    lattice: Lattice
    moving_layers: Tensor
    base: Tensor  # (3, Z, Y, X), moving's sampling coordinates of each fixed voxel after the linear map
    per_mm: Tensor  # (3, 3), moving's sampling coordinates per lattice mm of displacement

    @staticmethod
    def of(fixed: Prepared, moving: Prepared, moving_from_fixed: Matrix) -> Level:
        """Put both images, reduced alike, under the linear map."""
        device = fixed.image.device
        lattice = Lattice.of(fixed.grid, device)
        to_moving = sampling_from_world(moving.grid) @ moving_from_fixed
        per_mm = to_moving[:3, :3] @ world_from_lattice(fixed.grid)
        return Level(
            fixed,
            lattice,
            moving.layers(),
            linear_coordinates(lattice.identity, torch.from_numpy(to_moving @ world_from_sampling(fixed.grid))),
            torch.tensor(per_mm, dtype=torch.float32, device=device),
        )

    @cached_property
    def structure(self) -> tuple[Tensor, float]:
        """The fixed image's self-similarity, and the noise floor of the moving image under the linear map."""
        image = self.fixed.image[0]
        return self_similarity(image, noise_floor(image)), noise_floor(self.warped(torch.zeros_like(self.base))[0])

    def warped(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """The moving image at the displaced points, (Z, Y, X), and which of its voxels count."""
        moved = torch.addmm(self.base.reshape(3, -1), self.per_mm, displacement.reshape(3, -1))
        image, valid = sample_where_valid(self.moving_layers, moved.view_as(self.base))
        return image, self.fixed.valid[0] * valid
