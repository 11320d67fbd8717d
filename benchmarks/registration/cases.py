"""The rows of the side by side: which two images, what is known about them, and which are held out.

Real images are read from ../shared/data and stay there. Where the motion is made up, the fixed image is sampled at
x + displacement(x) from one acquisition and the moving image is another one at rest, so the displacement is the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 — the name its users know

from benchmarks.registration import dynamic, motions
from benchmarks.registration.motions import Motion, Points
from registration_engine import DisplacementField, Grid, Volume, warp
from registration_engine.files import read_volume
from registration_engine.resampling import image_of

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FREESURFER = (2, 3, 4, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 28, 31, 41, 42, 43, 46, 47, 49, 50, 51, 52, 53, 54,
              60, 63)  # fmt: skip
ORGANS = (1, 2, 3, 4, 5, 6, 7)  # spleen, kidneys, gallbladder, liver, stomach, pancreas
_LANDMARKS = 3000

Contrast = Literal["same", "agent", "other"]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images and what is known.

    Attributes
    ----------
    fixed_mm, moving_mm
        (n, 3), the same places in both images; empty where no motion is known.
    """

    fixed: Volume
    moving: Volume
    labels: tuple[int, ...] = ()
    fixed_labels: Volume | None = None
    moving_labels: Volume | None = None
    fixed_mm: Points = field(default_factory=lambda: np.zeros((0, 3)))
    moving_mm: Points = field(default_factory=lambda: np.zeros((0, 3)))

    def foreground(self) -> npt.NDArray[np.bool_]:
        """Voxels of the fixed body: above half of Otsu's threshold between the 0.5 and 99.5 percentiles."""
        low, high = np.percentile(self.fixed.voxels, [0.5, 99.5])
        otsu = sitk.OtsuThresholdImageFilter()
        otsu.Execute(sitk.GetImageFromArray(np.clip(self.fixed.voxels, low, high)))
        return np.asarray(self.fixed.voxels > low + (otsu.GetThreshold() - low) / 2)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes
    ----------
    contrast
        same: one kind of image; agent: one kind, contrast medium in one of them; other: different kinds.
    held_out
        Never used to choose settings.
    """

    name: str
    group: str
    contrast: Contrast
    build: Callable[[], Pair]
    held_out: bool = False


def cases() -> list[Case]:
    """Every row, small volumes first; of the seeded rows the first seeds first."""
    rows = [Case(f"liver-mr-{n}", "liver-mr-breathing", "agent", _liver(n), held_out=n in (4, 5)) for n in (2, 4, 1, 5)]
    rows.append(Case("abdomen-ct-mr", "abdomen-ct-mr", "other", _abdomen, held_out=True))
    rows.append(Case("brain-2mm", "brain-t1-two-subjects 2 mm", "same", lambda: _brain(2.0)))
    bodies = [Case(f"body-ct-{s}", "body-ct", "agent", _body(s), held_out=s > 5) for s in range(1, 11)]
    sclerosis = [Case(f"ms-agent-{s}", "brain-ms agent", "agent", _sclerosis(s), held_out=s > 5) for s in range(1, 11)]
    rows += bodies[:1] + bodies[5:6]
    rows += [Case(f"dce-{n}", "dce", "agent", _dynamic(n)) for n in (3, 8, 27)]
    rows.append(Case("brain-1mm", "brain-t1-two-subjects 1 mm", "same", lambda: _brain(1.0)))
    rows += [Case(f"stroke-{kind}-1".lower(), f"brain-stroke T1-{kind}", "other", _stroke(kind, 1))
             for kind in ("T2", "FLAIR")]  # fmt: skip
    rows.append(Case("ms-cross", "brain-ms T1-FLAIR inter-patient", "other", _sclerosis_cross, held_out=True))
    rows += sclerosis[:1] + sclerosis[5:6]
    for n in range(1, 5):
        rows += [bodies[n], bodies[n + 5], sclerosis[n], sclerosis[n + 5]]
    return rows


def _liver(number: int) -> Callable[[], Pair]:
    folder = DATA / "liver-mr-breathing"
    return lambda: Pair(*(read_volume(folder / f"flip_angle_{n}.nii.gz") for n in (3, number)))


def _brain(spacing_mm: float) -> Pair:
    """Two subjects; the second grid is every spacing_mm, images smoothed by half of it, labels nearest."""
    folder = DATA / "brain-t1-two-subjects"
    images = [read_volume(folder / f"{name}.nii.gz") for name in ("a", "b")]
    labels = [read_volume(folder / f"{name}_labels.nii.gz") for name in ("a", "b")]
    if spacing_mm > 1:
        images = [_coarser(image, spacing_mm, sitk.sitkLinear) for image in images]
        labels = [_coarser(image, spacing_mm, sitk.sitkNearestNeighbor) for image in labels]
    return Pair(*images, FREESURFER, *labels)


def _coarser(volume: Volume, spacing_mm: float, interpolator: int) -> Volume:
    image = image_of(volume.voxels, volume.grid)
    if interpolator == sitk.sitkLinear:
        image = sitk.SmoothingRecursiveGaussian(image, 0.5 * spacing_mm)
    shape = tuple(int(n * s / spacing_mm) for n, s in zip(volume.grid.shape, volume.grid.spacing_mm, strict=True))
    affine = volume.grid.affine.copy()
    affine[:3, :3] *= spacing_mm / volume.grid.spacing_mm
    grid = Grid(shape, affine)
    target = image_of(np.zeros(shape, np.float32), grid)
    return Volume(sitk.GetArrayFromImage(sitk.Resample(image, target, sitk.Transform(), interpolator)), grid)


def _abdomen() -> Pair:
    """CT ← MR of another person, moved so that the centers of the livers meet: for every method the same start."""
    folder = DATA / "abdomen-ct-mr"
    ct, mr, ct_labels, mr_labels = (read_volume(folder / f"{n}.nii.gz") for n in ("ct", "mr", "ct_labels", "mr_labels"))
    livers = [v.grid.points_mm(np.argwhere(v.voxels == 5).astype(float)).mean(0) for v in (ct_labels, mr_labels)]
    affine = mr.grid.affine.copy()
    affine[:3, 3] += livers[0] - livers[1]
    grid = Grid(mr.grid.shape, affine)
    return Pair(ct, Volume(mr.voxels, grid), ORGANS, ct_labels, Volume(mr_labels.voxels, grid))


def _body(seed: int) -> Callable[[], Pair]:
    """Body CT at the end of breathing out ← after breathing in, enhanced; both from the middle of a longer scan."""

    def build() -> Pair:
        folder = DATA / "abdomen-ct-mr"
        whole, labels = read_volume(folder / "body_ct.nii.gz"), read_volume(folder / "body_ct_labels.nii.gz")
        affine = whole.grid.affine.copy()
        affine[:3, 3] = whole.grid.points_mm(np.array([20.0, 0.0, 0.0]))
        grid = Grid((80, *whole.grid.shape[1:]), affine)
        motion = motions.breathing(grid, seed)
        rng = np.random.default_rng((seed, 4))
        enhanced = Volume(whole.voxels + _enhancement(whole, labels, late=float(rng.uniform(0, 1))), whole.grid)
        pair = _moved(whole, enhanced, grid, motion, seed, outside=-1024, labels=(labels, ORGANS))
        noisy = (Volume(v.voxels + rng.normal(0, 12, grid.shape), grid) for v in (pair.fixed, pair.moving))
        return Pair(next(noisy), next(noisy), *_known(pair))

    return build


def _enhancement(whole: Volume, labels: Volume, *, late: float) -> npt.NDArray[np.float32]:
    """HU that contrast medium adds: arteries and kidney early, liver, spleen and veins late; 2 mm of blur."""
    early_late = {52: (230, 120), 64: (40, 140), 63: (20, 110), 1: (90, 80), 2: (140, 150), 3: (140, 150), 5: (15, 60),
                  7: (60, 45), 6: (25, 30), 18: (20, 30), 19: (25, 35), 20: (10, 25)}  # fmt: skip
    added = np.zeros(whole.grid.shape, np.float32)
    for label, (early, portal) in early_late.items():
        added[labels.voxels == label] = early + late * (portal - early)
    # air and fat within an organ's label take up nothing
    added *= np.clip((whole.voxels + 30) / 40, 0, 1)
    return np.asarray(sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(image_of(added, whole.grid), 2.0)))


def _stroke(kind: str, seed: int) -> Callable[[], Pair]:
    """T1 under a large known deformation ← T2 or FLAIR of the same head at rest."""

    def build() -> Pair:
        t1, other = (read_volume(DATA / "brain-stroke-t1-t2-flair" / f"{name}.nii.gz") for name in ("T1", kind))
        motion = motions.waves(t1.grid, seed + (50 if kind == "FLAIR" else 0), largest_mm=14, wavelengths_mm=(70, 200))
        return _moved(t1, other, t1.grid, motion, seed, outside=0)

    return build


def _sclerosis(seed: int) -> Callable[[], Pair]:
    """T1 under a known deformation ← T1 after contrast medium; patient 07 by seeds 1 to 5, 19 by 6 to 10."""

    def build() -> Pair:
        patient = "07" if seed <= 5 else "19"
        folder = DATA / "brain-ms-t1-t1post-t2-flair"
        t1, post = (read_volume(folder / f"patient{patient}_{name}.nii.gz") for name in ("T1", "T1POST"))
        motion = motions.waves(t1.grid, seed, largest_mm=9, wavelengths_mm=(50, 180))
        return _moved(t1, post, t1.grid, motion, seed, outside=0)

    return build


def _sclerosis_cross() -> Pair:
    folder = DATA / "brain-ms-t1-t1post-t2-flair"
    return Pair(read_volume(folder / "patient07_T1.nii.gz"), read_volume(folder / "patient19_FLAIR.nii.gz"))


def _dynamic(phase: int) -> Callable[[], Pair]:
    def build() -> Pair:
        fixed, moving = dynamic.volume(dynamic.REFERENCE), dynamic.volume(phase)
        marks = _landmarks(fixed, dynamic.motion(phase), moving.grid, phase)
        return Pair(fixed, moving, (), None, None, *marks)

    return build


def _moved(
    at_rest: Volume,
    moving: Volume,
    grid: Grid,
    motion: Motion,
    seed: int,
    *,
    outside: float,
    labels: tuple[Volume, Sequence[int]] | None = None,
) -> Pair:
    """The fixed image shows `at_rest` at x + motion(x), the moving one `moving` at x."""
    truth = sampled(motion, grid)
    still = DisplacementField(np.zeros_like(truth.vectors), grid)
    fixed = warp(at_rest, truth, grid, outside=outside)
    marks = _landmarks(fixed, motion, grid, seed)
    moving = warp(moving, still, grid, outside=outside)
    if labels is None:
        return Pair(fixed, moving, (), None, None, *marks)
    carried, wanted = (warp(labels[0], f, grid, interpolation="nearest") for f in (truth, still)), tuple(labels[1])
    return Pair(fixed, moving, wanted, *carried, *marks)


def sampled(motion: Motion, grid: Grid) -> DisplacementField:
    """A motion at every voxel center."""
    vectors = np.empty((*grid.shape, 3), np.float32)
    plane = np.moveaxis(np.indices(grid.shape[1:], dtype=float), 0, -1)
    for k in range(grid.shape[0]):
        vectors[k] = motion(grid.points_mm(np.concatenate([np.full((*plane.shape[:2], 1), float(k)), plane], -1)))
    return DisplacementField(vectors, grid)


def _landmarks(fixed: Volume, motion: Motion, moving_grid: Grid, seed: int) -> tuple[Points, Points]:
    """3000 points of the fixed body where its gradient is among the strongest 15 percent, and where they go."""
    rng = np.random.default_rng((seed, 5))
    edges = sitk.GetArrayFromImage(
        sitk.GradientMagnitudeRecursiveGaussian(image_of(fixed.voxels, fixed.grid), float(fixed.grid.spacing_mm.min()))
    )
    body = Pair(fixed, fixed).foreground()
    index = np.argwhere(body & (edges > np.percentile(edges[body], 85))).astype(float)
    here = fixed.grid.points_mm(index)
    there = here + motion(here)
    at = moving_grid.indices(there)
    seen = ((at >= 2) & (at <= np.array(moving_grid.shape) - 3)).all(1)
    chosen = rng.permutation(np.flatnonzero(seen))[:_LANDMARKS]
    return here[chosen], there[chosen]


def _known(pair: Pair) -> tuple[tuple[int, ...], Volume | None, Volume | None, Points, Points]:
    return pair.labels, pair.fixed_labels, pair.moving_labels, pair.fixed_mm, pair.moving_mm
