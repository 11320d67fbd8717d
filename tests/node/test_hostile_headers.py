"""Stored bytes are hostile: whatever stands in them, a series becomes volumes or a StudyError, soon and in bounds."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from io import BytesIO
from pathlib import Path

import phantoms
import pytest
from multi_frame import enhanced
from pydicom import Dataset, config, dcmread
from pydicom.uid import EnhancedMRImageStorage, RLELossless

from dicomnode import volumes
from dicomnode.errors import StudyError

WHEN = datetime(2025, 1, 2, tzinfo=UTC)
MUTANTS = int(os.environ.get("HOSTILE_MUTANTS", "20"))
"""Of each kind; a long run takes thousands."""
SLOW_S = 20.0
VALUES: tuple[object, ...] = (
    "", None, "x", "\0", "nan", "inf", "-1", "0", "1e308", "99999999999999999999", "2147483647", "\\\\\\", "½",
    "../../etc/passwd", [1, 2], ["1", "x", ""], -5, 65535, 1e-300, "1.2.3", "20261332", "M" * 70000,
)  # fmt: skip
KEYWORDS = (
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "PixelPaddingRangeLimit", "InstanceNumber", "EchoTime",
    "AcquisitionNumber", "AcquisitionTime", "AcquisitionDateTime", "TriggerTime", "TemporalPositionIdentifier",
    "NumberOfTemporalPositions", "ImagesInAcquisition", "NumberOfSlices", "ImageType", "SOPClassUID",
    "SOPInstanceUID", "SeriesInstanceUID", "Modality", "PatientID", "SpecificCharacterSet", "StackID", "PixelData",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ConcatenationUID", "BurnedInAnnotation",
)  # fmt: skip


@cache
def originals(kind: str) -> tuple[bytes, ...]:
    """The files of a small series."""
    series = phantoms.make_series(modality="MR", shape=(4, 12, 10))
    if kind == "enhanced":
        series = [enhanced(series, EnhancedMRImageStorage, of_frame=[{}] * 4)]
    if kind == "compressed":
        for dataset in series:
            dataset.compress(RLELossless)
    return tuple(_bytes(dataset) for dataset in series)


def _bytes(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def digest(paths: Sequence[Path]) -> str:
    """What the node would do with these files; any error but a StudyError passes through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in the node, where they are no errors
        try:
            headers = volumes.read_headers(paths)
            volumes.promises(headers)
            described = volumes.describe(headers, last_received_at=WHEN)
            members = described.volumes[0][1]
            by_uid = {str(dataset.SOPInstanceUID): path for path, dataset in zip(paths, headers, strict=False)}
            chosen = [by_uid.get(each.sop_instance_uid, paths[0]) for each in members]
            volumes.load(volumes.read(chosen, [each.frames for each in members]))
        except StudyError as error:
            return str(error)
    return ""


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 8, 40))):
        changed[rng.randrange(132, len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def spliced(content: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(132, len(content)), rng.randrange(200)
    return content[:at] + rng.randbytes(rng.randrange(64)) + content[at + length :]


@pytest.mark.parametrize("kind", ["single", "enhanced", "compressed"])
@pytest.mark.parametrize("mutate", [flipped, cut, spliced])
def test_mutated_bytes_are_read_or_refused(
    kind: str, mutate: Callable[[bytes, random.Random], bytes], tmp_path: Path
) -> None:
    rng = random.Random(f"{kind} {mutate.__name__}")
    contents = originals(kind)
    for n in range(MUTANTS):
        paths = []
        victim = rng.randrange(len(contents))
        for k, content in enumerate(contents):
            path = tmp_path / f"{n}-{k}.dcm"
            path.write_bytes(mutate(content, rng) if k == victim else content)
            paths.append(path)
        started = time.process_time()

        said = digest(paths)

        assert time.process_time() - started < SLOW_S
        assert "PHANTOM" not in said


@pytest.mark.parametrize("kind", ["single", "enhanced"])
def test_absurd_values_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    paths = [tmp_path / f"{k}.dcm" for k in range(len(originals(kind)))]
    for path, content in zip(paths, originals(kind), strict=True):
        path.write_bytes(content)
    written = 0
    with config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4 * MUTANTS):
            dataset = dcmread(BytesIO(originals(kind)[0]))
            for keyword in rng.sample(KEYWORDS, rng.choice((1, 2, 3))):
                try:
                    setattr(dataset, keyword, rng.choice(VALUES))
                    content = _bytes(dataset)
                except Exception:  # noqa: S112 - what pydicom itself cannot write, nobody sends with it
                    continue
                paths[0].write_bytes(content)
                written += 1

                assert "PHANTOM" not in digest(paths)
    assert written > 2 * MUTANTS


@pytest.mark.parametrize("kind", ["single", "enhanced"])
def test_an_identifier_of_several_values_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    dataset = dcmread(BytesIO(originals(kind)[0]))
    dataset.SOPClassUID = [dataset.SOPClassUID, "1.2"]
    path = tmp_path / "one.dcm"
    path.write_bytes(_bytes(dataset))

    assert digest([path])
