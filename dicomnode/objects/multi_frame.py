"""The registered series of an Enhanced CT, MR or PET series: one Enhanced instance, PS3.3 A.36, A.38 and A.56.

Law: as for single frames, geometry is the fixed series' and acquisition the moving's. A functional group in which the
moving frames differ is that of the middle one: each frame of the result is interpolated from several.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import EnhancedCTImageStorage, EnhancedMRImageStorage, EnhancedPETImageStorage

from dicomnode.objects.acquisition import KEPT, MOVING_GRID, derivation
from dicomnode.objects.common import Subject, code, decimal, new_dataset
from dicomnode.objects.planes import Plane, Planes
from dicomnode.objects.references import refer, reference, references
from dicomnode.objects.scale import Scale
from dicomnode.volumes import frame_number

_CLASSES = (EnhancedCTImageStorage, EnhancedMRImageStorage, EnhancedPETImageStorage)
_ENHANCED = (
    "PixelPresentation",
    "VolumetricProperties",
    "VolumeBasedCalculationTechnique",
    "ComplexImageComponent",
    "AcquisitionContrast",
    "AcquisitionContextSequence",
    "PresentationLUTShape",
    "DeviceSerialNumber",
)
# Functional groups that say where the moving frames lie, or that are written anew. Those of the acquisition and of the
# reconstruction stay whole: they describe what was resampled.
_LEFT_BEHIND = {
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "FrameContentSequence",
    "DerivationImageSequence",
    "ReferencedImageSequence",
    "PixelValueTransformationSequence",
    "RealWorldValueMappingSequence",
    "CTPositionSequence",
    "MRFOVGeometrySequence",
    "FrameDisplayShutterSequence",
    "UnassignedSharedConvertedAttributesSequence",
    "UnassignedPerFrameConvertedAttributesSequence",
    "ConversionSourceAttributesSequence",
    "TemporalPositionSequence",
}
_FRAME_TYPES = ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence")
# PS3.3 C.8.13.4 and C.7.6.18.2 let a derived image keep them; dciodvfy takes that for an error
_ORIGINAL_ONLY = {
    "BulkMotionCompensationTechnique",
    "EchoPlanarPulseSequence",
    "EchoPulseSequence",
    "GeometryOfKSpaceTraversal",
    "MRAcquisitionType",
    "MultiPlanarExcitation",
    "MultipleSpinEcho",
    "NumberOfKSpaceTrajectories",
    "OversamplingPhase",
    "PhaseContrast",
    "PulseSequenceName",
    "RectilinearPhaseEncodeReordering",
    "SaturationRecovery",
    "SegmentedKSpaceTraversal",
    "SpectrallySelectedSuppression",
    "SteadyStatePulseSequence",
    "TimeOfFlightContrast",
}
_FRAME_TIMES = ("FrameReferenceDateTime", "FrameAcquisitionDateTime", "FrameAcquisitionDuration")


def is_enhanced(dataset: Dataset) -> bool:
    """Whether a slice is a frame of an Enhanced CT, MR or PET instance; Legacy Converted ones are not."""
    return bool(frame_number(dataset)) and dataset.SOPClassUID in _CLASSES


def multi_frame_template(moving: Dataset) -> Dataset:
    """What the instance takes over from that of a moving frame, outside functional groups."""
    parent: Dataset = moving.parent
    dataset = new_dataset(parent.SOPClassUID, parent.SOPInstanceUID)
    left_behind = {*MOVING_GRID, *_ORIGINAL_ONLY}
    acquisition = [e for e in parent.group_dataset(0x0018) if e.keyword not in left_behind]
    for element in (*(parent[keyword] for keyword in (*KEPT, *_ENHANCED) if keyword in parent), *acquisition):
        dataset.add(copy.deepcopy(element))
    return dataset


def multi_frame_instance(
    subject: Subject,
    template: Dataset,
    planes: Planes,
    sources: Sequence[Sequence[Dataset]],
    scale: Scale,
    voxels: npt.NDArray[np.float32],
    registration_object: Dataset | None,
) -> Dataset:
    """Complete the instance; frames ascend along the normal (row × column), as numbers of single frames do.

    Parameters
    ----------
    sources
        For each slice the moving slices that it is interpolated from.
    voxels
        (Z, Y, X) on the planes' grid.
    """
    dataset = template
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = subject.uid("series")
    dataset.InstanceNumber = 1
    dataset.ImageType = _derived(dataset.get("ImageType"))
    dataset.NumberOfFrames = len(planes.slices)
    dataset.Rows, dataset.Columns = planes.grid.shape[1:]
    _add_dimensions(dataset, subject)
    middle = subject.moving.datasets[len(subject.moving.datasets) // 2]
    dataset.SharedFunctionalGroupsSequence = [_shared(planes, scale, middle)]
    order = range(len(planes.slices) - 1, -1, -1)
    dataset.PerFrameFunctionalGroupsSequence = [
        _of_frame(subject, planes.slices[k], sources[k], number, middle) for number, k in enumerate(order, start=1)
    ]
    _refer_to_images(dataset, planes, sources, registration_object)
    dataset.PixelData = b"".join(scale.stored(voxels[k]).tobytes() for k in order)
    dataset.remove_private_tags()
    return dataset


def _derived(image_type: object) -> list[str]:
    """PS3.3 C.8.16.1: DERIVED, always PRIMARY, and RESAMPLED where nothing else was said of the pixels."""
    values = [str(value) for value in image_type] if isinstance(image_type, Sequence) else []
    contrast = values[3:4] if values[3:4] not in ([], ["NONE"]) else ["RESAMPLED"]
    return ["DERIVED", "PRIMARY", *(values[2:3] or ["VOLUME"]), *contrast]


def _add_dimensions(dataset: Dataset, subject: Subject) -> None:
    """One stack, PS3.3 C.7.6.17."""
    organization = Dataset()
    organization.DimensionOrganizationUID = subject.uid("series dimensions")
    dataset.DimensionOrganizationSequence = [organization]
    dataset.DimensionOrganizationType = "3D"
    dataset.DimensionIndexSequence = []
    for pointer, label in ((0x00209056, "Stack ID"), (0x00209057, "In-Stack Position Number")):
        item = Dataset()
        item.DimensionOrganizationUID = organization.DimensionOrganizationUID
        item.DimensionIndexPointer = pointer
        item.FunctionalGroupPointer = 0x00209111
        item.DimensionDescriptionLabel = label
        dataset.DimensionIndexSequence.append(item)


def _shared(planes: Planes, scale: Scale, middle: Dataset) -> Dataset:
    parent: Dataset = middle.parent
    own = parent.PerFrameFunctionalGroupsSequence[frame_number(middle) - 1]
    groups = Dataset()
    for element in (*parent.SharedFunctionalGroupsSequence[0], *own):
        if element.VR == "SQ" and not element.tag.is_private and element.keyword not in _LEFT_BEHIND:
            groups.add(copy.deepcopy(element))
    for keyword in _FRAME_TYPES:
        for item in groups.get(keyword) or []:
            item.FrameType = _derived(item.get("FrameType"))
    geometry = planes.slices[0].geometry
    groups.PixelMeasuresSequence = [_item(geometry, "PixelSpacing", "SliceThickness", "SpacingBetweenSlices")]
    if "SliceThickness" not in groups.PixelMeasuresSequence[0]:
        groups.PixelMeasuresSequence[0].SliceThickness = decimal(planes.grid.spacing_mm[0])
    groups.PlaneOrientationSequence = [_item(geometry, "ImageOrientationPatient")]
    transformation = Dataset()
    transformation.RescaleIntercept, transformation.RescaleSlope = decimal(scale.intercept), decimal(scale.slope)
    transformation.RescaleType = scale.rescale_type or "US"
    groups.PixelValueTransformationSequence = [transformation]
    groups.remove_private_tags()
    return groups


def _of_frame(subject: Subject, plane: Plane, sources: Sequence[Dataset], number: int, middle: Dataset) -> Dataset:
    groups = Dataset()
    content = _item(middle, *_FRAME_TIMES)
    content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", number, [1, number]
    groups.FrameContentSequence = [content]
    groups.PlanePositionSequence = [_item(plane.geometry, "ImagePositionPatient")]
    groups.ReferencedImageSequence = references([plane.fixed], purpose=code("121338", "Anatomic image"))
    image = Dataset()
    image.DerivationDescription, image.DerivationCodeSequence = derivation(subject)
    image.SourceImageSequence = references(
        sources, purpose=code("121322", "Source image for image processing operation")
    )
    for item in image.SourceImageSequence:
        item.SpatialLocationsPreserved = "NO"
    groups.DerivationImageSequence = [image]
    return groups


def _refer_to_images(
    dataset: Dataset, planes: Planes, sources: Sequence[Sequence[Dataset]], registration_object: Dataset | None
) -> None:
    """The evidence sequences of multi-frame images, and the Common Instance Reference module, PS3.3 C.12.2."""
    fixed = list({id(plane.fixed): plane.fixed for plane in planes.slices}.values())
    moving = list({id(each): each for several in sources for each in several}.values())
    dataset.ReferencedImageEvidenceSequence = [_evidence(fixed)]
    if moving:
        dataset.SourceImageEvidenceSequence = [_evidence(moving)]
    images = [(several[0], references(several)) for several in (fixed, moving) if several]
    registration = [(registration_object, [reference(registration_object)])] if registration_object else []
    refer(dataset, [*images, *registration])


def _evidence(datasets: Sequence[Dataset]) -> Dataset:
    """PS3.3 Table 10-4b: SOP instances by series and study."""
    series = Dataset()
    series.SeriesInstanceUID = datasets[0].SeriesInstanceUID
    series.ReferencedSOPSequence = [reference(each) for each in {d.SOPInstanceUID: d for d in datasets}.values()]
    study = Dataset()
    study.StudyInstanceUID = datasets[0].StudyInstanceUID
    study.ReferencedSeriesSequence = [series]
    return study


def _item(source: Dataset, *keywords: str) -> Dataset:
    item = Dataset()
    for keyword in keywords:
        if keyword in source:
            item[keyword] = copy.deepcopy(source[keyword])
    return item
