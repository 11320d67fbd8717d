"""Contours of the moving series, carried to the fixed slices as an RT Structure Set, PS3.3 A.19 and C.8.8.

Closed planar contours are outlines of a body: each structure becomes a signed distance in moving space, is resampled
with the field, and cut by the fixed slices. Between two drawn slices a structure ends half way. Points and other lines
are carried point by point.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import RTStructureSetStorage

from dicomnode.errors import StudyError
from dicomnode.objects.carrying import Drawing, carried_points, carried_values
from dicomnode.objects.common import Subject, code, own_object, set_frame_of_reference
from dicomnode.objects.outlines import band_mm, outlines, signed_distance
from dicomnode.objects.references import reference
from dicomnode.volumes import frame_number
from registration_engine import DisplacementField, Grid

Points = npt.NDArray[np.float64]
_LARGEST_DATA = 6_000_000
"""Points in one structure set; more is no drawing."""
_PLANAR = 0.1
"""A planar contour's points lie in one slice within this share of the slice spacing."""
_MARGIN = 4


def carried_structures(subject: Subject, field: DisplacementField, drawing: Drawing) -> Dataset:
    """The structures of an RT Structure Set that lie in the moving Frame of Reference, on the fixed slices.

    Numbers, names, colours and interpreted types stay; the generation algorithm of what was drawn by hand becomes
    SEMIAUTOMATIC, and nothing is approved.

    Raises
    ------
    StudyError
        It cannot be read, or no structure reaches the fixed volume.
    """
    source = drawing.dataset
    try:
        frame = subject.moving.frame_of_reference_uid
        roi_of = {
            int(roi.ROINumber): roi
            for roi in source.StructureSetROISequence
            if str(roi.ReferencedFrameOfReferenceUID) == frame
        }
        contours: dict[int, list[Dataset]] = {}
        colours = {}
        for item in source.get("ROIContourSequence") or []:
            number = int(item.ReferencedROINumber)
            if number in roi_of:
                found = _carried(subject, field, list(item.get("ContourSequence") or []))
                contours.setdefault(number, []).extend(found)
                colours[number] = item.get("ROIDisplayColor")
    except (AttributeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise StudyError(f"RT Structure Set {source.SOPInstanceUID} cannot be read: {error}") from error
    if not any(contours.values()):
        raise StudyError(f"RT Structure Set {source.SOPInstanceUID}: no structure reaches the fixed volume")
    dataset = _described(subject, drawing)
    dataset.StructureSetROISequence = [_roi(subject, roi) for roi in roi_of.values()]
    dataset.ROIContourSequence = []
    for number, several in contours.items():
        item = Dataset()
        item.ReferencedROINumber = number
        if colours[number]:
            item.ROIDisplayColor = colours[number]
        for nth, contour in enumerate(several, start=1):
            contour.ContourNumber = nth
        item.ContourSequence = several
        dataset.ROIContourSequence.append(item)
    observations = source.get("RTROIObservationsSequence") or []
    dataset.RTROIObservationsSequence = [
        _observation(item, n) for n, item in enumerate(observations, 1) if int(item.ReferencedROINumber) in roi_of
    ]
    return dataset


def _carried(subject: Subject, field: DisplacementField, items: Sequence[Dataset]) -> list[Dataset]:
    """The contours of one structure."""
    moving = subject.moving.grid
    in_slice: dict[int, list[tuple[float, Points]]] = defaultdict(list)
    made: list[Dataset] = []
    for item in items:
        points = np.asarray(item.ContourData, dtype=np.float64).reshape(-1, 3)
        if not np.isfinite(points).all() or len(points) > _LARGEST_DATA:
            raise ValueError(f"a contour of {len(points)} points, expected finite ones")
        index = moving.indices(points)
        is_planar = len(points) > 2 and np.ptp(index[:, 0]) <= _PLANAR
        if item.ContourGeometricType == "CLOSED_PLANAR" and is_planar:
            k = float(index[:, 0].mean())
            if -0.5 < k < moving.shape[0] - 0.5:
                in_slice[round(k)].append((k, index[:, 1:]))
        elif len(points):
            kind = str(item.ContourGeometricType)
            made.append(
                _contour(
                    carried_points(points, field),
                    kind.replace("PLANAR", "NONPLANAR") if kind in ("OPEN_PLANAR", "CLOSED_PLANAR") else kind,
                )
            )
    return made + (_cut(subject, field, in_slice) if in_slice else [])


def _cut(subject: Subject, field: DisplacementField, in_slice: dict[int, list[tuple[float, Points]]]) -> list[Dataset]:
    """Resample the body within closed contours, and cut it by the fixed slices."""
    moving, fixed = subject.moving.grid, subject.fixed.grid
    everything = np.concatenate([points for several in in_slice.values() for _, points in several])
    low = np.floor(everything.min(axis=0)).astype(int) - _MARGIN
    high = np.ceil(everything.max(axis=0)).astype(int) + _MARGIN + 1
    first, last = min(in_slice) - 1, max(in_slice) + 1
    spacing = (float(moving.spacing_mm[1]), float(moving.spacing_mm[2]))
    shape = (int(high[0] - low[0]), int(high[1] - low[1]))
    if shape[0] * shape[1] * (last - first + 1) > 2**30:
        raise ValueError("a structure larger than any body")
    outside = -band_mm(spacing)
    values = np.full((last - first + 1, *shape), outside, dtype=np.float32)
    for k, several in in_slice.items():
        nearest = min(abs(place - k) for place, _ in several)  # of planes closer than the slices one counts
        drawn = [points - low for place, points in several if abs(place - k) <= nearest + _PLANAR]
        values[k - first] = signed_distance(drawn, shape, spacing)
    affine = moving.affine.copy()
    affine[:3, 3] = moving.points_mm(np.array([first, low[0], low[1]], dtype=np.float64))
    landed = carried_values(values, Grid(values.shape, affine), field, fixed, outside=outside)
    if landed is None:
        return []
    part, carried = landed
    made = []
    for k, plane in enumerate(carried, start=part[0].start):
        for polygon in outlines(plane):
            if len(polygon) > 2:
                index = np.column_stack(
                    [np.full(len(polygon), float(k)), polygon + np.array([part[1].start, part[2].start])]
                )
                made.append(_contour(fixed.points_mm(index), "CLOSED_PLANAR", subject.fixed.datasets[k]))
    return made


def _contour(points: Points, kind: str, image: Dataset | None = None) -> Dataset:
    item = Dataset()
    if image is not None:
        named = reference(image)
        if frame_number(image):
            named.ReferencedFrameNumber = frame_number(image)
        item.ContourImageSequence = [named]
    item.ContourGeometricType = kind
    item.NumberOfContourPoints = len(points)
    item.ContourData = [f"{value:.3f}" for value in (points + 0.0).ravel()]
    return item


def _described(subject: Subject, drawing: Drawing) -> Dataset:
    source = drawing.dataset
    dataset = own_object(
        subject,
        RTStructureSetStorage,
        drawing.key,
        modality="RTSTRUCT",
        number=5500,
        description=f"REG {source.get('SeriesDescription') or 'structures'}"[:64],
    )
    for keyword in ("ContentDate", "ContentTime"):
        delattr(dataset, keyword)
    dataset.OperatorsName = ""
    set_frame_of_reference(dataset, subject)
    for keyword in ("ReferencedSeriesSequence", "StudiesContainingOtherReferencedInstancesSequence"):
        if keyword in dataset:  # a structure set has its references in modules of its own
            delattr(dataset, keyword)
    dataset.StructureSetLabel = f"REG {source.get('StructureSetLabel') or ''}".strip()[:16]
    dataset.StructureSetDescription = "Carried over from the moving series by registration"
    dataset.StructureSetDate, dataset.StructureSetTime = dataset.SeriesDate, dataset.SeriesTime
    dataset.PredecessorStructureSetSequence = [reference(source)]
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = subject.fixed.first.SeriesInstanceUID
    series.ContourImageSequence = subject.fixed.references()
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management, retired; C.8.8.5 asks for it
    study.ReferencedSOPInstanceUID = subject.fixed.first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = subject.fixed.frame_of_reference_uid
    frame.RTReferencedStudySequence = [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    dataset.ApprovalStatus = "UNAPPROVED"
    return dataset


def _roi(subject: Subject, source: Dataset) -> Dataset:
    roi = copy.deepcopy(source)
    roi.remove_private_tags()
    roi.ReferencedFrameOfReferenceUID = subject.fixed.frame_of_reference_uid
    if roi.get("ROIGenerationAlgorithm") in (None, "", "MANUAL"):
        roi.ROIGenerationAlgorithm = "SEMIAUTOMATIC"
    derivation = code("113085", "Spatial resampling")
    roi.DerivationCodeSequence = [derivation]
    return roi


def _observation(source: Dataset, number: int) -> Dataset:
    item = Dataset()
    item.ObservationNumber = number
    for keyword in ("ReferencedROINumber", "ROIObservationLabel", "RTROIIdentificationCodeSequence"):
        if keyword in source:
            item[keyword] = copy.deepcopy(source[keyword])
    item.RTROIInterpretedType = source.get("RTROIInterpretedType") or ""
    item.ROIInterpreter = ""
    return item
