"""Segmentations of the moving series, carried to the fixed grid segment by segment, PS3.3 A.51; they may overlap."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from highdicom.seg import Segmentation
from pydicom import Dataset
from pydicom.uid import SegmentationStorage

from dicomnode.errors import StudyError
from dicomnode.objects.carrying import Drawing, carried_values, refer_to_drawing
from dicomnode.objects.common import Subject, code, identify_content, own_object, set_frame_of_reference
from dicomnode.objects.map_frames import index_by_segment, set_frames
from dicomnode.volumes import SOFTWARE_NAME
from registration_engine import DisplacementField, Grid

_MAX_FRACTION = 255


def carried_segmentation(subject: Subject, field: DisplacementField, drawing: Drawing) -> Dataset:
    """The same segments on the fixed slices: where at least half of a voxel's interpolated value is inside.

    BINARY and LABELMAP become BINARY, FRACTIONAL stays so with 255 as its largest value. Segments keep their numbers,
    names, codes and tracking UIDs; one that was drawn by hand is from now on SEMIAUTOMATIC.

    Raises
    ------
    StudyError
        It cannot be read as volumes, or no segment reaches the fixed volume.
    """
    source = drawing.dataset
    is_fractional = source.SegmentationType == "FRACTIONAL"
    grid = subject.fixed.grid
    frames: list[tuple[int, int]] = []
    planes: list[npt.NDArray[np.uint8]] = []
    for number, values, place in _segments(source):
        landed = carried_values(values, place, field, grid, outside=0.0)
        if landed is None:
            continue
        part, share = landed
        stored = np.rint(share * _MAX_FRACTION).astype(np.uint8) if is_fractional else (share >= 0.5).astype(np.uint8)
        for k, plane in enumerate(stored, start=part[0].start):
            if plane.any():
                whole = np.zeros(grid.shape[1:], dtype=np.uint8)
                whole[part[1:]] = plane
                frames.append((number, k))
                planes.append(whole if is_fractional else np.packbits(whole.ravel(), bitorder="little"))
    if not frames:
        raise StudyError(f"Segmentation {source.SOPInstanceUID}: no segment reaches the fixed volume")
    dataset = _described(subject, drawing, frames)
    dataset.SegmentationType = "FRACTIONAL" if is_fractional else "BINARY"
    dataset.BitsAllocated = dataset.BitsStored = 8 if is_fractional else 1
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
    if is_fractional:
        dataset.SegmentationFractionalType = source.get("SegmentationFractionalType") or "PROBABILITY"
        dataset.MaximumFractionalValue = _MAX_FRACTION
    dataset.PixelData = _joined(planes, int(np.prod(grid.shape[1:])), is_fractional)
    dataset["PixelData"].VR = "OB"
    return dataset


def _segments(source: Dataset) -> Iterator[tuple[int, npt.NDArray[np.float32], Grid]]:
    """Number, values from 0 to 1 (Z, Y, X) around what is inside, and where they are."""
    try:
        read = Segmentation.from_dataset(source, copy=False)
        for number in read.segment_numbers:
            if number == 0:  # the background of a label map
                continue
            volume = read.get_volume(segment_numbers=[number], rescale_fractional=True)
            values = np.asarray(volume.array, dtype=np.float32)[..., 0]
            if values.any():
                yield number, *_around(values, Grid(values.shape, np.asarray(volume.affine)))
    except (ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        kind = type(error).__name__
        raise StudyError(f"Segmentation {source.SOPInstanceUID} cannot be read as volumes: {kind}: {error}") from error


def _around(values: npt.NDArray[np.float32], grid: Grid) -> tuple[npt.NDArray[np.float32], Grid]:
    """The box of what is inside, and one voxel more."""
    box = []
    for axis in range(3):
        hit = np.unique(np.nonzero(values)[axis])
        box.append((max(int(hit[0]) - 1, 0), min(int(hit[-1]) + 2, values.shape[axis])))
    affine = grid.affine.copy()
    affine[:3, 3] = grid.points_mm(np.array([low for low, _ in box], dtype=np.float64))
    (z0, z1), (y0, y1), (x0, x1) = box
    return np.ascontiguousarray(values[z0:z1, y0:y1, x0:x1]), Grid((z1 - z0, y1 - y0, x1 - x0), affine)


def _described(subject: Subject, drawing: Drawing, frames: Sequence[tuple[int, int]]) -> Dataset:
    source = drawing.dataset
    dataset = own_object(
        subject,
        SegmentationStorage,
        drawing.key,
        modality="SEG",
        number=5000,
        description=f"REG {source.get('SeriesDescription') or 'segmentation'}"[:64],
    )
    set_frame_of_reference(dataset, subject)
    label = str(source.get("ContentLabel") or "SEGMENTATION")
    identify_content(dataset, label, "Carried over from the moving series by registration")
    set_frames(dataset, subject, subject.fixed.grid, code("113085", "Spatial resampling"))
    refer_to_drawing(dataset, subject, drawing)
    index_by_segment(dataset, frames)
    dataset.SegmentSequence = [_segment(item) for item in source.SegmentSequence if item.SegmentNumber != 0]
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.LossyImageCompression = "00"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    return dataset


def _segment(source: Dataset) -> Dataset:
    segment = copy.deepcopy(source)
    segment.remove_private_tags()
    for keyword in ("ReferencedSurfaceSequence", "DefinitionSourceSequence"):
        if keyword in segment:
            delattr(segment, keyword)
    if segment.get("SegmentAlgorithmType") == "MANUAL":
        segment.SegmentAlgorithmType, segment.SegmentAlgorithmName = "SEMIAUTOMATIC", SOFTWARE_NAME
    return segment


def _joined(planes: Sequence[npt.NDArray[np.uint8]], pixels: int, is_fractional: bool) -> bytes:
    """PS3.5 8.1.1: frames of single bits follow each other without a gap; the whole has an even length."""
    if is_fractional or pixels % 8 == 0:
        stored = b"".join(plane.tobytes() for plane in planes)
    else:
        bits = np.concatenate([np.unpackbits(plane, count=pixels, bitorder="little") for plane in planes])
        stored = np.packbits(bits, bitorder="little").tobytes()
    return stored + b"\0" * (len(stored) % 2)
