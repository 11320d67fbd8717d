"""Received instances before they are indexed: one fsync makes file, name and journal record durable together.

Law: a spool file's 128-byte preamble, which PS3.10 7.1 leaves to the application, carries the journal record: the
association it came by, when, whose request brought it, its data set's length and digest, sealed with a checksum. It is
written with the last byte or after it, so a file without a valid record was never acknowledged, nor was one that is
shorter than its record says. Names are made durable beforehand, many with one fsync of the folder.
Each process has a folder of its own and holds a lock on it; what a dead process left is found by its free lock.
"""

from __future__ import annotations

import fcntl
import ipaddress
import mmap
import os
import secrets
import stat
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

from dicomnode.errors import LocalError
from dicomnode.model import RetrievedBy

PREAMBLE_BYTES = 128
NAMES_AT_ONCE = 64
YOUNG_S = 10.0

_MAGIC = b"DCMNODE1"
_RECORD = struct.Struct("<8s16sqq32s16s16s16s")
_SEAL = struct.Struct("<LB")  # checksum, and what it begins at: the number of the RetrievedBy
_RETRIEVED_BY = (RetrievedBy.UNKNOWN, RetrievedBy.NODE, RetrievedBy.OTHER)  # their order is the format's
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Source:
    """By which door and from whom instances come: one association, one HTTP request, one import.

    Attributes
    ----------
    key
        16 random bytes, unique for ever.
    """

    key: bytes
    calling_ae_title: str
    called_ae_title: str
    address: str

    @staticmethod
    def new(calling_ae_title: str, called_ae_title: str, address: str) -> Source:
        """A source that has just come up."""
        return Source(secrets.token_bytes(16), calling_ae_title, called_ae_title, address)


@dataclass(frozen=True)
class JournalRecord:
    """What is known of an instance once its last byte is there."""

    source: Source
    received_at: datetime
    data_set_bytes: int
    sha256: str
    retrieved_by: RetrievedBy = RetrievedBy.UNKNOWN

    def encode(self) -> bytes:
        """128 bytes for a preamble."""
        source = self.source
        body = _RECORD.pack(
            _MAGIC,
            source.key,
            (self.received_at - _EPOCH) // timedelta(microseconds=1),
            self.data_set_bytes,
            bytes.fromhex(self.sha256),
            source.calling_ae_title.encode()[:16],
            source.called_ae_title.encode()[:16],
            _packed(source.address),
        )
        number = _RETRIEVED_BY.index(self.retrieved_by)
        return (body + _SEAL.pack(zlib.crc32(body, number), number)).ljust(PREAMBLE_BYTES, b"\0")

    @staticmethod
    def decode(preamble: bytes) -> JournalRecord | None:
        """The record, or None: nothing was sealed here."""
        if len(preamble) < PREAMBLE_BYTES:
            return None
        body = preamble[: _RECORD.size]
        checksum, number = _SEAL.unpack_from(preamble, _RECORD.size)
        if number >= len(_RETRIEVED_BY) or checksum != zlib.crc32(body, number):
            return None
        magic, key, received, size, digest, calling, called, address = _RECORD.unpack(body)
        if magic != _MAGIC:
            return None
        texts = [part.rstrip(b"\0").decode(errors="replace") for part in (calling, called)]
        ip = ipaddress.IPv6Address(address)
        source = Source(key, texts[0], texts[1], str(ip.ipv4_mapped or ip))
        received_at = _EPOCH + timedelta(microseconds=received)
        return JournalRecord(source, received_at, size, digest.hex(), _RETRIEVED_BY[number])


class Spool:
    """This process's folder of files being received; new names are made by a thread before they run out.

    Parameters
    ----------
    folder
        The archive's `incoming`; the spool makes one of its own in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: Path | None = None
        self._lock_file = -1
        self._flags = os.O_RDWR
        self._names: list[str] = []
        self._number = 0
        self._lock = threading.Lock()  # of the names
        self._making = threading.Lock()  # taken before the other

    def take(self) -> tuple[str, int]:
        """An empty file whose name is durable: path and descriptor, with O_DIRECT where that works.

        Raises
        ------
        LocalError
            The disk has no room for it, or fails.
        """
        with local_errors:
            path = self._next()
            try:
                return path, os.open(path, self._flags)
            except FileNotFoundError:  # somebody has taken the folder away
                with self._lock:
                    self._names.clear()
                path = self._next()
                return path, os.open(path, self._flags)

    def close(self) -> None:
        """Take away the names that were not needed."""
        with self._making, self._lock, suppress(OSError):
            for path in self._names:
                Path(path).unlink(missing_ok=True)
            self._names.clear()
            if self._own is not None:
                os.close(self._lock_file)
                (self._own / "lock").unlink()
                self._own.rmdir()  # fails, and is left for the next start, while something waits to be indexed
            self._own = None

    def _next(self) -> str:
        while True:
            with self._lock:
                if len(self._names) == NAMES_AT_ONCE // 2:
                    threading.Thread(target=self._make_ahead, name="spool", daemon=True).start()
                if self._names:
                    return self._names.pop()
            with self._making:
                if not self._names:  # nobody has made any meanwhile
                    self._make_names()

    def _make_ahead(self) -> None:
        with self._making, suppress(OSError):  # who needs a name and gets none is told
            if self._own is not None and len(self._names) < NAMES_AT_ONCE:
                self._make_names()

    def _make_names(self) -> None:
        if self._own is None or not self._own.exists():
            own = self._folder / f"{os.getpid()}-{secrets.token_hex(4)}"
            own.mkdir()
            self._lock_file = os.open(own / "lock", os.O_CREAT | os.O_RDWR)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            self._flags = os.O_RDWR | (os.O_DIRECT if takes_direct_writes(own / "lock") else 0)
            fsync_path(self._folder)
            self._own = own
        made = []
        try:
            for _ in range(NAMES_AT_ONCE):
                self._number += 1
                path = f"{self._own}/{self._number}.part"
                os.mknod(path, 0o666 | stat.S_IFREG)  # EEXIST where it stands; no descriptor to close
                made.append(path)
            fsync_path(self._own)
        except OSError:
            for name in made:
                Path(name).unlink(missing_ok=True)
            raise
        with self._lock:
            self._names = made + self._names


def left_behind(folder: Path) -> Iterator[Path]:
    """Files with a journal record in the folders of dead processes; files without one are removed on the way.

    Parameters
    ----------
    folder
        The archive's `incoming`.
    """
    with local_errors:
        for own in sorted(folder.iterdir()):
            if own.is_dir():
                yield from _sealed_of_the_dead(own)


def _sealed_of_the_dead(own: Path) -> Iterator[Path]:
    lock = own / "lock"
    if not lock.exists() and time.time() - own.stat().st_mtime < YOUNG_S:
        return  # its process is just making it
    if lock.exists():
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # its process is alive
    for path in sorted(own.glob("*.part")):
        with path.open("rb") as file:
            sealed = JournalRecord.decode(file.read(PREAMBLE_BYTES)) is not None
        if sealed:
            yield path
        else:
            path.unlink()
    if not any(own.glob("*.part")):
        lock.unlink(missing_ok=True)
        own.rmdir()


def takes_direct_writes(path: Path) -> bool:
    """Whether that file, which is empty and stays so, can be written past the page cache."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:  # EINVAL
        return False
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            return os.pwrite(descriptor, page, 0) == mmap.PAGESIZE
    except OSError:
        return False
    finally:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@lru_cache
def _packed(address: str) -> bytes:
    try:
        parsed = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return bytes(16)
    return (parsed if parsed.version == 6 else ipaddress.IPv6Address(f"::ffff:{parsed}")).packed


class _LocalErrors:
    """Disk trouble leaves as LocalError. Entered several times for each instance: no generator."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError):
            raise LocalError(f"archive: {error}") from error


local_errors = _LocalErrors()
