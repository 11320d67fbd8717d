"""What PACS sources are asked for: earlier examinations, and how far that has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from dicomnode.index.database import Database, insert_new
from dicomnode.index.tables import instance, patient, prior_fetch, series

OPEN = ("waiting", "fetching")


@dataclass(frozen=True)
class PriorFetch:
    """One request to one source.

    Attributes
    ----------
    study_instance_uid
        Of the examination that needs an earlier one.
    request
        What is asked for: study_date, min_age_days, max_age_days, modalities, description, max_studies.
    """

    id: int
    patient: tuple[str, str]
    study_instance_uid: str
    rule_id: str
    source: str
    attempts: int
    request: dict[str, Any]


class Priors(Database):
    """Requests for earlier examinations. waiting → fetching → done or failed; a crash leaves fetching, tried again."""

    def request_priors(
        self,
        patient_of: tuple[str, str],
        study_instance_uid: str,
        rule_id: str,
        sources: Sequence[str],
        request: dict[str, Any],
        *,
        now: datetime,
    ) -> None:
        """Ask each source once for this examination and rule; what was asked before stands."""
        with self._writing() as connection:
            patient_id = connection.scalar(_patient_key(patient_of))
            for source in sources if patient_id is not None else ():
                key = {"study_instance_uid": study_instance_uid, "rule_id": rule_id, "source": source}
                rest = {"patient_id": patient_id, "state": "waiting", "attempts": 0, "next_attempt_at": now}
                insert_new(
                    connection,
                    prior_fetch,
                    {**key, **rest, "reason": "", "request": request, "found": {}, "created_at": now},
                )

    def due_fetches(self, *, now: datetime) -> list[PriorFetch]:
        """Requests to be tried now, oldest first."""
        query = (
            sa.select(prior_fetch, patient.c.patient_id.label("name"), patient.c.issuer_of_patient_id.label("issuer"))
            .join(patient, prior_fetch.c.patient_id == patient.c.id)
            .where(prior_fetch.c.state.in_(OPEN), prior_fetch.c.next_attempt_at <= now)
            .order_by(prior_fetch.c.id)
        )
        with self._reading() as connection:
            return [
                PriorFetch(
                    row.id,
                    (row.name, row.issuer),
                    row.study_instance_uid,
                    row.rule_id,
                    row.source,
                    row.attempts,
                    row.request,
                )
                for row in connection.execute(query)
            ]

    def begin_fetch(self, fetch_id: int, ae_title: str, series_instance_uids: Sequence[str], *, attempts: int) -> None:
        """Note which series a source is asked for, before it is: what comes of them from it is marked as fetched.

        What it was asked for by an earlier attempt stands: it may still be sending that.
        """
        this = prior_fetch.c.id == fetch_id
        with self._writing() as connection:
            former = connection.execute(sa.select(prior_fetch.c.found).where(this)).scalar_one()
            asked = {*former.get("series", ()), *series_instance_uids}
            found = {"ae_title": ae_title, "series": sorted(asked)}
            values = {"state": "fetching", "found": found, "attempts": attempts}
            connection.execute(prior_fetch.update().where(this).values(**values))

    def end_fetch(self, fetch_id: int, state: str, reason: str, *, next_attempt_at: datetime) -> None:
        """Note what became of an attempt."""
        values = {"state": state, "reason": reason, "next_attempt_at": next_attempt_at}
        with self._writing() as connection:
            connection.execute(prior_fetch.update().where(prior_fetch.c.id == fetch_id).values(**values))

    def patients_fetching(self) -> dict[tuple[str, str], set[str]]:
        """Studies whose earlier examinations are still asked for, by patient."""
        query = (
            sa.select(patient.c.patient_id, patient.c.issuer_of_patient_id, prior_fetch.c.study_instance_uid)
            .join(patient, prior_fetch.c.patient_id == patient.c.id)
            .where(prior_fetch.c.state.in_(OPEN))
        )
        found: dict[tuple[str, str], set[str]] = {}
        with self._reading() as connection:
            for row in connection.execute(query):
                found.setdefault((row[0], row[1]), set()).add(row[2])
        return found

    def held_instances(self, series_instance_uids: Sequence[str]) -> dict[str, tuple[tuple[str, str], int]]:
        """(PatientID, Issuer) and number of instances of each of these series that is here."""
        query = (
            sa.select(
                series.c.series_instance_uid,
                patient.c.patient_id,
                patient.c.issuer_of_patient_id,
                sa.func.count(instance.c.id),
            )
            .join(patient, series.c.patient_id == patient.c.id)
            .join(instance, instance.c.series_id == series.c.id)
            .where(series.c.series_instance_uid.in_(series_instance_uids))
            .group_by(series.c.id, patient.c.id)
        )
        with self._reading() as connection:
            return {row[0]: ((row[1], row[2]), int(row[3])) for row in connection.execute(query)}


def _patient_key(patient_of: tuple[str, str]) -> sa.Select[tuple[int]]:
    return sa.select(patient.c.id).where(
        patient.c.patient_id == patient_of[0], patient.c.issuer_of_patient_id == patient_of[1]
    )
