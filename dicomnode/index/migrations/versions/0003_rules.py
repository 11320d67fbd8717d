"""Rule sets with their history, decisions with their trace, work items, fetched priors, several pairs in one job."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

FORMER = "uq_pair_rule_id_moving_series_id_moving_volume_number"
UNIQUE = "uq_pair_rule_and_volumes"
UID = sa.String(64)


def upgrade() -> None:
    """Apply; a former rule set came from a file, and a former pair has the job that was made for it."""
    with op.batch_alter_table("rule_set") as batch_op:
        for name, kind, former in (
            ("written", sa.Text(), ""),
            ("source", sa.String(16), "file"),
            ("author", sa.String(64), ""),
            ("comment", sa.Text(), ""),
        ):
            batch_op.add_column(sa.Column(name, kind, nullable=False, server_default=former))
    op.execute("UPDATE rule_set SET written = text")
    with op.batch_alter_table("rule_set") as batch_op:
        for name in ("written", "source", "author", "comment"):
            batch_op.alter_column(name, server_default=None)
    _table(
        "decision",
        sa.Column("patient_id", sa.Integer(), nullable=False),
        sa.Column("rule_version", sa.Integer(), nullable=False),
        sa.Column("decided_at", sa.DateTime(), nullable=False),
        sa.Column("trace", sa.LargeBinary(), nullable=False),
        _rule_version("decision"),
    )
    _table(
        "work_item",
        sa.Column("patient_id", sa.Integer(), nullable=False),
        sa.Column("rule_id", sa.String(64), nullable=False),
        sa.Column("rule_version", sa.Integer(), nullable=False),
        sa.Column("scope", sa.String(255), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("fixed", sa.JSON(), nullable=False),
        sa.Column("moving", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("closed_at", sa.DateTime(), nullable=True),
        sa.Column("closed_by", sa.String(64), nullable=False),
        _rule_version("work_item"),
        sa.UniqueConstraint("patient_id", "rule_id", "scope", name=op.f("uq_work_item_patient_id_rule_id_scope")),
    )
    op.create_index(op.f("ix_work_item_state"), "work_item", ["state"])
    _table(
        "prior_fetch",
        sa.Column("patient_id", sa.Integer(), nullable=False),
        sa.Column("study_instance_uid", UID, nullable=False),
        sa.Column("rule_id", sa.String(64), nullable=False),
        sa.Column("source", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("found", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.UniqueConstraint(
            "study_instance_uid", "rule_id", "source", name=op.f("uq_prior_fetch_study_instance_uid_rule_id_source")
        ),
    )
    op.create_index(op.f("ix_prior_fetch_state"), "prior_fetch", ["state"])
    with op.batch_alter_table("series") as batch_op:
        batch_op.add_column(sa.Column("is_fetched", sa.Boolean(), nullable=False, server_default=sa.false()))
    with op.batch_alter_table("pair") as batch_op:
        batch_op.add_column(sa.Column("decision_id", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("job_id", sa.String(36), nullable=False, server_default=""))
        batch_op.create_foreign_key(op.f("fk_pair_decision_id_decision"), "decision", ["decision_id"], ["id"])
        batch_op.create_index(op.f("ix_pair_decision_id"), ["decision_id"])
        batch_op.create_index(op.f("ix_pair_job_id"), ["job_id"])
        batch_op.drop_constraint(FORMER, type_="unique")
        batch_op.create_unique_constraint(
            UNIQUE,
            ["rule_id", "fixed_series_id", "fixed_volume_number", "moving_series_id", "moving_volume_number"],
        )
    op.execute("UPDATE pair SET job_id = COALESCE((SELECT job.id FROM job WHERE job.pair_id = pair.id), '')")
    with op.batch_alter_table("pair") as batch_op:
        batch_op.alter_column("job_id", server_default=None)


def _table(name: str, *columns: sa.schema.SchemaItem) -> None:
    """A table about a patient."""
    op.create_table(
        name,
        sa.Column("id", sa.Integer(), nullable=False),
        *columns,
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"], name=op.f(f"fk_{name}_patient_id_patient")),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{name}")),
    )
    op.create_index(op.f(f"ix_{name}_patient_id"), name, ["patient_id"])


def _rule_version(table: str) -> sa.ForeignKeyConstraint:
    name = op.f(f"fk_{table}_rule_version_rule_set")
    return sa.ForeignKeyConstraint(["rule_version"], ["rule_set.version"], name=name)


def downgrade() -> None:
    """Take back; what only this version knows is lost."""
    with op.batch_alter_table("pair") as batch_op:
        batch_op.drop_constraint(UNIQUE, type_="unique")
        batch_op.create_unique_constraint(FORMER, ["rule_id", "moving_series_id", "moving_volume_number"])
        batch_op.drop_index(op.f("ix_pair_job_id"))
        batch_op.drop_index(op.f("ix_pair_decision_id"))
        batch_op.drop_constraint(op.f("fk_pair_decision_id_decision"), type_="foreignkey")
        batch_op.drop_column("job_id")
        batch_op.drop_column("decision_id")
    with op.batch_alter_table("series") as batch_op:
        batch_op.drop_column("is_fetched")
    for name in ("prior_fetch", "work_item", "decision"):
        op.drop_table(name)
    with op.batch_alter_table("rule_set") as batch_op:
        for name in ("comment", "author", "source", "written"):
            batch_op.drop_column(name)
