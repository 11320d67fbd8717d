"""Volumes and fields from and to image files, by SimpleITK: NIfTI, MetaImage, NRRD."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from registration_engine.errors import InvalidVolumeError
from registration_engine.resampling import field_image, grid_of, image_of, simpleitk
from registration_engine.volume import DisplacementField, Volume

SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")
"""Of the formats that are written."""

_NIFTI_HEAD_BYTES = 352
_CHUNK_BYTES = 1 << 22


def read_volume(path: Path) -> Volume:
    """Read one scalar three-dimensional image.

    Raises
    ------
    InvalidVolumeError
        Unreadable or cut short; not three-dimensional; vectors or colours; NaN; a sheared grid.
    """
    image = _read(path)
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise InvalidVolumeError(
            f"{path}: got {image.GetNumberOfComponentsPerPixel()} values per voxel, expected a scalar image"
        )
    with np.errstate(over="ignore"):  # what does not fit is infinite then, which a volume refuses
        return Volume(simpleitk().GetArrayFromImage(image).astype(np.float32), grid_of(image))


class VolumeFiles(Sequence[Volume]):
    """Image files in order, each read when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Volume: ...
    @overload
    def __getitem__(self, index: slice) -> VolumeFiles: ...
    def __getitem__(self, index: int | slice) -> Volume | VolumeFiles:
        if isinstance(index, slice):
            return VolumeFiles(self._paths[index])
        return read_volume(self._paths[index])


def read_field(path: Path) -> DisplacementField:
    """Read a displacement field: three components per voxel, x, y, z in LPS mm.

    Raises
    ------
    InvalidVolumeError
        Unreadable; not a three-dimensional image of three components; NaN.
    """
    image = _read(path)
    if image.GetNumberOfComponentsPerPixel() != 3:
        raise InvalidVolumeError(
            f"{path}: got {image.GetNumberOfComponentsPerPixel()} values per voxel, expected a field of 3"
        )
    return DisplacementField(simpleitk().GetArrayFromImage(image), grid_of(image))


def write_volume(path: Path, volume: Volume) -> None:
    """Write an image; the suffix says the format.

    Raises
    ------
    OSError
        The format is unknown or the file cannot be written.
    """
    _write(path, image_of(volume.voxels, volume.grid))


def write_field(path: Path, field: DisplacementField) -> None:
    """Write a field as `sitk.DisplacementFieldTransform(sitk.ReadImage(path, sitk.sitkVectorFloat64))` takes it."""
    _write(path, simpleitk().Cast(field_image(field), simpleitk().sitkVectorFloat32))


def require_writable(path: Path, inputs: Sequence[Path] = (), *, suffixes: Sequence[str] = SUFFIXES) -> None:
    """See that a file can be written, before the work that it is for.

    Parameters
    ----------
    inputs
        Files that it must not replace.
    suffixes
        What its name may end with.

    Raises
    ------
    OSError
        It cannot.
    """
    if not path.name.lower().endswith(tuple(suffixes)):
        raise OSError(f"{path}: cannot be written (got that name, expected one that ends with {', '.join(suffixes)})")
    if path.exists() and any(each.exists() and path.samefile(each) for each in inputs):
        raise OSError(f"{path}: cannot be written (got an input, expected another file)")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OSError(f"{path}: cannot be written (expected a file in a folder that is there and can be written to)")


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InvalidVolumeError(f"{path}: cannot be read as an image (no such file, or none that holds data)")
    try:
        image = simpleitk().ReadImage(str(path))
    except RuntimeError as error:
        raise InvalidVolumeError(f"{path}: cannot be read as an image ({_last_line(error)})") from None
    if image.GetDimension() != 3:
        raise InvalidVolumeError(f"{path}: got {image.GetDimension()} dimensions, expected 3")
    if path.name.lower().endswith((".nii", ".nii.gz")):
        # As the header has it: the reader's own type is wider where values are scaled.
        values = math.prod(max(int(image.GetMetaData(f"dim[{n}]")), 1) for n in range(1, 8))
        least = _NIFTI_HEAD_BYTES + values * int(image.GetMetaData("bitpix")) // 8
        if (found := _whole_bytes(path)) < least:  # the reader fills up with zeros
            raise InvalidVolumeError(f"{path}: cut short: got {found} bytes, expected {least} or more")
    return image


def _whole_bytes(path: Path) -> int:
    """How many bytes a file holds, unpacked; InvalidVolumeError where it is packed and its end is missing."""
    if not path.name.lower().endswith(".gz"):
        return path.stat().st_size
    found = 0
    try:
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                found += len(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidVolumeError(f"{path}: cut short or damaged: {error}") from None
    return found


def _write(path: Path, image: Any) -> None:
    try:
        simpleitk().WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({_last_line(error)})") from None


def _last_line(error: RuntimeError) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"
