"""Pixels of every transfer syntax: decoded to the value, or refused with the reason before anything is allocated."""

from __future__ import annotations

import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import phantoms
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1

from dicomnode import volumes
from dicomnode.errors import StudyError, UnsupportedImageError
from dicomnode.volumes import pixels, reading
from dicomnode.volumes.frames import Frame

CORPUS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom" / "corpus-pydicom"
REFUSED = {
    "OT-PAL-8-face": "no transfer syntax",
    "emri_small_jpeg_2k_lossless_too_short": "Rows is absent",
    "liver_deflate": "deflated frames of 1 bits",
    "liver_nonbyte_aligned_deflate": "deflated frames of 1 bits",
    "liver_nonbyte_aligned_rle": "RLE Lossless cannot be decoded",
    "liver_rle": "RLE Lossless cannot be decoded",
    "parametric_map_double_float": "has no Pixel Data of integers",
    "parametric_map_float": "has no Pixel Data of integers",
}
SAME = [
    ("693_UNCR", "693_J2KR"),
    ("MR2_UNCR", "MR2_J2KR"),
    ("MR2_UNCI", "MR2_J2KI"),
    ("US1_UNCR", "US1_J2KR"),
    ("emri_small", "emri_small_RLE"),
    ("emri_small", "emri_small_big_endian"),
    ("emri_small", "emri_small_jpeg_2k_lossless"),
    ("emri_small", "emri_small_jpeg_ls_lossless"),
    ("OBXXXX1A", "OBXXXX1A_rle"),
    ("OBXXXX1A", "OBXXXX1A_expb"),
    ("OBXXXX1A_2frame", "OBXXXX1A_rle_2frame"),
    ("SC_rgb_16bit_2frame", "SC_rgb_expb_16bit_2frame"),
    ("SC_rgb_32bit", "SC_rgb_expb_32bit"),
    ("gdcm-US-ALOKA-16", "gdcm-US-ALOKA-16_big"),
    ("liver", "liver_expb"),
    ("liver", "liver_j2k"),
]
data = pytest.mark.data
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def frames(dataset: Dataset) -> list[Dataset]:
    """Every frame, of whatever SOP class."""
    made: list[Dataset] = []
    for number in range(1, int(dataset.get("NumberOfFrames") or 1) + 1):
        frame = Frame()
        frame.update(dataset)
        frame.parent, frame.number = dataset, number
        made.append(frame)
    return made


def decoded(path: Path) -> npt.NDArray[Any]:
    return np.array(list(pixels.stored_values(frames(dcmread(path, force=True)))))


@data
def test_every_file_of_the_corpus_is_decoded_or_refused_with_the_reason() -> None:
    if not CORPUS.is_dir():
        pytest.skip("the real images are not there: shared/data/dicom/corpus-pydicom")
    refused, shapes = {}, {}
    for path in sorted(CORPUS.glob("*.dcm")):
        try:
            shapes[path.stem] = decoded(path).shape
        except StudyError as error:
            refused[path.stem] = str(error)

    assert refused.keys() == REFUSED.keys()
    for name, reason in REFUSED.items():
        assert reason in refused[name]
    assert len(shapes) == 71
    assert shapes["693_J2KR"] == (1, 512, 512)
    assert shapes["emri_small_jpeg_ls_lossless"] == (10, 64, 64)


@data
@pytest.mark.parametrize(("one", "other"), SAME)
def test_files_of_equal_content_decode_to_equal_values(one: str, other: str) -> None:
    if not CORPUS.is_dir():
        pytest.skip("the real images are not there: shared/data/dicom/corpus-pydicom")

    assert np.array_equal(decoded(CORPUS / f"{one}.dcm"), decoded(CORPUS / f"{other}.dcm"))


@data
@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.dcm")), ids=lambda path: path.stem)
def test_every_file_of_the_corpus_is_read_or_refused_as_a_series(path: Path) -> None:
    try:
        volumes.load(volumes.read([path]))
    except StudyError as error:
        refused = str(error)
    else:
        refused = ""
    assert (refused == "") is (path.stem == "eCT_Supplemental")


def a_slice(bits: int = 12, *, signed: bool = False) -> Dataset:
    """One slice whose values fill its bits."""
    (dataset, *_) = phantoms.make_series(modality="MR")
    rng = np.random.default_rng(1)
    low = -(1 << bits - 1) if signed else 0
    values = rng.integers(low, low + (1 << bits), (48, 56))
    smooth = np.sort(values, axis=None).reshape(48, 56)  # lossy codecs are not asked to keep noise
    dataset.BitsAllocated = 8 if bits == 8 else 16
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, int(signed)
    dataset.PixelData = smooth.astype(f"<{'i' if signed else 'u'}{dataset.BitsAllocated // 8}").tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


@pytest.mark.parametrize(
    ("command", "bits", "signed", "off_by"),
    [
        (["dcmcjpeg", "+eb"], 8, False, 3),
        (["dcmcjpeg", "+ee"], 8, False, 3),
        (["dcmcjpeg", "+ee"], 12, False, 12),
        (["dcmcjpeg", "+el"], 16, False, 0),
        (["dcmcjpeg", "+el"], 12, True, 0),
        (["dcmcjpeg", "+e1"], 12, False, 0),
        (["dcmcjpeg", "+e1"], 16, True, 0),
        (["dcmcjpls"], 12, False, 0),
        (["dcmcjpls"], 16, True, 0),
        (["dcmcjpls", "+en", "+md", "2"], 12, False, 2),
        (["dcmcrle"], 16, True, 0),
        (["dcmconv", "+td"], 12, True, 0),
        (["dcmconv", "+tb"], 16, True, 0),
        (["dcmconv", "+ti"], 16, False, 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_dcmtk_encodes_is_decoded(
    command: list[str], bits: int, signed: bool, off_by: int, tmp_path: Path
) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (Debian package dcmtk)")
    original = a_slice(bits, signed=signed)
    original.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    subprocess.run([*command, "a.dcm", "b.dcm"], cwd=tmp_path, check=True)

    (found,) = pixels.stored_values(volumes.read([tmp_path / "b.dcm"]))

    (wanted,) = pixels.stored_values([original])
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= off_by
    assert int(wanted.max()) - int(wanted.min()) > (1 << bits) * 0.9


def test_a_deflated_frame_is_decoded_and_a_longer_one_refused() -> None:
    dataset = a_slice(16)
    (wanted,) = pixels.stored_values([dataset])
    dataset.file_meta.TransferSyntaxUID = pixels.DEFLATED_FRAMES
    native = dataset.PixelData
    for content, fits in ((native, True), (native + bytes(10**6), False)):
        deflate = zlib.compressobj(wbits=-15)
        dataset.PixelData = encapsulate([deflate.compress(content) + deflate.flush()])
        if fits:
            assert np.array_equal(next(pixels.stored_values([dataset])), wanted)
        else:
            with pytest.raises(UnsupportedImageError, match="a deflated frame of 5378 bytes, expected 5376"):
                list(pixels.stored_values([dataset]))


@pytest.mark.parametrize(("signed", "high"), [(False, 11), (False, 15), (True, 11), (True, 13)])
def test_bits_beside_the_stored_ones_are_no_part_of_the_value(signed: bool, high: int) -> None:
    dataset = a_slice(12, signed=signed)
    (wanted,) = pixels.stored_values([dataset])
    units = (wanted.astype(np.int64) & 0xFFF) << (high - 11)
    beside = np.random.default_rng(2).integers(0, 1 << 16, units.shape) & ~(0xFFF << (high - 11))
    dataset.HighBit = high
    dataset.PixelData = (units | beside).astype("<u2").tobytes()

    (found,) = pixels.stored_values([dataset])

    assert np.array_equal(found, wanted)


def test_a_high_bit_below_the_stored_ones_is_refused() -> None:
    dataset = a_slice(12)
    dataset.HighBit = 3

    with pytest.raises(UnsupportedImageError, match="High Bit 3 with 12 of 16 bits stored"):
        list(pixels.stored_values([dataset]))


@pytest.mark.parametrize(
    ("modality", "padding", "limit", "expected"),
    [
        ("CT", -2000, None, -1024.0),
        ("CT", 63536, None, -1024.0),  # the same bits, written as unsigned
        ("CT", -2000, -1990, -1024.0),
        ("MR", 4000, None, 100.0),  # brighter than anything: the darkest value of the image
        ("MR", 7, None, 7.0),  # darker already
    ],
)
def test_padding_becomes_air_or_the_darkest_value(
    modality: str, padding: int, limit: int | None, expected: float
) -> None:
    (dataset, *_) = phantoms.make_series(modality=modality)
    stored = np.full((48, 56), 100, np.int16)
    stored[0] = padding if padding < 2**15 else padding - 2**16
    dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 16, 15
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.add_new("PixelPaddingValue", "US" if padding > 2**15 else "SS", padding)
    if limit is not None:
        stored[1] = dataset.PixelPaddingRangeLimit = limit
        dataset["PixelPaddingRangeLimit"].VR = "SS"
    dataset.PixelData = stored.tobytes()

    (found,) = pixels.values([dataset], (48, 56))

    assert set(found[0]) == {expected}
    assert set(found[1]) == {100.0 if limit is None else expected}
    assert set(found[2:].ravel()) == {100.0}


def jpeg_of(rows: int, columns: int) -> bytes:
    size = rows.to_bytes(2) + columns.to_bytes(2)
    return b"\xff\xd8\xff\xe0\x00\x04ab\xff\xff\xc3\x00\x0b\x10" + size + b"\x01\x01\x11\x00" + bytes(64)


def j2k_of(rows: int, columns: int) -> bytes:
    size = columns.to_bytes(4) + rows.to_bytes(4) + bytes(8)
    return b"\xff\x4f\xff\x51\x00\x29\x00\x00" + size + bytes(64)


@pytest.mark.parametrize(("syntax", "coded"), [(JPEGLosslessSV1, jpeg_of), (JPEG2000Lossless, j2k_of)])
@pytest.mark.parametrize("size", [(65000, 65000), (47, 56), (48, 60000)])
def test_a_codestream_of_another_size_is_refused_before_a_decoder_sees_it(
    syntax: str, coded: Any, size: tuple[int, int]
) -> None:
    dataset = a_slice(16)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([coded(*size)])

    with pytest.raises(UnsupportedImageError, match=f"compressed frame is {size[0]} × {size[1]}, expected 48 × 56"):
        list(pixels.stored_values([dataset]))


def test_huge_rows_are_refused_before_anything_is_allocated() -> None:
    dataset = a_slice()
    dataset.Rows = dataset.Columns = 65535

    with pytest.raises(UnsupportedImageError, match="65535 × 65535 × 1 samples in a frame"):
        list(pixels.stored_values([dataset]))


def test_a_deflated_data_set_that_grows_out_of_bounds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("dcmconv") is None:
        pytest.skip("dcmconv is not installed (Debian package dcmtk)")
    dataset = a_slice()
    dataset.ImageComments = "x"
    dataset.add_new((0x0011, 0x0010), "LO", "BOMB")
    dataset.add_new((0x0011, 0x1001), "OB", bytes(3_000_000))
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    subprocess.run(["dcmconv", "+td", "a.dcm", "b.dcm"], cwd=tmp_path, check=True)
    assert len(volumes.read_headers([tmp_path / "b.dcm"])) == 1
    monkeypatch.setattr(reading, "MAX_INFLATED_BYTES", 2_000_000)

    with pytest.raises(UnsupportedImageError, match=r"b\.dcm: a deflated data set of more than 2000000 bytes"):
        volumes.read_headers([tmp_path / "b.dcm"])
