from __future__ import annotations

import numpy as np
import phantoms
import pytest
from hand_made import make_objects, make_registration

from dicomnode import volumes

SMALL = (6, 16, 20)
FIXED, MOVING = phantoms.make_pair(shape=SMALL)
REGISTRATION = make_registration(volumes.load(FIXED).grid)


@pytest.mark.parametrize(("output", "matrix_type"), [("sro", "RIGID"), ("sro_affine", "AFFINE")])
def test_the_matrix_maps_moving_to_fixed(output: str, matrix_type: str) -> None:
    ((kind, made),) = make_objects(FIXED, MOVING, REGISTRATION, outputs=[output])

    moving_from_fixed = REGISTRATION.rigid if output == "sro" else REGISTRATION.moving_from_fixed
    item = made.RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence[0]
    fixed_from_moving = np.reshape(np.array(item.FrameOfReferenceTransformationMatrix, dtype=float), (4, 4))
    assert kind == "sro"
    assert np.abs(fixed_from_moving @ moving_from_fixed - np.eye(4)).max() < 1e-6
    assert item.FrameOfReferenceTransformationMatrixType == matrix_type
    assert all(len(str(value)) <= 16 for value in item.FrameOfReferenceTransformationMatrix)


def test_the_identity_comes_first_and_both_items_name_their_images() -> None:
    ((_, made),) = make_objects(FIXED, MOVING, REGISTRATION, outputs=["sro"])

    assert len(made.RegistrationSequence) == 2
    for item, series, how in zip(made.RegistrationSequence, (FIXED, MOVING), ("125021", "125024"), strict=True):
        assert item.FrameOfReferenceUID == series[0].FrameOfReferenceUID
        assert {i.ReferencedSOPInstanceUID for i in item.ReferencedImageSequence} == {d.SOPInstanceUID for d in series}
        (registration,) = item.MatrixRegistrationSequence
        assert registration.RegistrationTypeCodeSequence[0].CodeValue == how
        assert len(registration.MatrixSequence) == 1
    identity = made.RegistrationSequence[0].MatrixRegistrationSequence[0].MatrixSequence[0]
    assert np.array_equal(identity.FrameOfReferenceTransformationMatrix, np.eye(4).ravel())


def test_the_description_says_where_the_total_is() -> None:
    with_dsr = dict(make_objects(FIXED, MOVING, REGISTRATION, outputs=["sro", "dsr"]))["sro"]
    alone = dict(make_objects(FIXED, MOVING, REGISTRATION, outputs=["sro"]))["sro"]
    rigid = make_registration(REGISTRATION.grid, scaling=1, bump_mm=None)
    total = dict(make_objects(FIXED, MOVING, rigid, outputs=["sro"]))["sro"]

    assert with_dsr.ContentDescription == "Rigid stage; total is in the deformable object"
    assert alone.ContentDescription == "Rigid stage; the total map goes beyond it"
    assert total.ContentDescription == "Rigid registration"


def test_body_part_is_copied_else_laterality_is_there() -> None:
    nameless = phantoms.make_series(shape=SMALL, header={"BodyPartExamined": None})

    ((_, with_part),) = make_objects(FIXED, MOVING, REGISTRATION, outputs=["sro"])
    ((_, without),) = make_objects(nameless, MOVING, REGISTRATION, outputs=["sro"])

    assert with_part.BodyPartExamined == "ABDOMEN"
    assert without.Laterality == ""
