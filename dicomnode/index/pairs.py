"""What pairing reads, and the pairs and jobs it makes: all of one decision in one transaction."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from dicomnode.errors import ConfigError
from dicomnode.index.database import inserted_key, series_key
from dicomnode.index.decisions import Decisions
from dicomnode.index.tables import job, pair, patient, series, volume, work_item
from dicomnode.index.tables import study as studies
from dicomnode.model import Ambiguity, JobPlan, JobState, Pair, SeriesState, VolumeRef, WorkItem

Enqueue = Callable[[sa.Connection, str, datetime], None]
"""Puts the durable job with this id on the queue, in the caller's transaction; the job due first begins first."""


NOT_LOOKED_AT = "not looked at yet"
"""The reason of a series from its completion to the first decision."""


class Pairs(Decisions):
    """Complete volumes, and the pairs and jobs made of them."""

    def patients_to_pair(self, *, since: datetime) -> list[tuple[str, str]]:
        """(PatientID, IssuerOfPatientID) of every patient who has a complete series in no pair.

        Of those that the rules have looked at and do not wait for, only the ones received from `since` on.
        """
        is_pending = sa.or_(series.c.reason == NOT_LOOKED_AT, series.c.reason.startswith("waiting: "))
        query = (
            sa.select(patient.c.patient_id, patient.c.issuer_of_patient_id)
            .join(series, series.c.patient_id == patient.c.id)
            .where(series.c.state == SeriesState.UNPAIRED, series.c.is_own_output.is_(False))
            .where(sa.or_(is_pending, series.c.last_received_at >= since))
            .distinct()
        )
        with self._reading() as connection:
            return [(row[0], row[1]) for row in connection.execute(query)]

    def patients_of(self, *, study: str | None = None, since: datetime | None = None) -> list[tuple[str, str]]:
        """(PatientID, IssuerOfPatientID) of a study's patient, or of all who sent a series from `since` on."""
        query = sa.select(patient.c.patient_id, patient.c.issuer_of_patient_id).distinct()
        query = query.join(series, series.c.patient_id == patient.c.id)
        if study is not None:
            query = query.join(studies, series.c.study_id == studies.c.id).where(studies.c.study_instance_uid == study)
        if since is not None:
            query = query.where(series.c.last_received_at >= since)
        with self._reading() as connection:
            return [(row[0], row[1]) for row in connection.execute(query)]

    def volumes_of(self, patient_id: str, issuer_of_patient_id: str) -> list[VolumeRef]:
        """The volumes of a patient's complete series, the node's own output left out."""
        query = (
            sa.select(volume.c.facts, series.c.is_fetched, series.c.complete_at)
            .join(series, volume.c.series_id == series.c.id)
            .join(patient, series.c.patient_id == patient.c.id)
            .where(
                patient.c.patient_id == patient_id,
                patient.c.issuer_of_patient_id == issuer_of_patient_id,
                series.c.is_own_output.is_(False),
                series.c.state.in_([SeriesState.PAIRED, SeriesState.UNPAIRED]),
            )
            .order_by(series.c.id, volume.c.number)
        )
        with self._reading() as connection:
            return [_volume_ref(*row) for row in connection.execute(query)]

    def reasons_of(self, patient_id: str, issuer_of_patient_id: str) -> dict[str, str]:
        """Why a patient's series are none that `volumes_of` gives, by Series Instance UID."""
        query = (
            sa.select(series.c.series_instance_uid, series.c.state, series.c.reason, series.c.is_own_output)
            .join(patient, series.c.patient_id == patient.c.id)
            .where(patient.c.patient_id == patient_id, patient.c.issuer_of_patient_id == issuer_of_patient_id)
            .where(sa.or_(series.c.is_own_output, series.c.state.not_in([SeriesState.PAIRED, SeriesState.UNPAIRED])))
            .order_by(series.c.id)
        )
        with self._reading() as connection:
            rows = connection.execute(query).all()
        own = "the node's own output, or a registration object"
        return {uid: own if is_own else reason or f"is {state}" for uid, state, reason, is_own in rows}

    def pairs_of(self, series_instance_uids: Collection[str]) -> list[Pair]:
        """Every standing pair one of these series is in."""
        fixed, moving = series.alias(), series.alias()
        query = (
            sa.select(
                pair.c.rule_id,
                fixed.c.series_instance_uid,
                moving.c.series_instance_uid,
                pair.c.fixed_volume_number,
                pair.c.moving_volume_number,
            )
            .join(fixed, pair.c.fixed_series_id == fixed.c.id)
            .join(moving, pair.c.moving_series_id == moving.c.id)
            .where(
                sa.or_(
                    fixed.c.series_instance_uid.in_(series_instance_uids),
                    moving.c.series_instance_uid.in_(series_instance_uids),
                ),
                pair.c.superseded_at.is_(None),
            )
        )
        with self._reading() as connection:
            return [Pair(*row) for row in connection.execute(query)]

    def add_pairs(
        self,
        pairs: Sequence[Pair],
        reasons: Mapping[str, str],
        *,
        rule_version: int,
        enqueue: Enqueue,
        now: datetime,
        plans: Mapping[str, JobPlan] | None = None,
        patient_of: tuple[str, str] | None = None,
        ambiguities: Sequence[Ambiguity] = (),
        trace: Sequence[Any] = (),
    ) -> list[str]:
        """Record a decision: pairs, their jobs on the durable queue, why other series are in none; all or nothing.

        Parameters
        ----------
        plans
            How the jobs of each rule are queued, by rule id.
        patient_of
            PatientID and IssuerOfPatientID the decision is about; with it, trace and work items are kept too.

        Returns
        -------
        list[str]
            The job ids, in the order of `pairs`. A pair that stands already is left as it is.
        """
        plans = plans or {}
        with self._writing() as connection:
            decision_id = None
            if patient_of is not None:
                known = sa.select(patient.c.id).where(
                    patient.c.patient_id == patient_of[0], patient.c.issuer_of_patient_id == patient_of[1]
                )
                patient_id = int(connection.execute(known).scalar_one())
                self._note_ambiguities(connection, patient_id, ambiguities, rule_version, now)
                decision_id = self._add_decision(connection, patient_id, trace, rule_version, now)
            ids = self._add_new(connection, pairs, rule_version, decision_id, plans, enqueue, now)
            for uid, reason in reasons.items():
                connection.execute(
                    series.update()
                    .where(series.c.series_instance_uid == uid, series.c.state == SeriesState.UNPAIRED)
                    .values(reason=reason)
                )
            return ids

    def settle(
        self, item: WorkItem, pairs: Sequence[Pair], *, by: str, plan: JobPlan, enqueue: Enqueue, now: datetime
    ) -> list[str]:
        """Make the pairs that a person chose, by the rules that asked; the job ids.

        Raises
        ------
        ConfigError
            The item is not open any more.
        """
        with self._writing() as connection:
            closed = connection.execute(
                work_item.update()
                .where(work_item.c.id == item.id, work_item.c.state == "open")
                .values(state="settled", closed_at=now, closed_by=by[:64])
            )
            if closed.rowcount != 1:
                raise ConfigError("settle", "ITEM", item.id, "an item that is still open")
            plans = {item.ambiguity.rule_id: plan}
            return self._add_new(connection, pairs, item.rule_version, None, plans, enqueue, now)

    def _add_new(
        self,
        connection: sa.Connection,
        pairs: Sequence[Pair],
        rule_version: int,
        decision_id: int | None,
        plans: Mapping[str, JobPlan],
        enqueue: Enqueue,
        now: datetime,
    ) -> list[str]:
        """The job ids of the pairs that did not stand, in their order; those of one job follow each other."""
        jobs: dict[tuple[object, ...], str] = {}
        for new in pairs:
            key = (
                (new.rule_id, new.fixed_series_instance_uid, new.fixed_volume_number)
                if plans.get(new.rule_id, JobPlan()).is_one_job
                else (new,)
            )
            job_id = jobs.get(key) or str(uuid.uuid4())
            pair_id = self._add_pair(connection, new, rule_version, decision_id, job_id, now)
            if pair_id is None:
                continue
            if key not in jobs:
                jobs[key] = job_id
                self._add_job(connection, job_id, pair_id, plans.get(new.rule_id, JobPlan()), enqueue, now)
        return list(jobs.values())

    def _add_pair(
        self,
        connection: sa.Connection,
        new: Pair,
        rule_version: int,
        decision_id: int | None,
        job_id: str,
        now: datetime,
    ) -> int | None:
        """The new pair's id; None where it stands already."""
        fixed_id = series_key(connection, new.fixed_series_instance_uid)
        moving_id = series_key(connection, new.moving_series_instance_uid)
        volumes = {
            "rule_id": new.rule_id,
            "fixed_series_id": fixed_id,
            "fixed_volume_number": new.fixed_volume_number,
            "moving_series_id": moving_id,
            "moving_volume_number": new.moving_volume_number,
        }
        same = [pair.c[name] == value for name, value in volumes.items()]
        if connection.scalar(sa.select(pair.c.id).where(*same, pair.c.superseded_at.is_(None))):
            return None
        about = {"rule_version": rule_version, "created_at": now, "decision_id": decision_id, "job_id": job_id}
        pair_id = inserted_key(connection.execute(pair.insert().values(**volumes, **about)))
        connection.execute(
            series.update().where(series.c.id.in_([fixed_id, moving_id])).values(state=SeriesState.PAIRED, reason="")
        )
        return pair_id

    def _add_job(
        self, connection: sa.Connection, job_id: str, pair_id: int, plan: JobPlan, enqueue: Enqueue, now: datetime
    ) -> None:
        connection.execute(
            job.insert().values(
                id=job_id,
                pair_id=pair_id,
                state=JobState.HELD if plan.held else JobState.WAITING,
                stage="",
                progress=0.0,
                attempts=0,
                reason=plan.held,
                report={},
                created_at=now,
            )
        )
        if not plan.held:
            enqueue(connection, job_id, now + timedelta(seconds=plan.patience_s))

    def held_jobs(self) -> list[tuple[str, int, str, datetime]]:
        """(job id, rule version, rule id, created at) of jobs that wait for their rule's hours, oldest first."""
        query = (
            sa.select(job.c.id, pair.c.rule_version, pair.c.rule_id, job.c.created_at)
            .join(pair, job.c.pair_id == pair.c.id)
            .where(job.c.state == JobState.HELD)
            .order_by(job.c.created_at, job.c.id)
        )
        with self._reading() as connection:
            return [(row[0], row[1], row[2], row[3]) for row in connection.execute(query)]

    def waiting_jobs(self) -> int:
        """How many jobs stand on the queue, none of them begun."""
        query = sa.select(sa.func.count()).select_from(job).where(job.c.state == JobState.WAITING)
        with self._reading() as connection:
            return int(connection.scalar(query) or 0)

    def release_job(self, job_id: str, *, due: datetime, enqueue: Enqueue) -> None:
        """Put a held job on the queue."""
        with self._writing() as connection:
            released = connection.execute(
                job.update()
                .where(job.c.id == job_id, job.c.state == JobState.HELD)
                .values(state=JobState.WAITING, reason="")
            )
            if released.rowcount == 1:
                enqueue(connection, job_id, due)


def _volume_ref(facts: Mapping[str, Any], is_fetched: bool, complete_at: datetime) -> VolumeRef:
    """`complete_at` is earlier than what the volume says of its last instance where the clock was set back since."""
    values = {**facts, "is_fetched": is_fetched}
    values["last_received_at"] = min(datetime.fromisoformat(values["last_received_at"]), complete_at)
    values["shape"] = tuple(values["shape"])
    values["affine"] = tuple(values["affine"])
    return VolumeRef(**values)
