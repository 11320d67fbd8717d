"""Alembic's entry: runs the migrations on the connection that `Index.migrate` lends."""

from alembic import context

from dicomnode.index.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,  # SQLite alters tables by copy
)
with context.begin_transaction():
    context.run_migrations()
