"""From the journal to the index: reads headers after the sender has its answer, and says of each why not.

Law: an entry that cannot be read, or ends this process again and again, goes into quarantine with the reason and costs
no other its place; every step may be run twice. It runs in a process of its own, with its memory bounded, because what
it reads is hostile and its reading must not slow the listener down.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import pydicom
from pydicom import Dataset

from dicomnode.archive import Archive
from dicomnode.errors import LocalError, stack
from dicomnode.index import Index, Settled
from dicomnode.model import DuplicatePolicy, Instance, InstanceHeader, JournalEntry

log = logging.getLogger(__name__)

BATCH = 64
MAX_ATTEMPTS = 6  # a power cut while it is read counts too, and is not its fault
READING_LIMIT_S = 30
MEMORY_BYTES = 2 << 30  # a deflated data set of a megabyte may be one of a gigabyte
IDLE_S = 0.25
STREAMING_S = 1.5  # what came is written down every half second
LONGEST_WAIT_S = 10.0
RETRY_S = 2.0
_LARGE_ELEMENT_BYTES = 65536
_LONGEST_UID = 64  # PS3.5 9.1


class Indexer:
    """Empties the journal.

    Parameters
    ----------
    header_of
        What the index must know, from a data set without its pixel data; whatever it raises means quarantine.
    """

    def __init__(
        self,
        index: Index,
        archive: Archive,
        header_of: Callable[[Dataset], InstanceHeader],
        *,
        duplicates: DuplicatePolicy = DuplicatePolicy.FLAG,
    ) -> None:
        self._index = index
        self._archive = archive
        self._header_of = header_of
        self._duplicates = duplicates
        # An invalid value is no reason to keep an instance out, and the warnings of pydicom would quote it.
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

    def run_once(self) -> int:
        """Take up the oldest entries; how many there were.

        Raises
        ------
        LocalError
            The disk or the database fails: nothing is lost, all of it comes again.
        """
        entries = self._index.take_unindexed(BATCH)
        if not entries:
            return 0
        try:
            self._take_up(entries)
        except LocalError:
            self._index.put_back(entries)  # those that are out of the journal are not touched
            raise
        return len(entries)

    def gives_way(self, now: datetime) -> bool:
        """Whether instances stream in so fast that reading headers would slow the answers down.

        Never for longer than LONGEST_WAIT_S: what came before that is read whatever streams in.
        """
        found = self._index.pace(BATCH)
        return found is not None and is_streaming(*found, now=now)

    def _take_up(self, entries: Sequence[JournalEntry]) -> None:
        there = [entry for entry in entries if self._archive.is_there(entry)]
        stored = dict(zip((entry.id for entry in there), self._archive.settle(there), strict=True))
        batch: list[tuple[JournalEntry, Instance, InstanceHeader]] = []
        for entry in entries:
            if entry.id not in stored:
                self._put_aside(entry, entry.path, "its file is gone")
                continue
            instance = stored[entry.id]
            try:
                batch.append((entry, instance, self._header(entry, instance)))
            except _UnreadableError as error:
                self._put_aside(entry, instance.path, str(error))
        outcomes = self._index.index_entries(batch, policy=self._duplicates, now=datetime.now(UTC))
        for (entry, instance, _), became in zip(batch, outcomes, strict=True):
            if became is Settled.EQUAL:
                self._remove_unless_in_use(instance)
            elif became is not Settled.INDEXED:
                log.warning("instance %s: other content was stored under its UID: %s", entry.sop_instance_uid, became)

    def _remove_unless_in_use(self, stored: Instance) -> None:
        """Equal content may have come to the very path that is in use."""
        if stored.path not in self._index.paths_of(stored.sop_instance_uid):
            self._archive.remove(stored)

    def _put_aside(self, entry: JournalEntry, path: str, reason: str) -> None:
        log.warning("instance %s put into quarantine: %s", entry.sop_instance_uid or "without UID", reason)
        self._index.quarantine(entry, path, reason)

    def _header(self, entry: JournalEntry, stored: Instance) -> InstanceHeader:
        """Read what comes before the pixel data; refuse what is not a data set, or another than announced."""
        if entry.attempts >= MAX_ATTEMPTS:
            raise _UnreadableError(f"reading it ended the indexer {entry.attempts} times")
        try:
            with _time_limit(READING_LIMIT_S):
                dataset = pydicom.dcmread(
                    self._archive.path(stored), stop_before_pixels=True, defer_size=_LARGE_ELEMENT_BYTES
                )
                uids = str(dataset.get("SOPInstanceUID", "")), str(dataset.get("SOPClassUID", ""))
                header = self._header_of(dataset)
        except MemoryError:
            raise _UnreadableError("reading it takes more memory than the indexer may have") from None
        except Exception as error:
            log.info("cannot read a data set: %s\n%s", type(error).__name__, stack(error))
            raise _UnreadableError(f"data set cannot be read: {type(error).__name__}") from None
        for name, found, announced in (
            ("SOP Instance UID", uids[0], entry.sop_instance_uid),
            ("SOP Class UID", uids[1], entry.sop_class_uid),
        ):
            if found != announced:
                raise _UnreadableError(f"{name}: got {_shown(found)}, expected {_shown(announced)}, as announced")
            if not 0 < len(found) <= _LONGEST_UID:
                raise _UnreadableError(f"{name} of {len(found)} characters, expected 1 to {_LONGEST_UID}")
        for name, found in (
            ("Study Instance UID", header.study_instance_uid),
            ("Series Instance UID", header.series_instance_uid),
            ("Transfer Syntax UID", entry.transfer_syntax_uid),
        ):
            # Type 1 in every composite IOD (PS3.3 C.7.2.1, C.7.3.1); without them strangers would make one series.
            if not 0 < len(found) <= _LONGEST_UID:
                raise _UnreadableError(f"{name} of {len(found)} characters, expected 1 to {_LONGEST_UID}")
        return header


def is_streaming(oldest: datetime, recent: datetime, *, now: datetime) -> bool:
    """Whether a whole batch came within STREAMING_S, and nothing waits for longer than LONGEST_WAIT_S.

    Parameters
    ----------
    oldest, recent
        When the first of what waits came, and the first of the last batch. A clock that was set back is no stream.
    """
    return 0 <= (now - recent).total_seconds() < STREAMING_S and (now - oldest).total_seconds() < LONGEST_WAIT_S


def run(indexer: Indexer, stop: threading.Event) -> None:
    """Empty the journal until `stop` is set, in this process's main thread, with its memory bounded."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, hard))
    os.nice(5)  # answering senders comes first
    while not stop.is_set():
        try:
            if indexer.gives_way(datetime.now(UTC)) or not indexer.run_once():
                stop.wait(IDLE_S)
        except LocalError as error:
            log.error("indexer: trying again after: %s", error)
            stop.wait(RETRY_S)


class _UnreadableError(Exception):
    """Why an instance cannot be indexed; without any text of the data set but its UIDs."""


def _shown(uid: str) -> str:
    """A UID to be logged: where something else stands in its place, it may be anybody's name."""
    return repr(uid) if re.fullmatch(r"[0-9.]{0,64}", uid) else "no UID"


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError after so long; only where signals reach, in a process's main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def too_long(_number: int, _frame: object) -> None:
        raise TimeoutError

    former = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
