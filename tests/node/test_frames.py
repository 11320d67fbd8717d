"""Multi-frame instances read like the single-frame series that they hold."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import phantoms
import pytest
from counterparts import dciodvfy_errors
from hand_made import make_objects
from multi_frame import enhanced, item
from pydicom.uid import (
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    RLELossless,
)

from dicomnode import volumes
from dicomnode.errors import StudyError, UnsupportedImageError
from dicomnode.model import Member
from dicomnode.volumes.frames import frames_of

WHEN = datetime(2025, 1, 2, tzinfo=UTC)
CLASSES = {
    "CT": EnhancedCTImageStorage,
    "MR": EnhancedMRImageStorage,
    "PT": EnhancedPETImageStorage,
    "legacy CT": LegacyConvertedEnhancedCTImageStorage,
    "legacy MR": LegacyConvertedEnhancedMRImageStorage,
    "legacy PT": LegacyConvertedEnhancedPETImageStorage,
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_multi_frame_volume_is_the_single_frame_one(kind: str, compressed: bool, tmp_path: Path) -> None:
    series = phantoms.make_series(modality=kind[-2:], oblique=True)
    for n, dataset in enumerate(series):
        dataset.RescaleSlope, dataset.RescaleIntercept = (
            1 + n,
            0 if kind.endswith("PT") else -n,
        )  # of each frame its own
    instance = enhanced(series, CLASSES[kind], of_frame=[{}] * 20)
    if compressed:
        instance.compress(RLELossless)
    instance.save_as(tmp_path / "a.dcm", enforce_file_format=True)

    ((described, members),) = volumes.describe(
        volumes.read_headers([tmp_path / "a.dcm"]), last_received_at=WHEN
    ).volumes
    volume = volumes.load(volumes.read([tmp_path / "a.dcm"]))

    wanted = volumes.load(series)
    assert np.allclose(volume.grid.affine, wanted.grid.affine)
    assert np.array_equal(volume.voxels, wanted.voxels)
    assert described.shape == (20, 48, 56)
    assert members == (Member(str(instance.SOPInstanceUID), tuple(range(1, 21))),)


def test_the_functional_groups_stand_in_the_header_under_their_single_frame_names() -> None:
    series = phantoms.make_series(modality="MR", header={"EchoTime": None, "FlipAngle": None})
    frame = {
        "MREchoSequence": [item(EffectiveEchoTime=4.6)],
        "MRTimingAndRelatedParametersSequence": [item(FlipAngle=12.0)],
        "MRImageFrameTypeSequence": [item(FrameType=["ORIGINAL", "PRIMARY", "M", "NONE"])],
    }
    instance = enhanced(series, EnhancedMRImageStorage, of_frame=[frame] * 20)

    ((described, _),) = volumes.describe(frames_of(instance), last_received_at=WHEN).volumes

    assert described.header["EchoTime"] == 4.6
    assert described.header["FlipAngle"] == 12.0
    assert described.header["ImageType"] == ["ORIGINAL", "PRIMARY", "M", "NONE"]


def test_the_phases_of_one_instance_are_volumes_of_their_frames(tmp_path: Path) -> None:
    phases = [phantoms.make_series(modality="MR", phase=phase) for phase in ("native", "arterial", "portal")]
    interleaved = [dataset for same_place in zip(*phases, strict=True) for dataset in same_place]
    groups = [
        {
            "FrameContentSequence": [
                item(TemporalPositionIndex=n % 3 + 1, FrameAcquisitionDateTime=f"2026030110153{3 * (n % 3)}")
            ]
        }
        for n in range(60)
    ]
    instance = enhanced(interleaved, EnhancedMRImageStorage, of_frame=groups)
    instance.save_as(tmp_path / "a.dcm", enforce_file_format=True)

    described = volumes.describe(volumes.read_headers([tmp_path / "a.dcm"]), last_received_at=WHEN).volumes

    assert [volume.split_by for volume, _ in described] == [{"TemporalPositionIndex": n} for n in (1, 2, 3)]
    assert [volume.phase_time_s for volume, _ in described] == [0, 3, 6]
    for phase, (_, (member,)) in zip(phases, described, strict=True):
        loaded = volumes.load(volumes.read([tmp_path / "a.dcm"], [member.frames]))
        assert np.array_equal(loaded.voxels, volumes.load(phase).voxels)


@pytest.mark.parametrize("count", ["19", "2147483647", ""])
def test_frames_that_do_not_match_their_groups_are_refused(count: str) -> None:
    instance = enhanced(phantoms.make_series(), EnhancedCTImageStorage, of_frame=[{}] * 20)
    instance.NumberOfFrames = count or None

    with pytest.raises(UnsupportedImageError, match=f"{count or 'no'} frames by Number of Frames and 20 by functional"):
        frames_of(instance)


def test_a_frame_that_is_not_there_is_refused(tmp_path: Path) -> None:
    instance = enhanced(phantoms.make_series(), EnhancedCTImageStorage, of_frame=[{}] * 20)
    instance.save_as(tmp_path / "a.dcm", enforce_file_format=True)

    with pytest.raises(UnsupportedImageError, match="has 20 frames, expected frame 21"):
        volumes.read([tmp_path / "a.dcm"], [(3, 21)])


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_no_irregularity() -> None:
    series = phantoms.make_series(spacing_mm=(0.625, 4.0, 4.0))
    exact = volumes.load(series).grid.affine
    for dataset in series:
        dataset.ImagePositionPatient = [round(float(value), 1) for value in dataset.ImagePositionPatient]

    grid = volumes.load(series).grid

    assert np.abs(grid.points_mm(np.array([19.0, 0, 0])) - (exact @ [19, 0, 0, 1])[:3]).max() <= 0.06


@pytest.mark.parametrize("size", [5.0, 0.625])
def test_a_slice_that_is_out_of_place_by_more_than_its_tolerance_is_refused(size: float) -> None:
    series = phantoms.make_series(spacing_mm=(size, 4.0, 4.0))
    series[7].ImagePositionPatient[2] += max(0.03 * size, 0.09)

    with pytest.raises(StudyError, match="slice spacing varies from"):
        volumes.describe(series, last_received_at=WHEN)


def test_a_strange_image_among_slices_is_left_out_and_named() -> None:
    series = phantoms.make_series()
    stray = copy.deepcopy(series[0])
    stray.ImageOrientationPatient, stray.SOPInstanceUID = [0, 1, 0, 0, 0, -1], "1.2.3"
    colour = copy.deepcopy(series[3])
    colour.PhotometricInterpretation, colour.SamplesPerPixel, colour.SOPInstanceUID = "RGB", 3, "1.2.4"

    described = volumes.describe([colour, *series, stray], last_received_at=WHEN)

    ((volume, members),) = described.volumes
    assert (volume.shape, len(members)) == ((20, 48, 56), 20)
    assert described.notes[0] == "left out: 1 images: RGB, expected monochrome"
    assert described.notes[1].startswith("left out: 1 images of one plane: ")


@pytest.mark.parametrize(
    ("second", "keyword"),
    [({"oblique": True}, "ImageOrientationPatient"), ({"spacing_mm": (5.0, 2.0, 2.0)}, "PixelSpacing")],
)
def test_two_planes_in_one_series_are_two_volumes_told_apart_by_what_differs(
    second: dict[str, Any], keyword: str
) -> None:
    axial, other = phantoms.make_series(), phantoms.make_series(**second)
    for dataset in other:
        dataset.SeriesInstanceUID = axial[0].SeriesInstanceUID

    described = volumes.describe([*axial, *other], last_received_at=WHEN)

    assert [tuple(volume.split_by) for volume, _ in described.volumes] == [(keyword,)] * 2
    assert [len(members) for _, members in described.volumes] == [20, 20]


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_objects_of_a_multi_frame_pair_are_those_of_the_single_frame_one(modality: str, tmp_path: Path) -> None:
    fixed, moving = phantoms.make_pair(modality=modality, shape=(6, 16, 20))
    whole = [enhanced(series, CLASSES[modality], of_frame=[{}] * 6) for series in (fixed, moving)]

    made = make_objects(*(frames_of(instance) for instance in whole), may_be_multi_frame=False)

    for (kind, ours), (_, single) in zip(made, make_objects(fixed, moving), strict=True):
        assert ours.SOPClassUID == single.SOPClassUID
        if kind == "series":
            assert ours.PixelData == single.PixelData
            assert ours.ImagePositionPatient == single.ImagePositionPatient
            (source,) = ours.SourceImageSequence
            assert source.ReferencedSOPInstanceUID == whole[1].SOPInstanceUID
            assert all(1 <= number <= 6 for number in np.atleast_1d(source.ReferencedFrameNumber))
            (listed, *_) = ours.ReferencedSeriesSequence[0].ReferencedInstanceSequence
            assert "ReferencedFrameNumber" not in listed
    paths = [tmp_path / f"{n}.dcm" for n in range(len(made))]
    for path, (_, dataset) in zip(paths, made, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    assert dciodvfy_errors(paths) == set()


def test_volumes_of_one_instance_give_objects_of_their_own() -> None:
    fixed, moving = phantoms.make_pair(modality="MR", shape=(6, 16, 20))
    groups = [{"FrameContentSequence": [item(TemporalPositionIndex=1 + n // 6)]} for n in range(12)]
    both = frames_of(enhanced([*fixed, *moving], EnhancedMRImageStorage, of_frame=groups))

    there = dict(make_objects(both[:6], both[6:]))
    back = dict(make_objects(both[6:], both[:6]))

    assert there["dsr"].SOPInstanceUID != back["dsr"].SOPInstanceUID
    (reference,) = there["dsr"].DeformableRegistrationSequence[0].ReferencedImageSequence
    assert reference.ReferencedFrameNumber == [7, 8, 9, 10, 11, 12]
