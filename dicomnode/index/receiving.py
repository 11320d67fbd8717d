"""Associations and instances as they arrive; which series are not yet complete."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa

from dicomnode.errors import LocalError
from dicomnode.index.database import Database, inserted_key, series_key, stored_instance, upsert
from dicomnode.index.late import is_in_a_pair
from dicomnode.index.tables import (
    Words,
    association,
    instance,
    journal,
    patient,
    prior_fetch,
    product,
    series,
    study,
    volume,
)
from dicomnode.model import Instance, InstanceHeader, Member, RetrievedBy, SeriesActivity, SeriesState, VolumeRef


class Added(StrEnum):
    """What became of an instance that was offered to the index."""

    NEW = "new"
    EQUAL = "equal"
    """The same SOP Instance UID with the same content stands already; nothing changed."""
    CONFLICT = "conflict"
    """The same SOP Instance UID with other content stands already; nothing changed."""


class Receiving(Database):
    """From an association to a complete series."""

    def open_association(self, *, calling_ae_title: str, called_ae_title: str, address: str, now: datetime) -> int:
        """Record an accepted association; its id."""
        with self._writing() as connection:
            values = {
                "calling_ae_title": calling_ae_title[:64],
                "called_ae_title": called_ae_title[:64],
                "address": address[:64],
            }
            return inserted_key(connection.execute(association.insert().values(**values, opened_at=now)))

    def close_association(self, association_id: int, *, now: datetime) -> None:
        """Record that an association ended, however it ended."""
        with self._writing() as connection:
            connection.execute(association.update().where(association.c.id == association_id).values(closed_at=now))

    def close_all_associations(self, *, now: datetime) -> None:
        """At start: no association of a former process is open any more."""
        with self._writing() as connection:
            connection.execute(association.update().where(association.c.closed_at.is_(None)).values(closed_at=now))

    def restart_quiet_periods(self, *, now: datetime) -> None:
        """At start: nobody could send while the node was down, so what was being received is waited for anew."""
        with self._writing() as connection:
            connection.execute(
                series.update().where(series.c.state == SeriesState.RECEIVING).values(last_received_at=now)
            )

    def add_instance(
        self,
        stored: Instance,
        header: InstanceHeader,
        *,
        association_id: int,
        retrieved_by: RetrievedBy = RetrievedBy.UNKNOWN,
        now: datetime,
    ) -> Added:
        """Index one stored instance; its series is being received again unless it is paired.

        A series belongs to the study and patient of its first instance; that later instances agree is checked
        when the series is read as a volume.
        """
        with self._writing() as connection:
            return self._add_instance(
                connection,
                stored,
                header,
                association_id=association_id,
                retrieved_by=retrieved_by,
                received_at=now,
                now=now,
            )

    def _add_instance(
        self,
        connection: sa.Connection,
        stored: Instance,
        header: InstanceHeader,
        *,
        association_id: int,
        retrieved_by: RetrievedBy,
        received_at: datetime,
        now: datetime,
    ) -> Added:
        known = connection.scalar(
            sa.select(instance.c.sha256).where(instance.c.sop_instance_uid == stored.sop_instance_uid)
        )
        is_fetched = _is_fetched(connection, header.series_instance_uid, association_id, retrieved_by)
        if known is not None:
            if not is_fetched:
                _make_current(connection, header.series_instance_uid, now)
            return Added.EQUAL if known == stored.sha256 else Added.CONFLICT
        series_id = self._series_id(connection, header, now, is_fetched=is_fetched)
        connection.execute(
            instance.insert().values(
                series_id=series_id,
                association_id=association_id,
                received_at=received_at,
                **asdict(stored),
            )
        )
        return Added.NEW

    def find_instance(self, sop_instance_uid: str) -> Instance | None:
        """The stored instance of that UID, or None."""
        with self._reading() as connection:
            query = sa.select(instance).where(instance.c.sop_instance_uid == sop_instance_uid)
            row = connection.execute(query).mappings().first()
            return None if row is None else stored_instance(row)

    def _series_id(self, connection: sa.Connection, header: InstanceHeader, now: datetime, *, is_fetched: bool) -> int:
        patient_id = upsert(
            connection,
            patient,
            {"patient_id": header.patient_id, "issuer_of_patient_id": header.issuer_of_patient_id},
        )
        study_id = upsert(
            connection, study, {"study_instance_uid": header.study_instance_uid}, {"patient_id": patient_id}
        )
        series_id = upsert(
            connection,
            series,
            {"series_instance_uid": header.series_instance_uid},
            {
                "study_id": study_id,
                "patient_id": patient_id,
                "modality": header.modality[:16],
                "is_own_output": header.is_own_output,
                "is_fetched": is_fetched,
                "state": SeriesState.RECEIVING,
                "reason": "",
                "note": "",
                "last_received_at": now,
            },
        )
        is_paired = series.c.state == SeriesState.PAIRED
        connection.execute(
            series.update()
            .where(series.c.id == series_id)
            .values(
                last_received_at=now,
                is_own_output=sa.or_(series.c.is_own_output, sa.literal(header.is_own_output)),
                is_fetched=sa.and_(series.c.is_fetched, sa.literal(is_fetched)),
                state=sa.case((is_paired, SeriesState.PAIRED), else_=SeriesState.RECEIVING),
                reason=sa.case((is_paired, series.c.reason), else_=""),
            )
        )
        return series_id

    def activities(self) -> list[SeriesActivity]:
        """Every series that is not yet complete."""
        is_open = sa.exists().where(
            instance.c.series_id == series.c.id,
            association.c.id == instance.c.association_id,
            association.c.closed_at.is_(None),
        )
        query = (
            sa.select(
                series.c.series_instance_uid,
                study.c.study_instance_uid,
                patient.c.patient_id,
                patient.c.issuer_of_patient_id,
                series.c.last_received_at,
                sa.select(sa.func.count())
                .where(instance.c.series_id == series.c.id)
                .scalar_subquery()
                .label("instances"),
                is_open.label("receiving"),
                series.c.is_fetched,
                sa.select(sa.func.min(journal.c.received_at)).scalar_subquery().label("oldest_unindexed_at"),
            )
            .join_from(series, study, series.c.study_id == study.c.id)
            .join(patient, series.c.patient_id == patient.c.id)
        )
        with self._reading() as connection:
            rows = connection.execute(query.where(series.c.state == SeriesState.RECEIVING)).mappings()
            return [SeriesActivity(**row) for row in rows]

    def instances_of(self, series_instance_uid: str) -> list[Instance]:
        """The stored instances of a series, in order of arrival."""
        query = (
            sa.select(instance)
            .join(series, instance.c.series_id == series.c.id)
            .where(series.c.series_instance_uid == series_instance_uid)
            .order_by(instance.c.id)
        )
        with self._reading() as connection:
            return [stored_instance(row) for row in connection.execute(query).mappings()]

    def drawings_near(self, series_instance_uid: str) -> list[Instance]:
        """The patient's stored Segmentations and RT Structure Sets but our own, in order of arrival.

        Which of them belong to the series, their data sets say.
        """
        of_patient = sa.select(series.c.patient_id).where(series.c.series_instance_uid == series_instance_uid)
        query = (
            sa.select(instance)
            .join(series, instance.c.series_id == series.c.id)
            .where(
                series.c.patient_id.in_(of_patient),
                series.c.modality.in_(["SEG", "RTSTRUCT"]),
                series.c.is_own_output.is_(False),
            )
            .order_by(instance.c.id)
        )
        with self._reading() as connection:
            return [stored_instance(row) for row in connection.execute(query).mappings()]

    def members_of(self, series_instance_uid: str, volume_number: int) -> list[tuple[Instance, tuple[int, ...]]]:
        """The stored instances of one volume, each with its frame numbers (empty: single-frame), as it was judged.

        Raises
        ------
        LocalError
            The series has no such volume.
        """
        query = (
            sa.select(volume.c.members)
            .join(series, volume.c.series_id == series.c.id)
            .where(series.c.series_instance_uid == series_instance_uid, volume.c.number == volume_number)
        )
        with self._reading() as connection:
            members = connection.scalar(query)
        if members is None:
            raise LocalError(f"series {series_instance_uid} has no volume {volume_number} in the index")
        stored = {each.sop_instance_uid: each for each in self.instances_of(series_instance_uid)}
        return [(stored[uid], tuple(frames)) for uid, frames in members]

    def stored(self, sop_instance_uids: Collection[str]) -> dict[str, Instance]:
        """Those of the received instances that are here, by SOP Instance UID."""
        found: dict[str, Instance] = {}
        wanted = sorted(sop_instance_uids)
        with self._reading() as connection:
            for first in range(0, len(wanted), 500):  # SQLite bounds the parameters of a statement
                some = sa.select(instance).where(instance.c.sop_instance_uid.in_(wanted[first : first + 500]))
                found |= {row["sop_instance_uid"]: stored_instance(row) for row in connection.execute(some).mappings()}
        return found

    def is_own_output(self, series_instance_uid: str) -> bool:
        """Whether the series carries our mark, or one of its instances is a product of ours."""
        same = sa.exists().where(
            instance.c.series_id == series.c.id, product.c.sop_instance_uid == instance.c.sop_instance_uid
        )
        query = sa.select(sa.or_(series.c.is_own_output, same)).where(
            series.c.series_instance_uid == series_instance_uid
        )
        with self._reading() as connection:
            return bool(connection.scalar(query))

    def complete_series(
        self,
        activity: SeriesActivity,
        *,
        state: SeriesState,
        reason: str,
        volumes: Sequence[tuple[VolumeRef, Sequence[Member]]] = (),
        note: str = "",
    ) -> bool:
        """Close a series as seen in `activity`; False, and nothing changed, if an instance came meanwhile.

        Parameters
        ----------
        volumes
            Its volumes in order of their numbers, each with the instances and frames it consists of.
        note
            What is missing of it or was left out; empty where nothing.
        """
        with self._writing() as connection:
            changed = connection.execute(
                series.update()
                .where(
                    series.c.series_instance_uid == activity.series_instance_uid,
                    series.c.state == SeriesState.RECEIVING,
                    series.c.last_received_at == activity.last_received_at,
                )
                .values(state=state, reason=reason, note=note, complete_at=activity.last_received_at)
            )
            if changed.rowcount != 1:
                return False
            series_id = series_key(connection, activity.series_instance_uid)
            if state is SeriesState.UNPAIRED:  # late instances may have been appended to a series whose pairs stand
                connection.execute(
                    series.update()
                    .where(series.c.id == series_id, is_in_a_pair())
                    .values(state=SeriesState.PAIRED, reason="")
                )
            connection.execute(volume.delete().where(volume.c.series_id == series_id))
            for facts, members in volumes:
                values = asdict(facts)
                values["last_received_at"] = facts.last_received_at.isoformat()
                connection.execute(
                    volume.insert().values(
                        series_id=series_id,
                        number=facts.volume_number,
                        facts=values,
                        members=[[each.sop_instance_uid, each.frames] for each in members],
                    )
                )
            return True


def _is_fetched(
    connection: sa.Connection, series_instance_uid: str, association_id: int, retrieved_by: RetrievedBy
) -> bool:
    """Whether an instance is here because the node asked for it.

    Its Move Originator says so, whichever AE title the source sends under and however late (PS3.7 9.1.1.1). Of a source
    that names none, everything counts that it is asked for while the request is in hand.
    """
    if retrieved_by is not RetrievedBy.UNKNOWN:
        return retrieved_by is RetrievedBy.NODE
    # What comes after an attempt was given up was asked for too; once all has come, the source may send what it likes.
    names_it = sa.cast(prior_fetch.c.found, Words).contains(series_instance_uid, autoescape=True)
    requests = connection.scalars(sa.select(prior_fetch.c.found).where(prior_fetch.c.state != "done", names_it)).all()
    asked = {request["ae_title"] for request in requests if series_instance_uid in request["series"]}
    if not asked:
        return False
    sender = sa.select(association.c.calling_ae_title).where(association.c.id == association_id)
    return connection.scalar(sender) in asked


def _make_current(connection: sa.Connection, series_instance_uid: str, now: datetime) -> None:
    """A scanner sends what was fetched as a prior: from now on it is a series like any other, looked at anew."""
    connection.execute(
        series.update()
        .where(series.c.series_instance_uid == series_instance_uid, series.c.is_fetched)
        .values(is_fetched=False, state=SeriesState.RECEIVING, reason="", last_received_at=now)
    )
