"""A multi-frame instance → one dataset per frame that reads like a single-frame image.

Law: PS3.3 C.7.6.16. What stands in the shared and the frame's own functional groups is laid over the top level under
the names that single-frame images use; nothing else is invented. Legacy Converted objects carry the attributes they
were converted from in "unassigned" groups, laid over likewise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)

from dicomnode.errors import UnsupportedImageError

MAX_FRAMES = 50_000
SINGLE_FRAME_CLASS = {
    EnhancedCTImageStorage: CTImageStorage,
    LegacyConvertedEnhancedCTImageStorage: CTImageStorage,
    EnhancedMRImageStorage: MRImageStorage,
    LegacyConvertedEnhancedMRImageStorage: MRImageStorage,
    EnhancedPETImageStorage: PositronEmissionTomographyImageStorage,
    LegacyConvertedEnhancedPETImageStorage: PositronEmissionTomographyImageStorage,
}
"""The multi-frame classes that are read, and the class whose attributes their frames have."""

_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_LEFT_BEHIND = {*_GROUPS, "PixelData", "NumberOfFrames"}
_NOT_FLAT = {"RealWorldValueMappingSequence", "ReferencedImageSequence", "DerivationImageSequence"}
# PS3.3 C.8.13, C.8.15: the enhanced names of what single-frame images call otherwise
_SINGLE_FRAME_NAMES = {
    "EffectiveEchoTime": "EchoTime",
    "InversionTimes": "InversionTime",
    "FrameType": "ImageType",
    "FrameAcquisitionDateTime": "AcquisitionDateTime",
    "NominalCardiacTriggerDelayTime": "TriggerTime",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "FrameComments": "ImageComments",
}


class Frame(Dataset):
    """One frame of a multi-frame instance: header flat, pixels still in `parent`.

    Attributes
    ----------
    parent
        The instance.
    number
        1-based frame number.
    """

    parent: Dataset
    number: int


def frames_of(dataset: Dataset) -> list[Dataset]:
    """The frames of a multi-frame CT, MR or PET instance, or the dataset itself.

    Raises
    ------
    UnsupportedImageError
        Number of Frames and the functional groups disagree.
    """
    with disable_value_validation():
        if str(dataset.get("SOPClassUID")) not in SINGLE_FRAME_CLASS:  # hostile bytes may make it several values
            return [dataset]
        per_frame = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
        count = str(dataset.get("NumberOfFrames") or "")
        if count != str(len(per_frame)) or not 1 <= len(per_frame) <= MAX_FRAMES:
            raise UnsupportedImageError(
                f"Instance {shown_uid(dataset.get('SOPInstanceUID'))}: {count[:20] or 'no'} frames by Number of "
                f"Frames and {len(per_frame)} by functional groups, expected one count from 1 to {MAX_FRAMES}"
            )
        common = [element for element in dataset if element.keyword not in _LEFT_BEHIND]
        common += [element for item in shared[:1] for element in _flat(item)]
        return [_frame(dataset, number, common, item) for number, item in enumerate(per_frame, start=1)]


def shown_uid(uid: object) -> str:
    """A UID for a message; what cannot be one may hold anything, the patient's name too, and is not repeated."""
    return str(uid) if re.fullmatch(r"[0-9A-Za-z.]{1,64}", str(uid)) else "(malformed UID)"


def frame_number(dataset: Dataset) -> int:
    """The 1-based frame number of a frame, 0 of a single-frame instance."""
    return dataset.number if isinstance(dataset, Frame) else 0


def frame_count(dataset: Dataset) -> int:
    """How many frames the instance of a frame has, 1 of a single-frame instance."""
    return len(dataset.parent.PerFrameFunctionalGroupsSequence) if isinstance(dataset, Frame) else 1


def single_frame_class(dataset: Dataset) -> UID:
    """The SOP class whose attributes a slice has: its own, or of a frame its single-frame sibling."""
    sop_class = UID(str(dataset.get("SOPClassUID") or ""))
    return SINGLE_FRAME_CLASS.get(sop_class, sop_class)


def _frame(parent: Dataset, number: int, common: list[DataElement], own: Dataset) -> Frame:
    frame = Frame()
    frame.parent, frame.number = parent, number
    for element in (*common, *_flat(own)):
        frame[element.tag] = element
        single = _SINGLE_FRAME_NAMES.get(element.keyword)
        if single is not None and element.value not in (None, ""):
            # a new element: the one of that name may be the instance's own, which every frame shares
            tag = Tag(single)
            frame[tag] = DataElement(tag, dictionary_VR(tag), element.value)
    if hasattr(parent, "file_meta"):
        frame.file_meta = parent.file_meta
    return frame


def _flat(groups: Dataset) -> Iterator[DataElement]:
    """The elements of every functional group of one item, and of what stands within Echo, Diffusion and the like."""
    for element in groups:
        if element.VR != "SQ" or element.keyword in _NOT_FLAT or element.tag.is_private:
            continue
        for item in _items(element)[:1]:
            for inner in item:
                yield inner
                if inner.keyword == "DiffusionGradientDirectionSequence":
                    yield from (deepest for one in _items(inner)[:1] for deepest in one)


def _items(element: DataElement) -> list[Any]:
    return [item for item in element.value or [] if isinstance(item, Dataset)]
