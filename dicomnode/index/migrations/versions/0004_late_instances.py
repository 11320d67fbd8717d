"""Late instances: what a series was complete with, notes, superseded pairs."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

FORMER = "uq_pair_rule_and_volumes"
KEY = ["rule_id", "fixed_series_id", "fixed_volume_number", "moving_series_id", "moving_volume_number"]


def upgrade() -> None:
    """Apply; what is complete was complete with all it has."""
    with op.batch_alter_table("series") as batch_op:
        batch_op.add_column(sa.Column("note", sa.Text(), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("complete_at", sa.DateTime(), nullable=True))
    with op.batch_alter_table("series") as batch_op:
        batch_op.alter_column("note", server_default=None)
    op.execute("UPDATE series SET complete_at = last_received_at WHERE state <> 'receiving'")
    with op.batch_alter_table("pair") as batch_op:
        batch_op.add_column(sa.Column("superseded_at", sa.DateTime(), nullable=True))
        batch_op.drop_constraint(FORMER, type_="unique")
    standing = sa.text("superseded_at IS NULL")
    op.create_index("uq_pair_standing", "pair", KEY, unique=True, sqlite_where=standing, postgresql_where=standing)


def downgrade() -> None:
    """Take back; fails where a superseded pair was made again."""
    op.drop_index("uq_pair_standing", "pair")
    with op.batch_alter_table("pair") as batch_op:
        batch_op.drop_column("superseded_at")
        batch_op.create_unique_constraint(FORMER, KEY)
    with op.batch_alter_table("series") as batch_op:
        batch_op.drop_column("complete_at")
        batch_op.drop_column("note")
