"""Slices in patient space: which are images that can be registered, and whether they form one regular grid.

Law: nothing is repaired silently. A stack that is not one regular, orthogonal grid is refused with the measured figure.
Index order (slice, row, column), slices ordered to be right-handed, as highdicom has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from highdicom import VolumeGeometry
from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.uid import (
    UID,
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RTStructureSetStorage,
    SegmentationStorage,
)

from dicomnode.errors import IncompleteSeriesError, InconsistentGeometryError, UnsupportedImageError
from dicomnode.volumes.frames import Frame, single_frame_class
from dicomnode.volumes.pixels import rescale
from dicomnode.volumes.reading import name, numbers, text
from registration_engine import Grid
from registration_engine.errors import InvalidVolumeError

ORIENTATION_TOLERANCE = 1e-3
SHEAR_TOLERANCE = 1e-3
SPACING_TOLERANCE = 0.02
ROUNDING_MM = 0.06
"""Positions written to a tenth of a millimetre are off by up to 0.05 mm; that is no irregularity."""
SAME_POSITION_MM = 0.01
MAX_VOXELS = 2**30
CLASSES = (CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage)

SAME_IN_SERIES = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID")
_SAME_IN_VOLUME = ("SOPClassUID", "Rows", "Columns", "PhotometricInterpretation", "Units")


@dataclass(frozen=True, eq=False)
class Stack:
    """The slices of one volume in order, and the grid that their pixels stand on."""

    datasets: tuple[Dataset, ...]
    grid: Grid


def geometry(datasets: Sequence[Dataset]) -> Stack:
    """Order the slices of one volume by position and measure whether they form one regular grid.

    Accepted are single orientation (cosines within 0.001), no shear (0.001 of the stack's length) and one slice
    spacing: every slice within 2 % of the spacing, or 0.06 mm, of its place on the regular grid; never a gap, never
    two slices in one place.

    Raises
    ------
    IncompleteSeriesError, InconsistentGeometryError, UnsupportedImageError
        With the measured figure.
    """
    with disable_value_validation():
        for dataset in datasets:
            if why := left_out_because(dataset):
                raise UnsupportedImageError(why)
            check_elements(dataset)
        if len(datasets) < 2:
            raise IncompleteSeriesError(f"Series: got {len(datasets)} instance, expected at least 2 slices")
        check_same(datasets, (*SAME_IN_SERIES, *_SAME_IN_VOLUME))
        _check_size(datasets)
        row, column = _axes(datasets)
        ordered, spacing, first = _in_order(datasets, np.cross(row, column))
        placed = VolumeGeometry.from_attributes(
            image_position=first.tolist(),
            image_orientation=[*row, *column],
            rows=int(ordered[0].Rows),
            columns=int(ordered[0].Columns),
            pixel_spacing=numbers(ordered[0], "PixelSpacing", 2).tolist(),
            spacing_between_slices=spacing,
            number_of_frames=len(ordered),
            coordinate_system="PATIENT",
        )
    slices, rows, columns = placed.spatial_shape
    try:
        return Stack(tuple(ordered), Grid((slices, rows, columns), np.asarray(placed.affine)))
    except InvalidVolumeError as error:  # larger or farther away than any scanner's
        raise InconsistentGeometryError(f"{name(datasets)}: {error}") from None


def left_out_because(dataset: Dataset) -> str:
    """Why an instance is no slice of a volume that could be registered; empty where it is one."""
    sop_class = UID(text(dataset, "SOPClassUID"))
    problem = ""
    if sop_class in (SegmentationStorage, RTStructureSetStorage):
        problem = f"{sop_class.name}, no image: carried along where a rule's outputs ask for contours or segmentations"
    elif single_frame_class(dataset) not in CLASSES:
        problem = f"SOP Class {sop_class.name or 'none'}, expected CT, MR or PET Image Storage"
    elif not isinstance(dataset, Frame) and text(dataset, "NumberOfFrames") not in ("", "1"):
        problem = f"{dataset.NumberOfFrames} frames, expected one in this SOP class"
    elif text(dataset, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        got = text(dataset, "PhotometricInterpretation") or "no Photometric Interpretation"
        problem = f"{got}, expected monochrome"
    elif text(dataset, "SamplesPerPixel") != "1":
        problem = f"{text(dataset, 'SamplesPerPixel') or 'no'} samples per pixel, expected monochrome"
    elif text(dataset, "BitsAllocated") not in ("8", "16", "32"):
        problem = f"Bits Allocated {text(dataset, 'BitsAllocated')[:9] or 'none'}, expected 8, 16 or 32"
    elif text(dataset, "BurnedInAnnotation") == "YES":
        problem = "Burned In Annotation YES, expected pixels without text"
    elif "LOCALIZER" in (kinds := _image_type(dataset)):
        problem = "a localizer, expected a volume"
    elif "MOSAIC" in kinds:
        problem = "a Siemens mosaic (many slices tiled in one image), expected one slice per image or Enhanced MR"
    return f"{name([dataset])}: {problem}" if problem else ""


def check_elements(dataset: Dataset) -> None:
    """Refuse a slice without plausible size, place or scale."""
    rescale(dataset)
    for keyword, count in (("Rows", 1), ("Columns", 1), ("ImagePositionPatient", 3), ("ImageOrientationPatient", 6)):
        numbers(dataset, keyword, count)
    if min(int(dataset.Rows), int(dataset.Columns)) < 2:
        raise InconsistentGeometryError(
            f"{name([dataset])}: {dataset.Rows} × {dataset.Columns} pixels, expected 2 × 2 or more"
        )
    if (spacing := numbers(dataset, "PixelSpacing", 2)).min() <= 0:
        raise InconsistentGeometryError(f"{name([dataset])}: Pixel Spacing {spacing.tolist()} mm, expected above 0")


def check_same(datasets: Sequence[Dataset], keywords: Sequence[str]) -> None:
    """Refuse slices that differ in one of these elements."""
    for keyword in keywords:
        counts = Counter(text(dataset, keyword) for dataset in datasets)
        if len(counts) > 1:
            got = ", ".join(f"{value or 'none'} ({n} slices)" for value, n in counts.most_common(3))
            if keyword == "PatientID":  # Messages never say who the patient is.
                got = f"of {len(counts)} kinds"
            raise InconsistentGeometryError(f"{name(datasets)}: {keyword} is {got}; expected one value")


def _image_type(dataset: Dataset) -> set[str]:
    value = dataset.get("ImageType") or []
    return {str(one).strip().upper() for one in ([value] if isinstance(value, str) else value)}


def _check_size(datasets: Sequence[Dataset]) -> None:
    spacings = np.array([numbers(dataset, "PixelSpacing", 2) for dataset in datasets])
    if np.ptp(spacings, axis=0).max() > 1e-4 * spacings.max():
        got = f"{spacings.min(axis=0).tolist()} to {spacings.max(axis=0).tolist()}"
        raise InconsistentGeometryError(f"{name(datasets)}: Pixel Spacing is {got} mm, expected one value")
    voxels = len(datasets) * int(datasets[0].Rows) * int(datasets[0].Columns)
    if voxels > MAX_VOXELS:
        raise UnsupportedImageError(f"{name(datasets)}: {voxels} voxels, expected at most {MAX_VOXELS}")


def _axes(datasets: Sequence[Dataset]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The one row and column direction, made exactly orthonormal."""
    orientations = np.array([numbers(dataset, "ImageOrientationPatient", 6) for dataset in datasets])
    spread = float(np.ptp(orientations, axis=0).max())
    if spread > ORIENTATION_TOLERANCE:
        raise InconsistentGeometryError(
            f"{name(datasets)}: slices point in different directions: cosines differ by {spread:.4f}, "
            f"expected at most {ORIENTATION_TOLERANCE}"
        )
    row, column = orientations[0, :3], orientations[0, 3:]
    error = float(max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)))
    if error > ORIENTATION_TOLERANCE:
        raise InconsistentGeometryError(
            f"{name(datasets)}: Image Orientation (Patient) {orientations[0].tolist()} is not orthonormal: "
            f"off by {error:.4f}, expected at most {ORIENTATION_TOLERANCE}"
        )
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    return row, column / np.linalg.norm(column)


def _in_order(
    datasets: Sequence[Dataset], normal: npt.NDArray[np.float64]
) -> tuple[list[Dataset], float, npt.NDArray[np.float64]]:
    """Slices against the normal, their spacing and the first one's position, or the reason why they are irregular."""
    positions = np.array([numbers(dataset, "ImagePositionPatient", 3) for dataset in datasets])
    order = np.argsort(-(positions @ normal), kind="stable")
    ordered, positions = [datasets[n] for n in order], positions[order]
    along = -(positions @ normal)
    gaps = np.diff(along)
    doubled = int((gaps < SAME_POSITION_MM).sum())
    if doubled:
        raise IncompleteSeriesError(
            f"{name(datasets)}: {doubled} of {len(datasets)} slices lie where another lies, expected one per place"
        )
    from_first = positions - positions[0]
    in_plane = float(np.linalg.norm(from_first - np.outer(from_first @ normal, normal), axis=1).max())
    shear = in_plane / float(gaps.sum())
    if shear > SHEAR_TOLERANCE and in_plane > ROUNDING_MM:
        raise InconsistentGeometryError(
            f"{name(datasets)}: the stack is sheared (gantry tilt): slices slip {in_plane:.2f} mm sideways over "
            f"{gaps.sum():.1f} mm ({np.degrees(np.arctan(shear)):.2f} degrees), expected at most "
            f"{np.degrees(SHEAR_TOLERANCE):.2f} degrees"
        )
    # The regular grid nearest to the positions, least squares: rounded ones lie around it.
    index = np.arange(len(along)) - (len(along) - 1) / 2
    spacing = float(index @ along / (index @ index))
    even = along.mean() + spacing * index
    if np.abs(along - even).max() <= max(SPACING_TOLERANCE * spacing, ROUNDING_MM):
        return ordered, spacing, positions[0] - (even[0] - along[0]) * normal
    steps = gaps / gaps.min()
    if np.abs(steps - np.rint(steps)).max() < 0.05:
        raise IncompleteSeriesError(
            f"{name(datasets)}: {int(np.rint(steps).sum()) - len(gaps)} slices are missing: gaps of up to "
            f"{gaps.max():.3f} mm where slices are {gaps.min():.3f} mm apart"
        )
    raise InconsistentGeometryError(
        f"{name(datasets)}: slice spacing varies from {gaps.min():.3f} to {gaps.max():.3f} mm, "
        f"expected one value within {SPACING_TOLERANCE:.0%}"
    )
