"""Jobs and what they made."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from dicomnode.index.database import insert_new, stored_instance
from dicomnode.index.tables import delivery, job, pair, product, series
from dicomnode.index.withdrawals import NOTE, Notes, Withdrawals, delivery_rows
from dicomnode.model import DeliveryPriority, Job, JobState, Pair, Product, Verdict


class Jobs(Withdrawals):
    """How far each job has come, its products, and the deliveries that end it."""

    def job(self, job_id: str) -> Job:
        """The job of that id."""
        fixed, moving = series.alias(), series.alias()
        query = (
            sa.select(
                job.c.id, pair.c.rule_id, pair.c.rule_version,
                fixed.c.series_instance_uid, moving.c.series_instance_uid,
                job.c.state, job.c.stage, job.c.attempts, job.c.verdict, job.c.reason,
                pair.c.fixed_volume_number, pair.c.moving_volume_number,
            )
            .join(pair, job.c.pair_id == pair.c.id)
            .join(fixed, pair.c.fixed_series_id == fixed.c.id)
            .join(moving, pair.c.moving_series_id == moving.c.id)
            .where(job.c.id == job_id)
        )  # fmt: skip
        with self._reading() as connection:
            row = connection.execute(query).one()
        verdict = None if row[8] is None else Verdict(row[8])
        return Job(*row[:5], JobState(row[5]), row[6], row[7], verdict, *row[9:])

    def jobs_like(self, beginning: str) -> list[str]:
        """The ids of all jobs that begin so; the one job, where `beginning` is a whole id."""
        query = sa.select(job.c.id).where(job.c.id.startswith(beginning, autoescape=True)).order_by(job.c.id)
        with self._reading() as connection:
            return list(connection.scalars(query))

    def pairs_of_job(self, job_id: str) -> list[Pair]:
        """Every pair that the job registers; all have one fixed volume."""
        fixed, moving = series.alias(), series.alias()
        query = (
            sa.select(
                pair.c.rule_id, fixed.c.series_instance_uid, moving.c.series_instance_uid,
                pair.c.fixed_volume_number, pair.c.moving_volume_number,
            )
            .join(fixed, pair.c.fixed_series_id == fixed.c.id)
            .join(moving, pair.c.moving_series_id == moving.c.id)
            .where(pair.c.job_id == job_id)
            .order_by(pair.c.id)
        )  # fmt: skip
        with self._reading() as connection:
            return [Pair(*row) for row in connection.execute(query)]

    def take_up_job(self, job_id: str, *, now: datetime) -> int:
        """A worker begins or resumes the job; how often that has happened, this time included."""
        with self._writing() as connection:
            connection.execute(
                job.update()
                .where(job.c.id == job_id)
                .values(state=JobState.RUNNING, attempts=job.c.attempts + 1, stage_started_at=now)
            )
            return int(connection.execute(sa.select(job.c.attempts).where(job.c.id == job_id)).scalar_one())

    def lay_down_job(self, job_id: str) -> None:
        """A worker stops cleanly between two steps: the attempt does not count."""
        with self._writing() as connection:
            connection.execute(
                job.update().where(job.c.id == job_id, job.c.attempts > 0).values(attempts=job.c.attempts - 1)
            )

    def set_stage(self, job_id: str, stage: str, *, now: datetime) -> None:
        """Note the step that begins."""
        with self._writing() as connection:
            connection.execute(
                job.update()
                .where(job.c.id == job_id)
                .values(stage=stage, activity="", progress=0.0, stage_started_at=now)
            )

    def set_progress(self, job_id: str, progress: float, activity: str) -> None:
        """Note how much of the step in hand is done, 0 to 1, and at what it is."""
        with self._writing() as connection:
            connection.execute(job.update().where(job.c.id == job_id).values(progress=progress, activity=activity))

    def judge_job(
        self,
        job_id: str,
        verdict: Verdict,
        reason: str,
        report: Mapping[str, Any],
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the verdict with the engine's report, and what a person must know to come to it again."""
        packed = None if provenance is None else zlib.compress(json.dumps(provenance, separators=(",", ":")).encode())
        values = {"verdict": verdict, "reason": reason, "report": dict(report), "provenance": packed}
        with self._writing() as connection:
            connection.execute(job.update().where(job.c.id == job_id).values(values))

    def provenance(self, job_id: str) -> dict[str, Any] | None:
        """How the job came to its results, as `judge_job` was told; None where it has not come so far."""
        with self._reading() as connection:
            packed = connection.scalar(sa.select(job.c.provenance).where(job.c.id == job_id))
        return None if packed is None else dict(json.loads(zlib.decompress(packed)))

    def finish_job(self, job_id: str, state: JobState, reason: str, *, now: datetime) -> None:
        """Close a job: done, rejected, failed or cancelled."""
        with self._writing() as connection:
            connection.execute(
                job.update().where(job.c.id == job_id).values(state=state, reason=reason, progress=1.0, finished_at=now)
            )

    def add_products(self, products: Iterable[Product], *, adopted: Mapping[str, str] = MappingProxyType({})) -> None:
        """Record what a job made; products that stand already stay as they are.

        Parameters
        ----------
        adopted
            Job id by SOP Instance UID of what a former job made alike: what was never sent becomes that job's.
        """
        with self._writing() as connection:
            for made in products:
                insert_new(connection, product, {"job_id": made.job_id, "kind": made.kind, **asdict(made.instance)})
            for uid, job_id in adopted.items():
                unsent = ~sa.exists().where(delivery.c.product_id == product.c.id)
                same = product.c.sop_instance_uid == uid
                connection.execute(product.update().where(same, unsent).values(job_id=job_id))

    def products_of(self, job_id: str) -> list[Product]:
        """What a job made, in the order it was made."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(product).where(product.c.job_id == job_id).order_by(product.c.id))
            return [Product(job_id, row["kind"], stored_instance(row)) for row in rows.mappings()]

    def await_approval(self, job_id: str, reason: str) -> None:
        """All is made and kept, and nothing goes on its way before a person says so."""
        with self._writing() as connection:
            values = {"state": JobState.APPROVAL, "reason": reason, "progress": 1.0}
            connection.execute(job.update().where(job.c.id == job_id).values(values))

    def enqueue_deliveries(
        self,
        job_id: str,
        destinations: Sequence[str],
        *,
        now: datetime,
        priority: DeliveryPriority = DeliveryPriority.NORMAL,
        held: str = "",
        former: Sequence[str] = (),
        notes: Notes = (),
        reason: str | None = None,
        wanted: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """One delivery per (product, destination), once; the job ends with the same commit, rejected where that was its
        verdict, else done.

        Parameters
        ----------
        held
            Why none may be sent before `release_deliveries`; empty: they are due at once.
        former
            Jobs whose results these replace: what they have not delivered never goes.
        notes
            That withdraw what they have.
        reason
            The job's from now on; None: it stays.
        wanted
            The kinds of products that a destination gets, by its name; one that is not in it gets all.
        """
        with self._writing() as connection:
            own = sa.select(product.c.id, product.c.kind).where(product.c.job_id == job_id, product.c.kind != NOTE)
            made = connection.execute(own).all()
            for name in destinations:
                kinds = (wanted or {}).get(name)
                ids = [each.id for each in made if kinds is None or each.kind in kinds]
                rows = delivery_rows(ids, [name], priority=priority, now=now, held=held)
                insert_new(connection, delivery, rows)
            self._withdraw(connection, former, notes, f"superseded by job {job_id}", now)
            self._send(connection, job_id, notes, priority, now)
            ended = sa.case((job.c.verdict == Verdict.REJECT, JobState.REJECTED), else_=JobState.DONE)
            values = {"state": ended, "progress": 1.0, "finished_at": now}
            if reason is not None:
                values["reason"] = reason
            connection.execute(job.update().where(job.c.id == job_id).values(values))
