"""The counts that headers promise, by table: what each cue says there should be, and what is there of it."""

from __future__ import annotations

from typing import Any

import phantoms
import pytest
from multi_frame import enhanced
from pydicom.uid import EnhancedMRImageStorage

from dicomnode.model import Promise
from dicomnode.volumes import promises
from dicomnode.volumes.frames import frames_of

SLICES = 4


def stack(modality: str = "MR", **header: Any) -> list[Any]:
    return phantoms.make_series(modality=modality, shape=(SLICES, 8, 8), spacing_mm=(5.0, 4.0, 4.0), header=header)


def two_acquisitions() -> list[Any]:
    several = stack(ImagesInAcquisition=5, AcquisitionNumber=1)
    for dataset in several[2:]:
        dataset.AcquisitionNumber, dataset.ImagesInAcquisition = 2, 2
    return several


def first_part() -> list[Any]:
    made = enhanced(stack()[:2], EnhancedMRImageStorage, of_frame=[{}, {}])
    made.ConcatenationUID, made.InConcatenationTotalNumber = "1.2.3", 3
    return frames_of(made)


TABLE: dict[str, tuple[list[Any], list[Promise]]] = {
    "nothing": (stack(), []),
    "each acquisition its own": (
        two_acquisitions(),
        [
            Promise("ImagesInAcquisition of acquisition 1", 5, 2),
            Promise("ImagesInAcquisition of acquisition 2", 2, 2),
        ],
    ),
    "times in every place": (stack(NumberOfTemporalPositions=3), [Promise("NumberOfTemporalPositions 3", 12, 4)]),
    "one time": (stack(NumberOfTemporalPositions=1), []),
    "PET": (stack("PT", NumberOfSlices=6), [Promise("NumberOfSlices", 6, 4)]),
    "dynamic PET": (
        stack("PT", NumberOfSlices=4, NumberOfTimeSlices=5),
        [Promise("NumberOfSlices × times", 20, 4)],
    ),
    "gated PET": (
        stack("PT", NumberOfSlices=4, NumberOfTimeSlots=8, NumberOfRRIntervals=2),
        [Promise("NumberOfSlices × times", 64, 4)],
    ),
    "the whole series": (
        stack(NumberOfSeriesRelatedInstances=9),
        [Promise("NumberOfSeriesRelatedInstances", 9, 4)],
    ),
    "parts of one instance": (first_part(), [Promise("InConcatenationTotalNumber of 1.2.3", 3, 1)]),
    "no number": (stack(ImagesInAcquisition=0, NumberOfTemporalPositions=0), []),
}


@pytest.mark.parametrize("what", TABLE)
def test_what_headers_promise_is_told_with_what_came_of_it(what: str) -> None:
    datasets, expected = TABLE[what]

    assert promises(datasets) == expected
    assert promises([*datasets, datasets[0]]) == expected  # the same instance twice is one
