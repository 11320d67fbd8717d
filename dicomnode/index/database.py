"""One database, opened so that a commit is durable, and the few statements every room of the index needs.

Law: database trouble leaves as LocalError. SQLite runs in WAL mode with synchronous=FULL: what was committed survives
a power cut; writers wait for each other instead of failing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from dicomnode.errors import LocalError
from dicomnode.index.tables import series
from dicomnode.model import Instance

_MIGRATIONS = Path(__file__).parent / "migrations"
STORED = tuple(Instance.__dataclass_fields__)
"""The columns that hold a `model.Instance`."""


def create_engine(url: str) -> sa.Engine:
    """Open a database so that a commit is durable and writers wait for each other instead of failing.

    SQLite: WAL, synchronous=FULL, 30 s busy time-out, transactions that take the write lock at once.
    """
    # parameters may name the patient, and errors are logged
    engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"), hide_parameters=True)
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def _prepare(connection: Any, _record: object) -> None:
            connection.isolation_level = "IMMEDIATE"
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

    return engine


class Database:
    """An open database; each `_writing` block is one transaction.

    Parameters
    ----------
    url
        SQLAlchemy database URL, `sqlite:///…` or `postgresql+psycopg://…`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = create_engine(url)

    def migrate(self, revision: str = "head") -> None:
        """Bring the tables to this version's shape, or to that of an earlier revision.

        Raises
        ------
        LocalError
            The database cannot be opened or written.
        """
        import alembic.command
        import alembic.config
        import alembic.util

        config = alembic.config.Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        try:
            with self._local_errors(), self.engine.connect() as connection:
                is_sqlite = self.engine.dialect.name == "sqlite"
                if is_sqlite:  # it alters a table by copy and drop, which would break what refers to its rows
                    connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
                    connection.commit()
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                config.attributes["connection"] = connection
                try:
                    alembic.command.upgrade(config, revision)
                except alembic.util.CommandError as error:
                    raise LocalError(f"{self.name}: made by another version of dicomnode: {error}") from None
                if is_sqlite and connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
                    raise LocalError(f"{self.name}: a migration would break references; nothing was changed")
                connection.commit()
        finally:
            self.engine.dispose()  # the next connections look after references again

    def require_shape(self) -> None:
        """LocalError where another version of the software made, or last changed, the tables."""
        newest = max(path.stem.split("_")[0] for path in (_MIGRATIONS / "versions").glob("[0-9]*.py"))
        with self._reading() as connection:
            is_made = sa.inspect(connection).has_table("alembic_version")
            found = connection.scalar(sa.text("SELECT version_num FROM alembic_version")) if is_made else None
        if found != newest:
            expected = f"revision {newest}; a start of the node brings an older one to it"
            raise LocalError(f"{self.name}: got tables of revision {found or 'none'}, expected {expected}")

    @property
    def name(self) -> str:
        """The database as messages name it, without password."""
        url = self.engine.url
        return f"database {url.database if url.get_backend_name() == 'sqlite' else url.render_as_string()}"

    def close(self) -> None:
        """Give back every connection."""
        self.engine.dispose()

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """One transaction that holds SQLite's write lock from its first statement on."""
        with self._local_errors(), self.engine.begin() as connection:
            if self.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._local_errors(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def _local_errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            # what follows the first line is the statement, or, from PostgreSQL, the values of a row
            said = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
            raise LocalError(f"{self.name}: {said.splitlines()[0]}") from error


def upsert(
    connection: sa.Connection, table: sa.Table, key: Mapping[str, Any], rest: Mapping[str, Any] | None = None
) -> int:
    """The id of the row with that key, made if it is not there."""
    insert_new(connection, table, {**key, **(rest or {})})
    query = sa.select(table.c.id).where(*[table.c[name] == value for name, value in key.items()])
    return int(connection.execute(query).scalar_one())


def insert_new(
    connection: sa.Connection, table: sa.Table, values: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> None:
    """Insert, a row or several of the same columns, unless a unique key stands already."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    if values:
        connection.execute(dialect.insert(table).on_conflict_do_nothing(), values)


def series_key(connection: sa.Connection, series_instance_uid: str) -> int:
    """The row id of a series that is known to stand."""
    query = sa.select(series.c.id).where(series.c.series_instance_uid == series_instance_uid)
    return int(connection.execute(query).scalar_one())


def inserted_key(result: sa.CursorResult[Any]) -> int:
    """The id that the database gave an inserted row."""
    key = result.inserted_primary_key
    assert key is not None
    return int(key[0])


def stored_instance(row: sa.RowMapping) -> Instance:
    """The instance that a row of `instance` or `product` holds."""
    return Instance(**{name: row[name] for name in STORED})
