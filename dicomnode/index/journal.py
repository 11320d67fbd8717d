"""The journal: instances that are safe in the spool, from the answer to the sender until they are indexed.

Law: an entry leaves the journal in the transaction that makes it an instance, or puts it into quarantine with the
reason; what is not used is still named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Any

import sqlalchemy as sa

from dicomnode.index.database import STORED, insert_new, stored_instance, upsert
from dicomnode.index.receiving import Added, Receiving
from dicomnode.index.tables import association, instance, journal, quarantine
from dicomnode.model import DuplicatePolicy, Instance, InstanceHeader, JournalEntry, RetrievedBy


class Settled(StrEnum):
    """What became of a journal entry."""

    INDEXED = "indexed"
    EQUAL = "equal"
    """The same content stands already: its own file is not needed."""
    FLAGGED = "flagged"
    """Other content stands under its SOP Instance UID: both are kept, the first is used."""
    REPLACED = "replaced"
    """It is used now, and what stood under its SOP Instance UID is in quarantine."""


@dataclass(frozen=True)
class AssociationRecord:
    """How an association stands; `closed_at` None while it is open.

    Attributes
    ----------
    key
        Unique for ever, hexadecimal.
    outcome
        How it ended: released, aborted by the peer, timed out, …
    """

    key: str
    calling_ae_title: str
    called_ae_title: str
    address: str
    opened_at: datetime
    closed_at: datetime | None = None
    outcome: str = ""
    stored: int = 0
    refused: int = 0


class Journal(Receiving):
    """From sealed to indexed."""

    def enrol(self, associations: Sequence[AssociationRecord], entries: Sequence[tuple[str, JournalEntry]]) -> None:
        """Write down associations as they stand and what came by them, in one commit; may be repeated.

        Parameters
        ----------
        associations
            Every association of `entries`, and those that only ended.
        entries
            (association key, entry).
        """
        ids: dict[str, int] = {}
        with self._writing() as connection:
            for each in associations:
                values = asdict(each)
                for name in ("calling_ae_title", "called_ae_title", "address"):
                    values[name] = values[name][:64]
                values["outcome"] = values["outcome"][:200]
                key = values.pop("key")
                ids[key] = upsert(connection, association, {"key": key}, values)
                if each.closed_at is not None:
                    ended = {name: values[name] for name in ("closed_at", "outcome", "stored", "refused")}
                    connection.execute(association.update().where(association.c.id == ids[key]).values(**ended))
            rows = [{"association_id": ids[key], **vars(entry)} for key, entry in entries]
            for row in rows:
                del row["id"]
            insert_new(connection, journal, rows)

    def is_enrolled(self, path: str) -> bool:
        """Whether the journal has an entry for that sealed file."""
        with self._reading() as connection:
            return connection.scalar(sa.select(journal.c.id).where(journal.c.path == path)) is not None

    def pace(self, count: int) -> tuple[datetime, datetime] | None:
        """When the oldest entry came, and the one that is `count`-th from the newest; None where there are fewer."""
        oldest = sa.select(journal.c.received_at).order_by(journal.c.id).limit(1)
        recent = sa.select(journal.c.received_at).order_by(journal.c.id.desc()).offset(count - 1).limit(1)
        with self._reading() as connection:
            found = connection.scalar(oldest), connection.scalar(recent)
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    def take_unindexed(self, limit: int) -> list[JournalEntry]:
        """The oldest entries, each counted as begun; only the first, if it was begun in vain before."""
        query = sa.select(journal).order_by(journal.c.id).limit(limit)
        with self._writing() as connection:
            entries = [_entry(row) for row in connection.execute(query).mappings()]
            if entries and entries[0].attempts:
                entries = entries[:1]
            ids = [entry.id for entry in entries]
            connection.execute(journal.update().where(journal.c.id.in_(ids)).values(attempts=journal.c.attempts + 1))
        return entries

    def put_back(self, entries: Sequence[JournalEntry]) -> None:
        """Trouble of our own, not theirs: the attempt does not count."""
        ids = [entry.id for entry in entries]
        with self._writing() as connection:
            connection.execute(journal.update().where(journal.c.id.in_(ids)).values(attempts=journal.c.attempts - 1))

    def index_entries(
        self, batch: Sequence[tuple[JournalEntry, Instance, InstanceHeader]], *, policy: DuplicatePolicy, now: datetime
    ) -> list[Settled]:
        """Make journal entries instances of their series, in one commit.

        Their series count as received `now`, so that what is indexed late is never taken for what stood before.
        """
        with self._writing() as connection:
            return [self._index_entry(connection, *each, policy=policy, now=now) for each in batch]

    def quarantine(self, entry: JournalEntry, path: str, reason: str) -> None:
        """Take an entry out of the journal for good, with the reason; its file stands at `path`."""
        with self._writing() as connection:
            association_id = _take_out(connection, entry)
            values = {name: getattr(entry, name) for name in STORED} | {"path": path}
            _put_aside(connection, association_id, values, entry.received_at, reason)

    def contents_of(self, sop_instance_uid: str) -> set[str]:
        """The digests of every content that is kept under a SOP Instance UID, in use or not."""
        with self._reading() as connection:
            return {
                digest
                for table in (instance, journal, quarantine)
                for digest in connection.scalars(
                    sa.select(table.c.sha256).where(table.c.sop_instance_uid == sop_instance_uid)
                )
            }

    def paths_of(self, sop_instance_uid: str) -> set[str]:
        """Where every content stands that is kept under a SOP Instance UID."""
        with self._reading() as connection:
            return {
                path
                for table in (instance, quarantine)
                for path in connection.scalars(
                    sa.select(table.c.path).where(table.c.sop_instance_uid == sop_instance_uid)
                )
            }

    def _index_entry(
        self,
        connection: sa.Connection,
        entry: JournalEntry,
        stored: Instance,
        header: InstanceHeader,
        *,
        policy: DuplicatePolicy,
        now: datetime,
    ) -> Settled:
        association_id = _take_out(connection, entry)
        add = partial(
            self._add_instance,
            connection,
            stored,
            header,
            association_id=association_id,
            retrieved_by=entry.retrieved_by,
            received_at=entry.received_at,
            now=now,
        )
        added = add()
        if added is Added.NEW:
            return Settled.INDEXED
        if added is Added.EQUAL:
            return Settled.EQUAL
        is_known = sa.exists().where(
            quarantine.c.sop_instance_uid == stored.sop_instance_uid, quarantine.c.sha256 == stored.sha256
        )
        if policy is not DuplicatePolicy.REPLACE and connection.scalar(sa.select(is_known)):
            return Settled.EQUAL
        twin = sa.select(instance).where(instance.c.sop_instance_uid == stored.sop_instance_uid)
        former = connection.execute(twin).mappings().one()
        if policy is not DuplicatePolicy.REPLACE:
            reason = "other content under a SOP Instance UID that is stored already: both are kept, the first is used"
            _put_aside(connection, association_id, asdict(stored), entry.received_at, reason)
            return Settled.FLAGGED
        reason = "replaced by other content that came later under the same SOP Instance UID"
        values = asdict(stored_instance(former))
        connection.execute(instance.delete().where(instance.c.id == former["id"]))
        _put_aside(connection, former["association_id"], values, former["received_at"], reason)
        add()
        return Settled.REPLACED


def _entry(row: sa.RowMapping) -> JournalEntry:
    values = {name: row[name] for name in JournalEntry.__dataclass_fields__}
    return JournalEntry(**values | {"retrieved_by": RetrievedBy(values["retrieved_by"])})


def _take_out(connection: sa.Connection, entry: JournalEntry) -> int:
    association_id: int = connection.execute(
        sa.select(journal.c.association_id).where(journal.c.id == entry.id)
    ).scalar_one()
    connection.execute(journal.delete().where(journal.c.id == entry.id))
    return association_id


def _put_aside(
    connection: sa.Connection, association_id: int, stored: dict[str, Any], received_at: datetime, reason: str
) -> None:
    """Into quarantine, unless the very same file stands there."""
    insert_new(
        connection,
        quarantine,
        {"association_id": association_id, **stored, "received_at": received_at, "reason": reason},
    )
