from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import phantoms
import pytest
import SimpleITK
from counterparts import read_series
from pydicom import Dataset
from pydicom.uid import JPEG2000Lossless, RLELossless
from pynetdicom.sop_class import EnhancedMRImageStorage, SecondaryCaptureImageStorage  # type: ignore[attr-defined]

from dicomnode import volumes
from dicomnode.errors import (
    IncompleteSeriesError,
    InconsistentGeometryError,
    LocalError,
    StudyError,
    UnsupportedImageError,
)
from dicomnode.model import VolumeRef
from dicomnode.volumes import SOFTWARE_NAME

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
WHEN = datetime(2025, 1, 2, tzinfo=UTC)
data = pytest.mark.data


def describe(datasets: list[Dataset]) -> VolumeRef:
    """The one volume of an ordinary series."""
    ((volume, _),) = volumes.describe(datasets, last_received_at=WHEN).volumes
    return volume


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("oblique", [False, True])
def test_voxels_stand_where_simpleitk_puts_them(modality: str, oblique: bool, tmp_path: Path) -> None:
    paths = phantoms.write_series(phantoms.make_series(modality=modality, oblique=oblique), tmp_path)

    volume = volumes.load(volumes.read(reversed(paths)))

    theirs = read_series(paths)
    for index in ((0, 0, 0), (19, 47, 55), (3, 20, 41)):
        k, j, i = index
        at = theirs.TransformPhysicalPointToIndex(volume.grid.points_mm(np.array(index, dtype=float)).tolist())
        assert theirs[at] == volume.voxels[k, j, i]
        assert np.allclose(
            theirs.TransformIndexToPhysicalPoint(at), volume.grid.points_mm(np.array(index, dtype=float))
        )


def test_the_description_and_the_volume_cannot_disagree(tmp_path: Path) -> None:
    paths = phantoms.write_series(phantoms.make_series(oblique=True), tmp_path)

    described = describe(volumes.read_headers(paths))

    volume = volumes.load(volumes.read(paths))
    assert described.shape == volume.grid.shape == (20, 48, 56)
    assert np.array_equal(np.reshape(described.affine, (4, 4)), volume.grid.affine)


def test_ct_is_in_hounsfield_units() -> None:
    voxels = volumes.load(phantoms.make_series()).voxels

    assert voxels[10, 0, 0] == pytest.approx(-1000, abs=20)
    assert voxels[10, 24, 18] == pytest.approx(60, abs=20)  # liver


def test_each_slice_has_its_own_rescale() -> None:
    series = phantoms.make_series(modality="MR")
    for k, dataset in enumerate(series):
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 + k, -k

    voxels = volumes.load(series).voxels

    plain = volumes.load(phantoms.make_series(modality="MR")).voxels
    factors = np.arange(20, 0, -1)[:, None, None]  # highdicom's order runs against the normal, the phantom's along it
    assert np.array_equal(voxels, plain * factors - (factors - 1))


def test_the_header_holds_plain_values_by_keyword() -> None:
    header = {"PatientName": "Doe^Jane", "ImageComments": "x" * 3000, "AcquisitionNumber": None}
    series = phantoms.make_series(phase="portal", header={**header, "EchoTime": ""})
    for dataset in series:
        dataset.add_new((0x0009, 0x0010), "LO", "PRIVATE")

    described = describe(series).header

    assert described["PatientName"] == "Doe^Jane"
    assert described["ImageType"] == ["ORIGINAL", "PRIMARY", "AXIAL"]
    assert described["PixelSpacing"] == [4.0, 4.0]
    assert described["Rows"] == 48
    assert described["EchoTime"] == ""
    assert described["ContrastBolusAgent"] == "Iomeprol"
    assert len(str(described["ImageComments"])) == 1024
    assert not {"PixelData", "", "AcquisitionNumber"} & set(described)
    assert json.loads(json.dumps(dict(described), allow_nan=False)) == described


def change(index: int, **elements: Any) -> Any:
    def apply(series: list[Dataset]) -> list[Dataset]:
        for keyword, value in elements.items():
            setattr(series[index], keyword, value)
        return series

    return apply


def drop(keyword: str) -> Any:
    def apply(series: list[Dataset]) -> list[Dataset]:
        delattr(series[4], keyword)
        return series

    return apply


def tilt(series: list[Dataset]) -> list[Dataset]:
    for k, dataset in enumerate(series):
        dataset.ImagePositionPatient[1] += 0.05 * k
    return series


def widen(series: list[Dataset]) -> list[Dataset]:
    for dataset in series:
        dataset.PixelSpacing = [900_000, 1]
    return series


@pytest.mark.parametrize(
    ("broken", "error", "figure"),
    [
        (lambda s: s[:1], IncompleteSeriesError, "got 1 instance"),
        (lambda s: s[:0], IncompleteSeriesError, "got 0 instance"),
        (lambda s: s[:7] + s[8:], IncompleteSeriesError, "1 slices are missing: gaps of up to 10.000 mm"),
        (lambda s: s[:7] + s[10:], IncompleteSeriesError, "3 slices are missing"),
        (lambda s: [*s, *s[3:5]], IncompleteSeriesError, "2 of 22 slices lie where another lies"),
        (change(3, ImagePositionPatient=[-110, -94, -31]), InconsistentGeometryError, "from 3.500 to 6.500 mm"),
        (change(3, ImageOrientationPatient=[1, 0, 0, 0, 0.8, 0.6]), InconsistentGeometryError, "differ by 0.6000"),
        (tilt, InconsistentGeometryError, "0.95 mm sideways over 95.0 mm .0.57 degrees"),
        (change(3, Rows=47), InconsistentGeometryError, r"Rows is 48 .19 slices., 47 .1 slices."),
        (change(3, PixelSpacing=[4.1, 4]), InconsistentGeometryError, "4.1, 4.0"),
        (change(3, PixelSpacing=[0, 0]), InconsistentGeometryError, "expected above 0"),
        (change(3, FrameOfReferenceUID="1.2"), InconsistentGeometryError, "FrameOfReferenceUID is"),
        (change(3, PatientID="other"), InconsistentGeometryError, "PatientID is of 2 kinds"),
        (change(3, PhotometricInterpretation="RGB"), UnsupportedImageError, "RGB"),
        (change(3, NumberOfFrames=4), UnsupportedImageError, "4 frames"),
        (change(3, BitsAllocated=64), UnsupportedImageError, "Bits Allocated 64"),
        (change(3, BurnedInAnnotation="YES"), UnsupportedImageError, "Burned In Annotation"),
        (change(3, SOPClassUID=EnhancedMRImageStorage), InconsistentGeometryError, "SOPClassUID is"),
        (change(3, SOPClassUID=SecondaryCaptureImageStorage), UnsupportedImageError, "Secondary Capture Image Storage"),
        (change(3, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), UnsupportedImageError, "a localizer"),
        (change(3, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), UnsupportedImageError, "Siemens mosaic"),
        (change(3, ModalityLUTSequence=[]), UnsupportedImageError, "Modality LUT"),
        (change(3, RescaleSlope=0), UnsupportedImageError, "Rescale Slope 0"),
        (drop("ImagePositionPatient"), InconsistentGeometryError, "ImagePositionPatient is absent"),
        (drop("ImageOrientationPatient"), InconsistentGeometryError, "ImageOrientationPatient is absent"),
        (drop("PixelSpacing"), InconsistentGeometryError, "PixelSpacing is absent"),
        (drop("Rows"), InconsistentGeometryError, "Rows is absent"),
        (change(3, ImagePositionPatient=["1e300", 0, 0]), InconsistentGeometryError, "3 finite numbers up to 1000000"),
        (widen, InconsistentGeometryError, "expected all within 1000000 mm"),
        (change(3, ImagePositionPatient=[1, 2]), InconsistentGeometryError, "3 finite numbers"),
        (change(3, ImageOrientationPatient=[0] * 6), InconsistentGeometryError, "different directions"),
    ],
)
def test_what_is_not_one_regular_volume_is_refused_with_the_measured_figure(
    broken: Any, error: type[StudyError], figure: str
) -> None:
    series = broken(phantoms.make_series())

    with pytest.raises(error, match=figure) as of_headers:
        describe(series)

    with pytest.raises(error) as of_pixels:
        volumes.load(series)
    assert str(of_headers.value).startswith(str(of_pixels.value))
    assert "PHANTOM" not in str(of_headers.value)


def test_degenerate_orientation_in_every_slice_is_refused() -> None:
    series = phantoms.make_series(header={"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]})

    with pytest.raises(InconsistentGeometryError, match="not orthonormal"):
        describe(series)


def test_huge_sizes_are_refused_before_anything_is_allocated() -> None:
    series = phantoms.make_series(header={"Rows": 65535, "Columns": 65535})

    with pytest.raises(UnsupportedImageError, match=f"expected at most {volumes.MAX_VOXELS}"):
        volumes.load(series)


def test_pixels_that_do_not_fill_the_slice_are_refused_with_both_sizes() -> None:
    series = phantoms.make_series()
    series[2].PixelData = series[2].PixelData[:100]

    with pytest.raises(UnsupportedImageError, match="100 bytes of Pixel Data, expected 5376 for 1 × 48 × 56 pixels"):
        volumes.load(series)


def test_broken_compressed_pixels_name_the_transfer_syntax() -> None:
    series = phantoms.make_series()
    series[2].compress(RLELossless)
    series[2].file_meta.TransferSyntaxUID = JPEG2000Lossless

    with pytest.raises(UnsupportedImageError, match="JPEG 2000"):
        volumes.load(series)


def test_compressed_slices_are_read() -> None:
    series = phantoms.make_series()
    for dataset in series:
        dataset.compress(RLELossless)

    assert np.array_equal(volumes.load(series).voxels, volumes.load(phantoms.make_series()).voxels)


def test_bytes_that_are_no_dicom_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.dcm"
    path.write_bytes(bytes(range(256)) * 8)

    with pytest.raises(UnsupportedImageError, match=r"noise\.dcm"):
        volumes.read_headers([path])


def test_a_file_that_is_not_there_is_our_trouble(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"gone\.dcm"):
        volumes.read([tmp_path / "gone.dcm"])


def test_headers_come_without_pixels(tmp_path: Path) -> None:
    (path,) = phantoms.write_series(phantoms.make_series()[:1], tmp_path)

    assert "PixelData" not in volumes.read_headers([path])[0]
    assert "PixelData" in volumes.read([path])[0]


def test_an_instance_header_is_text_as_received() -> None:
    header = volumes.instance_header(phantoms.make_series(header={"IssuerOfPatientID": "HOSPITAL"})[0])

    assert (header.patient_id, header.issuer_of_patient_id) == ("PHANTOM", "HOSPITAL")
    assert (header.patient_birth_date, header.patient_sex, header.modality) == ("19700101", "O", "CT")
    assert not header.is_own_output
    assert volumes.instance_header(Dataset()).patient_id == ""


def test_our_own_output_is_known_by_modality_or_by_contributing_equipment() -> None:
    scanner, ours = Dataset(), Dataset()
    scanner.ManufacturerModelName = "Other workstation"
    ours.ManufacturerModelName = SOFTWARE_NAME
    by_others = phantoms.make_series(header={"ContributingEquipmentSequence": [scanner]})[0]
    by_us = phantoms.make_series(header={"ContributingEquipmentSequence": [scanner, ours]})[0]
    registration = phantoms.make_series(header={"Modality": "REG"})[0]

    assert [volumes.instance_header(d).is_own_output for d in (by_others, by_us, registration)] == [False, True, True]


def real(*folders: str) -> list[Path]:
    folder = DATA.joinpath(*folders)
    if not folder.is_dir():
        pytest.skip(f"the real images are not there: shared/data/dicom/{'/'.join(folders)}")
    return sorted(folder.rglob("*.dcm"))


@data
@pytest.mark.parametrize(
    ("folders", "shape"),
    [
        (("siemens-mr-two-positions", "HFS_t1"), (35, 256, 256)),
        (("siemens-mr-two-positions", "HFDL_t1"), (35, 256, 256)),
        (("mr-oblique",), (40, 320, 320)),
    ],
)
def test_real_series_stand_where_simpleitk_puts_them(folders: tuple[str, ...], shape: tuple[int, int, int]) -> None:
    paths = real(*folders)

    volume = volumes.load(volumes.read(paths))

    assert volume.grid.shape == shape
    theirs = read_series(paths)
    corner = theirs.TransformPhysicalPointToContinuousIndex(volume.grid.points_mm(np.zeros(3)).tolist())
    assert np.allclose(corner, [0, 0, shape[0] - 1], atol=1e-3)
    assert np.array_equal(SimpleITK.GetArrayViewFromImage(theirs)[::-1], volume.voxels)


@data
def test_a_real_tilted_gantry_is_refused_with_its_angle() -> None:
    with pytest.raises(InconsistentGeometryError, match=r"sheared \(gantry tilt\).*18\.50 degrees"):
        describe(volumes.read_headers(real("ct-gantry-tilt")))


@data
def test_a_real_dynamic_in_one_series_is_three_volumes_in_order_of_time() -> None:
    datasets = volumes.read_headers(real("mr-dynamic-one-series"))

    described = [volume for volume, _ in volumes.describe(datasets, last_received_at=WHEN).volumes]

    assert [(v.volume_number, v.volumes_in_series, v.phase_index, v.phases) for v in described] == [
        (n, 3, n, 3) for n in range(3)
    ]
    assert {v.shape for v in described} == {(3, 192, 152)}
    assert {tuple(v.split_by) for v in described} == {("AcquisitionNumber",)}
    times = [v.phase_time_s or 0.0 for v in described]
    assert times[0] == 0
    assert times == sorted(times)


@data
def test_real_enhanced_mr_is_refused_by_name() -> None:
    paths = [path for path in real("mr-enhanced") if path.stat().st_size > 100_000]

    with pytest.raises(StudyError):
        describe(volumes.read_headers(paths))
