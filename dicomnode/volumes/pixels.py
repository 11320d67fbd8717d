"""Stored pixels → numbers: one decoder per transfer syntax, bounded before it runs, checked after.

Law: no codec under the GPL. What a compressed frame says of its own size must agree with the header before a decoder
sees it. Values are those of the standard's Rescale Slope and Intercept of each frame.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import gdcm
import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicomnode.errors import StudyError, UnsupportedImageError
from dicomnode.volumes.frames import Frame, frame_number
from dicomnode.volumes.reading import name, numbers, text

MAX_FRAME_PIXELS = 2**27
AIR_HU = -1024.0

DEFLATED_FRAMES = UID("1.2.840.10008.1.2.8.1")
DECODERS = {
    JPEGBaseline8Bit: "gdcm",
    JPEGExtended12Bit: "gdcm",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
    HTJ2KLossless: "pylibjpeg",
    HTJ2KLosslessRPCL: "pylibjpeg",
    HTJ2K: "pylibjpeg",
    RLELossless: "pydicom",
}
"""Compressed transfer syntaxes and pydicom's plug-in for each: GDCM (Apache-2.0), CharLS by pyjpegls, OpenJPEG by
pylibjpeg-openjpeg, pydicom itself (all MIT or BSD)."""


def values(datasets: Sequence[Dataset], shape: tuple[int, int]) -> Iterator[npt.NDArray[np.float64]]:
    """Each slice in the image's unit (CT: HU), padding made air in CT and the darkest value elsewhere.

    Parameters
    ----------
    shape
        (rows, columns) that every slice must have.
    """
    for dataset, stored in zip(datasets, stored_values(datasets), strict=True):
        if stored.shape != shape:
            raise UnsupportedImageError(f"{name([dataset])}: decoded {stored.shape} pixels, expected {shape}")
        slope, intercept = rescale(dataset)
        rescaled = stored * np.float64(slope) + intercept
        padding = _padding(dataset, stored)
        if padding is not None and padding.any():
            if text(dataset, "Modality") == "CT":
                rescaled[padding] = AIR_HU
            else:
                darkest = rescaled.min(where=~padding, initial=rescaled.max())
                rescaled[padding] = np.minimum(rescaled[padding], darkest)
        yield rescaled


def stored_values(datasets: Sequence[Dataset]) -> Iterator[npt.NDArray[Any]]:
    """The stored values of each slice or frame, (rows, columns) or with samples last, as their bits say.

    Frames of one instance that follow each other are decoded in one go.

    Raises
    ------
    UnsupportedImageError
        They cannot be decoded, or would be out of bounds; names instance, transfer syntax and reason.
    """
    for _, several in groupby(datasets, key=lambda dataset: id(getattr(dataset, "parent", dataset))):
        group = list(several)
        parent = group[0].parent if isinstance(group[0], Frame) else group[0]
        syntax = UID(str(getattr(getattr(parent, "file_meta", None), "TransferSyntaxUID", "") or ""))
        try:
            with disable_value_validation():
                _check_bounds(parent)
                for dataset, decoded in zip(group, _decoded(parent, syntax, group), strict=True):
                    yield _in_range(dataset, decoded, syntax)
        except StudyError:
            raise
        except Exception as error:  # every codec has its own; what matters is which syntax it was
            what = f"pixels in {syntax.name or 'no transfer syntax'} cannot be decoded"
            raise UnsupportedImageError(f"{name([parent])}: {what}: {error}") from error


def rescale(dataset: Dataset) -> tuple[float, float]:
    """Slope and intercept from stored values to the image's unit; 1 and 0 where absent.

    These are the standard's Rescale Slope and Intercept, of each frame its own. Philips MR carries a private scale
    slope (2005,100E) beside them, which gives values comparable between acquisitions; it is not applied: what is
    displayed, windowed and sent on is the standard's scale, and no similarity measure here needs the other.
    """
    if "ModalityLUTSequence" in dataset:
        raise UnsupportedImageError(f"{name([dataset])}: Modality LUT Sequence, expected Rescale Slope")
    slope = numbers(dataset, "RescaleSlope", 1)[0] if text(dataset, "RescaleSlope") else 1.0
    intercept = numbers(dataset, "RescaleIntercept", 1)[0] if text(dataset, "RescaleIntercept") else 0.0
    if slope == 0:
        raise UnsupportedImageError(f"{name([dataset])}: Rescale Slope 0, expected another number")
    return float(slope), float(intercept)


def _check_bounds(parent: Dataset) -> None:
    pixels = 1
    for keyword in ("Rows", "Columns", "SamplesPerPixel"):
        pixels *= max(int(numbers(parent, keyword, 1)[0]), 1)
    if pixels > MAX_FRAME_PIXELS:
        raise UnsupportedImageError(
            f"{name([parent])}: {parent.Rows} × {parent.Columns} × {parent.SamplesPerPixel} samples in a frame, "
            f"expected at most {MAX_FRAME_PIXELS}"
        )
    if "PixelData" not in parent:
        raise UnsupportedImageError(f"{name([parent])}: has no Pixel Data of integers, expected an image")


def _decoded(parent: Dataset, syntax: UID, group: Sequence[Dataset]) -> Iterator[npt.NDArray[Any]]:
    indices = [max(frame_number(dataset), 1) - 1 for dataset in group]
    if syntax == DEFLATED_FRAMES:
        yield from (_inflated(parent, coded) for coded in _coded(parent, indices))
        return
    if syntax not in DECODERS:
        if syntax.is_compressed and not syntax.is_deflated:
            raise UnsupportedImageError(
                f"{name([parent])}: pixels in {syntax.name}, for which there is no decoder here"
            )
        _check_length(parent)
        # pydicom would take the lowest bits, wherever High Bit is
        yield from iter_pixels(parent, indices=indices, raw=True, correct_unused_bits=False)
        return
    if syntax != RLELossless:
        for coded in _coded(parent, indices):
            _check_coded_size(parent, coded)
    if syntax == JPEGExtended12Bit and int(parent.BitsAllocated) == 16:
        yield from (_decoded_12_bit(parent, coded) for coded in _coded(parent, indices))
        return
    yield from iter_pixels(parent, indices=indices, raw=True, decoding_plugin=DECODERS[syntax])


def _check_length(parent: Dataset) -> None:
    """Refuse uncompressed pixels that are fewer or more than the header says: with other columns, an image slants."""
    sizes = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
    rows, columns, samples, bits = (int(numbers(parent, keyword, 1)[0]) for keyword in sizes)
    frames = int(parent.get("NumberOfFrames") or 1)
    expected, got = frames * rows * columns * samples * bits // 8, len(parent.PixelData or b"")
    if samples == 1 and bits % 8 == 0 and got not in (expected, expected + expected % 2):
        raise UnsupportedImageError(
            f"{name([parent])}: {got} bytes of Pixel Data, expected {expected} for {frames} × {rows} × {columns} "
            f"pixels of {bits} bits"
        )


def _coded(parent: Dataset, indices: Sequence[int]) -> Iterator[bytes]:
    """The compressed frames of those indices, ascending."""
    count = int(parent.get("NumberOfFrames") or 1)
    frames = enumerate(generate_frames(parent.PixelData, number_of_frames=count))
    wanted = {index: frame for index, frame in frames if index in set(indices)}
    yield from (wanted[index] for index in indices)


def _check_coded_size(parent: Dataset, coded: bytes) -> None:
    """Refuse a codestream that claims another size than the header: a decoder would allocate what it claims."""
    claimed = _coded_size(coded)
    if claimed is not None and claimed != (int(parent.Rows), int(parent.Columns)):
        raise UnsupportedImageError(
            f"{name([parent])}: its compressed frame is {claimed[0]} × {claimed[1]}, expected {parent.Rows} × "
            f"{parent.Columns} as its header says"
        )


def _coded_size(coded: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG, JPEG-LS or JPEG 2000 codestream; None where its header is not found."""
    start = coded.find(b"\xff\x4f\xff\x51")  # ISO/IEC 15444-1 A.5.1: SOC, SIZ
    if 0 <= start < 1024 and len(coded) >= start + 24:
        right, bottom, left, top = (int.from_bytes(coded[start + n : start + n + 4]) for n in (8, 12, 16, 20))
        return bottom - top, right - left
    at = 2
    while at + 9 <= len(coded) and coded[at] == 0xFF:  # ITU-T T.81 B.1.1: segments up to the frame header
        marker = coded[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _FRAME_HEADERS:
            return int.from_bytes(coded[at + 5 : at + 7]), int.from_bytes(coded[at + 7 : at + 9])
        else:
            at += 2 + int.from_bytes(coded[at + 2 : at + 4])
    return None


_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def _inflated(parent: Dataset, coded: bytes) -> npt.NDArray[Any]:
    """A frame of Deflated Image Frame Compression (PS3.5 A.4.13), of one sample in whole bytes."""
    rows, columns, bits = int(parent.Rows), int(parent.Columns), int(parent.BitsAllocated)
    if int(parent.SamplesPerPixel) != 1 or bits not in (8, 16, 32):
        raise UnsupportedImageError(f"{name([parent])}: deflated frames of {bits} bits, expected monochrome in bytes")
    size = rows * columns * bits // 8
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(coded, size + 2)
    if len(inflated) - size not in (0, 1):  # padded to an even length
        raise UnsupportedImageError(f"{name([parent])}: a deflated frame of {len(inflated)} bytes, expected {size}")
    kind = "i" if int(parent.PixelRepresentation) else "u"
    return np.frombuffer(inflated[:size], f"<{kind}{bits // 8}").reshape(rows, columns)


def _decoded_12_bit(parent: Dataset, coded: bytes) -> npt.NDArray[np.uint16]:
    """JPEG Extended beyond 8 bits, which pydicom's plug-ins leave to a codec under the GPL; GDCM decodes it."""
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(coded)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((int(parent.Columns), int(parent.Rows), 1))
    image.SetDataElement(element)
    interpretation = gdcm.PhotometricInterpretation.GetPIType(str(parent.PhotometricInterpretation))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(interpretation))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(JPEGExtended12Bit))))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, int(parent.PixelRepresentation)))
    decoded = image.GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(decoded, "<u2").reshape(int(parent.Rows), int(parent.Columns))


def _in_range(dataset: Dataset, decoded: npt.NDArray[Any], syntax: UID) -> npt.NDArray[Any]:
    """Only the bits stored, with their sign: old images keep overlays in the bits above or below."""
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if decoded.dtype.kind not in "iu" or not 1 < stored < allocated or decoded.dtype.itemsize * 8 != allocated:
        return decoded
    high = int(dataset.HighBit) if syntax not in DECODERS else stored - 1
    if not stored - 1 <= high < allocated:
        raise UnsupportedImageError(
            f"{name([dataset])}: High Bit {high} with {stored} of {allocated} bits stored, expected {stored - 1}"
        )
    kind = "i" if int(dataset.PixelRepresentation) else "u"
    native = decoded.astype(f"{kind}{allocated // 8}", copy=True)
    return (native << (allocated - 1 - high)) >> (allocated - stored)


def _padding(dataset: Dataset, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
    """Where the image has no pixels of its own (PS3.3 C.7.5.1.1.2)."""
    first = _padding_value(dataset, "PixelPaddingValue")
    if first is None:
        return None
    last = _padding_value(dataset, "PixelPaddingRangeLimit")
    low, high = sorted((first, first if last is None else last))
    return (stored >= low) & (stored <= high)


def _padding_value(dataset: Dataset, keyword: str) -> int | None:
    """As the pixels are signed, whatever VR it was written with."""
    if not text(dataset, keyword):
        return None
    value, bits = int(numbers(dataset, keyword, 1)[0]), int(dataset.BitsAllocated)
    value %= 1 << bits
    return value - (1 << bits) if int(dataset.PixelRepresentation) and value >> (bits - 1) else value
