"""Single-frame series made into one multi-frame instance, for tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pydicom import Dataset
from pydicom.dataset import FileDataset
from pydicom.uid import UID


def item(**elements: Any) -> Dataset:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def enhanced(series: Sequence[FileDataset], sop_class: UID, *, of_frame: Sequence[dict[str, Any]]) -> FileDataset:
    """One multi-frame instance of a single-frame series; `of_frame` adds functional groups frame by frame."""
    made = copy.deepcopy(series[0])
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = sop_class
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope",
                    "RescaleIntercept", "InstanceNumber", "AcquisitionNumber", "SliceThickness"):  # fmt: skip
        if keyword in made:
            delattr(made, keyword)
    made.NumberOfFrames = len(series)
    first = series[0]
    made.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=first.PixelSpacing, SliceThickness=5)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=first.ImageOrientationPatient)],
        )
    ]
    made.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=dataset.ImagePositionPatient)],
            PixelValueTransformationSequence=[
                item(RescaleSlope=dataset.get("RescaleSlope", 1), RescaleIntercept=dataset.get("RescaleIntercept", 0))
            ],
            **more,
        )
        for dataset, more in zip(series, of_frame, strict=True)
    ]
    made.PixelData = b"".join(dataset.PixelData for dataset in series)
    return made
