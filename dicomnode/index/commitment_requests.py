"""Storage commitments that we ask destinations for, and what came of them.

Law: a request is written down before it is sent, so that its report is known whenever it comes. A delivery that wants
a commitment and is in no request has the empty transaction UID; one that does not want any has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from dicomnode.index.database import Database
from dicomnode.index.tables import commitment_request, delivery, product
from dicomnode.model import DeliveryState

_AT_ONCE = 500  # of SQLite's limit of parameters in one statement
_UNASKED = ""


@dataclass(frozen=True)
class Reference:
    """One delivered instance that a commitment is about; `delivery_id` is its row."""

    delivery_id: int
    sop_class_uid: str
    sop_instance_uid: str
    attempts: int


@dataclass(frozen=True)
class Denial:
    """What becomes of a delivery that the destination does not commit to.

    Attributes
    ----------
    next_attempt_at
        Where it is sent again.
    ask_again
        Whether the commitment is asked for again as it stands.
    """

    delivery_id: int
    state: DeliveryState
    reason: str
    next_attempt_at: datetime | None = None
    ask_again: bool = False


class CommitmentRequests(Database):
    """What is to be asked, what was, and the reports."""

    def uncommitted(self, destination: str, *, limit: int) -> list[Reference]:
        """What has arrived there, wants a commitment and is in no request."""
        return self._references(
            delivery.c.destination == destination,
            delivery.c.state == DeliveryState.DELIVERED,
            delivery.c.transaction_uid == _UNASKED,
            limit=limit,
        )

    def open_request(
        self,
        transaction_uid: str,
        destination: str,
        ids: Sequence[int],
        *,
        now: datetime,
        expires_at: datetime,
    ) -> None:
        """Write a request down; `ids` are of its deliveries."""
        values = {
            "transaction_uid": transaction_uid, "destination": destination, "state": "waiting", "reason": "",
            "created_at": now, "expires_at": expires_at,
        }  # fmt: skip
        with self._writing() as connection:
            connection.execute(commitment_request.insert().values(**values))
            for start in range(0, len(ids), _AT_ONCE):
                some = delivery.c.id.in_(ids[start : start + _AT_ONCE])
                connection.execute(delivery.update().where(some).values(transaction_uid=transaction_uid))

    def drop_request(self, transaction_uid: str) -> None:
        """It was not taken: what it asked for is to be asked again."""
        with self._writing() as connection:
            connection.execute(
                commitment_request.delete().where(commitment_request.c.transaction_uid == transaction_uid)
            )
            self._ask_again(connection, transaction_uid)

    def expire_requests(self, destination: str, *, now: datetime) -> list[str]:
        """Requests without a report in time: what they asked for is to be asked again. Their transaction UIDs."""
        overdue = (
            commitment_request.c.destination == destination,
            commitment_request.c.state == "waiting",
            commitment_request.c.expires_at <= now,
        )
        with self._writing() as connection:
            found = list(connection.scalars(sa.select(commitment_request.c.transaction_uid).where(*overdue)))
            for transaction_uid in found:
                self._end(connection, transaction_uid, "expired", "no report came in time; asked again")
                self._ask_again(connection, transaction_uid)
        return found

    def request_destination(self, transaction_uid: str) -> str | None:
        """Whom it was sent to; None: it is none of ours."""
        query = sa.select(commitment_request.c.destination).where(
            commitment_request.c.transaction_uid == transaction_uid
        )
        with self._reading() as connection:
            found: str | None = connection.scalar(query)
            return found

    def requested(self, transaction_uid: str) -> list[Reference]:
        """What it asks for and no later request does."""
        return self._references(delivery.c.transaction_uid == transaction_uid)

    def is_settled(self, transaction_uid: str) -> bool:
        """Whether its report has come."""
        query = sa.select(commitment_request.c.state).where(commitment_request.c.transaction_uid == transaction_uid)
        with self._reading() as connection:
            return connection.scalar(query) == "reported"

    def settle_request(
        self,
        transaction_uid: str,
        destination: str,
        committed: Sequence[str],
        denied: Iterable[Denial],
        reason: str,
        *,
        now: datetime,
    ) -> None:
        """Record a report, all of it with one commit; what it does not mention is to be asked again.

        Parameters
        ----------
        committed
            SOP Instance UIDs, of this request or, where it comes late, of its successor too.
        """
        has_arrived = (delivery.c.destination == destination, delivery.c.state == DeliveryState.DELIVERED)
        with self._writing() as connection:
            for start in range(0, len(committed), _AT_ONCE):
                some = product.c.sop_instance_uid.in_(committed[start : start + _AT_ONCE])
                rows = delivery.c.product_id.in_(sa.select(product.c.id).where(some))
                connection.execute(
                    delivery.update()
                    .where(*has_arrived, rows, delivery.c.committed_at.is_(None))
                    .values(committed_at=now, transaction_uid=None)
                )
            for each in denied:
                values = {"state": each.state, "reason": each.reason, "updated_at": now}
                values["transaction_uid"] = _UNASKED if each.ask_again else None
                if each.next_attempt_at is not None:
                    values["next_attempt_at"] = each.next_attempt_at
                row = (delivery.c.id == each.delivery_id, delivery.c.transaction_uid == transaction_uid)
                connection.execute(delivery.update().where(*row, *has_arrived).values(**values))
            self._ask_again(connection, transaction_uid)
            self._end(connection, transaction_uid, "reported", reason)

    def _references(self, *where: sa.ColumnElement[bool], limit: int | None = None) -> list[Reference]:
        query = (
            sa.select(delivery.c.id, product.c.sop_class_uid, product.c.sop_instance_uid, delivery.c.attempts)
            .join(product, delivery.c.product_id == product.c.id)
            .where(*where)
            .order_by(delivery.c.id)
            .limit(limit)
        )
        with self._reading() as connection:
            return [Reference(*row) for row in connection.execute(query)]

    def _ask_again(self, connection: sa.Connection, transaction_uid: str) -> None:
        rows = delivery.update().where(delivery.c.transaction_uid == transaction_uid)
        connection.execute(rows.values(transaction_uid=_UNASKED))

    def _end(self, connection: sa.Connection, transaction_uid: str, state: str, reason: str) -> None:
        row = commitment_request.update().where(commitment_request.c.transaction_uid == transaction_uid)
        connection.execute(row.values(state=state, reason=reason))
