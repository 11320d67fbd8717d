"""What must be true of each instance of a registered series: called computed, and lying where the fixed series lies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydicom import Dataset

from dicomnode.objects.common import Subject
from dicomnode.objects.planes import GEOMETRY
from dicomnode.objects.violations import require
from dicomnode.volumes import CLASSES, SINGLE_FRAME_CLASS, single_frame_class

_ROUNDING_MM = 0.01


def is_registered_series(dataset: Dataset) -> bool:
    """Whether it is an image of CT, MR or PET, single- or multi-frame."""
    return single_frame_class(dataset) in CLASSES


def check_registered_series(dataset: Dataset, subject: Subject) -> None:
    """Check one instance; AssertionError where it is not what a registered series of this pair holds."""
    moving = subject.moving.first
    own = {str(moving.SOPClassUID), str(single_frame_class(moving))}
    require(dataset.SOPClassUID in own, dataset, "SOP class is not the moving series'")
    require(dataset.ImageType[0] == "DERIVED", dataset, "Image Type does not say DERIVED")
    require(dataset.HighBit == dataset.BitsStored - 1, dataset, "High Bit")
    require(dataset.PhotometricInterpretation == moving.PhotometricInterpretation, dataset, "photometry")
    lossy = any(each.get("LossyImageCompression") == "01" for each in subject.moving.datasets)
    require(dataset.LossyImageCompression == ("01" if lossy else "00"), dataset, "lossy compression is not told")
    related = {str(item.SeriesInstanceUID) for item in dataset.get("RelatedSeriesSequence") or []}
    sources = {str(series.first.SeriesInstanceUID) for series in (subject.fixed, subject.moving)}
    require(related == sources, dataset, "Related Series Sequence")
    for place, derivation in _slices(dataset):
        require(bool(derivation.get("DerivationDescription")), dataset, "Derivation Description is empty")
        _check_place(dataset, place, subject)


def _check_place(dataset: Dataset, place: Dataset, subject: Subject) -> None:
    referred = place.get("ReferencedImageSequence") or [Dataset()]
    numbers = np.atleast_1d(referred[0].get("ReferencedFrameNumber") or 0)
    fixed = subject.fixed.slices.get((str(referred[0].get("ReferencedSOPInstanceUID", "")), int(numbers[0])))
    require(fixed is not None, dataset, "slice refers to no fixed slice")
    assert fixed is not None
    if subject.resolution == "fixed":
        for keyword in GEOMETRY:
            if keyword in fixed and keyword in place:
                require(place[keyword].value == fixed[keyword].value, dataset, f"{keyword} is not the fixed slice's")
        require("ImagePositionPatient" in place, dataset, "no Image Position (Patient)")
        return
    axes = [np.array(each.ImageOrientationPatient, dtype=float) for each in (place, fixed)]
    require(bool(np.abs(axes[0] - axes[1]).max() < 1e-3), dataset, "planes are not parallel to the fixed ones")
    spacing = np.array(place.PixelSpacing, dtype=float)
    row, column = axes[0].reshape(2, 3)
    center = np.array(place.ImagePositionPatient, dtype=float)
    center += row * spacing[1] * (place.Columns - 1) / 2 + column * spacing[0] * (place.Rows - 1) / 2
    index = subject.fixed.grid.indices(center)
    inside = (index >= -0.5 - _ROUNDING_MM) & (index <= np.array(subject.fixed.grid.shape) - 0.5 + _ROUNDING_MM)
    beyond = float(place.SliceThickness) / subject.fixed.grid.spacing_mm[0] / 2
    inside[0] = -0.5 - beyond <= index[0] <= subject.fixed.grid.shape[0] - 0.5 + beyond
    require(bool(inside.all()), dataset, "slice lies outside the fixed volume's box")


def _slices(dataset: Dataset) -> Iterator[tuple[Dataset, Dataset]]:
    """Each slice's place with the fixed image that it refers to, and the item that tells of its derivation."""
    if dataset.SOPClassUID not in SINGLE_FRAME_CLASS:
        yield dataset, dataset
        return
    shared = dataset.SharedFunctionalGroupsSequence[0]
    require(len(dataset.PerFrameFunctionalGroupsSequence) == int(dataset.NumberOfFrames), dataset, "number of frames")
    for own in dataset.PerFrameFunctionalGroupsSequence:
        place = Dataset()
        place.Rows, place.Columns = dataset.Rows, dataset.Columns
        place.update(shared.PixelMeasuresSequence[0])
        place.update(shared.PlaneOrientationSequence[0])
        place.update(own.PlanePositionSequence[0])
        place.ReferencedImageSequence = own.get("ReferencedImageSequence") or []
        yield place, (own.get("DerivationImageSequence") or [Dataset()])[0]
