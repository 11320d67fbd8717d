"""Whose retrieve request brought what is in the journal."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; of what waits it is not known."""
    op.add_column("journal", sa.Column("retrieved_by", sa.String(length=8), nullable=False, server_default=""))


def downgrade() -> None:
    """Take back."""
    op.drop_column("journal", "retrieved_by")
