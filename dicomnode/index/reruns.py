"""Jobs that are made again."""

from __future__ import annotations

import uuid
from datetime import datetime

import sqlalchemy as sa

from dicomnode.errors import ConfigError
from dicomnode.index.database import inserted_key
from dicomnode.index.pairs import Enqueue, Pairs
from dicomnode.index.tables import job, pair
from dicomnode.model import JobPlan, JobState

ENDED = (JobState.DONE, JobState.REJECTED, JobState.FAILED, JobState.CANCELLED, JobState.APPROVAL)
"""States in which a job holds nothing that a worker would go on with."""


class Reruns(Pairs):
    """Successors of jobs that have ended."""

    def rerun_job(
        self, job_id: str, *, rule_version: int | None, plan: JobPlan, reason: str, enqueue: Enqueue, now: datetime
    ) -> str:
        """Make a job's pairs again as a new job; the former pairs are superseded. The new job's id.

        Parameters
        ----------
        rule_version
            Of the rules to go by; None: the former job's.
        reason
            Noted with a former job that waits for approval: it is cancelled.

        Raises
        ------
        ConfigError
            The job has not ended, or its pairs are made again already.
        """
        with self._writing() as connection:
            state = JobState(connection.execute(sa.select(job.c.state).where(job.c.id == job_id)).scalar_one())
            if state not in ENDED:
                raise ConfigError("rerun", "JOB", job_id, f"a job that has ended; this one is {state}")
            standing = sa.select(pair).where(pair.c.job_id == job_id, pair.c.superseded_at.is_(None))
            rows = connection.execute(standing.order_by(pair.c.id)).mappings().all()
            if not rows:
                raise ConfigError("rerun", "JOB", job_id, "the newest job of its pair: this one was superseded")
            connection.execute(pair.update().where(pair.c.id.in_([r["id"] for r in rows])).values(superseded_at=now))
            waiting = sa.and_(job.c.id == job_id, job.c.state == JobState.APPROVAL)
            connection.execute(
                job.update().where(waiting).values(state=JobState.CANCELLED, reason=reason, finished_at=now)
            )
            new_id = str(uuid.uuid4())
            ids = [
                inserted_key(
                    connection.execute(
                        pair.insert().values(
                            {name: row[name] for name in row if name not in ("id", "created_at", "superseded_at")}
                            | {"job_id": new_id, "created_at": now, "rule_version": rule_version or row["rule_version"]}
                        )
                    )
                )
                for row in rows
            ]
            self._add_job(connection, new_id, ids[0], plan, enqueue, now)
            return new_id
