"""Instance files: what is received is sealed in the spool, answered, and moved among the kept ones when it is indexed.

Law: a path is made from our own hash, never from the wire; a kept file is never altered; disk trouble leaves as
LocalError. `seal` is the only promise: once it returns, content, name and journal record survive a power cut. What is
made here is written, fsynced, renamed and its folder fsynced at once (`keep`).
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomnode.errors import LocalError
from dicomnode.model import Instance, JournalEntry, RetrievedBy
from dicomnode.part10 import own_head, read_own_head
from dicomnode.spool import PREAMBLE_BYTES, JournalRecord, Source, Spool, fsync_path, left_behind, local_errors

_BUFFER_BYTES = 1 << 20
_HASHED_AT_ONCE = 1 << 17
_BLOCK_BYTES = 4096  # no disk's block is larger


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
        self._spool = Spool(self._incoming)
        self._buffers: list[mmap.mmap] = []  # one for each instance on its way, to be used again
        instances = root / "instances"
        with local_errors:
            self._incoming.mkdir(parents=True, exist_ok=True)
            # All 256 now: an instance is only as durable as the entry of the folder it stands in.
            for number in range(256):
                (instances / f"{number:02x}").mkdir(parents=True, exist_ok=True)
            fsync_path(instances)
            fsync_path(root)

    def receive(self, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> Incoming:
        """Open a spool file for one instance whose data set is about to come, to be sealed or kept.

        Raises
        ------
        LocalError
            The disk is full or failing.
        """
        path, descriptor = self._spool.take()
        return Incoming(
            path,
            descriptor,
            self._buffers,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
        )

    def seal(
        self,
        incoming: Incoming,
        source: Source,
        *,
        now: datetime,
        retrieved_by: RetrievedBy = RetrievedBy.UNKNOWN,
    ) -> JournalEntry:
        """Make a received instance durable: it survives a power cut once this returns, and success may be answered.

        What fills its last block stays behind it until `settle` or `recover` cuts it off.

        Raises
        ------
        LocalError
            The disk is full or failing; nothing was kept.
        """
        record = JournalRecord(source, now, incoming.data_set_bytes, incoming.sha256, retrieved_by)
        try:
            size_bytes = incoming.seal(record.encode())
        except LocalError:
            incoming.discard()
            raise
        return JournalEntry(
            sop_instance_uid=incoming.sop_instance_uid,
            sop_class_uid=incoming.sop_class_uid,
            transfer_syntax_uid=incoming.transfer_syntax_uid,
            path=incoming.path.removeprefix(f"{self.root}/"),
            sha256=record.sha256,
            size_bytes=size_bytes,
            received_at=now,
            retrieved_by=retrieved_by,
        )

    def recover(self) -> Iterator[tuple[JournalEntry, Source]]:
        """What dead processes have sealed; the rest of what they left is removed, none of it was acknowledged.

        Where a file's content is not what was sealed, the digest is the content's.
        """
        for path in left_behind(self._incoming):
            with local_errors, path.open("r+b") as file:
                record = JournalRecord.decode(file.read(PREAMBLE_BYTES))
                assert record is not None
                meta = read_own_head(file)
                start = file.tell()
                sealed_bytes = start + record.data_set_bytes
                size_bytes = os.fstat(file.fileno()).st_size
                if size_bytes < sealed_bytes:  # its length is durable before the answer: there was none
                    path.unlink()
                    continue
                if size_bytes > sealed_bytes:
                    file.truncate(sealed_bytes)
                    os.fsync(file.fileno())
                file.seek(start)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entry = JournalEntry(
                sop_instance_uid=meta.get(0x0003, ""),
                sop_class_uid=meta.get(0x0002, ""),
                transfer_syntax_uid=meta.get(0x0010, ""),
                path=str(path.relative_to(self.root)),
                sha256=digest,
                size_bytes=sealed_bytes,
                received_at=record.received_at,
                retrieved_by=record.retrieved_by,
            )
            yield entry, record.source

    def is_there(self, entry: JournalEntry) -> bool:
        """Whether a journal entry's file stands, sealed or settled."""
        return self.path_of(entry).exists()

    def path_of(self, entry: JournalEntry) -> Path:
        """Where a journal entry's file stands now."""
        sealed = self.root / entry.path
        return sealed if sealed.exists() else self.root / _kept_path(entry)

    def settle(self, entries: Sequence[JournalEntry]) -> list[Instance]:
        """Cut sealed files to measure and move them to where kept instances stand, durably; each entry's instance.

        May be repeated after a crash. Files that came together share a folder, so that few folders are fsynced.

        Raises
        ------
        LocalError
            The disk is failing, or a file is gone.
        """
        instances = []
        folders: set[Path] = set()
        with local_errors:
            self._cut_to_measure(entries)
            for entry in entries:
                sealed = self.root / entry.path
                path = _kept_path(entry)
                kept = self.root / path
                if sealed.exists() or not kept.exists():
                    sealed.rename(kept)
                folders |= {kept.parent, sealed.parent}
                instances.append(
                    Instance(
                        sop_instance_uid=entry.sop_instance_uid,
                        sop_class_uid=entry.sop_class_uid,
                        transfer_syntax_uid=entry.transfer_syntax_uid,
                        path=path,
                        sha256=entry.sha256,
                        size_bytes=entry.size_bytes,
                    )
                )
            for folder in folders:
                if folder.exists():
                    fsync_path(folder)
        return instances

    def _cut_to_measure(self, entries: Sequence[JournalEntry]) -> None:
        """Take off what fills the last blocks; all before the first fsync, which leaves the others little to do."""
        cut = []
        for entry in entries:
            sealed = self.root / entry.path
            if sealed.exists() and sealed.stat().st_size > entry.size_bytes:
                os.truncate(sealed, entry.size_bytes)
                cut.append(sealed)
        for sealed in cut:
            fsync_path(sealed)

    def close(self) -> None:
        """Take away what was prepared for instances that did not come."""
        self._spool.close()

    def keep(self, incoming: Incoming) -> Instance:
        """Make a received instance durable; it survives a power cut once this returns.

        Keeping equal content twice is the same as keeping it once.

        Raises
        ------
        LocalError
            The disk is full or failing; nothing was kept.
        """
        sha256 = incoming.sha256
        name = _name(incoming)
        path = f"instances/{name[:2]}/{name}.dcm"
        try:
            with local_errors:
                size_bytes = incoming.sync()
                kept = self.root / path
                Path(incoming.path).rename(kept)
                fsync_path(kept.parent)
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
        with local_errors:
            self.path(instance).unlink(missing_ok=True)

    def path(self, instance: Instance) -> Path:
        """Where an instance's file stands."""
        return self.root / instance.path


class Incoming:
    """One instance on its way into the archive, in a temporary file; made by `Archive.receive`.

    The file meta information stands in it from the start; `write` takes the data set bytes as they come. They are
    gathered in memory, hashed in large pieces and written with as few system calls as can be, past the page cache
    where the file system allows it: every call hands the interpreter to another association and waits to get it back,
    and what is to be durable at once gains nothing from a copy.

    Parameters
    ----------
    descriptor
        Of an empty file, which may be open with O_DIRECT.
    buffers
        Where one not in use is taken from and given back to; each begins at a page, as O_DIRECT wants.
    """

    def __init__(
        self,
        path: str,
        descriptor: int,
        buffers: list[mmap.mmap],
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
    ) -> None:
        self.path = path
        self._descriptor = descriptor
        self._is_sealed = False
        self.sop_class_uid = sop_class_uid
        self.sop_instance_uid = sop_instance_uid
        self.transfer_syntax_uid = transfer_syntax_uid
        self.data_set_bytes = 0
        self._digest = hashlib.sha256()
        self._buffers = buffers
        try:
            self._buffer = buffers.pop()
        except IndexError:  # none is free; asked first, another association could take the last one meanwhile
            self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        meta = own_head(sop_class_uid, sop_instance_uid, transfer_syntax_uid)
        self._buffer[: len(meta)] = meta
        self._meta_bytes = self._filled = self._hashed = len(meta)  # the last two in the buffer
        self._written = 0  # bytes of the file before the buffer's

    @property
    def sha256(self) -> str:
        """Of the data set bytes written so far."""
        self._hash()
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append data set bytes; LocalError if the disk does not take them."""
        self.data_set_bytes += len(data)
        at = 0
        while at < len(data):
            end = min(len(data), at + _BUFFER_BYTES - self._filled)
            start, self._filled = self._filled, self._filled + end - at
            self._buffer[start : self._filled] = data[at:end]
            at = end
            if self._filled - self._hashed >= _HASHED_AT_ONCE:
                self._hash()
            if self._filled == _BUFFER_BYTES:
                self._write_blocks()
                self._written += _BUFFER_BYTES
                self._filled = self._hashed = 0

    def flush(self) -> None:
        """Let others read, at `path`, what was written; LocalError if the disk does not take it."""
        self._write_blocks()
        with local_errors:
            os.ftruncate(self._descriptor, self._written + self._filled)

    def _write_blocks(self) -> None:
        """Write what is in the buffer and what fills its last block."""
        self._hash()
        size = -(-self._filled // _BLOCK_BYTES) * _BLOCK_BYTES
        at = 0
        with local_errors, memoryview(self._buffer) as buffer:
            while at < size:
                at += os.pwrite(self._descriptor, buffer[at:size], self._written + at)

    def seal(self, record: bytes) -> int:
        """Put the journal record into the preamble, make all of it durable, close; the instance's size in bytes.

        The file is left up to a block longer: cutting it would read that block and write it again before the answer.
        """
        if self._written:
            self._write_blocks()
            with local_errors:
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)  # it fills no block
                os.pwrite(self._descriptor, record, 0)
        else:
            self._buffer[: len(record)] = record
            self._write_blocks()
        size_bytes = self._fsync()
        self._close()
        self._is_sealed = True
        return size_bytes

    def sync(self) -> int:
        """Make the content durable and return the file's size in bytes."""
        self.flush()
        return self._fsync()

    def _fsync(self) -> int:
        with local_errors:
            os.fsync(self._descriptor)
        return self._meta_bytes + self.data_set_bytes

    def _hash(self) -> None:
        with memoryview(self._buffer) as buffer:
            self._digest.update(buffer[self._hashed : self._filled])
        self._hashed = self._filled

    def discard(self) -> None:
        """Close the file, and remove it unless it was sealed or kept. May be called twice."""
        if self._is_sealed:
            return
        self._close()
        with suppress(OSError):  # what cannot be removed now, `recover` removes
            Path(self.path).unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._buffers.append(self._buffer)


def _kept_path(entry: JournalEntry) -> str:
    sealed = Path(entry.path)
    group = hashlib.sha256(f"{sealed.parent.name} {int(sealed.stem) // 4096}".encode()).hexdigest()
    return f"instances/{group[:2]}/{_name(entry)}.dcm"


def _name(identity: Incoming | JournalEntry) -> str:
    parts = (
        identity.sop_instance_uid, identity.sop_class_uid, identity.transfer_syntax_uid, identity.sha256
    )  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
