"""Instances that came after their series was complete, and what becomes of the pairs and jobs made without them."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from dicomnode.index.database import Database, series_key
from dicomnode.index.tables import instance, job, pair, series
from dicomnode.model import JobState, SeriesState

SUPERSEDED = "superseded: instances came late, and the pair is made again with them"


_UNDELIVERED = (JobState.WAITING, JobState.HELD, JobState.APPROVAL)
"""States of a job that is in nobody's hands and of which nothing is on its way."""


class Late(Database):
    """Complete series that grew."""

    def late_series(self) -> dict[str, int]:
        """How many instances came to each paired series after it was complete, by Series Instance UID."""
        came_late = sa.and_(instance.c.series_id == series.c.id, instance.c.received_at > series.c.complete_at)
        query = (
            sa.select(series.c.series_instance_uid, sa.func.count(instance.c.id))
            .outerjoin(instance, came_late)
            .where(series.c.state == SeriesState.PAIRED, series.c.last_received_at > series.c.complete_at)
            .group_by(series.c.id)
        )
        with self._reading() as connection:
            # one that was received before and indexed after is late too
            return {row[0]: max(row[1], 1) for row in connection.execute(query)}

    def note_series(self, series_instance_uid: str, note: str) -> None:
        """Write down what is remarkable of a series, for `status`."""
        with self._writing() as connection:
            connection.execute(
                series.update().where(series.c.series_instance_uid == series_instance_uid).values(note=note)
            )

    def ignore_late(self, series_instance_uid: str, note: str) -> None:
        """Leave a series as it was complete; its late instances stay stored."""
        with self._writing() as connection:
            connection.execute(
                series.update()
                .where(series.c.series_instance_uid == series_instance_uid)
                .values(complete_at=series.c.last_received_at, note=note)
            )

    def reopen_series(self, series_instance_uid: str, note: str, *, supersede: bool, now: datetime) -> list[str]:
        """Receive a complete series again, to be complete with what came late.

        Parameters
        ----------
        supersede
            Its pairs are made again: those that stand are marked, jobs of theirs that have not begun are cancelled,
            one that runs delivers nothing, and what was delivered stays.

        Returns
        -------
        list[str]
            The ids of jobs that were cancelled.
        """
        with self._writing() as connection:
            series_id = series_key(connection, series_instance_uid)
            connection.execute(
                series.update()
                .where(series.c.id == series_id)
                .values(state=SeriesState.RECEIVING, reason="", note=note)
            )
            if not supersede:
                return []
            standing = sa.and_(
                sa.or_(pair.c.fixed_series_id == series_id, pair.c.moving_series_id == series_id),
                pair.c.superseded_at.is_(None),
            )
            jobs = list(connection.scalars(sa.select(pair.c.job_id).where(standing).distinct()))
            of_jobs = sa.and_(pair.c.job_id.in_(jobs), pair.c.superseded_at.is_(None))
            ends = connection.execute(sa.select(pair.c.fixed_series_id, pair.c.moving_series_id).where(of_jobs)).all()
            connection.execute(pair.update().where(of_jobs).values(superseded_at=now))
            waiting = sa.and_(job.c.id.in_(jobs), job.c.state.in_(_UNDELIVERED))
            cancelled = list(connection.scalars(sa.select(job.c.id).where(waiting)))
            connection.execute(
                job.update().where(waiting).values(state=JobState.CANCELLED, reason=SUPERSEDED, finished_at=now)
            )
            partners = {key for row in ends for key in row} - {series_id}
            connection.execute(
                series.update()
                .where(series.c.id.in_(partners), series.c.state == SeriesState.PAIRED, ~is_in_a_pair())
                .values(state=SeriesState.UNPAIRED, reason="waiting: its pair is made again, with what came late")
            )
            return cancelled

    def is_superseded(self, job_id: str) -> bool:
        """Whether the job's pair is made again with instances that came after it."""
        query = sa.select(pair.c.id).where(pair.c.job_id == job_id, pair.c.superseded_at.is_not(None)).limit(1)
        with self._reading() as connection:
            return connection.scalar(query) is not None


def is_in_a_pair() -> sa.ColumnElement[bool]:
    """Whether a series is in a pair that stands."""
    return sa.exists().where(
        sa.or_(pair.c.fixed_series_id == series.c.id, pair.c.moving_series_id == series.c.id),
        pair.c.superseded_at.is_(None),
    )
