"""Stored bytes → datasets, one per frame; what cannot be decoded is refused by name, and before it can grow."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.config import disable_value_validation
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from dicomnode.errors import InconsistentGeometryError, LocalError, UnsupportedImageError
from dicomnode.model import InstanceHeader
from dicomnode.volumes.frames import frames_of, shown_uid

SOFTWARE_NAME = "dicomnode"
"""What our objects name as Manufacturer's Model Name in the Contributing Equipment Sequence; the loop guard."""

LARGEST_NUMBER = 1e6
"""Of a position, a spacing (mm) or a rescale; beyond it lies only damage."""

LARGE_BYTES = 2**16
"""A private element beyond this is bulk data."""

MAX_INFLATED_BYTES = 2**30
"""Most that a deflated data set may inflate to."""


def read_headers(paths: Iterable[Path], frames: Iterable[Sequence[int]] = ()) -> list[Dataset]:
    """Read everything before the pixels, in the order given; a multi-frame instance gives one dataset per frame.

    Parameters
    ----------
    frames
        For each path the 1-based frames wanted; empty, or left out: all.

    Raises
    ------
    LocalError
        A file cannot be read.
    UnsupportedImageError
        A file is not DICOM, an element cannot be decoded, or a wanted frame is not there.
    """
    return _read_all(paths, frames, stop_before_pixels=True)


def read(paths: Iterable[Path], frames: Iterable[Sequence[int]] = ()) -> list[Dataset]:
    """Read whole instances, pixels undecoded. Parameters, result and errors as `read_headers`."""
    return _read_all(paths, frames, stop_before_pixels=False)


def instance_header(dataset: Dataset) -> InstanceHeader:
    """What the index must know of an instance; text as received, empty where absent."""
    with disable_value_validation():
        return InstanceHeader(
            patient_id=text(dataset, "PatientID"),
            issuer_of_patient_id=text(dataset, "IssuerOfPatientID"),
            patient_birth_date=text(dataset, "PatientBirthDate"),
            patient_sex=text(dataset, "PatientSex"),
            study_instance_uid=text(dataset, "StudyInstanceUID"),
            series_instance_uid=text(dataset, "SeriesInstanceUID"),
            modality=text(dataset, "Modality"),
            is_own_output=_is_own_output(dataset),
        )


def text(dataset: Dataset, keyword: str) -> str:
    """An element as text, empty where absent or without a value."""
    value = dataset.get(keyword)
    return "" if value is None else str(value)


def numbers(dataset: Dataset, keyword: str, count: int) -> npt.NDArray[np.float64]:
    """(count,) finite numbers of an element, InconsistentGeometryError where it has not."""
    try:
        found = np.atleast_1d(np.asarray(dataset.get(keyword), dtype=np.float64))
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (count,) or not np.isfinite(found).all() or np.abs(found).max() > LARGEST_NUMBER:
        raise InconsistentGeometryError(
            f"{name([dataset])}: {keyword} is {text(dataset, keyword)[:80] or 'absent'}, "
            f"expected {count} finite number{'s' if count > 1 else ''} up to {LARGEST_NUMBER:.0f}"
        )
    return found


def name(datasets: Sequence[Dataset]) -> str:
    """What a message calls one instance, or the series of several."""
    if len(datasets) == 1:
        return f"Instance {shown_uid(datasets[0].get('SOPInstanceUID'))}"
    return f"Series {shown_uid(datasets[0].get('SeriesInstanceUID'))}"


def _read_all(paths: Iterable[Path], frames: Iterable[Sequence[int]], *, stop_before_pixels: bool) -> list[Dataset]:
    found, wanted = [], iter(frames)
    for path in paths:
        instance = frames_of(_read(path, stop_before_pixels=stop_before_pixels))
        numbers = next(wanted, ()) or range(1, len(instance) + 1)
        if max(numbers, default=1) > len(instance):
            raise UnsupportedImageError(f"{path.name}: has {len(instance)} frames, expected frame {max(numbers)}")
        found += [instance[n - 1] for n in numbers]
    return found


def _read(path: Path, *, stop_before_pixels: bool) -> Dataset:
    with disable_value_validation():
        try:
            _check_inflated_size(path)
            dataset = dcmread(path, stop_before_pixels=stop_before_pixels, force=True)
            _decode(dataset)
        except UnsupportedImageError:
            raise
        except OSError as error:
            if error.errno is not None:  # pydicom raises its own, without, where bytes are missing
                raise LocalError(f"{path.name}: cannot be read: {error}") from error
            raise UnsupportedImageError(f"{path.name}: not decodable as DICOM: {_unquoted(error)}") from error
        except Exception as error:  # pydicom raises many kinds for broken bytes; all mean the same to us
            raise UnsupportedImageError(f"{path.name}: not decodable as DICOM: {_unquoted(error)}") from error
    if "SOPInstanceUID" not in dataset:
        raise UnsupportedImageError(f"{path.name}: has no SOP Instance UID, expected a DICOM instance")
    return dataset


def _decode(dataset: Dataset) -> None:
    """Decode every element here, where one that cannot be is named; a vendor's own that cannot be is left out.

    So are its large ones and its sequences, which nobody here reads and of which a series may hold gigabytes.
    """
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except Exception:
            if not tag.is_private:
                raise
            del dataset[tag]
            continue
        is_large = isinstance(element.value, bytes) and len(element.value) > LARGE_BYTES
        if tag.is_private and (element.VR == "SQ" or is_large):
            del dataset[tag]
        elif element.VR == "SQ":
            for item in element.value or []:
                if isinstance(item, Dataset):
                    _decode(item)


def _unquoted(error: Exception) -> str:
    """An error's text without the values it quotes, which may name the patient."""
    return re.sub(r"(['\"]).*\1", "'…'", str(error), flags=re.DOTALL)[:300]


def _check_inflated_size(path: Path) -> None:
    """Refuse a deflated data set that grows out of bounds, before it is held in memory as a whole."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(144 + int(meta.FileMetaInformationGroupLength))  # PS3.10 7.1: preamble, prefix, group length
        pending = file.read(2**20)
        while pending and not inflate.eof:
            size += len(inflate.decompress(pending, 2**20))
            if size > MAX_INFLATED_BYTES:
                raise UnsupportedImageError(
                    f"{path.name}: a deflated data set of more than {MAX_INFLATED_BYTES} bytes, expected at most that"
                )
            pending = inflate.unconsumed_tail or file.read(2**20)


def _is_own_output(dataset: Dataset) -> bool:
    equipment = dataset.get("ContributingEquipmentSequence") or []
    return text(dataset, "Modality") == "REG" or any(
        isinstance(item, Dataset) and text(item, "ManufacturerModelName") == SOFTWARE_NAME for item in equipment
    )
