"""The tables of the index. Law: the migrations make them; a test holds both equal.

States are stored as the texts of `dicomnode.model`'s enums; times as UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Timezone-aware UTC in Python, without a zone in the database (SQLite has none)."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 - the interface has it
        """Refuse naive times: they would shift by the host's zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"time without a zone: got {value!r}, expected timezone-aware")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 - the interface has it
        """Give the zone back."""
        return None if value is None else value.replace(tzinfo=UTC)


class Words(sa.types.TypeDecorator[str]):
    """Text as a database keeps it: no NUL, which PostgreSQL refuses, nothing that is no UTF-8, no longer than `length`.

    Much of it is a sender's, and one instance must never stop the others. What identifies a patient is compared in the
    volume's facts too, where it stands unaltered.
    """

    impl = sa.String
    cache_ok = True

    def __init__(self, length: int | None = None) -> None:
        super().__init__(length)
        self.length = length
        if length is None:
            self.impl = sa.Text()  # type: ignore[assignment]  # of an instance it is one, says SQLAlchemy

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:  # noqa: ARG002 - the interface has it
        """Replace what cannot be kept."""
        if value is None:
            return None
        return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()[: self.length]


METADATA = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

UID = Words(64)


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.Integer, primary_key=True)


def _to(table: str, *, name: str | None = None, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name or f"{table}_id", sa.ForeignKey(f"{table}.id"), nullable=nullable, index=True)


def _stored_instance() -> list[sa.Column[object]]:
    """What `model.Instance` holds, for received instances and for products alike."""
    return [
        sa.Column("sop_instance_uid", UID, nullable=False, unique=True),
        sa.Column("sop_class_uid", UID, nullable=False),
        sa.Column("transfer_syntax_uid", UID, nullable=False),
        sa.Column("path", Words(200), nullable=False),
        sa.Column("sha256", Words(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
    ]


def _sealed_instance() -> list[sa.Column[object]]:
    """What `model.JournalEntry` holds: the identifiers are a sender's, whatever their length."""
    return [
        sa.Column("sop_instance_uid", Words(255), nullable=False, index=True),
        sa.Column("sop_class_uid", Words(255), nullable=False),
        sa.Column("transfer_syntax_uid", Words(255), nullable=False),
        sa.Column("path", Words(200), nullable=False, unique=True),
        sa.Column("sha256", Words(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("received_at", UtcDateTime, nullable=False, index=True),
    ]


patient = sa.Table(
    "patient",
    METADATA,
    _id(),
    sa.Column("patient_id", Words(255), nullable=False),
    sa.Column("issuer_of_patient_id", Words(255), nullable=False),
    sa.UniqueConstraint("patient_id", "issuer_of_patient_id"),
)
study = sa.Table(
    "study",
    METADATA,
    _id(),
    _to("patient"),
    sa.Column("study_instance_uid", UID, nullable=False, unique=True),
)
series = sa.Table(
    "series",
    METADATA,
    _id(),
    _to("study"),
    _to("patient"),
    sa.Column("series_instance_uid", UID, nullable=False, unique=True),
    sa.Column("modality", Words(16), nullable=False),
    sa.Column("is_own_output", sa.Boolean, nullable=False),
    sa.Column("is_fetched", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("state", Words(16), nullable=False, index=True),
    sa.Column("reason", Words, nullable=False),
    sa.Column("note", Words, nullable=False),
    sa.Column("last_received_at", UtcDateTime, nullable=False),
    sa.Column("complete_at", UtcDateTime),  # when the last instance came that it was complete with
)
association = sa.Table(
    "association",
    METADATA,
    _id(),
    sa.Column("calling_ae_title", Words(64), nullable=False),
    sa.Column("called_ae_title", Words(64), nullable=False),
    sa.Column("address", Words(64), nullable=False),
    sa.Column("opened_at", UtcDateTime, nullable=False),
    sa.Column("closed_at", UtcDateTime, index=True),
    sa.Column("key", Words(32), unique=True, index=True),
    sa.Column("outcome", Words(200), nullable=False, server_default=""),
    sa.Column("stored", sa.Integer, nullable=False, server_default="0"),
    sa.Column("refused", sa.Integer, nullable=False, server_default="0"),
)
journal = sa.Table(
    "journal",
    METADATA,
    _id(),
    _to("association"),
    *_sealed_instance(),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("retrieved_by", Words(8), nullable=False, server_default=""),
)
quarantine = sa.Table(
    "quarantine",
    METADATA,
    _id(),
    _to("association"),
    *_sealed_instance(),
    sa.Column("reason", Words, nullable=False),
)
instance = sa.Table(
    "instance",
    METADATA,
    _id(),
    _to("series"),
    _to("association"),
    *_stored_instance(),
    sa.Column("received_at", UtcDateTime, nullable=False),
)
commitment = sa.Table(
    "commitment",
    METADATA,
    _id(),
    sa.Column("transaction_uid", UID, nullable=False),
    sa.Column("calling_ae_title", Words(64), nullable=False),
    sa.Column("address", Words(64), nullable=False),
    sa.Column("references", sa.JSON, nullable=False),
    sa.Column("state", Words(16), nullable=False, index=True),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("reason", Words, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("next_attempt_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("transaction_uid", "calling_ae_title"),
)
volume = sa.Table(
    "volume",
    METADATA,
    sa.Column("series_id", sa.ForeignKey("series.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("facts", sa.JSON, nullable=False),
    sa.Column("members", sa.JSON, nullable=False),
)
rule_set = sa.Table(
    "rule_set",
    METADATA,
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("sha256", Words(64), nullable=False),
    sa.Column("text", Words, nullable=False),
    sa.Column("written", Words, nullable=False),
    sa.Column("source", Words(16), nullable=False),
    sa.Column("author", Words(64), nullable=False),
    sa.Column("comment", Words, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)
decision = sa.Table(
    "decision",
    METADATA,
    _id(),
    _to("patient"),
    sa.Column("rule_version", sa.ForeignKey("rule_set.version"), nullable=False),
    sa.Column("decided_at", UtcDateTime, nullable=False),
    sa.Column("trace", sa.LargeBinary, nullable=False),
)
work_item = sa.Table(
    "work_item",
    METADATA,
    _id(),
    _to("patient"),
    sa.Column("rule_id", Words(64), nullable=False),
    sa.Column("rule_version", sa.ForeignKey("rule_set.version"), nullable=False),
    sa.Column("scope", Words(255), nullable=False),
    sa.Column("state", Words(16), nullable=False, index=True),
    sa.Column("reason", Words, nullable=False),
    sa.Column("fixed", sa.JSON, nullable=False),
    sa.Column("moving", sa.JSON, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("closed_at", UtcDateTime),
    sa.Column("closed_by", Words(64), nullable=False),
    sa.UniqueConstraint("patient_id", "rule_id", "scope"),
)
prior_fetch = sa.Table(
    "prior_fetch",
    METADATA,
    _id(),
    _to("patient"),
    sa.Column("study_instance_uid", UID, nullable=False),
    sa.Column("rule_id", Words(64), nullable=False),
    sa.Column("source", Words(64), nullable=False),
    sa.Column("state", Words(16), nullable=False, index=True),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_attempt_at", UtcDateTime, nullable=False),
    sa.Column("reason", Words, nullable=False),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("found", sa.JSON, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("study_instance_uid", "rule_id", "source"),
)
pair = sa.Table(
    "pair",
    METADATA,
    _id(),
    sa.Column("rule_id", Words(64), nullable=False),
    sa.Column("rule_version", sa.ForeignKey("rule_set.version"), nullable=False),
    _to("series", name="fixed_series_id"),
    sa.Column("fixed_volume_number", sa.Integer, nullable=False),
    _to("series", name="moving_series_id"),
    sa.Column("moving_volume_number", sa.Integer, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("decision_id", sa.ForeignKey("decision.id"), index=True),
    sa.Column("job_id", Words(36), nullable=False, index=True),
    sa.Column("superseded_at", UtcDateTime),
    sa.Index(
        "uq_pair_standing",
        "rule_id",
        "fixed_series_id",
        "fixed_volume_number",
        "moving_series_id",
        "moving_volume_number",
        unique=True,
        sqlite_where=sa.text("superseded_at IS NULL"),
        postgresql_where=sa.text("superseded_at IS NULL"),
    ),
)
job = sa.Table(
    "job",
    METADATA,
    sa.Column("id", Words(36), primary_key=True),
    _to("pair"),
    sa.Column("state", Words(16), nullable=False, index=True),
    sa.Column("stage", Words(16), nullable=False),
    sa.Column("activity", Words(32), nullable=False, server_default=""),  # what the stage is at
    sa.Column("progress", sa.Float, nullable=False),
    sa.Column("stage_started_at", UtcDateTime),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("verdict", Words(16)),
    sa.Column("reason", Words, nullable=False),
    sa.Column("report", sa.JSON, nullable=False),
    sa.Column("provenance", sa.LargeBinary),  # compressed JSON
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
)
product = sa.Table(
    "product",
    METADATA,
    _id(),
    sa.Column("job_id", sa.ForeignKey("job.id"), nullable=False, index=True),
    sa.Column("kind", Words(16), nullable=False),
    *_stored_instance(),
)
delivery = sa.Table(
    "delivery",
    METADATA,
    _id(),
    _to("product"),
    sa.Column("destination", Words(64), nullable=False),
    sa.Column("state", Words(16), nullable=False),
    sa.Column("status", sa.Integer),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("reason", Words, nullable=False),
    sa.Column("next_attempt_at", UtcDateTime, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False, server_default="1"),  # 0 first
    sa.Column("queued_at", UtcDateTime),  # when it was last put on its way by a job or a person
    sa.Column("committed_at", UtcDateTime),
    sa.Column("announced_at", UtcDateTime),
    sa.Column("transaction_uid", UID, index=True),  # of the storage commitment asked for it last
    sa.Column("withdrawn_at", UtcDateTime),  # when a rejection note for it was put on its way
    sa.UniqueConstraint("product_id", "destination"),
    sa.Index("ix_delivery_due", "destination", "state", "next_attempt_at"),
)
destination_hold = sa.Table(
    "destination_hold",
    METADATA,
    sa.Column("destination", Words(64), primary_key=True),
    sa.Column("reason", Words, nullable=False),
    sa.Column("held_at", UtcDateTime, nullable=False),
)
commitment_request = sa.Table(
    "commitment_request",
    METADATA,
    sa.Column("transaction_uid", UID, primary_key=True),
    sa.Column("destination", Words(64), nullable=False),
    sa.Column("state", Words(16), nullable=False, index=True),
    sa.Column("reason", Words, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False),
)
