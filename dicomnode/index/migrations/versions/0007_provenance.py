"""How a job came to its results; which deliveries a rejection note was sent for."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("job", sa.Column("provenance", sa.LargeBinary(), nullable=True))
    op.add_column("delivery", sa.Column("withdrawn_at", sa.DateTime(), nullable=True))


def downgrade() -> None:
    """Take back."""
    op.drop_column("delivery", "withdrawn_at")
    op.drop_column("job", "provenance")
