"""Every rule set that was ever in force; the newest is in force now.

Law: append only. A change never alters what a pair was made by; going back is a new version with the old text.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from dicomnode.errors import ConfigError
from dicomnode.index.database import Database, inserted_key
from dicomnode.index.tables import rule_set


class RuleSets(Database):
    """The versions of the rules."""

    def rule_set_version(self, text: str, sha256: str, *, now: datetime, written: str = "") -> int:
        """The version in force after a start with this rules file.

        A file that has not changed since it was last read changes nothing, even where other rules were imported
        meanwhile: they stay in force.
        """
        newest_file = sa.select(rule_set.c.sha256).where(rule_set.c.source == "file")
        with self._reading() as connection:
            known = connection.scalar(newest_file.order_by(rule_set.c.version.desc()).limit(1))
            in_force = connection.scalar(sa.select(sa.func.max(rule_set.c.version)))
        if known == sha256 and in_force is not None:
            return int(in_force)
        return self.import_rule_set(text, sha256, written=written or text, source="file", now=now)

    def import_rule_set(
        self, text: str, sha256: str, *, written: str, source: str, author: str = "", comment: str = "", now: datetime
    ) -> int:
        """Put a checked rule set in force; its version. The text in force already makes no new version.

        Parameters
        ----------
        text, sha256
            As normalized, and its digest.
        written
            As the administrator wrote it, comments and all.
        source
            file, import or rollback.
        """
        with self._writing() as connection:
            newest = connection.execute(sa.select(rule_set).order_by(rule_set.c.version.desc()).limit(1)).first()
            if newest is not None and newest.sha256 == sha256 and source != "file":
                return int(newest.version)
            values = {"text": text, "sha256": sha256, "written": written, "source": source}
            about = {"author": author[:64], "comment": comment, "created_at": now}
            return inserted_key(connection.execute(rule_set.insert().values(**values, **about)))

    def rule_set_in_force(self) -> tuple[int, str] | None:
        """Version and normalized text of the newest; None before any was."""
        query = sa.select(rule_set.c.version, rule_set.c.text).order_by(rule_set.c.version.desc()).limit(1)
        with self._reading() as connection:
            row = connection.execute(query).first()
        return None if row is None else (int(row[0]), str(row[1]))

    def newest_rule_version(self) -> int:
        """The version in force; 0 before any was."""
        with self._reading() as connection:
            return int(connection.scalar(sa.select(sa.func.max(rule_set.c.version))) or 0)

    def rule_set_text(self, version: int, *, written: bool = False) -> str:
        """The rules of a version, normalized or as written.

        Raises
        ------
        ConfigError
            There is no such version.
        """
        newest = self.newest_rule_version()
        text = None
        if 1 <= version <= newest:  # a database takes no larger number
            column = rule_set.c.written if written else rule_set.c.text
            with self._reading() as connection:
                text = connection.scalar(sa.select(column).where(rule_set.c.version == version))
        if text is None:
            expected = f"a version from 1 to {newest}" if newest else "rules in force; there were none yet"
            raise ConfigError("rules", "version", version, expected)
        return str(text)

    def rule_set_history(self) -> list[dict[str, Any]]:
        """Every version with its digest, source, author, comment and time, oldest first."""
        names = ("version", "sha256", "source", "author", "comment", "created_at")
        query = sa.select(*[rule_set.c[name] for name in names]).order_by(rule_set.c.version)
        with self._reading() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]
