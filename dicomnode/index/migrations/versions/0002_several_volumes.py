"""Several volumes in one series: a volume is named by series and number."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

FORMER = "uq_pair_rule_id_moving_series_id"
UNIQUE = "uq_pair_rule_id_moving_series_id_moving_volume_number"


def upgrade() -> None:
    """Apply; a former volume is number 0, and consists of every instance that its series has."""
    with op.batch_alter_table("volume") as batch_op:
        batch_op.add_column(sa.Column("number", sa.Integer(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("members", sa.JSON(), nullable=False, server_default="[]"))
        batch_op.drop_constraint("pk_volume", type_="primary")
        batch_op.create_primary_key("pk_volume", ["series_id", "number"])
    with op.batch_alter_table("volume") as batch_op:
        batch_op.alter_column("number", server_default=None)
        batch_op.alter_column("members", server_default=None)
    _fill_members(op.get_bind())
    with op.batch_alter_table("pair") as batch_op:
        for name in ("fixed_volume_number", "moving_volume_number"):
            batch_op.add_column(sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
        batch_op.drop_constraint(FORMER, type_="unique")
        batch_op.create_unique_constraint(UNIQUE, ["rule_id", "moving_series_id", "moving_volume_number"])
    with op.batch_alter_table("pair") as batch_op:
        for name in ("fixed_volume_number", "moving_volume_number"):
            batch_op.alter_column(name, server_default=None)


def _fill_members(connection: sa.Connection) -> None:
    instance = sa.table("instance", sa.column("series_id"), sa.column("sop_instance_uid"), sa.column("id"))
    volume = sa.table("volume", sa.column("series_id"), sa.column("members", sa.JSON))
    for series_id in connection.scalars(sa.select(volume.c.series_id)).all():
        uids = sa.select(instance.c.sop_instance_uid).where(instance.c.series_id == series_id).order_by(instance.c.id)
        members = [[uid, []] for uid in connection.scalars(uids)]
        connection.execute(volume.update().where(volume.c.series_id == series_id).values(members=members))


def downgrade() -> None:
    """Take back; volumes but the first of a series, and their pairs, cannot be kept."""
    op.execute("DELETE FROM volume WHERE number > 0")
    with op.batch_alter_table("pair") as batch_op:
        batch_op.drop_constraint(UNIQUE, type_="unique")
        batch_op.create_unique_constraint(FORMER, ["rule_id", "moving_series_id"])
        batch_op.drop_column("fixed_volume_number")
        batch_op.drop_column("moving_volume_number")
    with op.batch_alter_table("volume") as batch_op:
        batch_op.drop_constraint("pk_volume", type_="primary")
        batch_op.create_primary_key("pk_volume", ["series_id"])
        batch_op.drop_column("number")
        batch_op.drop_column("members")
