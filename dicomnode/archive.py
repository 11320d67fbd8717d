"""Instance files: written to a temporary file, fsynced, renamed, folder fsynced; only then is an instance kept.

Law: a path is made from our own hash, never from the wire; a kept file is never altered; disk trouble leaves as
LocalError. The archive does not know what is indexed. A file that was kept but not indexed, because of a crash
between the two, is harmless: the sender still owns that instance, and the same content comes back to the same path.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomnode.errors import LocalError
from dicomnode.model import Instance

IMPLEMENTATION_CLASS_UID = "2.25.230217732564501373792718796497012300702"
IMPLEMENTATION_VERSION_NAME = "DICOMNODE_0.1"
"""Who wrote a file and who speaks in an association (PS3.7 D.3.3.2); at most 16 characters."""

_BUFFER_BYTES = 131072


class Archive:
    """The folder that holds every instance, received or made here.

    Parameters
    ----------
    root
        Made if it is not there; `incoming` (temporary files) and `instances` stand in it, so that a rename from one
        to the other never leaves the file system.

    Raises
    ------
    LocalError
        The folders cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._incoming = root / "incoming"
        instances = root / "instances"
        with _local_errors():
            self._incoming.mkdir(parents=True, exist_ok=True)
            # All 256 now: an instance is only as durable as the entry of the folder it stands in.
            for number in range(256):
                (instances / f"{number:02x}").mkdir(parents=True, exist_ok=True)
            _fsync_folder(instances)
            _fsync_folder(root)

    def sweep(self) -> int:
        """Remove the temporary files that a crash left behind; none of them was ever acknowledged.

        Files that a live process is writing are left alone. Returns how many were removed.
        """
        removed = 0
        with _local_errors():
            for path in self._incoming.iterdir():
                try:
                    with path.open("rb") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()
                        removed += 1
                except (BlockingIOError, FileNotFoundError):
                    continue  # being written, or kept meanwhile
        return removed

    def receive(self, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> Incoming:
        """Open a temporary file for one instance whose data set is about to come.

        Raises
        ------
        LocalError
            The disk is full or failing.
        """
        return Incoming(
            self._incoming,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
        )

    def keep(self, incoming: Incoming) -> Instance:
        """Make a received instance durable; it survives a power cut once this returns.

        Keeping equal content twice is the same as keeping it once.

        Raises
        ------
        LocalError
            The disk is full or failing; nothing was kept.
        """
        sha256 = incoming.sha256
        identity = (incoming.sop_instance_uid, incoming.sop_class_uid, incoming.transfer_syntax_uid, sha256)
        name = hashlib.sha256("\n".join(identity).encode()).hexdigest()
        path = f"instances/{name[:2]}/{name}.dcm"
        try:
            with _local_errors():
                size_bytes = incoming.sync()
                kept = self.root / path
                incoming.path.rename(kept)
                _fsync_folder(kept.parent)
        finally:
            incoming.discard()
        return Instance(
            sop_instance_uid=incoming.sop_instance_uid,
            sop_class_uid=incoming.sop_class_uid,
            transfer_syntax_uid=incoming.transfer_syntax_uid,
            path=path,
            sha256=sha256,
            size_bytes=size_bytes,
        )

    def keep_dataset(self, dataset: Dataset) -> Instance:
        """Encode and keep an instance that was made here.

        Parameters
        ----------
        dataset
            Complete, with `file_meta.TransferSyntaxUID` (not a deflated one). The rest of the file meta information
            is written anew.

        Raises
        ------
        LocalError
            The disk is full or failing; nothing was kept.
        """
        transfer_syntax_uid = dataset.file_meta.TransferSyntaxUID
        assert not transfer_syntax_uid.is_deflated, "the node makes no deflated instances"
        buffer = DicomBytesIO()
        buffer.is_little_endian = transfer_syntax_uid.is_little_endian
        buffer.is_implicit_VR = transfer_syntax_uid.is_implicit_VR
        write_dataset(buffer, dataset)
        incoming = self.receive(
            sop_class_uid=str(dataset.SOPClassUID),
            sop_instance_uid=str(dataset.SOPInstanceUID),
            transfer_syntax_uid=str(transfer_syntax_uid),
        )
        try:
            incoming.write(buffer.getvalue())
            return self.keep(incoming)
        finally:
            incoming.discard()

    def remove(self, instance: Instance) -> None:
        """Remove a kept file that no index entry names."""
        with _local_errors():
            self.path(instance).unlink(missing_ok=True)

    def path(self, instance: Instance) -> Path:
        """Where an instance's file stands."""
        return self.root / instance.path


class Incoming:
    """One instance on its way into the archive, in a temporary file; made by `Archive.receive`.

    The file meta information stands in it from the start; `write` takes the data set bytes as they come.
    """

    def __init__(self, folder: Path, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> None:
        self.sop_class_uid = sop_class_uid
        self.sop_instance_uid = sop_instance_uid
        self.transfer_syntax_uid = transfer_syntax_uid
        self._digest = hashlib.sha256()
        header = _file_meta(sop_class_uid, sop_instance_uid, transfer_syntax_uid)
        with _local_errors():
            descriptor, name = tempfile.mkstemp(dir=folder, suffix=".part")
            self.path = Path(name)
            self._file = os.fdopen(descriptor, "wb", buffering=_BUFFER_BYTES)
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # tells `sweep` that somebody is at work
            self._file.write(header)

    @property
    def sha256(self) -> str:
        """Of the data set bytes written so far."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Append data set bytes; LocalError if the disk does not take them."""
        self._digest.update(data)
        with _local_errors():
            self._file.write(data)

    def flush(self) -> None:
        """Let others read, at `path`, what was written; LocalError if the disk does not take it."""
        with _local_errors():
            self._file.flush()

    def sync(self) -> int:
        """Make the content durable and return the file's size in bytes."""
        self.flush()
        with _local_errors():
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def discard(self) -> None:
        """Close the file, and remove it unless it was kept. May be called twice."""
        with suppress(OSError):  # closing may fail on bytes that a full disk did not take: not wanted any more
            self._file.close()
        with suppress(OSError):  # what cannot be removed now, `sweep` removes
            self.path.unlink(missing_ok=True)


def _file_meta(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
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


def _text_element(element: int, vr: bytes, text: str) -> bytes:
    value = text.encode()
    if len(value) % 2:
        value += b"\x00" if vr == b"UI" else b" "
    return struct.pack("<HH2sH", 0x0002, element, vr, len(value)) + value


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _local_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalError(f"archive: {error}") from error
