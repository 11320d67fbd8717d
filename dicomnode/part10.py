"""The head of a DICOM file (PS3.10 7.1): which instance it holds, in which encoding, and where its data set begins.

Law: the data set itself is not looked at; it goes to the archive as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from pydicom.config import disable_value_validation
from pydicom.filereader import read_dataset

LONGEST_HEAD_BYTES = 65536


class NotDicomError(Exception):
    """What was brought is no DICOM file; the text quotes nothing of it."""


@dataclass(frozen=True)
class FileHead:
    """What a file says of the instance it holds; `size_bytes` is where its data set begins."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    size_bytes: int


def read_head(file: BinaryIO) -> FileHead:
    """Read preamble and file meta information; the file is left anywhere.

    Raises
    ------
    NotDicomError
        No DICM at byte 128, or one of the three UIDs is missing.
    """
    if file.read(132)[128:] != b"DICM":
        raise NotDicomError("no DICM at byte 128, so it is no DICOM file")
    try:
        with disable_value_validation():
            meta = read_dataset(
                file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, _vr, _length: tag.group != 2
            )
            head = FileHead(
                str(meta.get("MediaStorageSOPClassUID") or ""),
                str(meta.get("MediaStorageSOPInstanceUID") or ""),
                str(meta.get("TransferSyntaxUID") or ""),
                size_bytes=file.tell(),
            )
    except Exception as error:  # whatever a parser raises on hostile bytes
        raise NotDicomError(f"its file meta information cannot be read: {type(error).__name__}") from None
    if not (head.sop_class_uid and head.sop_instance_uid and head.transfer_syntax_uid):
        raise NotDicomError("its file meta information lacks SOP Class, SOP Instance or Transfer Syntax UID")
    return head
