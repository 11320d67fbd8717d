from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
from hand_made import make_registration, make_report, rotation

from dicomnode.model import Verdict
from dicomnode.objects import sample_grid
from dicomnode.verdict import folding_fraction, judge
from registration_engine import PRESETS, DisplacementField, Grid

GRID = Grid((12, 16, 20), np.diag([4.0, 3.0, 2.0, 1.0])[[2, 1, 0, 3]])


def field_of(vectors: npt.NDArray[np.float64], grid: Grid = GRID) -> DisplacementField:
    return DisplacementField(vectors.astype(np.float32), grid)


def test_a_good_registration_is_accepted_without_a_word() -> None:
    registration = make_registration(GRID)

    sampled = sample_grid(registration)

    verdict = judge(registration, sampled.field, max_error_mm=sampled.max_error_mm, tolerance_mm=sampled.tolerance_mm)
    assert verdict == (Verdict.ACCEPT, "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"similarity_after": 0.19}, "similarity fell from 0.2000 to 0.1900"),
        ({"similarity_after": float("nan")}, "similarity fell"),
        ({"max_displacement_mm": 1 + PRESETS["balanced"].largest_displacement_mm}, "displacement of"),
        ({"max_displacement_mm": float("nan")}, "displacement of"),
    ],
)
def test_a_report_beyond_its_limits_rejects(change: dict[str, float], reason: str) -> None:
    registration = replace(make_registration(GRID), report=make_report(**change))

    verdict, got = judge(registration, sample_grid(registration).field, max_error_mm=0, tolerance_mm=0.2)

    assert verdict is Verdict.REJECT
    assert reason in got


def test_a_fold_in_the_delivered_field_rejects_whatever_the_report_says() -> None:
    registration = make_registration(GRID)
    delivered = sample_grid(registration).field
    vectors = np.array(delivered.vectors)
    vectors[tuple(np.array(vectors.shape[:3]) // 2)] += 12

    verdict, reason = judge(registration, field_of(vectors, delivered.grid), max_error_mm=0, tolerance_mm=0.2)

    assert verdict is Verdict.REJECT
    assert "the delivered field folds in" in reason


def test_a_grid_coarser_than_aimed_at_warns_with_the_figure() -> None:
    registration = make_registration(GRID)

    verdict = judge(registration, sample_grid(registration).field, max_error_mm=0.314, tolerance_mm=0.2)

    assert verdict == (Verdict.WARN, "grid error up to 0.31 mm, aimed at 0.20 mm: size limit")


def test_a_rotation_does_not_fold_on_any_axes() -> None:
    turned = (rotation(30, 40, 170) - np.eye(4))[:3, :3]
    index = np.moveaxis(np.indices(GRID.shape), 0, -1).astype(float)
    mirrored = Grid(GRID.shape, GRID.affine @ np.diag([-1.0, 1, 1, 1]))

    for grid in (GRID, mirrored):
        assert folding_fraction(field_of(grid.points_mm(index) @ turned.T, grid), grid) == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirroring_map_folds_everywhere(axis: int) -> None:
    index = np.moveaxis(np.indices(GRID.shape), 0, -1).astype(float)
    mirror = np.zeros((3, 3))
    mirror[axis, axis] = -2

    assert folding_fraction(field_of(GRID.points_mm(index) @ mirror.T), GRID) == 1


def test_the_share_counts_the_nodes_that_fold() -> None:
    vectors = np.zeros((*GRID.shape, 3))
    vectors[:, :, 10, 0] = 4.1  # mm along x where nodes are 2 mm apart: beyond it, space runs backwards

    assert folding_fraction(field_of(vectors), GRID) == pytest.approx(1 / 20)


def test_the_share_is_what_simpleitk_counts() -> None:
    vectors = np.random.default_rng(0).normal(0, 2, (*GRID.shape, 3))
    image = SimpleITK.GetImageFromArray(vectors, isVector=True)
    image.SetSpacing([2.0, 3.0, 4.0])

    determinant = SimpleITK.GetArrayFromImage(SimpleITK.DisplacementFieldJacobianDeterminant(image))

    inner = np.s_[1:-1, 1:-1, 1:-1]
    fixed = Grid((10, 14, 18), GRID.affine @ np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1.0]]))
    assert 0.01 < (determinant[inner] <= 0).mean() == pytest.approx(folding_fraction(field_of(vectors), fixed))


def test_folding_outside_the_fixed_volume_does_not_count() -> None:
    vectors = np.zeros((*GRID.shape, 3))
    vectors[:, :, 18, 0] = 5
    fixed = Grid((12, 16, 10), GRID.affine)

    assert folding_fraction(field_of(vectors), fixed) == 0
    assert folding_fraction(field_of(vectors), GRID) > 0
