"""The registered series: the moving image in the fixed Frame of Reference, multi-frame where the moving series is.

Law: patient, study, Frame of Reference and geometry are the fixed series'; how the image was acquired is the moving
series'. Whatever is known to describe the moving grid or the moving study stays behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
from pydicom import Dataset
from pydicom.uid import UID, PositronEmissionTomographyImageStorage

from dicomnode.objects.acquisition import KEPT, MOVING_GRID, WINDOW, derivation
from dicomnode.objects.common import (
    SourceSeries,
    Subject,
    character_set,
    code,
    contributing_equipment,
    decimal,
    new_dataset,
    pair_description,
    series_number,
    set_times,
)
from dicomnode.objects.deformable import SampledField, interpolate
from dicomnode.objects.mark import mark_image, marked
from dicomnode.objects.multi_frame import is_enhanced, multi_frame_instance, multi_frame_template
from dicomnode.objects.patient import copy_patient_and_study
from dicomnode.objects.planes import Plane, Planes, planes_of, set_position
from dicomnode.objects.references import refer, reference, references
from dicomnode.objects.scale import Scale, is_ct, outside_of, scale_of
from dicomnode.volumes import frame_number, single_frame_class
from registration_engine import Volume, warp


def registered_series(
    subject: Subject,
    moving: Volume,
    sampled: SampledField,
    registration_object: Dataset | None,
    *,
    may_be_multi_frame: bool = True,
) -> Iterator[Dataset]:
    """Resample the moving image once, with the delivered field, and write it slice by slice or as one instance.

    Parameters
    ----------
    moving
        The moving series' voxels, rescaled.
    registration_object
        The Deformable Spatial Registration that is sent with it, to refer to; or None.
    may_be_multi_frame
        Of an Enhanced CT, MR or PET series one Enhanced instance is made; else single-frame ones.
    """
    scale = scale_of(subject.moving, moving)
    planes = planes_of(subject.fixed, subject.moving.grid, subject.resolution)
    warped = warp(moving, sampled.field, planes.grid, outside=outside_of(subject.moving.first, scale))
    sources = [_contributing(subject, sampled, planes, k) for k in range(len(planes.slices))]
    if may_be_multi_frame and is_enhanced(subject.moving.first):
        template = _template(subject, multi_frame_template(subject.moving.first), scale, registration_object)
        made = multi_frame_instance(subject, template, planes, sources, scale, warped.voxels, registration_object)
        mark_image(made, subject.warning)
        yield made
        return
    template = _single_frame_template(subject, scale, registration_object, len(planes.slices))
    for k, plane in enumerate(planes.slices):
        dataset = copy.deepcopy(template)
        dataset.SOPInstanceUID = subject.uid("series", k)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        # Ascending along the normal (row × column) of the image plane; highdicom's order runs against it.
        dataset.InstanceNumber = len(planes.slices) - k
        if "ImageIndex" in dataset:
            dataset.ImageIndex = dataset.InstanceNumber
        dataset.update(copy.deepcopy(plane.geometry))
        _refer_to_images(dataset, plane, sources[k], registration_object)
        mark_image(dataset, subject.warning)
        dataset.PixelData = scale.stored(warped.voxels[k]).tobytes()
        yield dataset


def _single_frame_template(subject: Subject, scale: Scale, registration_object: Dataset | None, slices: int) -> Dataset:
    """What every single-frame instance of the series has in common."""
    moving = subject.moving.first
    dataset = new_dataset(single_frame_class(moving), subject.uid("series"))
    acquisition = [e for e in moving.group_dataset(0x0018) if e.keyword not in MOVING_GRID]
    for element in (*(moving[keyword] for keyword in KEPT if keyword in moving), *acquisition):
        dataset.add(copy.deepcopy(element))
    middle = subject.moving.datasets[len(subject.moving.datasets) // 2]
    for keyword in WINDOW:
        if keyword in middle:
            dataset.add(copy.deepcopy(middle[keyword]))
    _complete_from_enhanced(moving, dataset)
    _template(subject, dataset, scale, registration_object)
    image_type = [str(value) for value in moving.get("ImageType") or []]
    is_pet = dataset.SOPClassUID == PositronEmissionTomographyImageStorage
    rest = image_type[2:] or ([] if is_pet else ["AXIAL" if is_ct(moving) else "OTHER"])
    dataset.ImageType = ["DERIVED", "PRIMARY" if is_pet else "SECONDARY", *rest]  # PS3.3 C.8.9.4: PET knows no other
    if is_pet:
        _complete_pet(dataset, slices)
    _describe_derivation(dataset, subject)
    if scale.rescale_type is not None:
        dataset.RescaleSlope = decimal(scale.slope)
        dataset.RescaleIntercept = decimal(scale.intercept)
        if scale.rescale_type:
            dataset.RescaleType = scale.rescale_type
    return dataset


def _template(subject: Subject, dataset: Dataset, scale: Scale, registration_object: Dataset | None) -> Dataset:
    """Write into `dataset`, and give back, what single- and multi-frame instances have in common."""
    fixed, moving = subject.fixed.first, subject.moving.first
    dataset.SpecificCharacterSet = character_set(subject)
    copy_patient_and_study(subject.home, dataset)
    set_times(dataset, moving, subject.provenance.created_at)
    set_position(dataset, fixed, UID(dataset.SOPClassUID))
    dataset.SeriesInstanceUID = subject.uid("series series")
    dataset.SeriesNumber = series_number(moving, 1000)
    dataset.SeriesDescription = marked(pair_description(subject), subject.warning)
    dataset.FrameOfReferenceUID = subject.fixed.frame_of_reference_uid
    dataset.PositionReferenceIndicator = fixed.get("PositionReferenceIndicator") or ""
    equipment = [copy.deepcopy(item) for item in moving.get("ContributingEquipmentSequence") or []]
    dataset.ContributingEquipmentSequence = [*equipment, contributing_equipment(subject, dataset)]
    _relate(dataset, subject)
    if registration_object is not None:
        used = code("125028", "Source Deformable Spatial Registration")
        dataset.ReferencedInstanceSequence = [reference(registration_object, purpose=used)]
    dataset.BurnedInAnnotation = "NO"
    _copy_lossy(subject.moving, dataset)
    dataset.SamplesPerPixel = 1
    dataset.BitsAllocated = 16
    dataset.BitsStored = scale.bits
    dataset.HighBit = scale.bits - 1
    dataset.PixelRepresentation = int(scale.signed)
    dataset.remove_private_tags()  # those within sequences
    return dataset


def _complete_pet(target: Dataset, slices: int) -> None:
    """PS3.3 C.8.9.1 and C.8.9.4: counts of this series; one phase or gate alone is a static image."""
    kind = [str(value) for value in target.get("SeriesType") or ["STATIC", "IMAGE"]]
    target.SeriesType = [kind[0] if kind[0] == "WHOLE BODY" else "STATIC", "IMAGE"]
    target.NumberOfSlices, target.ImageIndex = slices, 1


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
    dataset.DerivationDescription, dataset.DerivationCodeSequence = derivation(subject)


def _relate(dataset: Dataset, subject: Subject) -> None:
    """Related Series Sequence, PS3.3 C.7.3.1."""
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


def _refer_to_images(
    dataset: Dataset, plane: Plane, sources: list[Dataset], registration_object: Dataset | None
) -> None:
    """Source Image Sequence and Referenced Image Sequence, PS3.3 C.7.6.16.2.7 and C.7.6.1."""
    dataset.ReferencedImageSequence = references([plane.fixed], purpose=code("121338", "Anatomic image"))
    if sources:
        items = references(sources, purpose=code("121322", "Source image for image processing operation"))
        for item in items:
            item.SpatialLocationsPreserved = "NO"
        dataset.SourceImageSequence = items
    registration = [(registration_object, [reference(registration_object)])] if registration_object else []
    images = [(series[0], references(series)) for series in ([plane.fixed], sources) if series]
    refer(dataset, [*images, *registration])


def _contributing(subject: Subject, sampled: SampledField, planes: Planes, k: int) -> list[Dataset]:
    """The moving slices that slice k of the registered series is interpolated from."""
    _, rows, columns = planes.grid.shape
    j, i = np.meshgrid(np.linspace(0, rows - 1, 33), np.linspace(0, columns - 1, 33), indexing="ij")
    points = planes.grid.points_mm(np.stack([np.full_like(j, k), j, i], axis=-1))
    points = points + interpolate(sampled.field.vectors, sampled.field.grid.indices(points))
    index = subject.moving.grid.indices(points)
    inside = ((index >= -0.5) & (index <= np.array(subject.moving.grid.shape) - 0.5)).all(axis=-1)
    if not inside.any():
        return []
    slices = index[inside][:, 0]
    first, last = max(int(np.floor(slices.min())), 0), int(np.ceil(slices.max()))
    return list(subject.moving.datasets[first : last + 1])


def _copy_lossy(moving: SourceSeries, target: Dataset) -> None:
    """PS3.3 C.7.6.1.1.5: once lossy, always lossy."""
    lossy = [dataset for dataset in moving.datasets if dataset.get("LossyImageCompression") == "01"]
    target.LossyImageCompression = "01" if lossy else "00"
    for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if lossy and keyword in lossy[0]:
            target[keyword] = copy.deepcopy(lossy[0][keyword])
