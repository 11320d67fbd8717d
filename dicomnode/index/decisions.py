"""What the rules decided and why, and what they left to a person."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from dicomnode.errors import ConfigError
from dicomnode.index.database import Database, inserted_key
from dicomnode.index.tables import decision, pair, patient, series, study, work_item
from dicomnode.model import Ambiguity, WorkItem


class Decisions(Database):
    """Traces and work items."""

    def traces_of(self, uid: str) -> list[dict[str, Any]]:
        """What was decided about a series or study: its patient's last decision, and those that made its pairs.

        Each has `decided_at`, `rule_version`, `trace` and `rules`: ids of the rules whose pairs with one of the series
        were made by it, None for the last decision. Oldest first; the last decision stands last.
        """
        members = sa.select(series.c.id, series.c.patient_id).join(study, series.c.study_id == study.c.id)
        members = members.where(sa.or_(series.c.series_instance_uid == uid, study.c.study_instance_uid == uid))
        with self._reading() as connection:
            rows = connection.execute(members).all()
            ids = [row[0] for row in rows]
            made = sa.select(pair.c.decision_id, pair.c.rule_id).where(
                sa.or_(pair.c.fixed_series_id.in_(ids), pair.c.moving_series_id.in_(ids)),
                pair.c.decision_id.is_not(None),
            )
            rules: dict[int, list[str] | None] = {}
            for decision_id, rule_id in connection.execute(made.order_by(pair.c.id)):
                known = rules.setdefault(decision_id, [])
                if known is not None and rule_id not in known:
                    known.append(rule_id)
            found = [self._told(connection, each, named) for each, named in sorted(rules.items())]
            last = sa.select(sa.func.max(decision.c.id)).where(decision.c.patient_id.in_({row[1] for row in rows}))
            if (newest := connection.scalar(last)) is not None:
                found.append(self._told(connection, int(newest), None))
            return found

    def _told(self, connection: sa.Connection, decision_id: int, rules: list[str] | None) -> dict[str, Any]:
        row = connection.execute(sa.select(decision).where(decision.c.id == decision_id)).one()
        trace = json.loads(zlib.decompress(row.trace))
        return {"decided_at": row.decided_at, "rule_version": row.rule_version, "trace": trace, "rules": rules}

    def _add_decision(
        self, connection: sa.Connection, patient_id: int, trace: Sequence[Any], rule_version: int, now: datetime
    ) -> int:
        """Keep the trace of a decision; of the patient's former ones those stay that made a pair."""
        referred = sa.select(pair.c.decision_id).where(pair.c.decision_id.is_not(None))
        connection.execute(decision.delete().where(decision.c.patient_id == patient_id, decision.c.id.not_in(referred)))
        packed = zlib.compress(json.dumps(trace, separators=(",", ":")).encode())
        values = {"patient_id": patient_id, "rule_version": rule_version, "decided_at": now, "trace": packed}
        return inserted_key(connection.execute(decision.insert().values(**values)))

    def _note_ambiguities(
        self,
        connection: sa.Connection,
        patient_id: int,
        ambiguities: Collection[Ambiguity],
        rule_version: int,
        now: datetime,
    ) -> None:
        """Open an item for each, and close those of the patient that are none any more."""
        current = {(each.rule_id, each.scope[:255]): each for each in ambiguities}
        known = connection.execute(sa.select(work_item).where(work_item.c.patient_id == patient_id)).all()
        for row in known:
            each = current.pop((row.rule_id, row.scope), None)
            if each is not None and row.state != "settled":
                values = {**_stated(each), "rule_version": rule_version, "state": "open", "closed_at": None}
                connection.execute(work_item.update().where(work_item.c.id == row.id).values(**values))
            elif each is None and row.state == "open":
                connection.execute(
                    work_item.update().where(work_item.c.id == row.id).values(state="gone", closed_at=now)
                )
        for (rule_id, scope), each in current.items():
            connection.execute(
                work_item.insert().values(
                    patient_id=patient_id,
                    rule_id=rule_id,
                    rule_version=rule_version,
                    scope=scope,
                    state="open",
                    created_at=now,
                    closed_by="",
                    **_stated(each),
                )
            )

    def work_items(self, *, everything: bool = False) -> list[WorkItem]:
        """What waits for a person, oldest first; with `everything` also what was settled or is gone."""
        query = sa.select(work_item, patient.c.patient_id.label("name"), patient.c.issuer_of_patient_id.label("issuer"))
        query = query.join(patient, work_item.c.patient_id == patient.c.id).order_by(work_item.c.id)
        if not everything:
            query = query.where(work_item.c.state == "open")
        with self._reading() as connection:
            return [_work_item(row) for row in connection.execute(query)]

    def work_item(self, item_id: int) -> WorkItem:
        """One item.

        Raises
        ------
        ConfigError
            There is no such item.
        """
        found = next((item for item in self.work_items(everything=True) if item.id == item_id), None)
        if found is None:
            raise ConfigError("settle", "ITEM", item_id, "the number of a work item; `dicomnode settle` lists them")
        return found


def _stated(ambiguity: Ambiguity) -> dict[str, Any]:
    return {
        "reason": ambiguity.reason,
        "fixed": [list(key) for key in ambiguity.fixed],
        "moving": [list(key) for key in ambiguity.moving],
    }


def _work_item(row: Any) -> WorkItem:
    fixed, moving = (tuple((str(uid), int(number)) for uid, number in keys) for keys in (row.fixed, row.moving))
    return WorkItem(
        id=row.id,
        patient=(row.name, row.issuer),
        rule_version=row.rule_version,
        ambiguity=Ambiguity(row.rule_id, row.scope, row.reason, fixed, moving),
        state=row.state,
        created_at=row.created_at,
        closed_at=row.closed_at,
        closed_by=row.closed_by,
    )
