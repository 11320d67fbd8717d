"""The head of a DICOM file (PS3.10 7.1): which instance it holds, in which encoding, and where its data set begins;
anybody's to be read, and our own.

Law: the data set itself is not looked at; it goes to the archive as it stands.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from pydicom.config import disable_value_validation
from pydicom.filereader import read_dataset

IMPLEMENTATION_CLASS_UID = "2.25.230217732564501373792718796497012300702"
IMPLEMENTATION_VERSION_NAME = "DICOMNODE_0.1"
"""Who wrote a file and who speaks in an association (PS3.7 D.3.3.2); at most 16 characters."""

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


def own_head(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Preamble, prefix and file meta information, PS3.10 7.1; always Explicit VR Little Endian.

    Built by hand because the UIDs are as the sender wrote them, conformant or not.
    """
    elements = b"".join(
        (
            struct.pack("<HH2sHL", 0x0002, 0x0001, b"OB", 0, 2) + b"\x00\x01",
            _text_element(0x0002, b"UI", sop_class_uid),
            _text_element(0x0003, b"UI", sop_instance_uid),
            _text_element(0x0010, b"UI", transfer_syntax_uid),
            _text_element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID),
            _text_element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME),
        )
    )
    group_length = struct.pack("<HH2sHL", 0x0002, 0x0000, b"UL", 4, len(elements))
    return bytes(128) + b"DICM" + group_length + elements


def read_own_head(file: BinaryIO) -> dict[int, str]:
    """The texts of a head that `own_head` wrote, by element number; begins after its preamble, ends at the data set."""
    head = file.read(16)
    (length,) = struct.unpack_from("<L", head, 12)
    content = file.read(length)
    texts = {}
    at = 14  # after (0002,0001), which is no text
    while at < len(content):
        element, size = struct.unpack_from("<xxHxxH", content, at)
        texts[element] = content[at + 8 : at + 8 + size].decode().rstrip("\0 ")
        at += 8 + size
    return texts


def _text_element(element: int, vr: bytes, text: str) -> bytes:
    value = text.encode()
    if len(value) % 2:
        value += b"\x00" if vr == b"UI" else b" "
    return struct.pack("<HH2sH", 0x0002, element, vr, len(value)) + value
