"""Series as scanners and archives send them, written where no real file is to be had: what is understood, what is not.

Each holds several volumes that one element or more tell apart, or is refused with the reason; none is guessed.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import phantoms
import pytest
from multi_frame import enhanced, item
from pydicom import Dataset
from pydicom.uid import (
    EncapsulatedPDFStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    RTDoseStorage,
    RTStructureSetStorage,
    SegmentationStorage,
    UltrasoundMultiFrameImageStorage,
    XRay3DAngiographicImageStorage,
)

from dicomnode import volumes
from dicomnode.errors import StudyError, UnsupportedImageError
from dicomnode.volumes.frames import Frame, frames_of

WHEN = datetime(2026, 1, 2, tzinfo=UTC)
SLICES = 4


def stack(modality: str = "MR", slices: int = SLICES, **more: Any) -> list[Any]:
    return phantoms.make_series(modality=modality, shape=(slices, 8, 8), spacing_mm=(5.0, 4.0, 4.0), **more)


def repeated(times: int, change: Callable[[Dataset, int, int], None], *, modality: str = "MR") -> list[Any]:
    """One single-frame series of `times` volumes in one place; `change(dataset, time, slice)`."""
    found = []
    for t in range(times):
        for k, dataset in enumerate(copy.deepcopy(stack(modality))):
            dataset.SOPInstanceUID = phantoms.make_uid("repeated", t, k)
            dataset.InstanceNumber = t * SLICES + k + 1
            dataset.AcquisitionTime = dataset.ContentTime = dataset.SeriesTime = "100000"
            change(dataset, t, k)
            found.append(dataset)
    return found


def setting(**values: Sequence[Any]) -> Callable[[Dataset, int, int], None]:
    """Each keyword's value by time."""

    def change(dataset: Dataset, t: int, _k: int) -> None:
        for keyword, by_time in values.items():
            setattr(dataset, keyword, by_time[t])

    return change


def multi_frame(groups: Sequence[dict[str, Any]], sop_class: Any = EnhancedMRImageStorage) -> list[Any]:
    """One multi-frame instance of as many volumes as there are groups, and its frames."""
    modality = "CT" if sop_class == EnhancedCTImageStorage else "MR"
    slices = [dataset for _ in groups for dataset in stack(modality)]
    made = enhanced(slices, sop_class, of_frame=[group for group in groups for _ in range(SLICES)])
    made.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]  # as every instance has, and each frame its own
    made.AcquisitionDateTime = "20260102100000"
    return frames_of(made)


def one_instance_per_time(frame_times: bool) -> list[Any]:
    found = []
    for t in range(3):
        content = [
            item(StackID="1", **({"FrameAcquisitionDateTime": f"2026010210{t:02}{k:02}"} if frame_times else {}))
            for k in range(SLICES)
        ]
        made = enhanced(stack(), EnhancedMRImageStorage, of_frame=[{"FrameContentSequence": [c]} for c in content])
        made.SOPInstanceUID, made.AcquisitionDateTime = phantoms.make_uid("xa", t), f"2026010210{t:02}00"
        found += frames_of(made)
    return found


def b_value(tag: int, creator: str, values: Sequence[Any], vr: str = "UN") -> Callable[[Dataset, int, int], None]:
    def change(dataset: Dataset, t: int, _k: int) -> None:
        dataset.add_new((tag >> 16 << 16) | 0x10, "LO", creator)
        dataset.add_new(tag, vr, values[t])

    return change


def frame_kind(part: str, echo: float, time: int) -> dict[str, Any]:
    return {
        "MRImageFrameTypeSequence": [item(FrameType=["ORIGINAL", "PRIMARY", part, "NONE"])],
        "MREchoSequence": [item(EffectiveEchoTime=echo)],
        "FrameContentSequence": [item(TemporalPositionIndex=time, StackID="1")],
    }


def two_stacks() -> list[Any]:
    slices = stack() + stack(oblique=True)
    of_frame = [{"PlaneOrientationSequence": [item(ImageOrientationPatient=s.ImageOrientationPatient)]} for s in slices]
    made = enhanced(slices, EnhancedMRImageStorage, of_frame=of_frame)
    del made.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    return frames_of(made)


def concatenation() -> list[Any]:
    found = []
    for part in range(2):
        half = stack()[2 * part : 2 * part + 2]
        made = enhanced(half, EnhancedMRImageStorage, of_frame=[{}] * 2)
        made.SOPInstanceUID, made.ConcatenationUID = phantoms.make_uid("part", part), "1.2.3"
        found += frames_of(made)
    return found


SEVERAL: dict[str, tuple[list[Any], tuple[str, ...], int, int]] = {
    # what: (frames or slices, what tells the volumes apart, how many, phases of each)
    "Siemens XA, one instance per time, each frame its own time": (
        one_instance_per_time(True), ("AcquisitionDateTime",), 3, 3,
    ),
    "Siemens XA, one instance per time": (one_instance_per_time(False), ("AcquisitionDateTime",), 3, 3),
    "GE, two stacks in one instance": (two_stacks(), ("ImageOrientationPatient",), 2, 1),
    "Philips, parts, echoes and times": (
        multi_frame([frame_kind(part, echo, t) for t in (1, 2, 3) for echo in (2.3, 4.6) for part in "MP"]),
        ("ImageType", "EchoTime", "TemporalPositionIndex"), 12, 3,
    ),
    "CT by respiratory phase": (
        multi_frame(
            [{"RespiratorySynchronizationSequence": [item(NominalPercentageOfRespiratoryPhase=25.0 * n)]}
             for n in range(4)], EnhancedCTImageStorage,
        ),
        ("NominalPercentageOfRespiratoryPhase",), 4, 4,
    ),
    "label and control": (
        multi_frame([{"MRArterialSpinLabelingSequence": [item(ASLContext=c)]} for c in ("LABEL", "CONTROL")]),
        ("ASLContext",), 2, 1,
    ),
    "flow directions": (
        multi_frame([{"MRVelocityEncodingSequence": [item(VelocityEncodingDirection=d)]}
                     for d in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0])]),
        ("VelocityEncodingDirection",), 3, 1,
    ),
    "an instance in two parts": (concatenation(), (), 1, 1),
    "CT at two voltages": (repeated(2, setting(KVP=(80, 140)), modality="CT"), ("KVP",), 2, 1),
    "PET in two units": (repeated(2, setting(Units=("BQML", "GML")), modality="PT"), ("Units",), 2, 1),
    "gated PET": (repeated(4, setting(TriggerTime=(0, 200, 400, 600)), modality="PT"), ("TriggerTime",), 4, 4),
    "dynamic PET": (
        repeated(3, setting(FrameReferenceTime=(15e3, 45e3, 75e3)), modality="PT"), ("FrameReferenceTime",), 3, 3,
    ),
    "a trigger time of its own in every slice": (
        repeated(3, lambda d, t, k: setattr(d, "TriggerTime", 40.0 * t + 3 * k)), ("TriggerTime",), 3, 3,
    ),
    "Siemens b-values that an archive made unknown": (
        repeated(2, b_value(0x0019100C, "SIEMENS MR HEADER", (b"0 ", b"1000"))), ("DiffusionBValue",), 2, 1,
    ),
    "Philips b-values that an archive made unknown": (
        repeated(2, b_value(0x20011003, "Philips Imaging DD 001", [struct.pack("<f", b) for b in (0.0, 800.0)])),
        ("DiffusionBValue",), 2, 1,
    ),
    "GE b-values": (
        repeated(2, b_value(0x00431039, "GEMS_PARM_01", ([1000000050, 8], [1000001000, 8]), "IS")),
        ("DiffusionBValue",), 2, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SEVERAL)
def test_the_volumes_of_one_series_are_told_apart_by_what_makes_them_differ(what: str, tmp_path: Path) -> None:
    datasets, keys, count, phases = SEVERAL[what]
    if not isinstance(datasets[0], Frame):  # what is unknown becomes known, if at all, when it is read
        datasets = volumes.read_headers(phantoms.write_series(datasets, tmp_path))

    described = volumes.describe(datasets, last_received_at=WHEN)

    assert [tuple(volume.split_by) for volume, _ in described.volumes] == [keys] * count
    assert {volume.phases for volume, _ in described.volumes} == {phases}
    assert described.notes == ()


def test_the_flags_that_ge_adds_are_no_part_of_a_b_value() -> None:
    datasets = SEVERAL["GE b-values"][0]

    described = volumes.describe(datasets, last_received_at=WHEN)

    assert [volume.split_by["DiffusionBValue"] for volume, _ in described.volumes] == [50, 1000]


def test_each_frame_keeps_its_own_values_beside_those_of_the_instance() -> None:
    frames = SEVERAL["Philips, parts, echoes and times"][0]

    assert [(f.ImageType[2], float(f.EchoTime), f.AcquisitionDateTime) for f in frames[:: 3 * SLICES]] == [
        ("M", 2.3, "20260102100000"), ("P", 4.6, "20260102100000"),
        ("M", 4.6, "20260102100000"), ("P", 2.3, "20260102100000"),
    ]  # fmt: skip


def of_class(uid: Any, modality: str) -> list[Any]:
    (dataset,) = stack(slices=1)
    dataset.SOPClassUID, dataset.Modality, dataset.NumberOfFrames = uid, modality, 3
    return [dataset]


def without(*keywords: str, modality: str = "MR") -> list[Any]:
    datasets = stack(modality)
    for dataset in datasets:
        for keyword in keywords:
            delattr(dataset, keyword)
    return datasets


def radial() -> list[Any]:
    datasets = stack()
    for n, dataset in enumerate(datasets):
        angle = np.pi * n / len(datasets)
        dataset.ImageOrientationPatient = [float(np.cos(angle)), float(np.sin(angle)), 0, 0, 0, -1]
    return datasets


def with_commas() -> list[Any]:
    datasets = stack()
    for dataset in datasets:
        dataset.add_new(0x00200032, "LO", "1,5\\2,5\\3,5")
    return datasets


def mixed(keyword: str, value: str) -> list[Any]:
    datasets = stack()
    setattr(datasets[2], keyword, value)
    return datasets


REFUSED: dict[str, tuple[list[Any], str]] = {
    "ultrasound": (of_class(UltrasoundMultiFrameImageStorage, "US"), "Ultrasound Multi-frame Image Storage, expected"),
    "dose": (of_class(RTDoseStorage, "RTDOSE"), "RT Dose Storage, expected CT, MR or PET"),
    "contours": (of_class(RTStructureSetStorage, "RTSTRUCT"), "no image: carried along where a rule's outputs ask for"),
    "segments": (of_class(SegmentationStorage, "SEG"), "no image: carried along where a rule's outputs ask for"),
    "document": (of_class(EncapsulatedPDFStorage, "DOC"), "Encapsulated PDF Storage, expected CT, MR or PET"),
    "cone beam": (of_class(XRay3DAngiographicImageStorage, "XA"), "X-Ray 3D Angiographic Image Storage, expected"),
    "planes around an axis": (radial(), "slices point in different directions: cosines differ by"),
    "the same images under new names": (
        repeated(2, lambda d, _t, k: setattr(d, "InstanceNumber", k + 1)),
        "4 of 8 slices lie where another lies, expected one per place, and no element tells them apart",
    ),
    "a dynamic that was cut off": (
        repeated(3, setting(TemporalPositionIdentifier=(1, 2, 3)))[:-1],
        "TemporalPositionIdentifier comes nearest: 2 of its 3 values have 4 slices; 3 has 3",
    ),
    "one image per moment": (
        [d for d in repeated(3, setting(AcquisitionTime=("100000", "100001", "100002"))) if d.InstanceNumber % 4 == 1],
        "3 images of one place, told apart by AcquisitionDateTime, expected at least 2 slices of each",
    ),
    "a derived CT without geometry": (
        without("ImagePositionPatient", "ImageOrientationPatient", modality="CT"), "ImagePositionPatient is absent",
    ),
    "pixels of unknown size": (without("PixelSpacing", modality="CT"), "PixelSpacing is absent, expected 2 finite"),
    "decimal commas": (with_commas(), "ImagePositionPatient is ['1,5', '2,5', '3,5'], expected 3 finite numbers"),
    "two Frames of Reference": (mixed("FrameOfReferenceUID", "1.2.3"), "FrameOfReferenceUID is"),
    "two patients": (mixed("PatientID", "SOMEBODY"), "PatientID is of 2 kinds; expected one value"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_understood_is_refused_with_the_reason(what: str) -> None:
    datasets, reason = REFUSED[what]

    with pytest.raises(StudyError) as caught:
        volumes.describe(datasets, last_received_at=WHEN)

    assert reason in str(caught.value)
    assert "SOMEBODY" not in str(caught.value)


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("Columns", 7, "128 bytes of Pixel Data, expected 112 for 1 × 8 × 7 pixels of 16 bits"),
        ("Rows", 9, "128 bytes of Pixel Data, expected 144 for 1 × 9 × 8 pixels of 16 bits"),
        ("PixelData", b"", "0 bytes of Pixel Data, expected 128"),
        ("PixelData", None, "0 bytes of Pixel Data, expected 128"),
    ],
)
def test_pixels_of_another_size_than_the_header_s_are_refused_with_both(keyword: str, value: Any, reason: str) -> None:
    datasets = stack()
    for dataset in datasets:
        setattr(dataset, keyword, value)

    with pytest.raises(UnsupportedImageError) as caught:
        volumes.load(datasets)

    assert reason in str(caught.value)


def test_what_a_vendor_wrote_for_itself_costs_neither_the_series_nor_memory(tmp_path: Path) -> None:
    datasets = stack()
    for dataset in datasets:
        dataset.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
        dataset.add_new(0x00291010, "OB", bytes(100_000))
        dataset.add_new(0x00291020, "SQ", [item(PatientComments="x" * 1000)])
        dataset.add_new(0x00291030, "LO", "kept")
        dataset.add_new(0x00291040, "LO", "12345")
    paths = phantoms.write_series(datasets, tmp_path)
    for path in paths:  # a number of five bytes
        path.write_bytes(path.read_bytes().replace(b"\x29\x00\x40\x10LO", b"\x29\x00\x40\x10FD"))

    read = volumes.read(paths)

    assert np.array_equal(volumes.load(read).voxels, volumes.load(datasets).voxels)
    for dataset in read:
        assert [hex(each.tag.element) for each in dataset if each.tag.is_private] == ["0x10", "0x1030"]


def test_the_private_scale_of_philips_changes_no_value() -> None:
    plain, scaled = stack(), stack()
    for n, dataset in enumerate(scaled):
        dataset.add_new(0x20050010, "LO", "Philips MR Imaging DD 001")
        dataset.add_new(0x2005100E, "FL", 0.001 * (n + 1))

    assert np.array_equal(volumes.load(scaled).voxels, volumes.load(plain).voxels)


@pytest.mark.parametrize(
    ("charset", "text", "name"),
    [
        (["", "ISO 2022 IR 87"], "造影 動脈相", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("GB18030", "增强 动脉期", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 100", "artérielle", "Müller^Jörg"),
    ],
)
def test_descriptions_are_read_in_the_character_set_of_the_instance(
    tmp_path: Path, charset: Any, text: str, name: str
) -> None:
    datasets = stack()
    for dataset in datasets:
        dataset.SpecificCharacterSet, dataset.SeriesDescription, dataset.PatientName = charset, text, name
    paths = phantoms.write_series(datasets, tmp_path)

    ((described, _),) = volumes.describe(volumes.read_headers(paths), last_received_at=WHEN).volumes

    assert described.header["SeriesDescription"] == text
