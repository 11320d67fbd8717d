"""Journal, quarantine, storage commitment, and how associations ended."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    # Not in batch mode: SQLite would drop and make anew a table that others refer to.
    op.add_column("association", sa.Column("key", sa.String(length=32), nullable=True))
    op.add_column("association", sa.Column("outcome", sa.String(length=200), nullable=False, server_default=""))
    op.add_column("association", sa.Column("stored", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("association", sa.Column("refused", sa.Integer(), nullable=False, server_default="0"))
    op.create_index(op.f("ix_association_key"), "association", ["key"], unique=True)
    for name, last in (
        ("journal", sa.Column("attempts", sa.Integer(), nullable=False)),
        ("quarantine", sa.Column("reason", sa.Text(), nullable=False)),
    ):
        op.create_table(
            name,
            sa.Column("id", sa.Integer(), nullable=False),
            sa.Column("association_id", sa.Integer(), nullable=False),
            sa.Column("sop_instance_uid", sa.String(length=255), nullable=False),
            sa.Column("sop_class_uid", sa.String(length=255), nullable=False),
            sa.Column("transfer_syntax_uid", sa.String(length=255), nullable=False),
            sa.Column("path", sa.String(length=200), nullable=False),
            sa.Column("sha256", sa.String(length=64), nullable=False),
            sa.Column("size_bytes", sa.BigInteger(), nullable=False),
            sa.Column("received_at", sa.DateTime(), nullable=False),
            last,
            sa.ForeignKeyConstraint(
                ["association_id"], ["association.id"], name=op.f(f"fk_{name}_association_id_association")
            ),
            sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{name}")),
            sa.UniqueConstraint("path", name=op.f(f"uq_{name}_path")),
        )
        for column in ("association_id", "received_at", "sop_instance_uid"):
            op.create_index(op.f(f"ix_{name}_{column}"), name, [column], unique=False)
    op.create_table(
        "commitment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("calling_ae_title", sa.String(length=64), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=False),
        sa.Column("references", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commitment")),
        sa.UniqueConstraint(
            "transaction_uid", "calling_ae_title", name=op.f("uq_commitment_transaction_uid_calling_ae_title")
        ),
    )
    op.create_index(op.f("ix_commitment_state"), "commitment", ["state"], unique=False)


def downgrade() -> None:
    """Take back."""
    op.drop_table("commitment")
    op.drop_table("quarantine")
    op.drop_table("journal")
    op.drop_index(op.f("ix_association_key"), "association")
    for name in ("refused", "stored", "outcome", "key"):
        op.drop_column("association", name)
