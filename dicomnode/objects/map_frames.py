"""A volume as frames of one instance, PS3.3 C.7.6.16 and C.7.6.17: what Parametric Maps and Segmentations share."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.tag import Tag

from dicomnode.objects.common import Subject, code, decimal
from registration_engine import Grid


def set_frames(dataset: Dataset, subject: Subject, grid: Grid, derivation: Dataset) -> None:
    """One frame for each slice of a grid, in its order, with both series as the source of all.

    Parameters
    ----------
    derivation
        The code of what was done.
    """
    slices, rows, columns = grid.shape
    between_slices, between_rows, between_columns = (decimal(mm) for mm in grid.spacing_mm)
    across, down = (grid.affine[:3, axis] / grid.spacing_mm[axis] for axis in (2, 1))
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = slices, rows, columns

    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.SliceThickness = measures.SpacingBetweenSlices = between_slices
    measures.PixelSpacing = [between_rows, between_columns]
    plane.ImageOrientationPatient = [decimal(value) for value in (*across, *down)]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.DerivationImageSequence = [_derivation(subject, derivation)]
    dataset.SharedFunctionalGroupsSequence = [shared]

    organization = subject.uid(f"dimension of {dataset.SeriesInstanceUID}")
    used, dimension = Dataset(), Dataset()
    used.DimensionOrganizationUID = dimension.DimensionOrganizationUID = organization
    dimension.DimensionIndexPointer = Tag("InStackPositionNumber")
    dimension.FunctionalGroupPointer = Tag("FrameContentSequence")
    dataset.DimensionOrganizationType = "3D"
    dataset.DimensionOrganizationSequence, dataset.DimensionIndexSequence = [used], [dimension]
    dataset.PerFrameFunctionalGroupsSequence = [_frame(grid, k) for k in range(slices)]


def index_by_segment(dataset: Dataset, frames: Sequence[tuple[int, int]]) -> None:
    """Of what `set_frames` made, a frame for each (segment number, slice); dimensions are the segment, then the slice.

    Readers look for the segment's number among the dimensions of each frame.
    """
    by_slice = list(dataset.PerFrameFunctionalGroupsSequence)
    made = []
    for number, k in frames:
        frame, identification = copy.deepcopy(by_slice[k]), Dataset()
        identification.ReferencedSegmentNumber = number
        frame.SegmentIdentificationSequence = [identification]
        content = frame.FrameContentSequence[0]
        content.DimensionIndexValues = [number, content.InStackPositionNumber]
        made.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = made
    dataset.NumberOfFrames = len(made)
    first, by_segment = dataset.DimensionIndexSequence[0], Dataset()
    by_segment.DimensionOrganizationUID = first.DimensionOrganizationUID
    by_segment.DimensionIndexPointer = Tag("ReferencedSegmentNumber")
    by_segment.FunctionalGroupPointer = Tag("SegmentIdentificationSequence")
    dataset.DimensionIndexSequence = [by_segment, first]
    if [k for _, k in frames] != list(range(len(by_slice))):
        del dataset.DimensionOrganizationType  # no longer a frame for each slice


def set_bits(dataset: Dataset, masks: Sequence[npt.NDArray[np.bool_]]) -> None:
    """The pixels of a BINARY Segmentation, PS3.5 8.1.1: frames have no gaps between them; the whole has an even length.

    Parameters
    ----------
    masks
        (Y, X) or (Z, Y, X), in the order of the frames.
    """
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.SegmentationType = "BINARY"
    dataset.LossyImageCompression = "00"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit = dataset.PixelRepresentation = 0
    packed = np.packbits(np.concatenate([mask.ravel() for mask in masks]), bitorder="little").tobytes()
    dataset.PixelData = packed + b"\0" * (len(packed) % 2)
    dataset["PixelData"].VR = "OB"


def _frame(grid: Grid, k: int) -> Dataset:
    content, position, frame = Dataset(), Dataset(), Dataset()
    content.StackID = "1"
    content.InStackPositionNumber = content.DimensionIndexValues = k + 1
    position.ImagePositionPatient = [decimal(mm) for mm in grid.points_mm(np.array([k, 0.0, 0.0]))]
    frame.FrameContentSequence, frame.PlanePositionSequence = [content], [position]
    return frame


def _derivation(subject: Subject, derivation: Dataset) -> Dataset:
    item = Dataset()
    item.DerivationCodeSequence = [derivation]
    item.SourceImageSequence = [each for series in (subject.fixed, subject.moving) for each in series.references()]
    for each in item.SourceImageSequence:
        each.PurposeOfReferenceCodeSequence = [code("121322", "Source image for image processing operation")]
    return item
