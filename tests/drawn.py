"""What a person or a program may have drawn on a phantom: RT Structure Sets and Segmentations, by highdicom."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
import phantoms
from multi_frame import item
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage

from registration_engine import Grid

Mask = npt.NDArray[np.bool_]


def ball(grid: Grid, center_mm: Sequence[float], radius_mm: float) -> Mask:
    """(Z, Y, X), whether a voxel center lies in a ball."""
    points = grid.points_mm(np.moveaxis(np.indices(grid.shape), 0, -1).astype(float))
    return np.linalg.norm(points - np.asarray(center_mm), axis=-1) <= radius_mm


def segmentation(series: Sequence[Any], masks: Mapping[str, Any], kind: str = "BINARY") -> Dataset:
    """A Segmentation with one segment for each mask (Z, Y, X) in slice order; a label map cannot overlap.

    `series` is in slice order too, or one multi-frame instance whose frames ascend.
    """
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.cid7150.Tissue,
            segmented_property_type=codes.cid7166.ConnectiveTissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(masks, start=1)
    ]
    stacked = np.stack(list(masks.values()), axis=-1)[:: -1 if len(series) == 1 else 1]
    stacked = stacked.astype(np.float32) if kind == "FRACTIONAL" else stacked.astype(np.uint8)
    made = hd.seg.Segmentation(
        source_images=list(series),
        pixel_array=stacked,
        segmentation_type=kind,
        segment_descriptions=descriptions,
        series_instance_uid=phantoms.make_uid("seg series", series[0].SeriesInstanceUID, kind),
        series_number=20,
        sop_instance_uid=phantoms.make_uid("seg", series[0].SeriesInstanceUID, kind),
        instance_number=1,
        manufacturer="Drawer",
        manufacturer_model_name="Drawer",
        software_versions="1",
        device_serial_number="1",
    )
    made.BodyPartExamined = "ABDOMEN"
    made.SeriesDescription = "Drawn"
    return made


def structures(series: Sequence[Any], contours: Mapping[str, Sequence[tuple[str, Any]]]) -> Dataset:
    """A Structure Set of structures by name, each of (geometric type, LPS points (n, 3)) contours."""
    first = series[0]
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = RTStructureSetStorage
    uid = phantoms.make_uid("rtss", first.SeriesInstanceUID)
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = uid
    for keyword in (
        "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime",
        "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID",
        "PositionReferenceIndicator", "SpecificCharacterSet",
    ):  # fmt: skip
        made[keyword] = copy.deepcopy(first[keyword])
    for keyword, value in {
        "SeriesInstanceUID": phantoms.make_uid("rtss series", first.SeriesInstanceUID), "Modality": "RTSTRUCT",
        "SeriesNumber": 21, "SeriesDescription": "Organs", "Manufacturer": "Drawer", "OperatorsName": "",
        "StructureSetLabel": "ORGANS", "StructureSetDate": "20250102", "StructureSetTime": "120000",
        "ApprovalStatus": "UNAPPROVED", "InstanceNumber": 1,
    }.items():  # fmt: skip
        setattr(made, keyword, value)
    instances = {str(d.SOPInstanceUID): d.SOPClassUID for d in series}
    images = [item(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=uid) for uid, kind in instances.items()]
    listed = item(SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=images)
    study = item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1", ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[listed],
    )  # fmt: skip
    made.ReferencedFrameOfReferenceSequence = [
        item(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study])
    ]
    made.StructureSetROISequence, made.ROIContourSequence, made.RTROIObservationsSequence = [], [], []
    for number, (name, several) in enumerate(contours.items(), start=1):
        made.StructureSetROISequence.append(
            item(ROINumber=number, ReferencedFrameOfReferenceUID=first.FrameOfReferenceUID, ROIName=name,
                 ROIGenerationAlgorithm="MANUAL")
        )  # fmt: skip
        drawn = [
            item(
                ContourGeometricType=kind, NumberOfContourPoints=len(points),
                ContourData=[f"{value:.4f}" for value in np.ravel(points)],
            )
            for kind, points in several
        ]  # fmt: skip
        made.ROIContourSequence.append(
            item(ReferencedROINumber=number, ROIDisplayColor=[255, 0, 0], ContourSequence=drawn)
        )
        made.RTROIObservationsSequence.append(
            item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="ORGAN", ROIInterpreter="")
        )
    return made


def circles(grid: Grid, center_mm: Sequence[float], radius_mm: float, points: int = 120) -> list[tuple[str, Any]]:
    """A ball's outline on every slice that cuts it."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    normal, down, across = (grid.affine[:3, :3] / grid.spacing_mm).T
    found = []
    for k in range(grid.shape[0]):
        away = float((grid.points_mm(np.array([k, 0.0, 0.0])) - center_mm) @ normal)
        if abs(away) < radius_mm:
            radius = np.sqrt(radius_mm**2 - away**2)
            middle = np.asarray(center_mm) + away * normal
            around = radius * (np.cos(angle)[:, None] * across + np.sin(angle)[:, None] * down)
            found.append(("CLOSED_PLANAR", middle + around))
    return found
