"""Test-time optimisation of a displacement field: coarse to fine, composed small smooth steps.

Each step is short, smooth and composed with the field so far, which keeps the map one to one; a floor on the local
volume change watches over what the discretisation lets through. Deterministic: no random numbers, and no sum whose
order a device may choose.

References
----------
Jena et al., FireANTs: Adaptive Riemannian optimization for multi-scale diffeomorphic matching, arXiv 2404.01249.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from registration_engine import field as fields
from registration_engine.level import Level
from registration_engine.losses import local_correlation, mutual_information
from registration_engine.prepare import Prepared
from registration_engine.presets import SUPPLE, Manner, Preset
from registration_engine.search import search
from registration_engine.spaces import Lattice, Matrix
from registration_engine.structure import likeness
from registration_engine.volume import Grid

_BETA_FORCE, _BETA_SQUARE = 0.9, 0.99
_DAMPING = 3.0  # Adam's floor as a multiple of the RMS: flat background must not move as hard as an edge
_LONGEST_STEP = 0.5  # voxels of the level
_LAST_PACE = 0.02
_PLATEAU_STEPS, _PLATEAU_GAIN = 10, 1e-4
_GUARD_EVERY, _GUARD_TRIES = 10, 40
_MARGIN_MM = 6.0
_CHOICE_VOXELS, _CHOICE_SHARE = 150_000, 0.3
_SEARCH_VOXELS = 250_000
_ONE_KIND = 0.8  # correlation; phases and contrast agents had 0.93 and more, two brains 0.80, T1-FLAIR 0.69 at most


def refine(
    fixed: Prepared,
    moving: Prepared,
    moving_from_fixed: Matrix,
    preset: Preset,
    starts: Sequence[tuple[Tensor, Grid]],
    judge: Callable[[Tensor, Grid], float],
    progress: Callable[[float], None],
) -> tuple[Tensor, Grid]:
    """Find the displacement that makes the moving image like the fixed one.

    The moving image is sampled at moving_from_fixed @ (x + displacement(x)). `progress` is called with the share
    done, 0…1; an exception it raises ends the optimisation. `judge` scores a displacement, larger = better; it chooses
    between the preset's manners. `starts` are displacements (3, Z, Y, X), lattice mm, on grids along the axes of the
    fixed one: the most similar is the start, zero where none beats it.

    Returns
    -------
    tuple[Tensor, Grid]
        (3, Z, Y, X), lattice mm, and the grid it is sampled on: that of the fixed body, no finer than the preset says.
    """
    body = fixed.cropped(_MARGIN_MM)
    finest = body.spacing_for(preset.voxels)
    body, moving = body.reduced(finest), moving.reduced(finest)
    shortest = float((body.grid.spacing_mm * body.grid.shape).min()) / finest
    manners, unlike = [manner.within(shortest) for manner in preset.manners], preset.unlike.within(shortest)
    levels = [
        (n, finest * 2.0**up) for up, n in zip(range(len(preset.iterations))[::-1], preset.iterations, strict=True)
    ]
    displacement, grid = _searched(body, moving, moving_from_fixed, preset, starts)
    # The manner is chosen on the finest level that costs next to nothing, and never on the last of several.
    cheap = body.spacing_for(_CHOICE_VOXELS)
    last = max([n for n, (_, spacing) in enumerate(levels[:-1]) if spacing >= cheap], default=0)
    # Coarser levels would smooth away what the search has found.
    choice = levels[last : last + 1] if displacement.any() else levels[: last + 1]

    def tried(manner: Manner, number: int) -> tuple[Tensor, Grid]:
        def part_done(part: float) -> None:
            progress(_CHOICE_SHARE * (number + part) / (1 + len(manners)))

        start = displacement, grid
        return _through_levels(start, body, moving, moving_from_fixed, choice, preset, manner, part_done)

    chosen, best = 0, tried(manners[0], 0)
    if _correlation(body, moving, moving_from_fixed, *best) < _ONE_KIND:
        manners[0] = unlike
        best = tried(unlike, 1)
    best_score = judge(*best)
    for number, suppler in enumerate(manners[1:], start=1):
        trial = tried(suppler, number + 1)
        score = judge(*trial)
        if score > suppler.worth * best_score:
            chosen, best, best_score = number, trial, score
    if (score := judge(displacement, grid)) > best_score:
        best, best_score = (displacement, grid), score
    rest = levels[last + 1 :]
    for number, manner in enumerate(manners[chosen:]):

        def rest_done(part: float, ahead: float = 0.1**number) -> None:
            progress(1 - (1 - _CHOICE_SHARE) * ahead * (1 - 0.9 * part))

        found = _through_levels(best, body, moving, moving_from_fixed, rest, preset, manner, rest_done)
        if judge(*found) >= best_score:
            return found
        # Too stiff for what the search has found: the next one.
    return best


def _correlation(
    body: Prepared, moving: Prepared, moving_from_fixed: Matrix, displacement: Tensor, grid: Grid
) -> float:
    """How nearly one image is a multiple of the other over the fixed body, -1…1."""
    spacing = float(grid.spacing_mm.max())
    level = Level.of(body.reduced(spacing), moving.reduced(spacing), moving_from_fixed)
    warped, weight = level.warped(fields.resize(displacement, grid, level.fixed.grid))
    inside = level.fixed.foreground[0] * weight > 0
    both = torch.stack([level.fixed.image[0][inside], warped[inside]])
    return float(torch.corrcoef(both)[0, 1]) if inside.any() else 0.0


def _through_levels(
    start: tuple[Tensor, Grid],
    body: Prepared,
    moving: Prepared,
    moving_from_fixed: Matrix,
    levels: list[tuple[int, float]],
    preset: Preset,
    manner: Manner,
    progress: Callable[[float], None],
) -> tuple[Tensor, Grid]:
    """The displacement refined level by level, each (iterations, voxel side in mm), and the grid of the last."""
    displacement, grid = start
    effort = [iterations / spacing**3 for iterations, spacing in levels]
    for number, (iterations, spacing) in enumerate(levels):
        level = Level.of(body.reduced(spacing), moving.reduced(spacing), moving_from_fixed)
        displacement = fields.resize(displacement, grid, level.fixed.grid)
        grid = level.fixed.grid
        done, share = sum(effort[:number]) / sum(effort), effort[number] / sum(effort)
        for part, refined in _refined(level, displacement, preset, manner, iterations, spacing):
            progress(done + share * part)
            displacement = refined
    return displacement, grid


def _searched(
    body: Prepared,
    moving: Prepared,
    moving_from_fixed: Matrix,
    preset: Preset,
    starts: Sequence[tuple[Tensor, Grid]],
) -> tuple[Tensor, Grid]:
    """The start of the field: a given one, a wide search, then a narrow one; each only where it is more similar."""
    spacing = max(preset.search_mm / 2, body.spacing_for(_SEARCH_VOXELS))
    level = Level.of(body.reduced(spacing), moving.reduced(spacing), moving_from_fixed)
    grid = level.fixed.grid
    none = torch.zeros(3, *grid.shape, device=body.image.device)
    given = [
        unfolded(fields.resize(*start, grid), level.lattice, smallest_determinant=preset.smallest_determinant)
        for start in starts
    ]
    displacement = max((none, *given), key=lambda start: _force(level, start, preset, SUPPLE)[0])
    for part, steps, window in ((1.0, 4, 3), (0.5, 3, 5)):
        spacing = max(part * preset.search_mm, body.spacing_for(_SEARCH_VOXELS))
        pooled = max(1, round(preset.search_mm / spacing))
        level = Level.of(body.reduced(spacing), moving.reduced(spacing), moving_from_fixed)
        before = fields.resize(displacement, grid, level.fixed.grid)
        found = search(level, before, step_mm=part * preset.search_mm, steps=steps, pooled=pooled, window=window)
        found = unfolded(found, level.lattice, smallest_determinant=preset.smallest_determinant)
        better = _force(level, found, preset, SUPPLE)[0] > _force(level, before, preset, SUPPLE)[0]
        displacement, grid = (found if better else before), level.fixed.grid
    return displacement, grid


def unfolded(displacement: Tensor, lattice: Lattice, *, smallest_determinant: float) -> Tensor:
    """The displacement, smoothed just where the local volume change falls below the floor, and a little around."""
    spacing = max(lattice.spacing_mm)
    for number in range(_GUARD_TRIES):
        low = fields.smallest_determinant(displacement, lattice.spacing_mm) < smallest_determinant
        if not low.any():
            break
        # Wider at every try, and fading out as widely: a seam would be the next fold.
        width = 1.5 + 0.25 * number
        blend = fields.smooth(low.float()[None], width * spacing, lattice).mul_(15.75 * width**3).clamp_(max=1)
        smoother = fields.smooth(displacement, (width - 0.5) * spacing, lattice)
        displacement = displacement + blend * (smoother - displacement)
    return displacement


def _refined(
    level: Level, displacement: Tensor, preset: Preset, manner: Manner, iterations: int, spacing_mm: float
) -> Iterator[tuple[float, Tensor]]:
    """Yield the share of the steps done and the displacement after each, the last one free of folds."""
    lattice = level.lattice
    mean = torch.zeros_like(displacement)
    square = torch.zeros_like(displacement)
    values: list[float] = []
    for step in range(1, iterations + 1):
        # The steps shrink, and with them the smoothing that holds them: what is left is not noise kept in motion.
        pace = _LAST_PACE + (1 - _LAST_PACE) * (1 + math.cos(math.pi * (step - 1) / iterations)) / 2
        value, force = _force(level, displacement, preset, manner)
        values.append(value)
        if _is_flat(values):
            break
        mean.lerp_(force, 1 - _BETA_FORCE)
        square.mul_(_BETA_SQUARE).addcmul_(force, force, value=1 - _BETA_SQUARE)
        unbiased = 1 - _BETA_SQUARE**step
        floor = _DAMPING * (square.mean() / unbiased).sqrt() + 1e-20
        root = torch.sqrt(square, out=force).mul_(unbiased**-0.5).add_(floor).mul_(1 - _BETA_FORCE**step)
        update = fields.smooth(torch.div(mean, root, out=root), manner.step_smoothing * spacing_mm, lattice)
        longest = update.square().sum(0).max().sqrt()
        update *= pace * _LONGEST_STEP * spacing_mm / longest.clamp(min=1e-20)
        displacement = fields.compose(displacement, update, lattice)
        width = math.sqrt(pace) * manner.field_smoothing * spacing_mm
        displacement = fields.smooth(displacement, width, lattice, sharpened=manner.holds_bends)
        if step % _GUARD_EVERY == 0:
            displacement = unfolded(displacement, lattice, smallest_determinant=preset.smallest_determinant)
        yield step / iterations, displacement
    yield 1.0, unfolded(displacement, lattice, smallest_determinant=preset.smallest_determinant)


def _force(level: Level, displacement: Tensor, preset: Preset, manner: Manner) -> tuple[float, Tensor]:
    """Similarity now, and its ascent direction (3, Z, Y, X) by the displacement of each voxel."""
    warped, weight = level.warped(displacement)
    fixed, spacing = level.fixed.image[0], level.lattice.spacing_mm
    value, slope = 0.0, torch.zeros_like(warped)
    found: list[tuple[float, tuple[float, Tensor]]] = []
    if manner.local_share < 1:
        found.append((1 - manner.local_share, mutual_information(fixed, warped, weight, bins=preset.bins)))
    if manner.local_share > 0:
        found.append((manner.local_share, local_correlation(fixed, warped, weight, width=preset.window)))
    for share, (term, gradient) in found:
        value += share * term
        slope += share * _of_rms_one(gradient)
    force = slope * fields.gradient(warped[None], spacing)
    if manner.structure_share > 0:
        described, floor = level.structure
        term, along = likeness(described, warped, weight, floor, spacing)
        value += term
        force = torch.lerp(_of_rms_one(force), _of_rms_one(along), manner.structure_share)
    return value, force


def _of_rms_one(tensor: Tensor) -> Tensor:
    return tensor / tensor.square().mean().sqrt().clamp(min=1e-20)


def _is_flat(values: list[float]) -> bool:
    """Whether the last ten steps gained next to nothing."""
    if len(values) <= _PLATEAU_STEPS:
        return False
    return values[-1] - values[-1 - _PLATEAU_STEPS] < _PLATEAU_GAIN * abs(values[-1 - _PLATEAU_STEPS])
