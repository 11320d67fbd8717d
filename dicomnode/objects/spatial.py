"""Spatial Registration, PS3.3 A.39.1 and C.20.2: one linear stage as a matrix from moving to fixed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import SpatialRegistrationStorage

from dicomnode.objects.common import SourceSeries, Subject, code, matrix_item, registration_object
from dicomnode.objects.texts import long_string

STAGES = {"RIGID": ("sro", "Rigid"), "AFFINE": ("sro affine", "Affine")}


def spatial_registration(
    subject: Subject,
    moving_from_fixed: npt.NDArray[np.float64],
    *,
    matrix_type: str,
    is_total: bool,
    has_deformable: bool,
) -> Dataset:
    """Write one linear stage as a Spatial Registration object.

    Parameters
    ----------
    moving_from_fixed
        (4, 4), LPS mm, as the engine has it; the object carries its inverse.
    matrix_type
        RIGID or AFFINE.
    is_total, has_deformable
        This stage is the whole map; a Deformable Spatial Registration of this pair carries the whole map. The
        description says so.
    """
    kind, stage = STAGES[matrix_type]
    text = f"{stage} registration" if is_total else f"{stage} stage; the total map goes beyond it"
    if has_deformable:
        text = f"{stage} stage; total is in the deformable object"
    dataset = registration_object(
        subject,
        SpatialRegistrationStorage,
        kind,
        number=2000 if matrix_type == "RIGID" else 2500,
        label=f"{stage.upper()} REG",
        text=f"WARNING {subject.warning}; {text}" if subject.warning else text,
    )
    # PS3.3 C.20.2.1.1: the matrix maps the Source RCS to the Registered RCS, i.e. moving to fixed. Readers that key
    # by Frame of Reference keep the last item where both series share one, so the identity comes first.
    dataset.RegistrationSequence = [
        _item(subject.fixed, np.eye(4), "RIGID", code("125021", "Frame of Reference Identity"), "Identity"),
        _item(
            subject.moving,
            np.asarray(np.linalg.inv(moving_from_fixed), dtype=np.float64),
            matrix_type,
            code("125024", "Image Content-based Alignment"),
            f"{stage} stage, moving to fixed",
        ),
    ]
    return dataset


def _item(
    series: SourceSeries, matrix: npt.NDArray[np.float64], matrix_type: str, how: Dataset, comment: str
) -> Dataset:
    registration = Dataset()
    registration.FrameOfReferenceTransformationComment = long_string(comment)
    registration.RegistrationTypeCodeSequence = [how]
    registration.MatrixSequence = [matrix_item(matrix, matrix_type)]
    item = Dataset()
    item.FrameOfReferenceUID = series.frame_of_reference_uid
    item.ReferencedImageSequence = series.references()
    item.MatrixRegistrationSequence = [registration]
    return item
