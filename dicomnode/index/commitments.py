"""Storage commitment requests and whether their reports were taken."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from dicomnode.index.database import Database, insert_new
from dicomnode.index.tables import commitment, instance, journal, quarantine
from dicomnode.model import Commitment

_AT_ONCE = 500  # of SQLite's limit of parameters in one statement


class Commitments(Database):
    """Requests, what is held, reports."""

    def add_commitment(
        self,
        transaction_uid: str,
        calling_ae_title: str,
        address: str,
        references: Sequence[tuple[str, str]],
        *,
        now: datetime,
        next_attempt_at: datetime,
    ) -> Commitment:
        """Write a request down; the same request again is the same commitment, with what it asks for now.

        Parameters
        ----------
        references
            (SOP Class UID, SOP Instance UID).
        """
        key = {"transaction_uid": transaction_uid, "calling_ae_title": calling_ae_title[:64]}
        values: dict[str, Any] = {
            "address": address, "references": [list(pair) for pair in references], "state": "waiting",
            "attempts": 0, "reason": "", "created_at": now, "next_attempt_at": next_attempt_at,
        }  # fmt: skip
        found = sa.and_(*[commitment.c[name] == value for name, value in key.items()])
        with self._writing() as connection:
            insert_new(connection, commitment, {**key, **values})
            connection.execute(commitment.update().where(found).values(**values))
            return _commitment(connection.execute(sa.select(commitment).where(found)).mappings().one())

    def due_commitments(self, *, now: datetime) -> list[Commitment]:
        """Whose report was not taken and may be repeated now."""
        query = sa.select(commitment).where(commitment.c.state == "waiting", commitment.c.next_attempt_at <= now)
        with self._reading() as connection:
            return [_commitment(row) for row in connection.execute(query.order_by(commitment.c.id)).mappings()]

    def postpone_commitment(self, commitment_id: int, reason: str, *, next_attempt_at: datetime) -> None:
        """A report was not taken."""
        values = {"attempts": commitment.c.attempts + 1, "reason": reason, "next_attempt_at": next_attempt_at}
        with self._writing() as connection:
            connection.execute(commitment.update().where(commitment.c.id == commitment_id).values(**values))

    def end_commitment(self, commitment_id: int, state: str, reason: str) -> None:
        """A report was taken (`reported`), or is given up (`failed`)."""
        with self._writing() as connection:
            connection.execute(
                commitment.update().where(commitment.c.id == commitment_id).values(state=state, reason=reason)
            )

    def classes_held(self, sop_instance_uids: Sequence[str]) -> dict[str, set[str]]:
        """SOP Instance UID → the SOP classes it is held as: indexed, in the journal or in quarantine."""
        held: dict[str, set[str]] = {}
        with self._reading() as connection:
            for start in range(0, len(sop_instance_uids), _AT_ONCE):
                some = sop_instance_uids[start : start + _AT_ONCE]
                for table in (instance, journal, quarantine):
                    query = sa.select(table.c.sop_instance_uid, table.c.sop_class_uid)
                    for uid, sop_class in connection.execute(query.where(table.c.sop_instance_uid.in_(some))):
                        held.setdefault(uid, set()).add(sop_class)
        return held


def _commitment(row: sa.RowMapping) -> Commitment:
    values = {name: row[name] for name in Commitment.__dataclass_fields__}
    values["references"] = tuple((a, b) for a, b in row["references"])
    return Commitment(**values)
