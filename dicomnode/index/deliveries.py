"""One row per (instance, destination): what is due, and what became of each attempt."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from dicomnode.index.database import STORED, Database, stored_instance
from dicomnode.index.tables import delivery, product
from dicomnode.model import Delivery, DeliveryState


class Deliveries(Database):
    """The ledger of what goes where."""

    def due_deliveries(self, destination: str, *, now: datetime, limit: int) -> list[Delivery]:
        """What waits for a destination and may be tried now, oldest first."""
        query = (
            sa.select(delivery, *[product.c[name] for name in STORED])
            .join(product, delivery.c.product_id == product.c.id)
            .where(
                delivery.c.destination == destination,
                delivery.c.state == DeliveryState.WAITING,
                delivery.c.next_attempt_at <= now,
            )
            .order_by(delivery.c.id)
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
                )
                for row in connection.execute(query).mappings()
            ]

    def record_delivery(
        self,
        delivery_id: int,
        *,
        state: DeliveryState,
        status: int | None,
        reason: str,
        next_attempt_at: datetime | None,
        now: datetime,
    ) -> None:
        """Record the outcome of one attempt."""
        values: dict[str, Any] = {
            "state": state,
            "status": status,
            "reason": reason,
            "attempts": delivery.c.attempts + 1,
            "updated_at": now,
        }
        if next_attempt_at is not None:
            values["next_attempt_at"] = next_attempt_at
        with self._writing() as connection:
            connection.execute(delivery.update().where(delivery.c.id == delivery_id).values(**values))
