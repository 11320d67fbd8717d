"""The only room that speaks SQL: what the node knows, one commit per change.

Law: every method is one transaction; database trouble leaves as LocalError; rows never leave, values of
`dicomnode.model` do. SQLite runs in WAL mode with synchronous=FULL: what was committed survives a power cut.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from dicomnode.errors import LocalError
from dicomnode.model import (
    Delivery,
    DeliveryState,
    Instance,
    InstanceHeader,
    Job,
    JobState,
    Pair,
    Product,
    SeriesActivity,
    SeriesState,
    Verdict,
    VolumeRef,
)
from dicomnode.tables import (
    association,
    delivery,
    instance,
    job,
    pair,
    patient,
    product,
    rule_set,
    series,
    study,
    volume,
)

Enqueue = Callable[[sa.Connection, str], None]
"""Puts the durable job with this id on the queue, in the caller's transaction."""

_STORED = tuple(Instance.__dataclass_fields__)


class Added(StrEnum):
    """What became of an instance that was offered to the index."""

    NEW = "new"
    EQUAL = "equal"
    """The same SOP Instance UID with the same content stands already; nothing changed."""
    CONFLICT = "conflict"
    """The same SOP Instance UID with other content stands already; nothing changed."""


def create_engine(url: str) -> sa.Engine:
    """Open a database so that a commit is durable and writers wait for each other instead of failing.

    SQLite: WAL, synchronous=FULL, 30 s busy time-out, transactions that take the write lock at once.
    """
    engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def _prepare(connection: Any, _record: object) -> None:
            connection.isolation_level = "IMMEDIATE"
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

    return engine


class Index:
    """What the node knows of patients, studies, series, instances, pairs, jobs, products and deliveries.

    Parameters
    ----------
    url
        SQLAlchemy database URL, `sqlite:///…` or `postgresql+psycopg://…`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = create_engine(url)

    def migrate(self) -> None:
        """Bring the tables to this version's shape.

        Raises
        ------
        LocalError
            The database cannot be opened or written.
        """
        config = alembic.config.Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self._writing() as connection:
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")

    def close(self) -> None:
        """Give back every connection."""
        self.engine.dispose()

    # ── receiving ──

    def open_association(
        self, *, calling_ae_title: str, called_ae_title: str, address: str, now: datetime
    ) -> int:
        """Record an accepted association; its id."""
        with self._writing() as connection:
            values = {
                "calling_ae_title": calling_ae_title[:64],
                "called_ae_title": called_ae_title[:64],
                "address": address[:64],
            }
            return _key(connection.execute(association.insert().values(**values, opened_at=now)))

    def close_association(self, association_id: int, *, now: datetime) -> None:
        """Record that an association ended, however it ended."""
        with self._writing() as connection:
            connection.execute(
                association.update().where(association.c.id == association_id).values(closed_at=now)
            )

    def close_all_associations(self, *, now: datetime) -> None:
        """At start: no association of a former process is open any more."""
        with self._writing() as connection:
            connection.execute(
                association.update().where(association.c.closed_at.is_(None)).values(closed_at=now)
            )

    def add_instance(
        self, stored: Instance, header: InstanceHeader, *, association_id: int, now: datetime
    ) -> Added:
        """Index one stored instance; its series is being received again unless it is paired.

        A series belongs to the study and patient of its first instance; that later instances agree is checked
        when the series is read as a volume.
        """
        with self._writing() as connection:
            known = connection.scalar(
                sa.select(instance.c.sha256).where(instance.c.sop_instance_uid == stored.sop_instance_uid)
            )
            if known is not None:
                return Added.EQUAL if known == stored.sha256 else Added.CONFLICT
            series_id = self._series_id(connection, header, now)
            connection.execute(
                instance.insert().values(
                    series_id=series_id, association_id=association_id, received_at=now, **asdict(stored)
                )
            )
            return Added.NEW

    def find_instance(self, sop_instance_uid: str) -> Instance | None:
        """The stored instance of that UID, or None."""
        with self._reading() as connection:
            query = sa.select(instance).where(instance.c.sop_instance_uid == sop_instance_uid)
            row = connection.execute(query).mappings().first()
            return None if row is None else _instance(row)

    def _series_id(self, connection: sa.Connection, header: InstanceHeader, now: datetime) -> int:
        patient_id = _upsert(
            connection,
            patient,
            {"patient_id": header.patient_id, "issuer_of_patient_id": header.issuer_of_patient_id},
        )
        study_id = _upsert(
            connection, study, {"study_instance_uid": header.study_instance_uid}, {"patient_id": patient_id}
        )
        series_id = _upsert(
            connection,
            series,
            {"series_instance_uid": header.series_instance_uid},
            {
                "study_id": study_id,
                "patient_id": patient_id,
                "modality": header.modality[:16],
                "is_own_output": header.is_own_output,
                "state": SeriesState.RECEIVING,
                "reason": "",
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
                state=sa.case((is_paired, SeriesState.PAIRED), else_=SeriesState.RECEIVING),
                reason=sa.case(
                    (is_paired, "instances came after it was paired; they are stored, not used"), else_=""
                ),
            )
        )
        return series_id

    # ── completion and pairing ──

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
            return [_instance(row) for row in connection.execute(query).mappings()]

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
        self, activity: SeriesActivity, *, state: SeriesState, reason: str, facts: VolumeRef | None
    ) -> bool:
        """Close a series as seen in `activity`; False, and nothing changed, if an instance came meanwhile."""
        with self._writing() as connection:
            changed = connection.execute(
                series.update()
                .where(
                    series.c.series_instance_uid == activity.series_instance_uid,
                    series.c.state == SeriesState.RECEIVING,
                    series.c.last_received_at == activity.last_received_at,
                )
                .values(state=state, reason=reason)
            )
            if changed.rowcount != 1:
                return False
            series_id = _series_key(connection, activity.series_instance_uid)
            connection.execute(volume.delete().where(volume.c.series_id == series_id))
            if facts is not None:
                values = asdict(facts)
                values["last_received_at"] = facts.last_received_at.isoformat()
                connection.execute(volume.insert().values(series_id=series_id, facts=values))
            return True

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
            .order_by(series.c.id)
        )
        with self._reading() as connection:
            return [_volume_ref(facts) for facts in connection.scalars(query)]

    def pairs_of(self, series_instance_uids: Collection[str]) -> list[Pair]:
        """Every pair one of these series is in."""
        fixed, moving = series.alias(), series.alias()
        query = (
            sa.select(pair.c.rule_id, fixed.c.series_instance_uid, moving.c.series_instance_uid)
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
        fixed_id = _series_key(connection, new.fixed_series_instance_uid)
        moving_id = _series_key(connection, new.moving_series_instance_uid)
        stands = sa.select(pair.c.id).where(
            pair.c.rule_id == new.rule_id, pair.c.moving_series_id == moving_id
        )
        if connection.scalar(stands) is not None:
            return None
        pair_id = _key(
            connection.execute(
                pair.insert().values(
                    rule_id=new.rule_id,
                    rule_version=rule_version,
                    fixed_series_id=fixed_id,
                    moving_series_id=moving_id,
                    created_at=now,
                )
            )
        )
        connection.execute(
            series.update()
            .where(series.c.id.in_([fixed_id, moving_id]))
            .values(state=SeriesState.PAIRED, reason="")
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
            newest = connection.execute(
                sa.select(rule_set).order_by(rule_set.c.version.desc()).limit(1)
            ).first()
            if newest is not None and newest.sha256 == sha256:
                return int(newest.version)
            return _key(
                connection.execute(rule_set.insert().values(text=text, sha256=sha256, created_at=now))
            )

    def rule_set_text(self, version: int) -> str:
        """The rules of a version, as they were read."""
        with self._reading() as connection:
            return str(
                connection.execute(
                    sa.select(rule_set.c.text).where(rule_set.c.version == version)
                ).scalar_one()
            )

    # ── jobs and products ──

    def job(self, job_id: str) -> Job:
        """The job of that id."""
        fixed, moving = series.alias(), series.alias()
        query = (
            sa.select(
                job.c.id, pair.c.rule_id, pair.c.rule_version,
                fixed.c.series_instance_uid, moving.c.series_instance_uid,
                job.c.state, job.c.stage, job.c.attempts, job.c.verdict, job.c.reason,
            )
            .join(pair, job.c.pair_id == pair.c.id)
            .join(fixed, pair.c.fixed_series_id == fixed.c.id)
            .join(moving, pair.c.moving_series_id == moving.c.id)
            .where(job.c.id == job_id)
        )  # fmt: skip
        with self._reading() as connection:
            row = connection.execute(query).one()
        verdict = None if row[8] is None else Verdict(row[8])
        return Job(*row[:5], JobState(row[5]), row[6], row[7], verdict, row[9])

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

    def set_stage(self, job_id: str, stage: str, *, progress: float, now: datetime) -> None:
        """Note the step in hand and how much of it is done, 0 to 1."""
        with self._writing() as connection:
            connection.execute(
                job.update()
                .where(job.c.id == job_id)
                .values(stage=stage, progress=progress, stage_started_at=now)
            )

    def judge_job(self, job_id: str, verdict: Verdict, reason: str, report: Mapping[str, Any]) -> None:
        """Record the verdict with the engine's report."""
        with self._writing() as connection:
            connection.execute(
                job.update()
                .where(job.c.id == job_id)
                .values(verdict=verdict, reason=reason, report=dict(report))
            )

    def finish_job(self, job_id: str, state: JobState, reason: str, *, now: datetime) -> None:
        """Close a job: done, rejected, failed or cancelled."""
        with self._writing() as connection:
            connection.execute(
                job.update()
                .where(job.c.id == job_id)
                .values(state=state, reason=reason, progress=1.0, finished_at=now)
            )

    def add_products(self, products: Iterable[Product]) -> None:
        """Record what a job made; products that stand already stay as they are."""
        with self._writing() as connection:
            for made in products:
                _insert_new(
                    connection, product, {"job_id": made.job_id, "kind": made.kind, **asdict(made.instance)}
                )

    def products_of(self, job_id: str) -> list[Product]:
        """What a job made, in the order it was made."""
        with self._reading() as connection:
            rows = connection.execute(
                sa.select(product).where(product.c.job_id == job_id).order_by(product.c.id)
            )
            return [Product(job_id, row["kind"], _instance(row)) for row in rows.mappings()]

    def enqueue_deliveries(self, job_id: str, destinations: Sequence[str], *, now: datetime) -> None:
        """One delivery per (product, destination), once; the job is done with the same commit."""
        with self._writing() as connection:
            for product_id in connection.scalars(
                sa.select(product.c.id).where(product.c.job_id == job_id)
            ).all():
                for name in destinations:
                    _insert_new(
                        connection,
                        delivery,
                        {
                            "product_id": product_id, "destination": name, "state": DeliveryState.WAITING,
                            "attempts": 0, "reason": "", "next_attempt_at": now, "updated_at": now,
                        },
                    )  # fmt: skip
            connection.execute(
                job.update()
                .where(job.c.id == job_id)
                .values(state=JobState.DONE, progress=1.0, finished_at=now)
            )

    # ── delivery ──

    def due_deliveries(self, destination: str, *, now: datetime, limit: int) -> list[Delivery]:
        """What waits for a destination and may be tried now, oldest first."""
        query = (
            sa.select(delivery, *[product.c[name] for name in _STORED])
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
                    instance=_instance(row),
                    destination=row["destination"],
                    state=DeliveryState(row["state"]),
                    attempts=row["attempts"],
                    next_attempt_at=row["next_attempt_at"],
                    status=row["status"],
                    reason=row["reason"],
                )
                for row in connection.execute(query).mappings()
            ]

    def next_delivery_at(self, destination: str) -> datetime | None:
        """When the next waiting delivery of a destination may be tried, or None."""
        query = sa.select(sa.func.min(delivery.c.next_attempt_at)).where(
            delivery.c.destination == destination, delivery.c.state == DeliveryState.WAITING
        )
        with self._reading() as connection:
            at: datetime | None = connection.scalar(query)
            return at

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

    # ── status ──

    def status(self) -> dict[str, list[dict[str, Any]]]:
        """Everything an administrator asks for: studies, series, jobs, deliveries, with reasons."""
        fixed, moving = series.alias(), series.alias()
        count = sa.func.count(instance.c.id).label("instances")
        queries = {
            "studies": sa.select(study.c.study_instance_uid, sa.func.count(series.c.id).label("series"))
            .join(series, series.c.study_id == study.c.id)
            .group_by(study.c.id)
            .order_by(study.c.id),
            "series": sa.select(
                series.c.series_instance_uid, study.c.study_instance_uid, series.c.modality, series.c.state,
                series.c.reason, count,
            )
            .join(study, series.c.study_id == study.c.id)
            .outerjoin(instance, instance.c.series_id == series.c.id)
            .group_by(series.c.id, study.c.study_instance_uid)
            .order_by(series.c.id),
            "jobs": sa.select(
                job.c.id, pair.c.rule_id, pair.c.rule_version, fixed.c.series_instance_uid.label("fixed"),
                moving.c.series_instance_uid.label("moving"), job.c.state, job.c.stage, job.c.progress,
                job.c.attempts, job.c.verdict, job.c.reason, job.c.report,
            )
            .join(pair, job.c.pair_id == pair.c.id)
            .join(fixed, pair.c.fixed_series_id == fixed.c.id)
            .join(moving, pair.c.moving_series_id == moving.c.id)
            .order_by(job.c.created_at, job.c.id),
            "deliveries": sa.select(
                product.c.sop_instance_uid, product.c.kind, delivery.c.destination, delivery.c.state,
                delivery.c.status, delivery.c.attempts, delivery.c.reason,
            )
            .join(product, delivery.c.product_id == product.c.id)
            .order_by(delivery.c.id),
        }  # fmt: skip
        with self._reading() as connection:
            return {
                name: [dict(row) for row in connection.execute(query).mappings()]
                for name, query in queries.items()
            }

    # ── transactions ──

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """One transaction that holds SQLite's write lock from its first statement on."""
        with _local_errors(), self.engine.begin() as connection:
            if self.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _local_errors(), self.engine.connect() as connection:
            yield connection


@contextmanager
def _local_errors() -> Iterator[None]:
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        raise LocalError(f"database: {error}") from error


def _upsert(
    connection: sa.Connection, table: sa.Table, key: Mapping[str, Any], rest: Mapping[str, Any] | None = None
) -> int:
    """The id of the row with that key, made if it is not there."""
    _insert_new(connection, table, {**key, **(rest or {})})
    query = sa.select(table.c.id).where(*[table.c[name] == value for name, value in key.items()])
    return int(connection.execute(query).scalar_one())


def _insert_new(connection: sa.Connection, table: sa.Table, values: Mapping[str, Any]) -> None:
    """Insert unless a unique key stands already."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(dialect.insert(table).values(**values).on_conflict_do_nothing())


def _series_key(connection: sa.Connection, series_instance_uid: str) -> int:
    query = sa.select(series.c.id).where(series.c.series_instance_uid == series_instance_uid)
    return int(connection.execute(query).scalar_one())


def _key(result: sa.CursorResult[Any]) -> int:
    key = result.inserted_primary_key
    assert key is not None
    return int(key[0])


def _instance(row: sa.RowMapping) -> Instance:
    return Instance(**{name: row[name] for name in _STORED})


def _volume_ref(facts: Mapping[str, Any]) -> VolumeRef:
    values = dict(facts)
    values["last_received_at"] = datetime.fromisoformat(values["last_received_at"])
    values["shape"] = tuple(values["shape"])
    values["affine"] = tuple(values["affine"])
    return VolumeRef(**values)
