"""The archive path that every door shares: C-STORE, STOW-RS and import bring instances in here and nowhere else.

Law: `keep` returns only when the instance would survive a power cut; the index learns of it a moment later, from a
thread of its own, and a crash in between is made good at the next start. Nothing that was kept is forgotten: what
the database does not take now is offered again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from dicomnode.archive import Archive, Incoming
from dicomnode.errors import LocalError, stack
from dicomnode.index import AssociationRecord, Index
from dicomnode.model import DuplicatePolicy, JournalEntry, RetrievedBy
from dicomnode.spool import Source

log = logging.getLogger(__name__)

_LONGEST_UID = 255
_FREE_SPACE_AGE_S = 0.2
_ENROL_EVERY_S = 0.5
_RETRY_S = 2.0
_SLOWEST_BYTES_PER_S = 1024


def is_too_slow(elapsed_s: float, received_bytes: int, *, silence_s: float) -> bool:
    """Whether so few bytes of one message in so long are as good as silence; `silence_s` is what a peer may pause."""
    return elapsed_s > silence_s + received_bytes / _SLOWEST_BYTES_PER_S


class FullError(LocalError):
    """No more is taken, for want of room or because one instance is too large; the sender still owns it."""


class DuplicateError(LocalError):
    """Other content stands under the SOP Instance UID, and the policy is to keep the first."""

    retry = False


@dataclass(frozen=True)
class IntakeLimits:
    """Bounds on what is taken in.

    Attributes
    ----------
    max_instance_bytes
        Of one data set.
    refuse_below_bytes, reject_below_bytes
        Free space under which instances are refused, and under which associations are rejected.
    """

    max_instance_bytes: int = 8 << 30
    refuse_below_bytes: int = 0
    reject_below_bytes: int = 0


class Intake:
    """Takes instances in.

    Parameters
    ----------
    duplicates
        What becomes of other content under a SOP Instance UID that is stored already. Only keep-first decides it
        before the answer; the indexer does the rest.
    """

    def __init__(
        self,
        archive: Archive,
        index: Index,
        *,
        duplicates: DuplicatePolicy = DuplicatePolicy.FLAG,
        limits: IntakeLimits | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._archive = archive
        self._index = index
        self._duplicates = duplicates
        self._limits = limits or IntakeLimits()
        self.clock = clock
        self._lock = threading.Lock()
        self._associations: dict[str, AssociationRecord] = {}  # to be written down, as they stand
        self._entries: list[tuple[str, JournalEntry]] = []
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._free = (0.0, 0)
        self._first_wins = threading.Lock()
        self._enrolling = threading.Lock()

    def start(self) -> None:
        """Recover what dead processes sealed, then write down what comes.

        Raises
        ------
        LocalError
            The disk or the database fails.
        """
        recovered = 0
        for entry, source in self._archive.recover():
            if not self._index.is_enrolled(entry.path):
                record = replace(_record(source, entry.received_at), closed_at=self.clock(), outcome="node died")
                self._index.enrol([record], [(record.key, entry)])
                recovered += 1
        if recovered:
            log.info("recovered %d instances that were acknowledged and not yet in the index", recovered)
        self._thread = threading.Thread(target=self._enrol_for_ever, name="enrol", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write down what is left; what the database does not take, the next start does."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._archive.close()

    def begin(self, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> Reception:
        """Open an instance whose data set is about to come.

        Raises
        ------
        FullError
            Less space is free than must be.
        LocalError
            The disk is failing.
        """
        free = self._free_bytes()
        if free < self._limits.refuse_below_bytes:
            raise FullError(f"archive: {free} bytes free, expected {self._limits.refuse_below_bytes}")
        incoming = self._archive.receive(
            sop_class_uid=_clean(sop_class_uid),
            sop_instance_uid=_clean(sop_instance_uid),
            transfer_syntax_uid=_clean(transfer_syntax_uid),
        )
        return Reception(incoming, self._limits.max_instance_bytes)

    def is_full(self) -> bool:
        """Whether so little space is free that associations are to be rejected."""
        return self._free_bytes() < self._limits.reject_below_bytes

    def keep(
        self,
        reception: Reception,
        source: Source,
        opened_at: datetime,
        *,
        retrieved_by: RetrievedBy = RetrievedBy.UNKNOWN,
    ) -> None:
        """Make a whole instance durable; on return it is safe.

        Raises
        ------
        DuplicateError
            The policy is keep-first, and other content came first.
        LocalError
            The disk is full or failing; nothing was kept.
        """
        incoming = reception.incoming
        if self._duplicates is DuplicatePolicy.KEEP_FIRST:
            with self._first_wins:
                self._refuse_other_content(incoming)
                self._seal(incoming, source, opened_at, retrieved_by)
        else:
            self._seal(incoming, source, opened_at, retrieved_by)
        self._wake.set()

    def ended(self, source: Source, opened_at: datetime, *, outcome: str, stored: int, refused: int) -> None:
        """An association that brought instances has ended."""
        if stored == refused == 0:
            return
        record = replace(
            _record(source, opened_at), closed_at=self.clock(), outcome=outcome, stored=stored, refused=refused
        )
        with self._lock:
            self._associations[record.key] = record
        self._wake.set()

    def flush(self) -> None:
        """Write down what has come so far; LocalError if the database does not take it."""
        self._enrol()

    def _refuse_other_content(self, incoming: Incoming) -> None:
        uid = incoming.sop_instance_uid
        with self._lock:
            waiting = {entry.sha256 for _, entry in self._entries if entry.sop_instance_uid == uid}
        known = waiting | self._index.contents_of(uid)
        if known and incoming.sha256 not in known:
            raise DuplicateError("SOP Instance UID is stored with other content")

    def _seal(self, incoming: Incoming, source: Source, opened_at: datetime, retrieved_by: RetrievedBy) -> None:
        entry = self._archive.seal(incoming, source, now=self.clock(), retrieved_by=retrieved_by)
        key = source.key.hex()
        with self._lock:
            if key not in self._associations:
                self._associations[key] = _record(source, opened_at)
            self._entries.append((key, entry))

    def _free_bytes(self) -> int:
        at, free = self._free
        now = time.monotonic()
        if now - at > _FREE_SPACE_AGE_S:
            try:
                found = os.statvfs(self._archive.root)
            except OSError as error:
                raise LocalError(f"archive: {error}") from error
            free = found.f_bavail * found.f_frsize
            self._free = (now, free)
        return free

    def _enrol_for_ever(self) -> None:
        while True:
            self._wake.wait()
            stopping = self._stopping.is_set()
            self._wake.clear()
            try:
                self._enrol()
            except Exception as error:
                what = error if isinstance(error, LocalError) else f"{type(error).__name__}\n{stack(error)}"
                log.error("the index does not take what has come (it is safe, and offered again): %s", what)
                self._wake.set()
                if stopping or self._stopping.wait(_RETRY_S):
                    return
            else:
                if stopping:
                    return
                self._stopping.wait(_ENROL_EVERY_S)  # so that one commit takes many

    def _enrol(self) -> None:
        with self._enrolling:
            with self._lock:
                associations, entries = dict(self._associations), list(self._entries)
            if not associations:
                return
            self._index.enrol(list(associations.values()), entries)
            with self._lock:
                del self._entries[: len(entries)]
                for key, record in associations.items():
                    if self._associations.get(key) is record:
                        del self._associations[key]


class Reception:
    """One instance on its way in, with trouble kept for the answer: the rest of its bytes still has to be read."""

    def __init__(self, incoming: Incoming, max_bytes: int) -> None:
        self.incoming = incoming
        self._max_bytes = max_bytes

    def write(self, data: bytes | memoryview) -> None:
        """Append data set bytes; FullError or LocalError once they cannot be taken."""
        if self.incoming.data_set_bytes + len(data) > self._max_bytes:
            raise FullError(f"archive: an instance of more than {self._max_bytes} bytes")
        self.incoming.write(data)

    def discard(self) -> None:
        """Remove it, unless it was kept. May be called twice."""
        self.incoming.discard()


def _record(source: Source, opened_at: datetime) -> AssociationRecord:
    return AssociationRecord(
        source.key.hex(), source.calling_ae_title, source.called_ae_title, source.address, opened_at
    )


def _clean(uid: str) -> str:
    """An identifier as sent, but nothing that a database or a file's head cannot hold."""
    return uid.replace("\0", "?")[:_LONGEST_UID]
