"""The way back undoes the way there."""

from __future__ import annotations

import numpy as np
import phantoms
import pytest
from counterparts import decoded_field, displacements_at
from hand_made import make_objects, make_registration, make_source
from pydicom import Dataset

from dicomnode.objects import sample_grid

FIXED = phantoms.make_series()
MOVING = phantoms.make_series(phase="arterial", shape=(18, 40, 44), frame_of_reference="other", study="later study")


def test_there_and_back_is_where_one_was_within_the_figure_that_the_object_tells() -> None:
    registration = make_registration(make_source(FIXED).grid)
    made = dict(make_objects(FIXED, MOVING, registration, outputs=["dsr", "dsr-inverse"]))

    there, back = (decoded_field(made[kind]) for kind in ("dsr", "dsr-inverse"))
    moving = make_source(MOVING).grid
    points = moving.points_mm(np.random.default_rng(3).integers(0, moving.shape, (2000, 3)).astype(float))
    fixed = points + displacements_at(back, points)
    inside = there.grid.indices(fixed)
    inside = ((inside >= 0) & (inside <= np.array(there.grid.shape) - 1)).all(axis=1)
    error = np.linalg.norm(fixed + displacements_at(there, fixed) - points, axis=1)[inside]

    (item,) = made["dsr-inverse"].DeformableRegistrationSequence
    told = float(item.FrameOfReferenceTransformationComment.split(" at most ")[1].removesuffix(" mm"))
    assert inside.sum() > 1500
    assert error.max() <= told + 1e-3 < 0.2
    assert np.linalg.norm(displacements_at(there, fixed), axis=1)[inside].min() > 1  # something had to be undone


@pytest.mark.parametrize("store_in", ["fixed_study", "moving_study", "newest"])
def test_the_inverse_lies_beside_the_forward_object_in_the_moving_frame_of_reference(store_in: str) -> None:
    made = dict(make_objects(FIXED, MOVING, outputs=["dsr", "dsr-inverse"], store_in=store_in))
    there, back = made["dsr"], made["dsr-inverse"]

    assert back.StudyInstanceUID == there.StudyInstanceUID
    assert back.FrameOfReferenceUID == MOVING[0].FrameOfReferenceUID == source_frame(there)
    assert source_frame(back) == FIXED[0].FrameOfReferenceUID == there.FrameOfReferenceUID
    assert back.ContentDescription == "Inverse: total map from moving to fixed"
    assert len({there.SOPInstanceUID, back.SOPInstanceUID, there.SeriesInstanceUID, back.SeriesInstanceUID}) == 4


def test_the_inverse_is_not_the_registration_the_other_way_round() -> None:
    back = dict(make_objects(FIXED, MOVING, outputs=["dsr-inverse"]))["dsr-inverse"]
    turned = dict(make_objects(MOVING, FIXED, outputs=["dsr"]))["dsr"]

    assert back.SOPInstanceUID != turned.SOPInstanceUID


def test_of_a_linear_map_the_inverse_is_exact() -> None:
    registration = make_registration(make_source(FIXED).grid, bump_mm=None)
    back = decoded_field(dict(make_objects(FIXED, MOVING, registration, outputs=["dsr-inverse"]))["dsr-inverse"])

    points = np.random.default_rng(5).uniform(-40, 40, (200, 3))
    matrix = np.linalg.inv(registration.moving_from_fixed)
    expected = points @ matrix[:3, :3].T + matrix[:3, 3]
    assert np.linalg.norm(points + displacements_at(back, points) - expected, axis=1).max() < 0.02
    assert sample_grid(registration).max_error_mm == 0


def source_frame(deformable: Dataset) -> str:
    return str(deformable.DeformableRegistrationSequence[0].SourceFrameOfReferenceUID)
