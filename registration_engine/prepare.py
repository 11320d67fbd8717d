"""From a `Volume` to what the optimisation reads: checked, scaled to 0…1, with masks, on a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from registration_engine import field as fields
from registration_engine.errors import InvalidVolumeError
from registration_engine.spaces import centered_grid
from registration_engine.volume import Grid, Volume

SMALLEST_SIZE = 4  # voxels along each axis
_LOW, _HIGH = 0.5, 99.5  # percentiles that become 0 and 1
_SPREAD = 0.25
_LARGEST_SAMPLE = 2_000_000  # voxels looked at for percentiles and thresholds


@dataclass(frozen=True, eq=False)
class Prepared:
    """One image ready to be registered.

    Attributes
    ----------
    image
        (1, Z, Y, X) float32, 0…1 between robust percentiles.
    valid
        (1, Z, Y, X), 1 where the caller's mask allows, all ones without a mask.
    foreground
        (1, Z, Y, X), 1 where the image is brighter than air and valid.
    """

    grid: Grid
    image: Tensor
    valid: Tensor
    foreground: Tensor

    def cropped(self, margin_mm: float) -> Prepared:
        """The same cut to the box of its foreground plus a margin, within the image."""
        mask = self.foreground[0] if self.foreground.any() else self.valid[0]
        bounds = []
        for axis, spacing in enumerate(self.grid.spacing_mm):
            share = mask.mean(dim=[a for a in range(3) if a != axis]).cpu().numpy()
            # Slices that hold less than this are noise or a wire, not the body.
            hit = np.flatnonzero(share > 0.002 * share.max())
            margin = int(np.ceil(margin_mm / spacing))
            lower, upper = max(int(hit[0]) - margin, 0), min(int(hit[-1]) + margin + 1, mask.shape[axis])
            lack = max(SMALLEST_SIZE - (upper - lower), 0)
            lower = max(lower - lack, 0)
            bounds.append((lower, max(upper, lower + SMALLEST_SIZE)))
        (z, zz), (y, yy), (x, xx) = bounds
        affine = self.grid.affine.copy()
        affine[:3, 3] = self.grid.points_mm(np.array([z, y, x], dtype=np.float64))
        parts = (t[:, z:zz, y:yy, x:xx] for t in (self.image, self.valid, self.foreground))
        return Prepared(Grid((zz - z, yy - y, xx - x), affine), *parts)

    def spacing_for(self, voxels: int) -> float:
        """Voxel size in mm at which `reduced` holds no more than so many voxels; the finest axis at least."""
        native = self.grid.spacing_mm
        extent = native * np.array(self.grid.shape)
        spacing = float(native.min())
        while float(np.prod(extent / np.maximum(native, spacing))) > voxels:
            spacing *= 1.02
        return spacing

    def reduced(self, spacing_mm: float) -> Prepared:
        """The same on a coarser grid; an axis whose voxels are already that large keeps them."""
        native = self.grid.spacing_mm
        spacing = np.maximum(native, spacing_mm)
        if np.allclose(spacing, native):
            return self
        extent = native * (np.array(self.grid.shape) - 1)
        grid = centered_grid(self.grid, np.zeros(3), extent, spacing)
        # Half a coarse voxel of Gaussian keeps what the coarse grid cannot hold from aliasing.
        image, valid, foreground = (
            fields.resize(x, self.grid, grid, sigma_mm=0.5 * spacing_mm)
            for x in (self.image, self.valid, self.foreground)
        )
        return Prepared(grid, image, (valid > 0.9).float(), (foreground > 0.5).float())

    def layers(self) -> Tensor:
        """What `sample_where_valid` reads."""
        return self.image if bool(self.valid.all()) else torch.cat([self.image, self.valid])

    def center_mm(self) -> npt.NDArray[np.float64]:
        """(3,) LPS mm, center of the foreground, or of the valid voxels where no voxel is foreground."""
        mask = self.foreground[0] if self.foreground.any() else self.valid[0]
        index = [
            float((mask.sum(dim=[a for a in range(3) if a != axis]).double().cpu() * torch.arange(n)).sum())
            for axis, n in enumerate(mask.shape)
        ]
        return self.grid.points_mm(np.array(index) / float(mask.sum(dtype=torch.float64)))


def prepared(volume: Volume, mask: Volume | None, name: str, device: torch.device) -> Prepared:
    """Check and scale one image.

    Raises
    ------
    InvalidVolumeError
        Fewer than four voxels along an axis, constant, a mask on another grid or an empty mask.
    """
    if min(volume.grid.shape) < SMALLEST_SIZE:
        raise InvalidVolumeError(
            f"{name} image: got {volume.grid.shape} voxels, expected {SMALLEST_SIZE} or more along each axis"
        )
    if mask is not None and not mask.grid.is_same_as(volume.grid, tolerance_mm=0.1):
        raise InvalidVolumeError(
            f"{name} mask: got a grid of shape {mask.grid.shape} elsewhere, expected the image's grid"
        )
    allowed = np.ones(volume.grid.shape, dtype=bool) if mask is None else mask.voxels > 0
    if not allowed.any():
        raise InvalidVolumeError(f"{name} mask: got no voxel above 0, expected a region to register")
    low, high = _range(volume.voxels[allowed])
    if not high > low:
        raise InvalidVolumeError(f"{name} image: every voxel has the value {low:g}, expected contrast")

    scaled = np.clip((volume.voxels - np.float32(low)) / np.float32(high - low), 0, 1)
    foreground = (scaled > _air_threshold(scaled[allowed])) & allowed
    scaled = _spread(scaled, scaled[foreground])
    image, valid, body = (
        torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(device)[None]
        for x in (scaled, allowed, foreground)
    )
    return Prepared(volume.grid, image, valid, body)


def body(volume: Volume) -> npt.NDArray[np.bool_]:
    """The foreground (Z, Y, X) of a fixed image: what is measured over. Raises what `prepared` does."""
    return np.asarray(prepared(volume, None, "Fixed", torch.device("cpu")).foreground[0].numpy() > 0)


def _range(voxels: npt.NDArray[np.float32]) -> tuple[float, float]:
    low, high = np.percentile(_thinned(voxels), [_LOW, _HIGH])
    # A small bright object in an empty image has no percentiles of its own.
    return (float(low), float(high)) if high > low else (float(voxels.min()), float(voxels.max()))


def _spread(scaled: npt.NDArray[np.float32], foreground: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A quarter of the way to equal histogram bins over the body.

    Soft tissues of CT lie within a tenth of the range from air to bone: as they are, they would share three bins of
    the joint histogram, and organs would be one grey. (Without it the TRE of DCE doubles; half of the way costs body CT
    a third, because it raises noise as much as tissue.)
    """
    if foreground.size == 0:
        return scaled
    levels = np.linspace(0, 1, 513)
    counts, _ = np.histogram(_thinned(foreground), bins=512, range=(0, 1))
    share = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    table = (1 - _SPREAD) * levels + _SPREAD * share
    return np.interp(scaled, levels, table).astype(np.float32)


def _air_threshold(scaled: npt.NDArray[np.float32]) -> float:
    """Half of Otsu's threshold: lets dim tissue in, keeps air and its noise out."""
    counts, edges = np.histogram(_thinned(scaled), bins=128, range=(0, 1))
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = np.cumsum(counts * centers)
    between = np.zeros(len(below))
    both = (below > 0) & (above > 0)
    means = sums[:-1][both] / below[both] - (sums[-1] - sums[:-1][both]) / above[both]
    between[both] = below[both] * above[both] * means**2
    return float(edges[1 + int(between.argmax())]) / 2


def _thinned(voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return voxels[:: max(1, voxels.size // _LARGEST_SAMPLE)]
