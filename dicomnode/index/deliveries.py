"""One row per (instance, destination): what is due, what became of each attempt, and what a person holds up.

Law: a delivered row is sent again only where a person asks for it or the destination denies to hold it; a row that is
held, or whose destination is, is never due.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from dicomnode.index.database import STORED, Database, stored_instance
from dicomnode.index.tables import UtcDateTime, association, delivery, destination_hold, instance, product, series
from dicomnode.model import Delivery, DeliveryState, Instance

_WAITING, _HELD, _FAILED = DeliveryState.WAITING, DeliveryState.HELD, DeliveryState.FAILED


# One statement for many rows. What a person has held meanwhile stays held, unless it has arrived.
_RECORD = (
    delivery.update()
    .where(
        delivery.c.id == sa.bindparam("row"),
        sa.or_(delivery.c.state == _WAITING, sa.bindparam("arrived", type_=sa.Boolean)),
    )
    .values(
        state=sa.bindparam("to"),
        status=sa.bindparam("answer"),
        reason=sa.bindparam("why"),
        attempts=delivery.c.attempts + 1,
        updated_at=sa.bindparam("now"),
        transaction_uid=sa.bindparam("asks"),
        next_attempt_at=sa.func.coalesce(sa.bindparam("again", type_=UtcDateTime), delivery.c.next_attempt_at),
    )
)


@dataclass(frozen=True)
class Attempt:
    """What became of one attempt at one delivery; `next_attempt_at` only where it waits."""

    delivery_id: int
    state: DeliveryState
    status: int | None
    reason: str
    next_attempt_at: datetime | None
    at: datetime
    asks_commitment: bool = False


@dataclass(frozen=True)
class Which:
    """Deliveries a person means: those of a job, of an instance, to a destination; each left out means any."""

    job_id: str | None = None
    destination: str | None = None
    sop_instance_uid: str | None = None

    def matches(self) -> list[sa.ColumnElement[bool]]:
        """The conditions on `delivery`."""
        products = sa.select(product.c.id)
        found: list[sa.ColumnElement[bool]] = []
        if self.job_id is not None:
            found.append(delivery.c.product_id.in_(products.where(product.c.job_id == self.job_id)))
        if self.sop_instance_uid is not None:
            only = products.where(product.c.sop_instance_uid == self.sop_instance_uid)
            found.append(delivery.c.product_id.in_(only))
        if self.destination is not None:
            found.append(delivery.c.destination == self.destination)
        return found


class Deliveries(Database):
    """The ledger of what goes where."""

    def due_deliveries(
        self, destination: str, *, now: datetime, limit: int, up_to: int | None = None
    ) -> list[Delivery]:
        """What waits for a destination and may be tried now: by priority, then oldest first; nothing while it is held.

        Parameters
        ----------
        up_to
            The last `DeliveryPriority` that may go now; None: all.
        """
        is_held = sa.exists().where(destination_hold.c.destination == destination)
        query = (
            sa.select(delivery, *[product.c[name] for name in STORED])
            .join(product, delivery.c.product_id == product.c.id)
            .where(
                delivery.c.destination == destination,
                delivery.c.state == _WAITING,
                delivery.c.next_attempt_at <= now,
                ~is_held,
                *([] if up_to is None else [delivery.c.priority <= up_to]),
            )
            .order_by(delivery.c.priority, delivery.c.id)
            .limit(limit)
        )
        with self._reading() as connection:
            return [
                Delivery(
                    id=row["id"],
                    instance=stored_instance(row),
                    destination=row["destination"],
                    state=DeliveryState(row["state"]),
                    attempts=row["attempts"],
                    next_attempt_at=row["next_attempt_at"],
                    status=row["status"],
                    reason=row["reason"],
                    priority=row["priority"],
                    queued_at=row["queued_at"],
                )
                for row in connection.execute(query).mappings()
            ]

    def record_attempts(self, attempts: Iterable[Attempt]) -> None:
        """Record the outcomes of several attempts, all with one commit."""
        rows = [
            {
                "row": each.delivery_id, "arrived": each.state is DeliveryState.DELIVERED, "to": each.state,
                "answer": each.status, "why": each.reason, "again": each.next_attempt_at, "now": each.at,
                "asks": "" if each.asks_commitment and each.state is DeliveryState.DELIVERED else None,
            }
            for each in attempts
        ]  # fmt: skip
        if rows:
            with self._writing() as connection:
                connection.execute(_RECORD, rows)

    def hold_deliveries(self, which: Which, reason: str, *, now: datetime) -> int:
        """Hold what still waits; how many rows. An instance that is on its way arrives nevertheless."""
        return self._move(which, [_WAITING], {"state": _HELD, "reason": reason}, now)

    def release_deliveries(self, which: Which, *, now: datetime) -> int:
        """Let what is held go at once; how many rows."""
        return self._move(which, [_HELD], self._afresh(now), now)

    def resend_deliveries(self, which: Which, *, now: datetime, delivered: bool = False) -> int:
        """Try what has failed, or waits for its next attempt, at once and as if for the first time; how many rows.

        Parameters
        ----------
        delivered
            Send what has arrived again too.
        """
        states = [_WAITING, _FAILED, *([DeliveryState.DELIVERED] if delivered else [])]
        return self._move(which, states, self._afresh(now), now)

    def hold_destination(self, destination: str, reason: str, *, now: datetime) -> None:
        """Send nothing to a destination, present or future, until it is released."""
        with self._writing() as connection:
            connection.execute(destination_hold.delete().where(destination_hold.c.destination == destination))
            connection.execute(destination_hold.insert().values(destination=destination, reason=reason, held_at=now))

    def release_destination(self, destination: str) -> bool:
        """Send to it again; whether it was held."""
        with self._writing() as connection:
            held = destination_hold.delete().where(destination_hold.c.destination == destination)
            return connection.execute(held).rowcount > 0

    def senders_of(self, series_instance_uid: str) -> list[str]:
        """Calling AE titles that the instances of a series came from."""
        query = (
            sa.select(association.c.calling_ae_title)
            .join(instance, instance.c.association_id == association.c.id)
            .join(series, instance.c.series_id == series.c.id)
            .where(series.c.series_instance_uid == series_instance_uid)
            .group_by(association.c.calling_ae_title)
            .order_by(sa.func.min(instance.c.id))
        )
        with self._reading() as connection:
            return list(connection.scalars(query))

    def unannounced(self, destination: str, *, since: datetime) -> list[str]:
        """Jobs all of which has arrived there, the last of it from `since` on, as nobody was told; oldest first.

        What still wants a storage commitment has not arrived.
        """
        has_arrived = sa.and_(delivery.c.state == DeliveryState.DELIVERED, delivery.c.transaction_uid.is_(None))
        query = (
            sa.select(product.c.job_id)
            .join(delivery, delivery.c.product_id == product.c.id)
            .where(delivery.c.destination == destination)
            .group_by(product.c.job_id)
            .having(
                sa.func.sum(sa.case((has_arrived, 0), else_=1)) == 0,
                sa.func.count(delivery.c.id) > sa.func.count(delivery.c.announced_at),
                sa.func.max(delivery.c.updated_at) >= since,
            )
            .order_by(sa.func.min(delivery.c.id))
        )
        with self._reading() as connection:
            return list(connection.scalars(query))

    def arrived(self, job_id: str, destination: str) -> list[Instance]:
        """What of a job has arrived there."""
        query = (
            sa.select(*[product.c[name] for name in STORED])
            .join(delivery, delivery.c.product_id == product.c.id)
            .where(*Which(job_id=job_id, destination=destination).matches())
            .where(delivery.c.state == DeliveryState.DELIVERED)
            .order_by(delivery.c.id)
        )
        with self._reading() as connection:
            return [stored_instance(row) for row in connection.execute(query).mappings()]

    def note_announced(self, job_id: str, destination: str, *, now: datetime) -> None:
        """Whom it concerns was told that all of a job has arrived."""
        rows = delivery.update().where(*Which(job_id=job_id, destination=destination).matches())
        with self._writing() as connection:
            connection.execute(rows.values(announced_at=now))

    def undelivered(self, job_id: str) -> int:
        """How many of a job's rows have not arrived, for whatever reason: none of its instances may be deleted."""
        rows = sa.select(sa.func.count(delivery.c.id)).where(
            *Which(job_id=job_id).matches(),
            delivery.c.state.not_in([DeliveryState.DELIVERED, DeliveryState.CANCELLED]),
        )
        with self._reading() as connection:
            return int(connection.execute(rows).scalar_one())

    def _afresh(self, now: datetime) -> dict[str, Any]:
        return {
            "state": _WAITING, "reason": "", "attempts": 0, "next_attempt_at": now, "queued_at": now,
            "committed_at": None, "announced_at": None, "transaction_uid": None,
        }  # fmt: skip

    def _move(self, which: Which, states: list[DeliveryState], values: dict[str, Any], now: datetime) -> int:
        rows = delivery.update().where(*which.matches(), delivery.c.state.in_(states))
        with self._writing() as connection:
            return connection.execute(rows.values(**values, updated_at=now)).rowcount
