"""Measure the engine's presets on real pairs and print one table. `python benchmarks/engine_first_form.py [preset …]`.

Reads ../shared/data (see its README). CPU seconds are the comparable column: wall time depends on who else computes.

* brain: T1 of two subjects, 1 mm; mean Dice over 30 FreeSurfer labels.
* body CT: a CT against itself under a known breathing motion with another enhancement and noise; error in mm at points
  of strong gradient, so the truth is exact but smooth.
* positions: one head in two positions, two frames of reference; similarity only, no truth is known.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 — the name its users know

from registration_engine import Grid, Registration, Volume, register, warp
from registration_engine.files import read_volume
from registration_engine.resampling import grid_of, image_of
from registration_engine.volume import DisplacementField

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
LABELS = [2, 3, 4, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 28, 31, 41, 42, 43, 46, 47, 49, 50, 51, 52, 53, 54]
LABELS += [60, 63]


def main(presets: list[str]) -> int:
    """Run every case with every preset."""
    if not DATA.is_dir():
        print(f"no images at {DATA}", file=sys.stderr)
        return 2
    print(
        f"{'case':<10} {'preset':<9} {'before':>16} {'after':>16} {'folds':>6} {'sdlogj':>6} {'wall':>6} {'CPU s':>6}"
    )
    for name, case in (("brain", brain), ("body CT", body_ct), ("positions", positions)):
        fixed, moving, judge = case()
        for preset in presets:
            wall, cpu = time.perf_counter(), time.process_time()
            result = register(fixed, moving, preset=preset, device="cpu")
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            report = result.report
            print(
                f"{name:<10} {preset:<9} {judge(None):>16} {judge(result):>16} {report.folding_fraction:6.3f} "
                f"{report.sdlogj:6.2f} {wall:6.1f} {cpu:6.1f}",
                flush=True,
            )
    return 0


Case = tuple[Volume, Volume, Callable[[Registration | None], str]]


def brain() -> Case:
    """Two subjects; Dice of the labels carried over."""
    folder = DATA / "brain-t1-two-subjects"
    fixed, moving, fixed_labels, moving_labels = (
        read_volume(folder / f"{name}.nii.gz") for name in ("a", "b", "a_labels", "b_labels")
    )

    def judge(result: Registration | None) -> str:
        labels = moving_labels
        if result is not None:
            labels = warp(moving_labels, result.total_field(), fixed.grid, interpolation="nearest")
        scores = []
        for label in LABELS:
            a, b = fixed_labels.voxels == label, labels.voxels == label
            scores.append(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))
        return f"Dice {np.mean(scores):.3f}"

    return fixed, moving, judge


def body_ct() -> Case:
    """Known motion: both images are cut from the middle of a longer CT, so that nothing is invented at the ends."""
    source = sitk.ReadImage(str(DATA / "abdomen-ct-mr" / "body_ct.nii.gz"), sitk.sitkFloat32)
    whole = Volume(sitk.GetArrayFromImage(source), grid_of(source))
    directions = whole.grid.affine[:3, :3] / whole.grid.spacing_mm
    affine = np.eye(4)
    affine[:3, :3] = directions * (3.0, 1.5, 1.5)
    affine[:3, 3] = whole.grid.points_mm(np.array([16.0, 0.0, 0.0]))
    grid = Grid((80, 200, 240), affine)
    points = grid.points_mm(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1).astype(np.float64))
    scaled = (points - grid.points_mm((np.array(grid.shape) - 1) / 2)) / (150.0, 120.0, 130.0)
    swell = np.exp(-1.3 * (scaled**2).sum(-1))
    truth = swell[..., None] * np.stack(
        [3 * np.sin(2 * scaled[..., 1]), -6 * np.cos(1.5 * scaled[..., 2]), 18 + 2.7 * np.sin(3 * scaled[..., 0])], -1
    )

    still = DisplacementField(np.zeros_like(truth, dtype=np.float32), grid)
    moving = warp(whole, still, grid, outside=-1000).voxels
    fixed = warp(whole, DisplacementField(truth, grid), grid, outside=-1000).voxels
    rng = np.random.default_rng(0)
    edges = sitk.GetArrayFromImage(sitk.GradientMagnitudeRecursiveGaussian(image_of(fixed, grid), 2.0))
    body = fixed > -300
    marks = np.argwhere((edges > np.percentile(edges[body], 85)) & body)
    to = grid.indices(grid.points_mm(marks) + truth[tuple(marks.T)])
    marks = marks[((to > 2) & (to < np.array(grid.shape) - 3)).all(1)]
    at = tuple(rng.permutation(marks)[:3000].T)
    enhanced = moving + np.where((moving > 40) & (moving < 200), 60 * np.clip((moving - 40) / 40, 0, 1), 0)

    def judge(result: Registration | None) -> str:
        found = np.zeros(3) if result is None else result.total_field().vectors[at]
        errors = np.linalg.norm(found - truth[at], axis=1)
        return f"{errors.mean():.2f} ({np.percentile(errors, 95):.2f}) mm"

    noisy = (Volume(image + rng.normal(0, 12, grid.shape), grid) for image in (fixed, enhanced))
    return next(noisy), next(noisy), judge


def positions() -> Case:
    """A head supine and on its side."""
    volumes = []
    for name in ("HFS_t1", "HFDL_t1"):
        reader = sitk.ImageSeriesReader()
        folder = DATA / "dicom" / "siemens-mr-two-positions" / name
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        image = reader.Execute()
        volumes.append(Volume(sitk.GetArrayFromImage(image).astype(np.float32), grid_of(image)))
    fixed, moving = volumes
    before: list[float] = []

    def judge(result: Registration | None) -> str:
        if result is None:
            return f"NMI {before[-1]:.3f}" if before else "see report"
        before.append(result.report.similarity_before)
        return f"NMI {result.report.similarity_after:.3f}"

    return fixed, moving, judge


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["fast", "balanced", "accurate"]))
