"""What former jobs had sent, and how it is withdrawn once others stand in its place.

Law: what was sent stays on record; it is withdrawn with the commit that puts its successor, or the note, on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime

import sqlalchemy as sa

from dicomnode.index.database import Database, insert_new, stored_instance
from dicomnode.index.tables import delivery, job, pair, product
from dicomnode.model import DeliveryPriority, DeliveryState, JobState, Product

NOTE = "note"
"""The kind of product that withdraws others."""

Notes = Sequence[tuple[Product, Sequence[str]]]
"""Rejection notes, each with the destinations that it goes to."""


class Withdrawals(Database):
    """Predecessors of jobs, and notes about what they sent."""

    def former_jobs(self, job_id: str) -> list[str]:
        """The jobs whose pairs this one's have superseded, oldest first."""
        own, former = pair.alias(), pair.alias()
        query = (
            sa.select(former.c.job_id)
            .join(
                own,
                sa.and_(
                    own.c.rule_id == former.c.rule_id,
                    own.c.fixed_series_id == former.c.fixed_series_id,
                    own.c.moving_series_id == former.c.moving_series_id,
                    own.c.id > former.c.id,
                ),
            )
            .where(own.c.job_id == job_id, former.c.job_id != job_id, former.c.superseded_at.is_not(None))
            .group_by(former.c.job_id)
            .order_by(sa.func.min(former.c.id))
        )
        with self._reading() as connection:
            return list(connection.scalars(query))

    def made_already(self, sop_instance_uids: Sequence[str]) -> set[str]:
        """Those that some job has made."""
        with self._reading() as connection:
            some = sa.select(product.c.sop_instance_uid).where(product.c.sop_instance_uid.in_(sop_instance_uids))
            return set(connection.scalars(some))

    def sent_by(self, job_ids: Sequence[str]) -> dict[str, list[Product]]:
        """What these jobs have delivered, or may be delivering now, and nothing has withdrawn; by destination.

        A destination to which nothing has arrived yet is left out.
        """
        arrived = sa.func.max(sa.case((delivery.c.state == DeliveryState.DELIVERED, 1), else_=0))
        has_any = (
            sa.select(delivery.c.destination)
            .join(product, delivery.c.product_id == product.c.id)
            .where(product.c.job_id.in_(job_ids))
            .group_by(delivery.c.destination)
            .having(arrived == 1)
        )
        query = (
            sa.select(product, delivery.c.destination)
            .join(delivery, delivery.c.product_id == product.c.id)
            .where(
                product.c.job_id.in_(job_ids),
                product.c.kind != NOTE,
                delivery.c.withdrawn_at.is_(None),
                delivery.c.state.in_([DeliveryState.DELIVERED, DeliveryState.WAITING]),
                delivery.c.destination.in_(has_any),
            )
            .order_by(product.c.id)
        )
        found: dict[str, list[Product]] = {}
        with self._reading() as connection:
            for row in connection.execute(query).mappings():
                made = Product(row["job_id"], row["kind"], stored_instance(row))
                found.setdefault(row["destination"], []).append(made)
        return found

    def _withdraw(
        self, connection: sa.Connection, job_ids: Sequence[str], notes: Notes, why: str, now: datetime
    ) -> None:
        """What these jobs have not delivered never goes; what they have is marked where a note goes."""
        of_jobs = delivery.c.product_id.in_(
            sa.select(product.c.id).where(product.c.job_id.in_(job_ids), product.c.kind != NOTE)
        )
        noted = delivery.c.destination.in_({name for _, destinations in notes for name in destinations})
        fresh = delivery.c.withdrawn_at.is_(None)
        connection.execute(delivery.update().where(of_jobs, noted, fresh).values(withdrawn_at=now))
        open_states = [DeliveryState.WAITING, DeliveryState.HELD, DeliveryState.FAILED]
        connection.execute(
            delivery.update()
            .where(of_jobs, delivery.c.state.in_(open_states))
            .values(state=DeliveryState.CANCELLED, reason=why, updated_at=now)
        )

    def reject_job(self, job_id: str, reason: str, notes: Notes, *, priority: DeliveryPriority, now: datetime) -> None:
        """A person rejects what a job made: nothing more of it is sent, and the notes go to who has it already."""
        with self._writing() as connection:
            self._withdraw(connection, [job_id], notes, reason, now)
            self._send(connection, job_id, notes, priority, now)
            values = {"state": JobState.REJECTED, "reason": reason, "finished_at": now}
            connection.execute(job.update().where(job.c.id == job_id).values(values))

    def _send(
        self, connection: sa.Connection, job_id: str, notes: Notes, priority: DeliveryPriority, now: datetime
    ) -> None:
        """Record the notes as products of the job and put each on its way."""
        for made, destinations in notes:
            insert_new(connection, product, {"job_id": job_id, "kind": made.kind, **asdict(made.instance)})
            same = product.c.sop_instance_uid == made.instance.sop_instance_uid
            product_id = connection.execute(sa.select(product.c.id).where(same)).scalar_one()
            insert_new(connection, delivery, delivery_rows([product_id], destinations, priority=priority, now=now))


def delivery_rows(
    product_ids: Iterable[int],
    destinations: Sequence[str],
    *,
    priority: DeliveryPriority,
    now: datetime,
    held: str = "",
) -> list[dict[str, object]]:
    """Rows of the ledger, one for each product and destination; `held`: why none may be sent before it is released."""
    state = DeliveryState.HELD if held else DeliveryState.WAITING
    return [
        {
            "product_id": product_id, "destination": name, "state": state, "attempts": 0, "reason": held,
            "next_attempt_at": now, "updated_at": now, "queued_at": now, "priority": priority,
        }
        for product_id in product_ids
        for name in destinations
    ]  # fmt: skip
