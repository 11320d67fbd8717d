"""What must be true of each object before it leaves; a violation is our own bug."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from pydicom import Dataset
from pydicom.uid import DeformableSpatialRegistrationStorage, EnhancedSRStorage, SecondaryCaptureImageStorage

from dicomnode.objects.common import Subject

_WITHOUT_FRAME_OF_REFERENCE = (EnhancedSRStorage, SecondaryCaptureImageStorage)
_OTHER_STUDIES = ("StudiesContainingOtherReferencedInstancesSequence", "PertinentOtherEvidenceSequence")


def check(dataset: Dataset, subject: Subject, *, also: Dataset | None = None) -> Dataset:
    """Check one object against the pair it is about, and give it back.

    Parameters
    ----------
    also
        Another object of this pair that it may refer to.

    Raises
    ------
    AssertionError
        References, matrices, grid or pixels are not what the standard and our profile ask for.
    """
    _check_references(dataset, subject, also)
    for item in _items(dataset, "FrameOfReferenceTransformationMatrix"):
        _check_matrix(item)
    if dataset.SOPClassUID == DeformableSpatialRegistrationStorage:
        for item in _items(dataset, "VectorGridData"):
            _check_grid(item, subject)
    for keyword in ("PixelData", "FloatPixelData"):
        if keyword in dataset:
            _require(len(dataset[keyword].value) == _pixel_bytes(dataset), dataset, "pixel bytes")
    if dataset.SOPClassUID not in _WITHOUT_FRAME_OF_REFERENCE:
        _require(dataset.FrameOfReferenceUID == subject.fixed.frame_of_reference_uid, dataset, "Frame of Reference")
    _require(dataset.StudyInstanceUID == subject.home.StudyInstanceUID, dataset, "study")
    return dataset


def _check_references(dataset: Dataset, subject: Subject, also: Dataset | None) -> None:
    """Every referenced instance exists and stands, under its study and series, in the Common Instance Reference."""
    known = dict(subject.known)
    if also is not None:
        known[str(also.SOPInstanceUID)] = (str(also.StudyInstanceUID), str(also.SeriesInstanceUID))
    listed = {}
    studies = [(dataset.StudyInstanceUID, dataset.get("ReferencedSeriesSequence") or [])]
    for keyword in _OTHER_STUDIES:
        for study in dataset.get(keyword) or []:
            _require(study.StudyInstanceUID != dataset.StudyInstanceUID, dataset, "own study listed as another")
            studies.append((study.StudyInstanceUID, study.ReferencedSeriesSequence))
    evidence = dataset.get("CurrentRequestedProcedureEvidenceSequence") or []
    studies += [(study.StudyInstanceUID, study.ReferencedSeriesSequence) for study in evidence]
    for uid, series in studies:
        for item in series:
            for instance in item.get("ReferencedInstanceSequence") or item.ReferencedSOPSequence:
                listed[instance.ReferencedSOPInstanceUID] = (uid, item.SeriesInstanceUID)
    for item in _items(dataset, "ReferencedSOPInstanceUID"):
        uid = item.ReferencedSOPInstanceUID
        _require(uid in known and listed.get(uid) == known[uid], dataset, f"reference to {uid}")


def _pixel_bytes(dataset: Dataset) -> int:
    """PS3.5 8.1.1: frames of single bits have no gaps between them; the whole is padded to an even length."""
    voxels = dataset.Rows * dataset.Columns * int(dataset.get("NumberOfFrames") or 1)
    size = -(-voxels * dataset.SamplesPerPixel * dataset.BitsAllocated // 8)
    return int(size + size % 2)


def _check_matrix(item: Dataset) -> None:
    matrix = np.array(item.FrameOfReferenceTransformationMatrix, dtype=np.float64).reshape(4, 4)
    _require(bool(np.isfinite(matrix).all()) and matrix[3].tolist() == [0, 0, 0, 1], item, "matrix")
    if item.FrameOfReferenceTransformationMatrixType == "RIGID":
        axes = matrix[:3, :3]
        _require(bool(np.abs(axes @ axes.T - np.eye(3)).max() < 1e-6), item, "rigid matrix is not orthonormal")
        _require(bool(np.linalg.det(axes) > 0), item, "rigid matrix mirrors")


def _check_grid(item: Dataset, subject: Subject) -> None:
    size = np.array(item.GridDimensions, dtype=np.int64)
    spacing = np.array(item.GridResolution)
    _require(len(item.VectorGridData) == int(size.prod()) * 12, item, "vector bytes")
    _require(bool(np.isfinite(np.frombuffer(item.VectorGridData, "<f4")).all()), item, "vectors are not finite")
    _require([float(v) for v in item.ImageOrientationPatient] == [1, 0, 0, 0, 1, 0], item, "grid is not along LPS")
    fixed = subject.fixed.grid
    corners = fixed.points_mm(np.array(list(product((0.0, 1.0), repeat=3))) * fixed.shape - 0.5)
    first = np.array(item.ImagePositionPatient, dtype=np.float64)
    covers = (first <= corners.min(axis=0)).all() and (first + (size - 1) * spacing >= corners.max(axis=0)).all()
    _require(bool(covers), item, "grid does not cover the fixed volume")


def _items(dataset: Dataset, keyword: str) -> Iterator[Dataset]:
    """The data set and every nested item that holds an element of this keyword."""
    if keyword in dataset:
        yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _items(item, keyword)


def _require(holds: bool, dataset: Dataset, what: str) -> None:
    if not holds:
        raise AssertionError(f"{dataset.get('SOPInstanceUID', 'item')}: {what}")
