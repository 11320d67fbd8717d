"""Image pairs that never were: made-up anatomy, two contrasts, a known deformation, and what scanners do to images.

Everything is drawn on the device from one seed; no image is read. A pair is a function of (seed, index, shape) on one
kind of device, so training can stop and go on at any pair.

References
----------
Hoffmann et al., SynthMorph, IEEE TMI 2022: networks that learn from random contrasts meet real ones unseen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from registration_engine.field import gaussian_matrix, separable
from registration_engine.spaces import Lattice, sample, sample_where_valid
from registration_engine.volume import Grid

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class SyntheticPair:
    """Two images on one grid and the truth between them.

    Attributes
    ----------
    fixed, moving
        (Z, Y, X), 0…1 between robust percentiles.
    fixed_valid, moving_valid
        (Z, Y, X), 1 within the field of view.
    body
        (Z, Y, X), 1 in the fixed image's body.
    displacement
        (3, Z, Y, X) voxels, components (i, j, k): moving(x + displacement(x)) shows what fixed(x) shows.
    """

    fixed: Tensor
    moving: Tensor
    fixed_valid: Tensor
    moving_valid: Tensor
    body: Tensor
    displacement: Tensor

    @property
    def shape(self) -> Shape:
        """(Z, Y, X)."""
        z, y, x = self.fixed.shape
        return z, y, x

    @property
    def input(self) -> Tensor:
        """(1, 2, Z, Y, X), what the network reads."""
        return torch.stack([self.fixed, self.moving])[None]


def synthetic_pair(seed: int, index: int, shape: Shape, device: torch.device) -> SyntheticPair:
    """Pair number `index` of the series `seed`."""
    draw = _Draw(seed, index, shape, device)
    contrasts, body, inner = _anatomy(draw)
    displacement = _deformation(draw, inner)
    points = unit_lattice(shape, device).displaced(displacement)
    fixed = sample(contrasts[:1], points)[0]
    fixed_body, _ = sample_where_valid(torch.stack([body, torch.ones_like(body)]), points)
    fixed, fixed_valid = _acquired(draw, fixed)
    moving, moving_valid = _acquired(draw, contrasts[1])
    return SyntheticPair(fixed, moving, fixed_valid, moving_valid, (fixed_body > 0.5).float(), displacement)


class _Draw:
    """Random numbers of one pair and what is drawn with them, at the scale of its shape."""

    def __init__(self, seed: int, index: int, shape: Shape, device: torch.device) -> None:
        self.shape, self.device, self.size = shape, device, min(shape)
        state = np.random.SeedSequence([seed, index]).generate_state(2, np.uint32)
        self._host = np.random.default_rng(state[0])
        self._generator = torch.Generator(device).manual_seed(int(state[1]))

    def uniform(self, low: float, high: float) -> float:
        return float(self._host.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        """low … high, both included."""
        return int(self._host.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return bool(self._host.random() < probability)

    def uniforms(self, low: float, high: float, *size: int) -> Tensor:
        return torch.tensor(self._host.uniform(low, high, size), dtype=torch.float32, device=self.device)

    def white(self) -> Tensor:
        """(Z, Y, X) normal noise."""
        return torch.randn(self.shape, generator=self._generator, device=self.device)

    def smooth(self, channels: int, wavelength: float) -> Tensor:
        """(channels, Z, Y, X) smooth noise of unit spread: cubic B-splines with random coefficients."""
        knots = [max(4, math.ceil(2 * n / wavelength) + 3) for n in self.shape]
        coefficients = torch.randn(channels, *knots, generator=self._generator, device=self.device)
        bases = [_spline_basis(n, k).to(self.device) for n, k in zip(self.shape, knots, strict=True)]
        noise = separable(coefficients, *bases)
        return noise / noise.std().clamp(min=1e-6)


def _spline_basis(size: int, knots: int) -> Tensor:
    """(size, knots) uniform cubic B-splines over the axis."""
    position = torch.linspace(1, knots - 2 - 1e-4, size, dtype=torch.float64)
    distance = (position[:, None] - torch.arange(knots)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far).float()


def unit_lattice(shape: Shape, device: torch.device) -> Lattice:
    """The lattice of a grid of 1 mm voxels: millimetres are voxels."""
    return Lattice.of(Grid(shape, np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]), device)


def _positions(draw: _Draw) -> Tensor:
    """(3, Z, Y, X), -1 … 1 along (i, j, k)."""
    return unit_lattice(draw.shape, draw.device).identity


def _anatomy(draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Both contrasts (2, Z, Y, X) of one geometry, the body and what lies within its wall (Z, Y, X)."""
    where = _positions(draw)
    labels = draw.integer(4, 12)
    grey = _Contrasts(draw)
    logits = draw.smooth(labels, draw.size * draw.uniform(0.25, 1.0))
    share = torch.softmax(logits / draw.uniform(0.03, 0.15), dim=0)
    image = torch.tensordot(torch.stack([grey.next() for _ in range(labels)], 1), share, dims=1)

    for _ in range(draw.integer(2, 6)):  # organs
        center, radii = draw.uniforms(-0.6, 0.6, 3), draw.uniforms(0.12, 0.45, 3)
        image = _painted(image, _blob(draw, where, center, radii, rough=0.15), grey.next())
    for _ in range(draw.integer(0, 4)):  # vessels, spine
        image = _painted(image, _tube(draw, where), grey.next())
    texture = draw.smooth(1, draw.uniform(2.5, 8.0)) * draw.uniform(0.0, 0.12)
    image = image + texture * draw.uniforms(-1, 1, 2).view(2, 1, 1, 1)

    if draw.chance(0.2):  # a box cut out of the inside
        whole = torch.ones(draw.shape, device=draw.device)
        return image, whole, whole
    center, radii = draw.uniforms(-0.15, 0.15, 3), draw.uniforms(0.6, 1.0, 3)
    if draw.chance(0.5):  # a trunk: the body goes on beyond the first and last slice
        radii[2] = 4.0
    rough = draw.smooth(1, 0.8 * draw.size)[0] * 0.06
    distance = _distance(where, center, radii) + rough
    body, inner = _soft(draw, distance, 1.0, radii), _soft(draw, distance, draw.uniform(0.8, 0.92), radii)
    wall = grey.next()
    image = inner * image + (1 - inner) * wall.view(2, 1, 1, 1)  # skull, skin and fat
    air = draw.uniforms(0, 0.05, 2) if draw.chance(0.9) else draw.uniforms(0, 1, 2)
    return body * image + (1 - body) * air.view(2, 1, 1, 1), body, inner


class _Contrasts:
    """Grey values (2,) of one tissue after the other in both images, in one of four relations."""

    def __init__(self, draw: _Draw) -> None:
        self._draw = draw
        self._relation = draw.integer(0, 3)
        self._power = draw.uniform(0.5, 2.0)

    def next(self) -> Tensor:
        draw = self._draw
        first, other = draw.uniform(0.1, 1), draw.uniform(0.1, 1)
        second = (
            other,  # another modality
            first + draw.uniform(-0.03, 0.03),  # the same
            1.1 - first**self._power + draw.uniform(-0.1, 0.1),  # inverted, as T1 and T2
            first + (draw.uniform(0.2, 0.8) if draw.chance(0.3) else 0.0),  # contrast agent taken up
        )[self._relation]
        pair = [first, second] if draw.chance(0.5) or self._relation != 3 else [second, first]
        return torch.tensor(pair, device=draw.device)


def _painted(image: Tensor, alpha: Tensor, grey: Tensor) -> Tensor:
    return image + alpha * (grey.view(2, 1, 1, 1) - image)


def _distance(where: Tensor, center: Tensor, radii: Tensor) -> Tensor:
    """1 on the surface of an ellipsoid."""
    return ((where - center.view(3, 1, 1, 1)) / radii.view(3, 1, 1, 1)).square().sum(0).sqrt()


def _soft(draw: _Draw, distance: Tensor, surface: float, radii: Tensor) -> Tensor:
    """1 inside, 0 outside, half a voxel soft: partial volume."""
    per_voxel = 2 / (draw.size * float(radii[:2].min()))
    return torch.sigmoid((surface - distance) / (0.35 * per_voxel))


def _blob(draw: _Draw, where: Tensor, center: Tensor, radii: Tensor, *, rough: float) -> Tensor:
    noise = draw.smooth(1, draw.size * draw.uniform(0.2, 0.6))[0] * rough
    return _soft(draw, _distance(where, center, radii) + noise, 1.0, radii)


def _tube(draw: _Draw, where: Tensor) -> Tensor:
    along = draw.integer(0, 2)
    across = [axis for axis in range(3) if axis != along]
    bend, phase = draw.uniforms(-0.3, 0.3, 2), draw.uniforms(0, 6.3, 2)
    center, radius = draw.uniforms(-0.5, 0.5, 2), draw.uniform(0.05, 0.15)
    square = torch.zeros(draw.shape, device=draw.device)
    for number, axis in enumerate(across):
        middle = center[number] + bend[number] * torch.sin(2 * where[along] + phase[number])
        square = square + (where[axis] - middle).square()
    return torch.sigmoid((radius - square.sqrt()) * draw.size / 2 / 0.7)


def _deformation(draw: _Draw, inner: Tensor) -> Tensor:
    """(3, Z, Y, X) voxels, smooth but for a sliding body wall."""
    where = _positions(draw)
    moved = torch.zeros(3, *draw.shape, device=draw.device)
    for share in (1.2, 0.6, 0.3):
        wavelength = share * draw.size
        moved = moved + draw.smooth(3, wavelength) * draw.uniform(0, 0.045) * wavelength
    if draw.chance(0.35):  # breathing: along k, most under a dome, sliding along the wall half the time
        center = draw.uniforms(-0.4, 0.4, 3)
        dome = torch.exp(-_distance(where, center, draw.uniforms(0.5, 1.2, 3)).square())
        shift = dome * draw.uniform(0.02, 0.12) * draw.shape[0] * (1 if draw.chance(0.5) else -1)
        if draw.chance(0.5):
            shift = shift * separable(inner[None], *(gaussian_matrix(n, 1.0, draw.device) for n in draw.shape))[0]
        moved[2] += shift
        moved[1] += 0.3 * shift
    linear = draw.uniforms(-1, 1, 3, 3) * 0.05  # what an affine stage leaves over
    half = torch.tensor([(n - 1) / 2 for n in draw.shape[::-1]], device=draw.device).view(3, 1, 1, 1)
    shift = draw.uniforms(-1, 1, 3) * 0.04 * draw.size * draw.uniform(0, 1)
    moved += torch.tensordot(linear * draw.uniform(0, 1), where * half, dims=1)
    return moved + shift.view(3, 1, 1, 1)


def _acquired(draw: _Draw, image: Tensor) -> tuple[Tensor, Tensor]:
    """What a scanner makes of an image, 0…1, and its field of view."""
    if draw.chance(0.7):  # coil sensitivity
        image = image * torch.exp(draw.smooth(1, draw.size * draw.uniform(0.8, 2.0))[0] * draw.uniform(0, 0.25))
    if draw.chance(0.6):  # blur, of its own along each axis
        image = _blurred(draw, image, [draw.uniform(0.0, 1.2) for _ in range(3)])
    if draw.chance(0.3):
        image = _thick_slices(draw, image)
    if draw.chance(0.15):  # metal, vessels, a lead: outliers that percentiles must survive
        image = image + (draw.white() > 3.3) * draw.uniform(0.5, 3.0)
    strength = draw.uniform(0, 0.08)
    if draw.chance(0.5):
        image = image + strength * draw.white()
    else:  # Rician, as a magnitude image
        image = ((image + strength * draw.white()) ** 2 + (strength * draw.white()) ** 2).sqrt()
    valid = torch.ones_like(image)
    if draw.chance(0.25):  # partial field of view
        axis, cut = draw.integer(0, 2), draw.uniform(0.05, 0.25)
        count = max(1, round(cut * draw.shape[axis]))
        valid.narrow(axis, 0 if draw.chance(0.5) else draw.shape[axis] - count, count).zero_()
    return _scaled(image, valid), valid


def _blurred(draw: _Draw, image: Tensor, sigmas: list[float]) -> Tensor:
    blur = [gaussian_matrix(n, s, draw.device) for n, s in zip(draw.shape, sigmas, strict=True)]
    return separable(image[None], *blur)[0]


def _thick_slices(draw: _Draw, image: Tensor) -> Tensor:
    """Slices of two to five voxels along one axis, put back on the grid linearly."""
    axis, thickness = draw.integer(0, 2), draw.uniform(2, 5)
    sigmas = [0.4 * thickness if a == axis else 0.0 for a in range(3)]
    size = draw.shape[axis]
    kept = torch.linspace(0, size - 1, max(2, round(size / thickness)))
    position = torch.arange(size, dtype=torch.float32)
    step = float(kept[1])
    hat = (1 - (position[:, None] - kept).abs() / step).clamp(min=0)
    pick = torch.zeros(len(kept), size)
    pick[torch.arange(len(kept)), kept.round().long()] = 1
    matrices = [torch.eye(n, device=draw.device) for n in draw.shape]
    matrices[axis] = (hat @ pick).to(draw.device)
    return separable(_blurred(draw, image, sigmas)[None], *matrices)[0]


def _scaled(image: Tensor, valid: Tensor) -> Tensor:
    """0…1 between the 0.5 and 99.5 percentiles of the field of view, 0 outside it."""
    values = image[valid > 0]
    values = values[:: max(1, values.numel() // 1_000_000)]
    low, high = torch.quantile(values, torch.tensor([0.005, 0.995], device=image.device)).tolist()
    scaled: Tensor = (image - low) / max(high - low, 1e-3)
    return scaled.clamp(0, 1) * valid
