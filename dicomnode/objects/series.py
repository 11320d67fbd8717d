"""The registered series: the moving image on the fixed grid, one single-frame instance for each fixed slice.

Law: patient, study, Frame of Reference and geometry are the fixed series'; how the image was acquired is the moving
series'. Whatever is known to describe the moving grid or the moving study stays behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import CTImageStorage

from dicomnode.objects.common import (
    SourceSeries,
    Subject,
    ascii_text,
    character_set,
    code,
    contributing_equipment,
    copy_patient_and_study,
    decimal,
    new_dataset,
    pair_description,
    refer,
    reference,
    references,
    series_number,
    set_times,
)
from dicomnode.objects.deformable import SampledField, interpolate
from dicomnode.volumes import frame_number, rescale, single_frame_class
from registration_engine import Volume, warp

CT_OUTSIDE_HU = -1024.0

# From the moving instance, beside group 0018 less _GEOMETRY: what was imaged, by whom, with what
_KEPT = (
    "ImageType",
    "AcquisitionDate",
    "AcquisitionTime",
    "AcquisitionDateTime",
    "Modality",
    "Manufacturer",
    "InstitutionName",
    "InstitutionAddress",
    "StationName",
    "InstitutionalDepartmentName",
    "PerformingPhysicianName",
    "OperatorsName",
    "ManufacturerModelName",
    "AnatomicRegionSequence",
    "IrradiationEventUID",
    "AcquisitionNumber",
    "Laterality",
    "ImageLaterality",
    "TemporalPositionIdentifier",
    "NumberOfTemporalPositions",
    "PhotometricInterpretation",
    "WindowCenter",
    "WindowWidth",
    "WindowCenterWidthExplanation",
    "VOILUTFunction",
    # PET Series, Isotope and Image modules, PS3.3 C.8.9
    "Units",
    "CountsSource",
    "SeriesType",
    "CorrectedImage",
    "DecayCorrection",
    "RandomsCorrectionMethod",
    "AttenuationCorrectionMethod",
    "ScatterCorrectionMethod",
    "ReconstructionMethod",
    "RadiopharmaceuticalInformationSequence",
    "PatientOrientationCodeSequence",
    "PatientGantryRelationshipCodeSequence",
    "FrameReferenceTime",
    "DecayFactor",
    "DoseCalibrationFactor",
)
# Of group 0018: true of the moving grid only
_GEOMETRY = (
    "SliceThickness",
    "SpacingBetweenSlices",
    "PatientPosition",
    "GantryDetectorTilt",
    "TableHeight",
    "ReconstructionDiameter",
    "InPlanePhaseEncodingDirection",
    "AcquisitionMatrix",
    "DataCollectionCenterPatient",
    "ReconstructionTargetCenterPatient",
    "TablePosition",
)
_FROM_FIXED = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "SliceThickness",
    "SpacingBetweenSlices",
    "PatientPosition",
)


@dataclass(frozen=True)
class Scale:
    """How values of the image are stored: stored = (value - intercept) / slope, in `bits` bits."""

    slope: float
    intercept: float
    bits: int
    signed: bool
    rescale_type: str | None
    """None where the image carries no rescale."""

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest stored value."""
        return (-(1 << self.bits - 1), (1 << self.bits - 1) - 1) if self.signed else (0, (1 << self.bits) - 1)

    def stored(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.int16] | npt.NDArray[np.uint16]:
        """Values rounded to stored units and clipped to the stored range."""
        units = np.rint((values.astype(np.float64) - self.intercept) / self.slope)
        return np.clip(units, *self.range).astype("<i2" if self.signed else "<u2")


def registered_series(
    subject: Subject, moving: Volume, sampled: SampledField, registration_object: Dataset | None
) -> Iterator[Dataset]:
    """Resample the moving image once, with the delivered field, and write it slice by slice.

    Parameters
    ----------
    moving
        The moving series' voxels, rescaled.
    registration_object
        The Deformable Spatial Registration that is sent with it, to refer to; or None.
    """
    scale = _scale(subject.moving, moving)
    warped = warp(moving, sampled.field, subject.fixed.grid, outside=_outside(subject.moving.first, scale))
    template = _template(subject, scale)
    if registration_object is not None:
        used = code("125028", "Source Deformable Spatial Registration")
        template.ReferencedInstanceSequence = [reference(registration_object, purpose=used)]
    for k, fixed in enumerate(subject.fixed.datasets):
        dataset = copy.deepcopy(template)
        dataset.SOPInstanceUID = subject.uid("series", k)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        # Ascending along the normal (row × column) of the image plane; highdicom's order runs against it.
        dataset.InstanceNumber = len(subject.fixed.datasets) - k
        for keyword in _FROM_FIXED:
            if keyword in fixed:
                dataset[keyword] = copy.deepcopy(fixed[keyword])
        sources = [subject.moving.datasets[n] for n in _contributing(subject, sampled, k)]
        _refer_to_images(dataset, fixed, sources)
        registration = [(registration_object, [reference(registration_object)])] if registration_object else []
        images = [(series[0], references(series)) for series in ([fixed], sources) if series]
        refer(dataset, [*images, *registration])
        dataset.PixelData = scale.stored(warped.voxels[k]).tobytes()
        yield dataset


def _template(subject: Subject, scale: Scale) -> Dataset:
    """What every slice of the series has in common."""
    fixed, moving = subject.fixed.first, subject.moving.first
    dataset = new_dataset(single_frame_class(moving), subject.uid("series"))
    dataset.SpecificCharacterSet = character_set(subject)
    acquisition = [e for e in moving.group_dataset(0x0018) if e.keyword not in _GEOMETRY]
    for element in (*(moving[keyword] for keyword in _KEPT if keyword in moving), *acquisition):
        dataset.add(copy.deepcopy(element))
    copy_patient_and_study(subject.home, dataset)
    set_times(dataset, moving, subject.provenance.created_at)
    _complete_from_enhanced(moving, dataset)
    image_type = [str(value) for value in moving.get("ImageType") or []]
    dataset.ImageType = ["DERIVED", "SECONDARY", *(image_type[2:] or ["AXIAL" if _is_ct(moving) else "OTHER"])]
    dataset.SeriesInstanceUID = subject.uid("series series")
    dataset.SeriesNumber = series_number(moving, 1000)
    dataset.SeriesDescription = pair_description(subject)
    dataset.FrameOfReferenceUID = subject.fixed.frame_of_reference_uid
    dataset.PositionReferenceIndicator = fixed.get("PositionReferenceIndicator") or ""
    equipment = [copy.deepcopy(item) for item in moving.get("ContributingEquipmentSequence") or []]
    dataset.ContributingEquipmentSequence = [*equipment, contributing_equipment(subject, dataset)]
    _describe_derivation(dataset, subject)
    dataset.BurnedInAnnotation = "NO"
    _copy_lossy(subject.moving, dataset)
    dataset.SamplesPerPixel = 1
    dataset.BitsAllocated = 16
    dataset.BitsStored = scale.bits
    dataset.HighBit = scale.bits - 1
    dataset.PixelRepresentation = int(scale.signed)
    if scale.rescale_type is not None:
        dataset.RescaleSlope = decimal(scale.slope)
        dataset.RescaleIntercept = decimal(scale.intercept)
        dataset.RescaleType = scale.rescale_type
    dataset.remove_private_tags()  # those within sequences
    return dataset


def _complete_from_enhanced(moving: Dataset, target: Dataset) -> None:
    """What single-frame images must say and multi-frame ones say otherwise or not at all (PS3.3 C.8.2.1, C.8.3.1)."""
    if not frame_number(moving):
        return
    empty = ["AcquisitionNumber"]
    if target.Modality == "MR":
        empty += ["ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength"]
        pulses = {"SPIN": "SE", "GRADIENT": "GR", "BOTH": ["SE", "GR"]}
        if "ScanningSequence" not in target:
            target.ScanningSequence = pulses.get(str(moving.get("EchoPulseSequence")), "RM")
        if "SequenceVariant" not in target:
            target.SequenceVariant = "NONE"
        for keyword in ("InversionTime", "VelocityEncodingDirection"):  # of the macros; a single frame has no IR here
            if keyword in target and "IR" not in target.ScanningSequence:
                del target[keyword]
    if not any(target.get(keyword) for keyword in ("BodyPartExamined", "Laterality", "ImageLaterality")):
        target.Laterality = ""
    for keyword in empty:
        if keyword not in target:
            setattr(target, keyword, None)


def _describe_derivation(dataset: Dataset, subject: Subject) -> None:
    text = f"{dataset.SeriesDescription}: resampled once, linearly, on the fixed grid by the total displacement field."
    if subject.warning:
        text += f" WARNING: {subject.warning}"
    dataset.DerivationDescription = ascii_text(text)[:1024]
    dataset.DerivationCodeSequence = [code("113085", "Spatial resampling")]
    if subject.is_deformable:
        dataset.DerivationCodeSequence.append(code("125027", "Deformed for Registration"))
    related = []
    for series, purpose in (
        (subject.moving, code("121323", "Source series for image processing operation")),
        (subject.fixed, code("122401", "Same Anatomy")),
    ):
        item = Dataset()
        item.StudyInstanceUID = series.first.StudyInstanceUID
        item.SeriesInstanceUID = series.first.SeriesInstanceUID
        item.PurposeOfReferenceCodeSequence = [purpose]
        related.append(item)
    dataset.RelatedSeriesSequence = related


def _refer_to_images(dataset: Dataset, fixed: Dataset, sources: list[Dataset]) -> None:
    """Source Image Sequence and Referenced Image Sequence, PS3.3 C.7.6.16.2.7 and C.7.6.1."""
    dataset.ReferencedImageSequence = references([fixed], purpose=code("121338", "Anatomic image"))
    if not sources:
        return
    items = references(sources, purpose=code("121322", "Source image for image processing operation"))
    for item in items:
        item.SpatialLocationsPreserved = "NO"
    dataset.SourceImageSequence = items


def _contributing(subject: Subject, sampled: SampledField, k: int) -> range:
    """Indices of the moving slices that fixed slice k is interpolated from."""
    _, rows, columns = subject.fixed.grid.shape
    j, i = np.meshgrid(np.linspace(0, rows - 1, 33), np.linspace(0, columns - 1, 33), indexing="ij")
    points = subject.fixed.grid.points_mm(np.stack([np.full_like(j, k), j, i], axis=-1))
    points = points + interpolate(sampled.field.vectors, sampled.field.grid.indices(points))
    index = subject.moving.grid.indices(points)
    inside = ((index >= -0.5) & (index <= np.array(subject.moving.grid.shape) - 0.5)).all(axis=-1)
    if not inside.any():
        return range(0)
    slices = index[inside][:, 0]
    last = len(subject.moving.datasets) - 1
    return range(max(int(np.floor(slices.min())), 0), min(int(np.ceil(slices.max())), last) + 1)


def _scale(series: SourceSeries, volume: Volume) -> Scale:
    """CT in whole HU; else the stored scale of the series, or where its slices differ one scale that holds all."""
    first = series.first
    rescale_type = first.get("RescaleType")
    if _is_ct(first) and (rescale_type or "HU") == "HU":
        return Scale(1.0, 0.0, 16, True, "HU")
    scales = {rescale(dataset) for dataset in series.datasets}
    if len(scales) == 1:
        slope, intercept = scales.pop()
        has_rescale = "RescaleSlope" in first
        signed = bool(first.PixelRepresentation)
        bits = max(int(dataset.BitsStored) for dataset in series.datasets)
        return Scale(slope, intercept, bits, signed, (rescale_type or "US") if has_rescale else None)
    smallest, largest = float(volume.voxels.min()), float(volume.voxels.max())
    signed = smallest < 0
    limit = 32767 if signed else 65535
    slope = float(str(decimal(max(-smallest, largest, 1e-6) / limit)))
    return Scale(slope, 0.0, 16, signed, rescale_type or "US")


def _outside(moving: Dataset, scale: Scale) -> float:
    """The value of points outside the moving image: air in CT, 0 in MR or what is stored nearest to it."""
    wanted = CT_OUTSIDE_HU if scale.rescale_type == "HU" and _is_ct(moving) else 0.0
    low, high = sorted(limit * scale.slope + scale.intercept for limit in scale.range)
    return min(max(wanted, low), high)


def _copy_lossy(moving: SourceSeries, target: Dataset) -> None:
    """PS3.3 C.7.6.1.1.5: once lossy, always lossy."""
    lossy = [dataset for dataset in moving.datasets if dataset.get("LossyImageCompression") == "01"]
    target.LossyImageCompression = "01" if lossy else "00"
    for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if lossy and keyword in lossy[0]:
            target[keyword] = copy.deepcopy(lossy[0][keyword])


def _is_ct(dataset: Dataset) -> bool:
    return single_frame_class(dataset) == CTImageStorage
