"""What a clock that was set back leaves behind: times that have not come yet, and whoever waits for them.

Law: no series, delivery, request or report waits longer because the machine's clock was once ahead.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa

from dicomnode.index.database import Database
from dicomnode.index.priors import OPEN
from dicomnode.index.tables import commitment, delivery, instance, prior_fetch, series
from dicomnode.model import DeliveryState

TOLERANCE = timedelta(seconds=5)
"""Clocks are corrected by less than this all the time; nobody waits noticeably longer for it."""


class Clock(Database):
    """Times that were written down before the clock was set back."""

    def is_ahead_of(self, now: datetime) -> bool:
        """Whether something is recorded as done later than now."""
        latest = (sa.func.max(series.c.last_received_at), sa.func.max(delivery.c.updated_at))
        with self._reading() as connection:
            found = [connection.scalar(sa.select(each)) for each in latest]
        return any(each is not None and each > now + TOLERANCE for each in found)

    def clock_was_set_back(self, *, now: datetime) -> None:
        """Quiet periods begin anew for what came later than now; what is to be tried later than now is due."""
        waits = (
            (delivery, delivery.c.state == DeliveryState.WAITING),
            (prior_fetch, prior_fetch.c.state.in_(OPEN)),
            (commitment, commitment.c.state == "waiting"),
        )
        with self._writing() as connection:
            for done in (
                instance.c.received_at, series.c.last_received_at, series.c.complete_at, delivery.c.updated_at,
            ):  # fmt: skip
                connection.execute(sa.update(done.table).where(done > now).values({done.name: now}))
            for table, is_waiting in waits:
                late = table.update().where(is_waiting, table.c.next_attempt_at > now)
                connection.execute(late.values(next_attempt_at=now))
