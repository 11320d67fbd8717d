"""What the headers of a series promise: how many instances there should be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pydicom import Dataset
from pydicom.config import disable_value_validation

from dicomnode.model import Promise
from dicomnode.volumes.frames import Frame
from dicomnode.volumes.reading import text


def promises(datasets: Sequence[Dataset]) -> list[Promise]:
    """Every count that headers carry, with what is there of it.

    Images in Acquisition (0020,1002) for each acquisition; Number of Temporal Positions × slice positions; of PET
    Number of Slices × Number of Time Slices × Time Slots × R-R Intervals; of a concatenation its parts; Number of
    Series Related Instances. Frames of multi-frame instances are not counted: an instance has all of its own.
    """
    with disable_value_validation():
        instances = list({text(dataset, "SOPInstanceUID"): dataset for dataset in datasets}.values())
        single = [dataset for dataset in instances if not isinstance(dataset, Frame)]
        found = [*_acquisitions(single), *_concatenations(instances)]
        places = {text(dataset, "ImagePositionPatient") for dataset in single}
        times = _count(single, "NumberOfTemporalPositions")
        if times > 1 and "" not in places:
            found.append(Promise(f"NumberOfTemporalPositions {times}", times * len(places), len(single)))
        if slices := _count(single, "NumberOfSlices"):
            parts = ("NumberOfTimeSlices", "NumberOfTimeSlots", "NumberOfRRIntervals")
            several = [n for keyword in parts if (n := _count(single, keyword)) > 1]
            for n in several:
                slices *= n
            found.append(Promise("NumberOfSlices" if not several else "NumberOfSlices × times", slices, len(single)))
        if related := _count(instances, "NumberOfSeriesRelatedInstances"):
            found.append(Promise("NumberOfSeriesRelatedInstances", related, len(instances)))
        return found


def _acquisitions(single: Sequence[Dataset]) -> list[Promise]:
    acquisitions: dict[str, list[Dataset]] = defaultdict(list)
    for dataset in single:
        acquisitions[text(dataset, "AcquisitionNumber")].append(dataset)
    return [
        Promise(f"ImagesInAcquisition of acquisition {number or 'without number'}", promised, len(several))
        for number, several in acquisitions.items()
        if (promised := _count(several, "ImagesInAcquisition"))
    ]


def _concatenations(instances: Sequence[Dataset]) -> list[Promise]:
    parts: dict[str, list[Dataset]] = defaultdict(list)
    for dataset in instances:
        if uid := text(dataset, "ConcatenationUID"):
            parts[uid].append(dataset)
    return [
        Promise(f"InConcatenationTotalNumber of {uid}", promised, len(several))
        for uid, several in parts.items()
        if (promised := _count(several, "InConcatenationTotalNumber"))
    ]


def _count(datasets: Sequence[Dataset], keyword: str) -> int:
    """The largest count that they carry, 0 where none carries one."""
    found = [text(dataset, keyword).strip() for dataset in datasets]
    return max((int(value) for value in found if value.isdecimal() and len(value) < 10), default=0)
