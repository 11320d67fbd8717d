"""Deliveries: priority, deadline, holds, and the storage commitments that we ask for."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.add_column("delivery", sa.Column("priority", sa.Integer(), nullable=False, server_default="1"))
    for name in ("queued_at", "committed_at", "announced_at"):
        op.add_column("delivery", sa.Column(name, sa.DateTime(), nullable=True))
    op.add_column("delivery", sa.Column("transaction_uid", sa.String(length=64), nullable=True))
    op.execute("UPDATE delivery SET queued_at = updated_at")
    op.create_index(op.f("ix_delivery_transaction_uid"), "delivery", ["transaction_uid"], unique=False)
    op.create_table(
        "destination_hold",
        sa.Column("destination", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("held_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("destination", name=op.f("pk_destination_hold")),
    )
    op.create_table(
        "commitment_request",
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("destination", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("transaction_uid", name=op.f("pk_commitment_request")),
    )
    op.create_index(op.f("ix_commitment_request_state"), "commitment_request", ["state"], unique=False)


def downgrade() -> None:
    """Take back."""
    op.drop_table("commitment_request")
    op.drop_table("destination_hold")
    op.drop_index(op.f("ix_delivery_transaction_uid"), "delivery")
    for name in ("transaction_uid", "announced_at", "committed_at", "queued_at", "priority"):
        op.drop_column("delivery", name)
