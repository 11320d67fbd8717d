"""The encoding in which an instance goes to a destination: its own, or a lossless change of it that the peer takes.

Law: what is compressed may be decompressed, with the same pixels under the same SOP Instance UID (PS3.5 8.2); nothing
is ever compressed, let alone with loss.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicomnode.errors import LocalError, RefusedError
from dicomnode.model import Instance
from dicomnode.scu import CONTEXTS_AT_MOST

Pair = tuple[str, str]
"""SOP class and transfer syntax."""


def wanted(instance: Instance) -> list[Pair]:
    """What to propose for an instance, the encoding it has first.

    Each is a presentation context of its own, so that the acceptor cannot choose a re-encoding for us. Implicit VR
    Little Endian is one that every acceptor must know (PS3.5 10.1).
    """
    if instance.transfer_syntax_uid == ExplicitVRBigEndian:
        return [(instance.sop_class_uid, ExplicitVRBigEndian)]  # retired; nothing here swaps the bytes of pixels
    syntaxes = (instance.transfer_syntax_uid, ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    return [(instance.sop_class_uid, syntax) for syntax in dict.fromkeys(map(str, syntaxes))]


def contexts(instances: Iterable[Instance]) -> list[Pair]:
    """What to propose for the first of `instances`, as many as fit into one association; the others are not in it."""
    found: dict[Pair, None] = {}
    for instance in instances:
        more = dict.fromkeys(wanted(instance))
        if len(found | more) <= CONTEXTS_AT_MOST:
            found |= more
    return list(found)


def choose(instance: Instance, accepted: Mapping[Pair, int]) -> str:
    """The transfer syntax to send it in.

    Raises
    ------
    RefusedError
        The peer takes it in none that we can make of it.
    """
    for pair in wanted(instance):
        if pair in accepted:
            return pair[1]
    name = UID(instance.transfer_syntax_uid).name
    raise RefusedError(f"it accepts no presentation context for {UID(instance.sop_class_uid).name} with {name}")


@contextmanager
def encoded(path: Path, instance: Instance, transfer_syntax_uid: str) -> Iterator[tuple[BinaryIO, int]]:
    """The data set in that transfer syntax, as a file at its beginning, and its size in bytes.

    Raises
    ------
    LocalError
        The file cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise LocalError(f"archive: cannot read the instance: {error}") from error
    with file:
        if transfer_syntax_uid == instance.transfer_syntax_uid:
            size = _at_data_set(file)
            yield file, size
        else:
            content = _changed(file, transfer_syntax_uid)
            yield BytesIO(content), len(content)


def _at_data_set(file: BinaryIO) -> int:
    """Go to where the data set begins, as the group length tells (PS3.10 7.1); its size."""
    try:
        head = file.read(144)
        if head[128:140] != b"DICM\x02\x00\x00\x00UL\x04\x00" or len(head) < 144:
            raise RefusedError("cannot be sent: its file here is damaged")
        start = 144 + int.from_bytes(head[140:], "little")
        size = file.seek(0, os.SEEK_END) - start
        file.seek(start)
    except OSError as error:
        raise LocalError(f"archive: cannot read the instance: {error}") from error
    if size <= 0:
        raise RefusedError("cannot be sent: its file here is damaged")
    return size


def _changed(file: BinaryIO, transfer_syntax_uid: str) -> bytes:
    dataset = pydicom.dcmread(file)
    own = dataset.file_meta.TransferSyntaxUID
    if own.is_encapsulated:
        try:
            dataset.decompress(as_rgb=False, generate_instance_uid=False)
        except Exception as error:  # whatever a codec raises on what it does not know
            raise RefusedError(
                f"{own.name} is not accepted, and cannot be decompressed: {type(error).__name__}"
            ) from error
    return encode(dataset, transfer_syntax_uid)


def encode(dataset: Dataset, transfer_syntax_uid: str) -> bytes:
    """A data set's bytes."""
    syntax, buffer = UID(transfer_syntax_uid), DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = syntax.is_little_endian, syntax.is_implicit_VR
    write_dataset(buffer, dataset)
    content: bytes = buffer.getvalue()
    return content
