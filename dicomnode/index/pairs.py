"""What pairing reads, and the pairs and jobs it makes: all of one decision in one transaction."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from dicomnode.index.database import Database, inserted_key, series_key
from dicomnode.index.tables import job, pair, patient, rule_set, series, volume
from dicomnode.model import JobState, Pair, SeriesState, VolumeRef

Enqueue = Callable[[sa.Connection, str], None]
"""Puts the durable job with this id on the queue, in the caller's transaction."""


class Pairs(Database):
    """Complete volumes, rule sets, pairs."""

    def patients_to_pair(self) -> list[tuple[str, str]]:
        """(PatientID, IssuerOfPatientID) of every patient who has a complete series in no pair."""
        query = (
            sa.select(patient.c.patient_id, patient.c.issuer_of_patient_id)
            .join(series, series.c.patient_id == patient.c.id)
            .where(series.c.state == SeriesState.UNPAIRED, series.c.is_own_output.is_(False))
            .distinct()
        )
        with self._reading() as connection:
            return [(row[0], row[1]) for row in connection.execute(query)]

    def volumes_of(self, patient_id: str, issuer_of_patient_id: str) -> list[VolumeRef]:
        """The volumes of a patient's complete series, the node's own output left out."""
        query = (
            sa.select(volume.c.facts)
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
            return [_volume_ref(facts) for facts in connection.scalars(query)]

    def pairs_of(self, series_instance_uids: Collection[str]) -> list[Pair]:
        """Every pair one of these series is in."""
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
                )
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
    ) -> list[str]:
        """Record pairs, their jobs on the durable queue, and why other series are in none, all or nothing.

        Returns
        -------
        list[str]
            The job ids, in the order of `pairs`. A pair that stands already is left as it is.
        """
        with self._writing() as connection:
            ids = [
                job_id
                for each in pairs
                if (job_id := self._add_pair(connection, each, rule_version, enqueue, now)) is not None
            ]
            for uid, reason in reasons.items():
                connection.execute(
                    series.update()
                    .where(series.c.series_instance_uid == uid, series.c.state == SeriesState.UNPAIRED)
                    .values(reason=reason)
                )
            return ids

    def _add_pair(
        self, connection: sa.Connection, new: Pair, rule_version: int, enqueue: Enqueue, now: datetime
    ) -> str | None:
        fixed_id = series_key(connection, new.fixed_series_instance_uid)
        moving_id = series_key(connection, new.moving_series_instance_uid)
        stands = sa.select(pair.c.id).where(
            pair.c.rule_id == new.rule_id,
            pair.c.moving_series_id == moving_id,
            pair.c.moving_volume_number == new.moving_volume_number,
        )
        if connection.scalar(stands) is not None:
            return None
        pair_id = inserted_key(
            connection.execute(
                pair.insert().values(
                    rule_id=new.rule_id,
                    rule_version=rule_version,
                    fixed_series_id=fixed_id,
                    fixed_volume_number=new.fixed_volume_number,
                    moving_series_id=moving_id,
                    moving_volume_number=new.moving_volume_number,
                    created_at=now,
                )
            )
        )
        connection.execute(
            series.update().where(series.c.id.in_([fixed_id, moving_id])).values(state=SeriesState.PAIRED, reason="")
        )
        job_id = str(uuid.uuid4())
        connection.execute(
            job.insert().values(
                id=job_id,
                pair_id=pair_id,
                state=JobState.WAITING,
                stage="",
                progress=0.0,
                attempts=0,
                reason="",
                report={},
                created_at=now,
            )
        )
        enqueue(connection, job_id)
        return job_id

    def rule_set_version(self, text: str, sha256: str, *, now: datetime) -> int:
        """The version of this rule set: the newest one if it is the same text, else a new one."""
        with self._writing() as connection:
            newest = connection.execute(sa.select(rule_set).order_by(rule_set.c.version.desc()).limit(1)).first()
            if newest is not None and newest.sha256 == sha256:
                return int(newest.version)
            return inserted_key(connection.execute(rule_set.insert().values(text=text, sha256=sha256, created_at=now)))

    def rule_set_text(self, version: int) -> str:
        """The rules of a version, as they were read."""
        with self._reading() as connection:
            return str(connection.execute(sa.select(rule_set.c.text).where(rule_set.c.version == version)).scalar_one())


def _volume_ref(facts: Mapping[str, Any]) -> VolumeRef:
    values = dict(facts)
    values["last_received_at"] = datetime.fromisoformat(values["last_received_at"])
    values["shape"] = tuple(values["shape"])
    values["affine"] = tuple(values["affine"])
    return VolumeRef(**values)
