from __future__ import annotations

from itertools import product

import numpy as np
import phantoms
import pytest
from counterparts import displacements_at
from hand_made import make_objects, make_registration

from dicomnode import volumes
from dicomnode.objects import sample_grid
from dicomnode.objects.deformable import LARGEST_BYTES, interpolate
from registration_engine import Grid, Registration

AXIAL = volumes.load(phantoms.make_series()).grid
OBLIQUE = volumes.load(phantoms.make_series(oblique=True)).grid


def truth(registration: Registration, index: np.ndarray) -> np.ndarray:
    """The engine's total displacement at fixed indices inside the volume."""
    points = registration.grid.points_mm(index)
    linear = (registration.moving_from_fixed - np.eye(4))[:3]
    total = points @ linear[:, :3].T + linear[:, 3]
    if registration.displacement is not None:
        total += interpolate(registration.displacement, index)
    return total


@pytest.mark.parametrize("grid", [AXIAL, OBLIQUE], ids=["axial", "oblique"])
def test_the_grid_lies_along_lps_and_covers_the_volume_and_a_cell_more(grid: Grid) -> None:
    field = sample_grid(make_registration(grid)).field

    assert np.allclose(field.grid.affine[:3, :3], np.diag(field.grid.spacing_mm[::-1])[:, ::-1])
    corners = grid.points_mm(np.array(list(product((0.0, 1.0), repeat=3))) * grid.shape - 0.5)
    index = field.grid.indices(corners)
    assert (index >= 1 - 1e-6).all()
    assert (index <= np.array(field.grid.shape) - 2 + 1e-6).all()


@pytest.mark.parametrize("grid", [AXIAL, OBLIQUE], ids=["axial", "oblique"])
def test_the_delivered_map_is_the_engines_within_the_measured_error(grid: Grid) -> None:
    registration = make_registration(grid)

    sampled = sample_grid(registration)

    rng = np.random.default_rng(0)
    index = rng.integers(0, grid.shape, (3000, 3)).astype(float)
    error = np.linalg.norm(displacements_at(sampled.field, grid.points_mm(index)) - truth(registration, index), axis=1)
    assert error.max() <= sampled.max_error_mm + 1e-4
    assert sampled.max_error_mm < 0.2


def test_the_spacing_shrinks_until_the_error_is_small_enough() -> None:
    registration = make_registration(OBLIQUE, sigma_mm=20)

    coarse, fine = (sample_grid(registration, tolerance_mm=t) for t in (2.0, 0.1))

    assert coarse.field.grid.spacing_mm[0] == 4.0
    assert fine.field.grid.spacing_mm[0] < 4.0
    assert fine.max_error_mm <= 0.1 < coarse.max_error_mm


def test_a_grid_with_the_voxels_own_spacing_loses_nothing_however_rough_the_field() -> None:
    fine = volumes.load(phantoms.make_series(shape=(8, 24, 28), spacing_mm=(5, 1.5, 1.1))).grid
    linear = make_registration(fine, bump_mm=None)
    rough = np.random.default_rng(0).normal(0, 3, (*fine.shape, 3)).astype(np.float32)
    registration = Registration(fine, linear.rigid, linear.moving_from_fixed, rough, linear.report)

    sampled = sample_grid(registration)

    assert np.allclose(sampled.field.grid.spacing_mm, [5, 1.5, 1.1])
    assert sampled.max_error_mm < 1e-3
    index = np.random.default_rng(1).uniform(0, np.array(fine.shape) - 1, (500, 3))
    points = fine.points_mm(index)
    assert np.allclose(displacements_at(sampled.field, points), truth(registration, index), atol=1e-3)


def test_the_size_limit_wins_and_the_error_is_told() -> None:
    registration = make_registration(OBLIQUE, sigma_mm=8)
    coarse = sample_grid(registration, tolerance_mm=100.0)

    limited = sample_grid(registration, largest_bytes=coarse.field.vectors.nbytes)

    assert limited.field.grid.spacing_mm[0] == 4.0
    assert limited.max_error_mm > limited.tolerance_mm
    assert registration.displacement is not None
    index = np.argwhere(np.linalg.norm(registration.displacement, axis=-1) > 1).astype(float)
    error = np.linalg.norm(
        displacements_at(limited.field, OBLIQUE.points_mm(index)) - truth(registration, index), axis=1
    )
    assert error.max() <= limited.max_error_mm + 1e-4
    assert error.max() == pytest.approx(limited.max_error_mm, abs=1e-4)


def test_a_volume_too_large_for_the_default_spacing_still_stays_within_the_limit() -> None:
    registration = make_registration(OBLIQUE, bump_mm=None)

    sampled = sample_grid(registration, largest_bytes=500_000)

    assert sampled.field.vectors.nbytes <= 500_000 < LARGEST_BYTES
    assert sampled.field.grid.spacing_mm[0] == 8.0


def test_a_linear_registration_is_exact_everywhere() -> None:
    registration = make_registration(OBLIQUE, bump_mm=None)

    sampled = sample_grid(registration)

    index = np.random.default_rng(0).uniform(-0.5, np.array(OBLIQUE.shape) - 0.5, (500, 3))
    assert np.allclose(displacements_at(sampled.field, OBLIQUE.points_mm(index)), truth(registration, index), atol=1e-4)
    assert sampled.max_error_mm == 0


def test_the_margin_goes_on_smoothly() -> None:
    constant = np.broadcast_to(np.float32([3, -2, 1]), (*AXIAL.shape, 3))
    linear = make_registration(AXIAL, bump_mm=None)
    registration = Registration(AXIAL, linear.rigid, linear.moving_from_fixed, constant, linear.report)

    sampled, plain = sample_grid(registration).field, sample_grid(linear).field

    assert np.allclose(sampled.vectors - plain.vectors, [3, -2, 1], atol=1e-4)


@pytest.mark.parametrize("own_frame", [False, True], ids=["one Frame of Reference", "two"])
def test_the_object_holds_the_profile_that_every_reader_reads(own_frame: bool) -> None:
    fixed = phantoms.make_series()
    moving = phantoms.make_series(phase="arterial", frame_of_reference="other" if own_frame else None)
    registration = make_registration(volumes.load(fixed).grid)
    sampled = sample_grid(registration)

    ((_, made),) = make_objects(fixed, moving, registration, sampled=sampled, outputs=["dsr"])

    assert made.FrameOfReferenceUID == fixed[0].FrameOfReferenceUID
    assert (made.Modality, made.ContentLabel, made.InstanceNumber) == ("REG", "DEFORMABLE REG", 1)
    (item,) = made.DeformableRegistrationSequence
    assert item.SourceFrameOfReferenceUID == moving[0].FrameOfReferenceUID
    assert {i.ReferencedSOPInstanceUID for i in item.ReferencedImageSequence} == {d.SOPInstanceUID for d in moving}
    assert item.RegistrationTypeCodeSequence[0].CodeValue == "125024"
    assert f"{sampled.max_error_mm:.3f} mm" in item.FrameOfReferenceTransformationComment
    for sequence in (item.PreDeformationMatrixRegistrationSequence, item.PostDeformationMatrixRegistrationSequence):
        assert np.array_equal(sequence[0].FrameOfReferenceTransformationMatrix, np.eye(4).ravel())
        assert sequence[0].FrameOfReferenceTransformationMatrixType == "RIGID"
    (grid,) = item.DeformableRegistrationGridSequence
    vectors = np.frombuffer(grid.VectorGridData, "<f4").reshape(*grid.GridDimensions[::-1], 3)
    assert np.array_equal(vectors, sampled.field.vectors)
    assert np.array_equal(np.array(grid.ImagePositionPatient, dtype=float), sampled.field.grid.affine[:3, 3])
    assert list(grid.GridResolution) == sampled.field.grid.spacing_mm[::-1].tolist()
