from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from engine import bodies
from hand_made import make_registration, make_report, rotation, translation

from dicomnode import quality
from dicomnode.objects import sample_grid
from registration_engine import DisplacementField, Grid, Registration, Volume

GRID = bodies.grid((24, 30, 32), (4.0, 3.5, 3.0))
BODY = bodies.volume(GRID)


def linear(matrix: np.ndarray) -> Registration:
    return Registration(GRID, matrix, matrix, None, make_report())


def measured(registration: Registration, fixed: Volume = BODY, moving: Volume = BODY) -> quality.Quality:
    sampled = sample_grid(registration)
    return quality.measure(fixed, moving, registration, sampled.field, grid_error_mm=sampled.max_error_mm)


def test_an_image_on_itself_is_one_everywhere_and_moves_nowhere() -> None:
    figures = measured(linear(np.eye(4))).figures

    assert figures.patch_nmi_before == figures.patch_nmi_after == pytest.approx(1, abs=1e-5)
    assert figures.overlap_fraction == 1
    assert (figures.jacobian_min, figures.jacobian_median, figures.jacobian_max) == pytest.approx((1, 1, 1), abs=1e-5)
    for name in ("folding_fraction", "patch_nmi_fell_fraction", "sdlogj", "displacement_max_mm", "nonlinear_max_mm"):
        assert getattr(figures, name) == pytest.approx(0, abs=1e-5), name
    assert (figures.rotation_deg, figures.translation_mm) == pytest.approx((0, 0), abs=1e-6)
    assert figures.inverse_consistency_max_mm == pytest.approx(0, abs=1e-4)


def test_a_linear_map_has_its_own_determinant_everywhere_and_nothing_beyond_it() -> None:
    matrix = translation(3, -4, 12) @ rotation(0, 0, 10) @ np.diag([1.1, 1.0, 0.8, 1.0])
    registration = replace(linear(matrix), rigid=translation(3, -4, 12) @ rotation(0, 0, 10))
    found = measured(registration)

    assert found.jacobian == pytest.approx(0.88, abs=1e-3)
    assert found.figures.sdlogj == pytest.approx(0, abs=1e-3)
    assert found.figures.nonlinear_max_mm == pytest.approx(0, abs=1e-3)
    points = GRID.points_mm(np.moveaxis(np.indices(GRID.shape), 0, -1).astype(float))
    lengths = np.linalg.norm(points @ (matrix - np.eye(4))[:3, :3].T + matrix[:3, 3], axis=-1)
    assert found.displacement == pytest.approx(lengths, abs=0.01)
    assert found.figures.displacement_p95_mm == pytest.approx(np.percentile(lengths[found.body], 95), abs=0.01)
    assert found.figures.rotation_deg == pytest.approx(10, abs=1e-3)
    assert found.figures.translation_mm == pytest.approx(13, abs=0.6)  # the body's center is not quite the origin


def test_breathing_is_measured_as_it_was_made() -> None:
    through = bodies.breathing(9.0)
    points = GRID.points_mm(np.moveaxis(np.indices(GRID.shape), 0, -1).astype(float))
    exact = through(points) - points
    # The moving body is drawn at the inverse of the map, by fixed point.
    back = points.copy()
    for _ in range(40):
        back = points - (through(back) - back)
    moving = Volume(bodies.intensity(back), GRID)
    registration = Registration(GRID, np.eye(4), np.eye(4), exact.astype(np.float32), make_report())
    found = measured(registration, moving=moving)

    figures, lengths = found.figures, np.linalg.norm(exact, axis=-1)
    assert figures.patch_nmi_after > figures.patch_nmi_before + 0.2
    assert figures.patch_nmi_fell_fraction < 0.01
    assert figures.displacement_max_mm == pytest.approx(lengths[found.body].max(), abs=0.2)
    assert found.nonlinear == pytest.approx(found.displacement, abs=1e-4)
    along = np.stack([np.gradient(exact, axis=n) / GRID.spacing_mm[n] for n in range(3)], axis=-1)
    truth = np.linalg.det(np.eye(3) + along[..., ::-1])  # axes of the grid are z, y, x
    inside = found.body[2:-2, 2:-2, 2:-2]
    assert np.abs(found.jacobian - truth)[2:-2, 2:-2, 2:-2][inside].max() < 0.05
    assert figures.sdlogj == pytest.approx(np.log(truth[found.body]).std(), abs=0.01)
    assert figures.inverse_consistency_p95_mm < 0.1
    wrong = measured(replace(registration, displacement=-registration.displacement), moving=moving).figures
    assert wrong.patch_nmi_after < wrong.patch_nmi_before
    assert wrong.patch_nmi_fell_fraction > 0.5


def test_every_figure_over_the_body_is_that_of_its_map() -> None:
    found = measured(make_registration(GRID))
    figures, body = found.figures, found.body

    assert figures.jacobian_min == found.jacobian[body].min()
    assert figures.jacobian_max == found.jacobian[body].max()
    assert figures.displacement_mean_mm == pytest.approx(found.displacement[body].mean())
    assert figures.nonlinear_max_mm == found.nonlinear[body].max()
    assert figures.patch_nmi_after == pytest.approx(np.nanmean(found.patches[1]))
    assert figures.overlap_fraction == found.overlap[body].mean()
    assert 0.5 < figures.overlap_fraction < 1  # it moves by about 9 mm


def test_a_fold_counts_node_by_node() -> None:
    registration = make_registration(GRID, bump_mm=None)
    sampled = sample_grid(registration)
    vectors = np.array(sampled.field.vectors)
    vectors[tuple(np.array(vectors.shape[:3]) // 2)] += 12
    field = DisplacementField(vectors, sampled.field.grid)

    figures = quality.measure(BODY, BODY, registration, field, grid_error_mm=0).figures

    assert 0 < figures.folding_fraction < 0.01
    assert figures.jacobian_min < 0.2
    assert figures.nonlinear_max_mm > 5


def test_images_that_share_no_place_at_the_start_are_measured_after() -> None:
    away = Volume(BODY.voxels, Grid(GRID.shape, translation(500, 0, 0) @ GRID.affine))

    figures = measured(linear(translation(500, 0, 0)), moving=away).figures

    assert figures.patch_nmi_before == 0
    assert figures.patch_nmi_after == pytest.approx(1, abs=1e-3)
    assert figures.overlap_fraction == 1


def test_where_nothing_is_reached_nothing_is_said() -> None:
    figures = measured(linear(translation(500, 0, 0))).figures

    assert figures.overlap_fraction == 0
    assert np.isnan([figures.patch_nmi_before, figures.patch_nmi_after, figures.patch_nmi_fell_fraction]).all()
    told = json.loads(json.dumps(figures.as_dict()))
    assert told["patch_nmi_after"] is None
    assert quality.Figures.from_dict(told).as_dict() == figures.as_dict()


def test_a_large_grid_is_thinned_the_finest_axes_first() -> None:
    thin, every = quality.thinned(GRID, 12_000)

    assert thin.shape == (24, 15, 16)  # 3.5 and 3 mm are of a kind, 4 mm is coarser
    assert BODY.voxels[every].shape == thin.shape
    index = np.array([3.0, 4.0, 5.0])
    at = np.rint(GRID.indices(thin.points_mm(index))).astype(int)
    assert BODY.voxels[every][3, 4, 5] == BODY.voxels[tuple(at)]
    assert quality.thinned(GRID, 10**6)[0].is_same_as(GRID)
