"""What must be true of each object before it leaves; a violation is our own bug."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import (
    BlendingSoftcopyPresentationStateStorage,
    DeformableSpatialRegistrationStorage,
    EnhancedSRStorage,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
    SpatialRegistrationStorage,
)

from dicomnode.objects.common import Subject
from dicomnode.objects.series_invariants import check_registered_series, is_registered_series
from dicomnode.objects.violations import items, require
from dicomnode.volumes import SOFTWARE_NAME
from registration_engine import DisplacementField

_WITHOUT_FRAME_OF_REFERENCE = (
    BlendingSoftcopyPresentationStateStorage,
    EnhancedSRStorage,
    SecondaryCaptureImageStorage,
)
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management, retired: how an RT Structure Set names a study."""
_OTHER_STUDIES = ("StudiesContainingOtherReferencedInstancesSequence", "PertinentOtherEvidenceSequence")


def check(
    dataset: Dataset,
    subject: Subject,
    *,
    also: Sequence[Dataset] = (),
    moving_from_fixed: npt.NDArray[np.float64] | None = None,
    field: DisplacementField | None = None,
) -> Dataset:
    """Check one object against the pair it is about, and give it back.

    Parameters
    ----------
    also
        Other objects of this pair that it may refer to.
    moving_from_fixed
        (4, 4), LPS mm, the linear stage that a Spatial Registration is of.
    field
        From fixed to moving points, what a Deformable Spatial Registration is of.

    Raises
    ------
    AssertionError
        References, matrices, grid or pixels are not what the standard and our profile ask for.
    """
    _check_identity(dataset, subject)
    _check_references(dataset, subject, also)
    for item in items(dataset, "FrameOfReferenceTransformationMatrix"):
        _check_matrix(item)
    if dataset.SOPClassUID == DeformableSpatialRegistrationStorage:
        _check_deformable(dataset, subject, field)
    if dataset.SOPClassUID == SpatialRegistrationStorage:
        _check_spatial(dataset, subject, moving_from_fixed)
    if dataset.SOPClassUID == BlendingSoftcopyPresentationStateStorage:
        _check_blending(dataset, subject, also)
    if is_registered_series(dataset):
        check_registered_series(dataset, subject)
    for keyword in ("PixelData", "FloatPixelData"):
        if keyword in dataset:
            require(len(dataset[keyword].value) == _pixel_bytes(dataset), dataset, "pixel bytes")
    if dataset.SOPClassUID not in _WITHOUT_FRAME_OF_REFERENCE:
        require(dataset.FrameOfReferenceUID == subject.fixed.frame_of_reference_uid, dataset, "Frame of Reference")
    return dataset


def _check_identity(dataset: Dataset, subject: Subject) -> None:
    """Its own UIDs, the patient and study of its home, and the mark by which no rule ever takes it for a source."""
    uid = str(dataset.SOPInstanceUID)
    sources = {str(series.first.SeriesInstanceUID) for series in (subject.fixed, subject.moving)}
    require(uid == dataset.file_meta.MediaStorageSOPInstanceUID, dataset, "UID in file meta information")
    require(dataset.SOPClassUID == dataset.file_meta.MediaStorageSOPClassUID, dataset, "SOP class in file meta")
    require(uid.startswith("2.25.") and uid not in subject.known, dataset, "UID is not of our own making")
    require(dataset.SeriesInstanceUID not in sources, dataset, "lies in a source series")
    require(dataset.StudyInstanceUID == subject.home.StudyInstanceUID, dataset, "study")
    require((dataset.get("PatientID") or "") == (subject.home.get("PatientID") or ""), dataset, "patient")
    equipment = dataset.get("ContributingEquipmentSequence") or [Dataset()]
    require(equipment[-1].get("ManufacturerModelName") == SOFTWARE_NAME, dataset, "not marked as our own output")
    require(bool(dataset.get("SeriesDescription")), dataset, "Series Description is empty")


def _check_references(dataset: Dataset, subject: Subject, also: Sequence[Dataset]) -> None:
    """Every referenced instance exists and stands, under its study and series, in the Common Instance Reference."""
    known = dict(subject.known)
    known |= {str(each.SOPInstanceUID): (str(each.StudyInstanceUID), str(each.SeriesInstanceUID)) for each in also}
    listed = {}
    studies = [(dataset.StudyInstanceUID, dataset.get("ReferencedSeriesSequence") or [])]
    for keyword in _OTHER_STUDIES:
        for study in dataset.get(keyword) or []:
            require(study.StudyInstanceUID != dataset.StudyInstanceUID, dataset, "own study listed as another")
            studies.append((study.StudyInstanceUID, study.ReferencedSeriesSequence))
    evidence = dataset.get("CurrentRequestedProcedureEvidenceSequence") or []
    studies += [(study.StudyInstanceUID, study.ReferencedSeriesSequence) for study in evidence]
    for uid, series in studies:
        for item in series:
            for instance in item.get("ReferencedInstanceSequence") or item.ReferencedSOPSequence:
                listed[instance.ReferencedSOPInstanceUID] = (uid, item.SeriesInstanceUID)
    for item in items(dataset, "ReferencedSOPInstanceUID"):
        uid = item.ReferencedSOPInstanceUID
        if item.get("ReferencedSOPClassUID") == _STUDY_CLASS:
            require(uid in {study for study, _ in known.values()}, dataset, f"reference to {uid}")
            continue
        is_listed = listed.get(uid) == known.get(uid) or dataset.SOPClassUID == RTStructureSetStorage
        require(uid in known and is_listed, dataset, f"reference to {uid}")


def _pixel_bytes(dataset: Dataset) -> int:
    """PS3.5 8.1.1: frames of single bits have no gaps between them; the whole is padded to an even length."""
    voxels = dataset.Rows * dataset.Columns * int(dataset.get("NumberOfFrames") or 1)
    size = -(-voxels * dataset.SamplesPerPixel * dataset.BitsAllocated // 8)
    return int(size + size % 2)


def _check_matrix(item: Dataset) -> None:
    matrix = _matrix(item)
    require(bool(np.isfinite(matrix).all()) and matrix[3].tolist() == [0, 0, 0, 1], item, "matrix")
    if item.FrameOfReferenceTransformationMatrixType == "RIGID":
        axes = matrix[:3, :3]
        require(bool(np.abs(axes @ axes.T - np.eye(3)).max() < 1e-6), item, "rigid matrix is not orthonormal")
        require(bool(np.linalg.det(axes) > 0), item, "rigid matrix mirrors")


def _check_spatial(dataset: Dataset, subject: Subject, moving_from_fixed: npt.NDArray[np.float64] | None) -> None:
    """Identity of the fixed series first, then the moving series' one matrix, from moving to fixed."""
    found = list(dataset.RegistrationSequence)
    require(len(found) == 2, dataset, "not one item for each series")
    for item, series in zip(found, (subject.fixed, subject.moving), strict=True):
        require(item.FrameOfReferenceUID == series.frame_of_reference_uid, dataset, "order of the series")
        named = {str(image.ReferencedSOPInstanceUID) for image in item.ReferencedImageSequence}
        require(named == {uid for uid, _ in series.slices}, dataset, "images of an item")
        require(len(item.MatrixRegistrationSequence) == 1, dataset, "more than one registration in an item")
        require(len(item.MatrixRegistrationSequence[0].MatrixSequence) == 1, dataset, "more than one matrix")
    identity, matrix = (_matrix(item.MatrixRegistrationSequence[0].MatrixSequence[0]) for item in found)
    require(np.array_equal(identity, np.eye(4)), dataset, "the fixed series' matrix is not the identity")
    if moving_from_fixed is not None:
        back = matrix @ moving_from_fixed
        require(bool(np.abs(back - np.eye(4)).max() < 1e-4), dataset, "matrix does not lead from moving to fixed")


def _check_deformable(dataset: Dataset, subject: Subject, field: DisplacementField | None) -> None:
    """One item: the moving series, identity before and after, one grid with the very vectors that were delivered."""
    require(len(dataset.DeformableRegistrationSequence) == 1, dataset, "not one deformable item")
    item = dataset.DeformableRegistrationSequence[0]
    require(item.SourceFrameOfReferenceUID == subject.moving.frame_of_reference_uid, dataset, "source frame")
    named = {str(image.ReferencedSOPInstanceUID) for image in item.ReferencedImageSequence}
    require(named == {uid for uid, _ in subject.moving.slices}, dataset, "images of the deformable item")
    require("mm" in item.get("FrameOfReferenceTransformationComment", ""), dataset, "error is not told")
    for keyword in ("PreDeformationMatrixRegistrationSequence", "PostDeformationMatrixRegistrationSequence"):
        require(len(item.get(keyword) or []) == 1, dataset, "matrix before or after is missing")
        require(np.array_equal(_matrix(item[keyword].value[0]), np.eye(4)), dataset, "matrix before or after")
    require(len(item.get("DeformableRegistrationGridSequence") or []) == 1, dataset, "not one grid")
    grid = item.DeformableRegistrationGridSequence[0]
    _check_grid(grid, subject)
    if field is not None:
        require(list(grid.GridDimensions) == list(field.grid.shape[::-1]), dataset, "grid dimensions")
        require(grid.VectorGridData == field.vectors.astype("<f4").tobytes(), dataset, "vectors are not the delivered")


def _check_blending(dataset: Dataset, subject: Subject, registered: Sequence[Dataset]) -> None:
    """The fixed series below, the registered one above, each with all its images."""
    layers = list(dataset.BlendingSequence)
    require(
        [layer.BlendingPosition for layer in layers] == ["UNDERLYING", "SUPERIMPOSED"], dataset, "order of the layers"
    )
    below, above = (
        {str(image.ReferencedSOPInstanceUID) for image in layer.ReferencedSeriesSequence[0].ReferencedImageSequence}
        for layer in layers
    )
    require(below == {uid for uid, _ in subject.fixed.slices}, dataset, "images of the layer below")
    require(above == {str(each.SOPInstanceUID) for each in registered}, dataset, "images of the layer above")


def _matrix(item: Dataset) -> npt.NDArray[np.float64]:
    return np.array(item.FrameOfReferenceTransformationMatrix, dtype=np.float64).reshape(4, 4)


def _check_grid(item: Dataset, subject: Subject) -> None:
    size = np.array(item.GridDimensions, dtype=np.int64)
    spacing = np.array(item.GridResolution)
    require(len(item.VectorGridData) == int(size.prod()) * 12, item, "vector bytes")
    require(bool(np.isfinite(np.frombuffer(item.VectorGridData, "<f4")).all()), item, "vectors are not finite")
    require([float(v) for v in item.ImageOrientationPatient] == [1, 0, 0, 0, 1, 0], item, "grid is not along LPS")
    fixed = subject.fixed.grid
    corners = fixed.points_mm(np.array(list(product((0.0, 1.0), repeat=3))) * fixed.shape - 0.5)
    first = np.array(item.ImagePositionPatient, dtype=np.float64)
    covers = (first <= corners.min(axis=0)).all() and (first + (size - 1) * spacing >= corners.max(axis=0)).all()
    require(bool(covers), item, "grid does not cover the fixed volume")
