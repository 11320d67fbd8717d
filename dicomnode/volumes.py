"""One series → one volume in LPS millimetres, or the measured reason why it is none.

Law: `describe` (headers only, before pairing) and `load` (with pixels, in the worker) share `geometry`, so that what
was judged regular is what is registered. Nothing is repaired silently: a stack that is not one regular, orthogonal
grid is refused. Geometry is highdicom's: index order (slice, row, column), slices ordered to be right-handed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from highdicom import VolumeGeometry
from highdicom.spatial import get_series_volume_positions
from pydicom import Dataset, dcmread
from pydicom.config import disable_value_validation
from pydicom.dataelem import DataElement
from pydicom.multival import MultiValue
from pydicom.uid import UID, CTImageStorage, MRImageStorage

from dicomnode.errors import (
    IncompleteSeriesError,
    InconsistentGeometryError,
    LocalError,
    UnsupportedImageError,
)
from dicomnode.model import HeaderValue, InstanceHeader, VolumeRef
from registration_engine import Grid, Volume

SOFTWARE_NAME = "dicomnode"
"""What our objects name as Manufacturer's Model Name in the Contributing Equipment Sequence; the loop guard."""

ORIENTATION_TOLERANCE = 1e-3
SHEAR_TOLERANCE = 1e-3
SPACING_TOLERANCE = 0.02
SAME_POSITION_MM = 0.01
MAX_VOXELS = 2**30

_BULK = {"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "UN", "UT"}
_MAX_TEXT, _MAX_VALUES = 1024, 64
_SAME_IN_ALL = (
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "FrameOfReferenceUID",
    "SOPClassUID",
    "Rows",
    "Columns",
    "PhotometricInterpretation",
    "PixelRepresentation",
)


@dataclass(frozen=True, eq=False)
class Stack:
    """The instances of one series in slice order, and the grid that their pixels stand on."""

    datasets: tuple[Dataset, ...]
    grid: Grid


def read_headers(paths: Iterable[Path]) -> list[Dataset]:
    """Read everything before the pixels, in the order given.

    Raises
    ------
    LocalError
        A file cannot be read.
    UnsupportedImageError
        A file is not DICOM, or an element cannot be decoded.
    """
    return [_read(path, stop_before_pixels=True) for path in paths]


def read(paths: Iterable[Path]) -> list[Dataset]:
    """Read whole instances, pixels undecoded, in the order given. Raises what `read_headers` raises."""
    return [_read(path, stop_before_pixels=False) for path in paths]


def instance_header(dataset: Dataset) -> InstanceHeader:
    """What the index must know of an instance; text as received, empty where absent."""
    with disable_value_validation():
        return InstanceHeader(
            patient_id=_text(dataset, "PatientID"),
            issuer_of_patient_id=_text(dataset, "IssuerOfPatientID"),
            patient_birth_date=_text(dataset, "PatientBirthDate"),
            patient_sex=_text(dataset, "PatientSex"),
            study_instance_uid=_text(dataset, "StudyInstanceUID"),
            series_instance_uid=_text(dataset, "SeriesInstanceUID"),
            modality=_text(dataset, "Modality"),
            is_own_output=_is_own_output(dataset),
        )


def describe(datasets: Sequence[Dataset], *, last_received_at: datetime) -> VolumeRef:
    """What pairing must know of a complete series, from its headers.

    Raises
    ------
    IncompleteSeriesError, InconsistentGeometryError, UnsupportedImageError
        The instances are not one volume; the message carries the measured figure.
    """
    ordered = geometry(datasets)
    first = ordered.datasets[0]
    about = instance_header(first)
    with disable_value_validation():
        return VolumeRef(
            patient_id=about.patient_id,
            issuer_of_patient_id=about.issuer_of_patient_id,
            patient_birth_date=about.patient_birth_date,
            patient_sex=about.patient_sex,
            study_instance_uid=about.study_instance_uid,
            series_instance_uid=about.series_instance_uid,
            frame_of_reference_uid=_text(first, "FrameOfReferenceUID"),
            modality=about.modality,
            shape=ordered.grid.shape,
            affine=tuple(ordered.grid.affine.ravel().tolist()),
            last_received_at=last_received_at,
            header={e.keyword: _plain(e.value) for e in first if _is_describable(e)},
        )


def load(datasets: Sequence[Dataset]) -> Volume:
    """Decode a series, in any order, into one volume: rescaled (CT: HU), LPS millimetres.

    Raises
    ------
    IncompleteSeriesError, InconsistentGeometryError, UnsupportedImageError
        As `describe`; or pixels cannot be decoded, naming the transfer syntax.
    """
    ordered = geometry(datasets)
    voxels = np.empty(ordered.grid.shape, dtype=np.float32)
    for k, dataset in enumerate(ordered.datasets):
        slope, intercept = rescale(dataset)
        voxels[k] = _pixels(dataset, ordered.grid.shape[1:]) * np.float64(slope) + intercept
    return Volume(voxels, ordered.grid)


def geometry(datasets: Sequence[Dataset]) -> Stack:
    """Order the instances of one series by position and measure whether they form one regular grid.

    Accepted are single orientation (cosines within 0.001), no shear (0.001 of the stack's length) and one slice
    spacing (within 2 %); never a gap, never two slices in one place.
    """
    with disable_value_validation():
        for dataset in datasets:
            _check_kind(dataset)
        if len(datasets) < 2:
            raise IncompleteSeriesError(f"Series: got {len(datasets)} instance, expected at least 2 slices")
        _check_same(datasets)
        row, column = _axes(datasets)
        _check_positions(datasets, np.cross(row, column))
        spacing, places = get_series_volume_positions(
            datasets,
            rtol=SPACING_TOLERANCE,
            perpendicular_tol=SHEAR_TOLERANCE,
            orientation_tol=ORIENTATION_TOLERANCE,
        )
        if spacing is None or places is None:
            raise InconsistentGeometryError(f"{_name(datasets)}: its slices do not form one regular volume")
        ordered = [dataset for _, dataset in sorted(zip(places, datasets, strict=True), key=lambda p: p[0])]
        placed = VolumeGeometry.from_attributes(
            image_position=_numbers(ordered[0], "ImagePositionPatient", 3).tolist(),
            image_orientation=[*row, *column],
            rows=int(ordered[0].Rows),
            columns=int(ordered[0].Columns),
            pixel_spacing=_numbers(ordered[0], "PixelSpacing", 2).tolist(),
            spacing_between_slices=spacing,
            number_of_frames=len(ordered),
            coordinate_system="PATIENT",
        )
    slices, rows, columns = placed.spatial_shape
    return Stack(tuple(ordered), Grid((slices, rows, columns), np.asarray(placed.affine)))


def rescale(dataset: Dataset) -> tuple[float, float]:
    """Slope and intercept from stored values to the image's unit; 1 and 0 where absent."""
    if "ModalityLUTSequence" in dataset:
        raise UnsupportedImageError(f"{_name([dataset])}: Modality LUT Sequence, expected Rescale Slope")
    slope = _numbers(dataset, "RescaleSlope", 1)[0] if _text(dataset, "RescaleSlope") else 1.0
    intercept = _numbers(dataset, "RescaleIntercept", 1)[0] if _text(dataset, "RescaleIntercept") else 0.0
    if slope == 0:
        raise UnsupportedImageError(f"{_name([dataset])}: Rescale Slope 0, expected another number")
    return float(slope), float(intercept)


def _read(path: Path, *, stop_before_pixels: bool) -> Dataset:
    with disable_value_validation():
        try:
            dataset = dcmread(path, stop_before_pixels=stop_before_pixels, force=True)
            for _ in dataset:  # Decodes every element here, where an undecodable one can be named.
                pass
        except OSError as error:
            raise LocalError(f"{path.name}: cannot be read: {error}") from error
        except Exception as error:  # pydicom raises many kinds for broken bytes; all mean the same to us
            raise UnsupportedImageError(f"{path.name}: not decodable as DICOM: {error}") from error
    if "SOPInstanceUID" not in dataset:
        raise UnsupportedImageError(f"{path.name}: has no SOP Instance UID, expected a DICOM instance")
    return dataset


def _is_own_output(dataset: Dataset) -> bool:
    equipment = dataset.get("ContributingEquipmentSequence") or []
    return _text(dataset, "Modality") == "REG" or any(
        isinstance(item, Dataset) and _text(item, "ManufacturerModelName") == SOFTWARE_NAME for item in equipment
    )


def _check_kind(dataset: Dataset) -> None:
    """Refuse what is not a single-frame monochrome CT or MR slice of plausible size with a position."""
    name = _name([dataset])
    sop_class = UID(_text(dataset, "SOPClassUID"))
    if sop_class not in (CTImageStorage, MRImageStorage):
        got = sop_class.name or "none"
        raise UnsupportedImageError(f"{name}: SOP Class {got}, expected CT or MR Image Storage (single-frame)")
    if _text(dataset, "NumberOfFrames") not in ("", "1"):
        raise UnsupportedImageError(f"{name}: {dataset.NumberOfFrames} frames, expected single-frame images")
    photometric = _text(dataset, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or _text(dataset, "SamplesPerPixel") != "1":
        raise UnsupportedImageError(f"{name}: {photometric or 'no Photometric Interpretation'}, expected monochrome")
    if _text(dataset, "BitsAllocated") not in ("8", "16"):
        raise UnsupportedImageError(f"{name}: Bits Allocated {_text(dataset, 'BitsAllocated')}, expected 8 or 16")
    if _text(dataset, "BurnedInAnnotation") == "YES":
        raise UnsupportedImageError(f"{name}: Burned In Annotation YES, expected pixels without text")
    rescale(dataset)
    for keyword, count in (("Rows", 1), ("Columns", 1), ("ImagePositionPatient", 3)):
        _numbers(dataset, keyword, count)
    if min(int(dataset.Rows), int(dataset.Columns)) < 2:
        raise InconsistentGeometryError(f"{name}: {dataset.Rows} × {dataset.Columns} pixels, expected 2 × 2 or more")
    if (spacing := _numbers(dataset, "PixelSpacing", 2)).min() <= 0:
        raise InconsistentGeometryError(f"{name}: Pixel Spacing {spacing.tolist()} mm, expected above 0")


def _check_same(datasets: Sequence[Dataset]) -> None:
    for keyword in _SAME_IN_ALL:
        counts = Counter(_text(dataset, keyword) for dataset in datasets)
        if len(counts) > 1:
            got = ", ".join(f"{value or 'none'} ({n} slices)" for value, n in counts.most_common(3))
            if keyword == "PatientID":  # Messages never say who the patient is.
                got = f"of {len(counts)} kinds"
            raise InconsistentGeometryError(f"{_name(datasets)}: {keyword} is {got}; expected one value")
    spacings = np.array([_numbers(dataset, "PixelSpacing", 2) for dataset in datasets])
    if np.ptp(spacings, axis=0).max() > 1e-4 * spacings.max():
        got = f"{spacings.min(axis=0).tolist()} to {spacings.max(axis=0).tolist()}"
        raise InconsistentGeometryError(f"{_name(datasets)}: Pixel Spacing is {got} mm, expected one value")
    voxels = len(datasets) * int(datasets[0].Rows) * int(datasets[0].Columns)
    if voxels > MAX_VOXELS:
        raise UnsupportedImageError(f"{_name(datasets)}: {voxels} voxels, expected at most {MAX_VOXELS}")


def _axes(datasets: Sequence[Dataset]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The one row and column direction, made exactly orthonormal."""
    orientations = np.array([_numbers(dataset, "ImageOrientationPatient", 6) for dataset in datasets])
    spread = float(np.ptp(orientations, axis=0).max())
    if spread > ORIENTATION_TOLERANCE:
        raise InconsistentGeometryError(
            f"{_name(datasets)}: slices point in different directions: cosines differ by {spread:.4f}, "
            f"expected at most {ORIENTATION_TOLERANCE}"
        )
    row, column = orientations[0, :3], orientations[0, 3:]
    error = float(max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)))
    if error > ORIENTATION_TOLERANCE:
        raise InconsistentGeometryError(
            f"{_name(datasets)}: Image Orientation (Patient) {orientations[0].tolist()} is not orthonormal: "
            f"off by {error:.4f}, expected at most {ORIENTATION_TOLERANCE}"
        )
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    return row, column / np.linalg.norm(column)


def _check_positions(datasets: Sequence[Dataset], normal: npt.NDArray[np.float64]) -> None:
    """Refuse doubled positions, a sheared stack, gaps and irregular spacing, in this order."""
    positions = np.array([_numbers(dataset, "ImagePositionPatient", 3) for dataset in datasets])
    positions = positions[np.argsort(positions @ normal, kind="stable")]
    gaps = np.diff(positions @ normal)
    doubled = int((gaps < SAME_POSITION_MM).sum())
    if doubled:
        raise IncompleteSeriesError(
            f"{_name(datasets)}: {doubled} of {len(datasets)} slices lie where another lies, expected one per place"
        )
    from_first = positions - positions[0]
    in_plane = float(np.linalg.norm(from_first - np.outer(from_first @ normal, normal), axis=1).max())
    shear = in_plane / float(gaps.sum())
    if shear > SHEAR_TOLERANCE:
        raise InconsistentGeometryError(
            f"{_name(datasets)}: the stack is sheared (gantry tilt): slices slip {in_plane:.2f} mm sideways over "
            f"{gaps.sum():.1f} mm ({np.degrees(np.arctan(shear)):.2f} degrees), expected at most {SHEAR_TOLERANCE}"
        )
    if np.abs(gaps - gaps.mean()).max() <= SPACING_TOLERANCE * gaps.mean():
        return
    steps = gaps / gaps.min()
    if np.abs(steps - np.rint(steps)).max() < 0.05:
        raise IncompleteSeriesError(
            f"{_name(datasets)}: {int(np.rint(steps).sum()) - len(gaps)} slices are missing: gaps of up to "
            f"{gaps.max():.3f} mm where slices are {gaps.min():.3f} mm apart"
        )
    raise InconsistentGeometryError(
        f"{_name(datasets)}: slice spacing varies from {gaps.min():.3f} to {gaps.max():.3f} mm, "
        f"expected one value within {SPACING_TOLERANCE:.0%}"
    )


def _pixels(dataset: Dataset, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    syntax = UID(getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", "")).name
    try:
        pixels: npt.NDArray[Any] = dataset.pixel_array
    except Exception as error:  # every codec has its own; what matters is which syntax it was
        raise UnsupportedImageError(f"{_name([dataset])}: pixels in {syntax} cannot be decoded: {error}") from error
    if pixels.shape != shape:
        raise UnsupportedImageError(f"{_name([dataset])}: decoded {pixels.shape} pixels, expected {shape}")
    return pixels


def _numbers(dataset: Dataset, keyword: str, count: int) -> npt.NDArray[np.float64]:
    """(count,) finite numbers of an element."""
    try:
        numbers = np.atleast_1d(np.asarray(dataset.get(keyword), dtype=np.float64))
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all() or np.abs(numbers).max() > 1e6:
        raise InconsistentGeometryError(
            f"{_name([dataset])}: {keyword} is {_text(dataset, keyword)[:80] or 'absent'}, "
            f"expected {count} finite number{'s' if count > 1 else ''}"
        )
    return numbers


def _name(datasets: Sequence[Dataset]) -> str:
    if len(datasets) == 1:
        return f"Instance {_text(datasets[0], 'SOPInstanceUID')}"
    return f"Series {_text(datasets[0], 'SeriesInstanceUID')}"


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    return "" if value is None else str(value)


def _is_describable(element: DataElement) -> bool:
    is_bulk = element.VR in _BULK or isinstance(element.value, bytes)
    return bool(element.keyword) and not element.tag.is_private and not is_bulk


def _plain(value: Any) -> HeaderValue:
    """An element's value as JSON knows it, cut to a sane length."""
    if isinstance(value, MultiValue | list | tuple):
        return [_plain(one) for one in value[:_MAX_VALUES]]  # type: ignore[return-value]  # one VR, so one kind
    if value is None:
        return ""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and np.isfinite(value):
        return float(value)
    return str(value)[:_MAX_TEXT]
