"""Test-time optimisation of a network's weights: the paper's stage 3.

A copy of the weights is fitted to one pair; the caller's network is never touched, so nothing of one patient reaches
the next, unless the caller lends a copy of its own to the phases of one series. The network sees both images on one
grid, the body of the fixed image padded to multiples of 16; padding, masks and what lies outside the moving image's
field of view count nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from registration_engine.devices import autocast_type
from registration_engine.field import NEGLIGIBLE_MM
from registration_engine.level import Level
from registration_engine.objectives import (
    divergence,
    multi_axis_mutual_information,
    normalized_cross_correlation,
    smoothness,
)
from registration_engine.optimize import unfolded
from registration_engine.prepare import Prepared
from registration_engine.presets import Preset, Tuning
from registration_engine.spaces import Matrix, sample, share_inside
from registration_engine.unet import MULTIPLE, UNet
from registration_engine.volume import Grid

_MARGIN_MM = 10.0
_FADE_VOXELS = 2.0  # over which what leaves the field of view ceases to count
_PLATEAU_EPOCHS, _PLATEAU_GAIN = 10, 1e-3
_ROOMY_VOXELS = 2_000_000  # above, activations are recomputed rather than kept: 2.5 GB here, in float32


@dataclass(frozen=True, eq=False)
class NetworkPair:
    """Both images as a network sees them: on one grid, in multiples of 16 voxels."""

    level: Level
    input: Tensor

    @staticmethod
    def of(fixed: Prepared, moving: Prepared, moving_from_fixed: Matrix, spacing_mm: float) -> NetworkPair:
        """The body of the fixed image and the moving one after the linear map, at a voxel side of spacing_mm or more.

        An axis whose voxels are larger keeps them.
        """
        body = padded(fixed.cropped(_MARGIN_MM).reduced(spacing_mm))
        level = Level.of(body, moving.reduced(spacing_mm), moving_from_fixed)
        warped, weight = level.warped(torch.zeros_like(level.base))
        return NetworkPair(level, torch.stack([body.image[0] * body.valid[0], warped * weight])[None])

    def displacement_mm(self, voxels: Tensor) -> Tensor:
        """A network's (3, Z, Y, X) voxels in lattice mm."""
        return voxels * torch.tensor(self.level.lattice.spacing_mm, device=voxels.device).view(3, 1, 1, 1)

    def loss(self, voxels: Tensor, tuning: Tuning) -> Tensor:
        """L_TTO of section 2.3 at a displacement in voxels."""
        level, (fixed, valid) = self.level, (self.level.fixed.image[0], self.level.fixed.valid[0])
        points = level.base + torch.tensordot(level.per_mm, self.displacement_mm(voxels), dims=1)
        warped, *masks = sample(level.moving_layers, points)
        weight = valid * share_inside(points, level.moving_layers.shape[1:], fade=_FADE_VOXELS)
        for mask in masks:
            weight = weight * (mask.detach() > 0.99)
        counted = weight.detach()
        similarity = multi_axis_mutual_information(fixed, warped, counted)
        similarity = similarity + normalized_cross_correlation(fixed, warped, counted)
        # Few voxels are easily alike: what moves out of the field of view counts as the worst there is, 1.
        overlap = weight.sum() / valid.sum().clamp(min=1)
        return (
            tuning.lambda_sim * (overlap * similarity + 1 - overlap)
            + tuning.lambda_smooth * smoothness(voxels, self.level.lattice.spacing_mm)
            + tuning.alpha_div * divergence(voxels)
        )


def refine(
    fixed: Prepared,
    moving: Prepared,
    moving_from_fixed: Matrix,
    preset: Preset,
    network: UNet,
    progress: Callable[[float], None],
    adapts: bool = False,
) -> tuple[Tensor, Grid]:
    """Fit a copy of the network to this pair; the displacement of lowest loss, free of folds, and its grid.

    Parameters as in `optimize.refine`; the preset has a `tuning`. Stops after its epochs or seconds, whichever comes
    first, so where the time runs out the result depends on the machine's load. Where the network `adapts` it is tuned
    itself and keeps the weights of lowest loss.
    """
    tuning = preset.tuning
    assert tuning is not None
    pair = NetworkPair.of(fixed, moving, moving_from_fixed, tuning.coarsening * working_spacing(fixed, network))
    lowest, best = np.inf, torch.zeros_like(pair.level.base)
    learned = copy.deepcopy(network.state_dict())
    for part, loss, voxels in tuned(pair, network, tuning, adapts=adapts):
        if loss < lowest:
            lowest, best = loss, voxels
            learned = copy.deepcopy(network.state_dict()) if adapts else learned
        progress(part)
    network.load_state_dict(learned)
    found = unfolded(pair.displacement_mm(best), pair.level.lattice, smallest_determinant=preset.smallest_determinant)
    return torch.where(found.abs() > NEGLIGIBLE_MM, found, 0.0), pair.level.fixed.grid


def working_spacing(fixed: Prepared, network: UNet) -> float:
    """Voxel side in mm: the fixed image's own on a GPU, twice that on a CPU, where full size takes hours."""
    on_gpu = next(network.parameters()).device.type == "cuda"
    return float(fixed.grid.spacing_mm.min()) * (1 if on_gpu else 2)


def prediction(fixed: Prepared, moving: Prepared, moving_from_fixed: Matrix, network: UNet) -> tuple[Tensor, Grid]:
    """The network's displacement (3, Z, Y, X), lattice mm, at half resolution and without tuning, and its grid."""
    pair = NetworkPair.of(fixed, moving, moving_from_fixed, 2 * float(fixed.grid.spacing_mm.min()))
    with torch.no_grad():
        return pair.displacement_mm(network(pair.input)[0]), pair.level.fixed.grid


def tuned(
    pair: NetworkPair, network: UNet, tuning: Tuning, *, adapts: bool = False
) -> Iterator[tuple[float, float, Tensor]]:
    """Yield the share done, the loss and the displacement in voxels of each epoch, beginning with the untuned one.

    A copy is tuned, or the network itself where it `adapts`.
    """
    own = (network if adapts else copy.deepcopy(network)).requires_grad_(True)
    own.checkpointing = pair.input.numel() // 2 > _ROOMY_VOXELS
    own.autocast = autocast_type(pair.input.device) if tuning.bf16 else None
    optimizer = torch.optim.Adam(own.parameters(), lr=tuning.learning_rate)
    started, losses = time.monotonic(), list[float]()
    for epoch in range(tuning.epochs + 1):
        with torch.enable_grad():
            voxels = own(pair.input)[0]
            loss = pair.loss(voxels, tuning)
        losses.append(float(loss.detach()))
        spent = (time.monotonic() - started) / tuning.seconds
        yield min(1.0, max(epoch / tuning.epochs, spent)), losses[-1], voxels.detach()
        if spent > 1 or epoch == tuning.epochs or (tuning.stops_early and _is_flat(losses)):
            return
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        del voxels, loss


def padded(image: Prepared) -> Prepared:
    """The same on a grid of multiples of 16, padded at both ends; padding is not valid."""
    counts = [MULTIPLE * -(-n // MULTIPLE) for n in image.grid.shape]
    first = [(count - n) // 2 for count, n in zip(counts, image.grid.shape, strict=True)]
    ends: list[int] = []
    for count, n, before in zip(counts[::-1], image.grid.shape[::-1], first[::-1], strict=True):
        ends += [before, count - n - before]
    affine = image.grid.affine.copy()
    affine[:3, 3] = image.grid.points_mm(-np.array(first, dtype=np.float64))
    parts = (pad(t, ends) for t in (image.image, image.valid, image.foreground))
    return Prepared(Grid((counts[0], counts[1], counts[2]), affine), *parts)


def _is_flat(losses: list[float]) -> bool:
    """Whether the last ten epochs gained next to nothing."""
    if len(losses) <= _PLATEAU_EPOCHS:
        return False
    before = min(losses[:-_PLATEAU_EPOCHS])
    return before - min(losses[-_PLATEAU_EPOCHS:]) < _PLATEAU_GAIN * abs(before)
