"""`ready`: which roles a rule waits for, how long, and what becomes of them at the deadline."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import phantoms
import pytest
import yaml
from held import Held
from volume_refs import NOW, volume

from dicomnode import cli, pairing, rules, workflow
from dicomnode.model import Pair, SeriesActivity, VolumeRef
from dicomnode.pairing import Decision
from dicomnode.rules import RuleSet

CAME = NOW - timedelta(hours=1)
"""When the first of the volumes below came."""


def rule_set(*, many: bool = True, **ready: Any) -> RuleSet:
    """Native is fixed, contrast is moving."""
    roles = {"fixed": {"match": {"contrast": False}}, "moving": {"match": {"contrast": True}, "many": many}}
    rule = {"id": "r", "roles": roles, "ready": {"quiet_s": 10, "deadline_s": 600, **ready}}
    return rules.parse(yaml.safe_dump({"version": 1, "rules": [rule]}), "r.yaml")


def native(uid: str = "N", *, minute: int = 0) -> VolumeRef:
    return volume(uid, SeriesDescription="nativ", last_received_at=CAME + timedelta(minutes=minute))


def contrast(uid: str = "C", *, minute: int = 0) -> VolumeRef:
    return volume(
        uid,
        SeriesDescription="portal",
        ContrastBolusAgent="Iomeprol",
        last_received_at=CAME + timedelta(minutes=minute),
    )


def decide(in_force: RuleSet, *held: VolumeRef, minute: float, receiving: tuple[str, ...] = ()) -> Decision:
    activities = [
        SeriesActivity(uid, "study-1", "P1", "", 3, CAME + timedelta(minutes=minute), receiving=True)
        for uid in receiving
    ]
    return pairing.pair(in_force, held, receiving=activities, quiet_period_s=30, now=CAME + timedelta(minutes=minute))


BOTH, ONE = (Pair("r", "N", "C"), Pair("r", "N", "D")), (Pair("r", "N", "C"),)


@pytest.mark.parametrize(
    ("ready", "held", "minute", "pairs"),
    [
        ({}, (native(), contrast()), 5, ONE),
        ({"min_moving": 2}, (native(), contrast()), 5, ()),
        ({"min_moving": 2}, (native(), contrast(), contrast("D", minute=4)), 5, BOTH),
        ({"min_moving": 2}, (native(), contrast()), 10, ()),  # at_deadline: leave
        ({"min_moving": 2, "at_deadline": "leave"}, (native(), contrast()), 10, ()),
        ({"min_moving": 2, "at_deadline": "ask"}, (native(), contrast()), 10, ()),
        ({"min_moving": 2, "at_deadline": "pair"}, (native(), contrast()), 9.9, ()),
        ({"min_moving": 2, "at_deadline": "pair"}, (native(), contrast()), 10, ONE),
        ({"min_moving": 2, "at_deadline": "pair"}, (native(),), 10, ()),
        ({"min_moving": 2, "roles": ["fixed"]}, (native(), contrast()), 5, ONE),  # moving is not waited for
    ],
)
def test_a_rule_pairs_once_its_roles_are_filled_or_at_its_deadline(
    ready: dict[str, Any], held: tuple[VolumeRef, ...], minute: float, pairs: tuple[Pair, ...]
) -> None:
    assert decide(rule_set(**ready), *held, minute=minute).pairs == pairs


@pytest.mark.parametrize(
    ("ready", "held", "awaited"),
    [
        ({}, (native(),), "moving"),
        ({}, (contrast(),), "fixed"),
        ({"roles": ["moving"]}, (native(),), "moving"),
        ({"min_moving": 2}, (native(), contrast()), "2 moving series"),
    ],
)
def test_what_is_missing_is_waited_for_until_the_deadline_and_named(
    ready: dict[str, Any], held: tuple[VolumeRef, ...], awaited: str
) -> None:
    decision = decide(rule_set(**ready), *held, minute=5)

    assert decision.look_again_at == CAME + timedelta(minutes=10)
    assert decision.waiting == {each.series_instance_uid for each in held}
    for reason in decision.reasons.values():
        assert reason == f"waiting: rule r: it waits for {awaited} until 2026-03-01 11:10:00 UTC"


@pytest.mark.parametrize(
    ("roles", "held"), [(["fixed"], native()), (["moving"], contrast()), (["fixed"], volume("X", Modality="MR"))]
)
def test_a_role_that_need_not_be_there_is_not_waited_for(roles: list[str], held: VolumeRef) -> None:
    decision = decide(rule_set(roles=roles), held, minute=5)

    assert decision.look_again_at is None
    assert not decision.waiting
    assert decision.reasons[held.series_instance_uid]


def test_the_deadline_counts_from_the_first_series_of_the_rule_and_ends_every_wait() -> None:
    """A stray that is received for hours does not hold up what has been ready since."""
    in_force = rule_set()
    late = contrast(minute=9)

    before = decide(in_force, native(), late, minute=9.1, receiving=("X",))
    after = decide(in_force, native(), late, minute=10, receiving=("X",))

    assert before.pairs == ()
    assert "still being received" in before.reasons["N"]
    assert after.pairs == ONE


def test_at_the_deadline_a_person_is_asked_with_what_there_is() -> None:
    in_force = rule_set(at_deadline="ask", many=False)

    (asked,) = decide(in_force, native(), minute=10).ambiguities
    none = decide(in_force, native(), minute=9)
    filled = decide(in_force, native(), contrast(), minute=10)

    assert (asked.rule_id, asked.fixed) == ("r", (("N", 0),))
    assert "the deadline of 600 s has passed; a person is asked" in asked.reason
    assert (none.ambiguities, filled.ambiguities) == ((), ())
    assert filled.pairs == ONE


def test_without_a_deadline_nothing_is_waited_for_but_what_is_on_its_way() -> None:
    in_force = rule_set(deadline_s=None)

    assert decide(in_force, native(), minute=1).reasons == {
        "N": "rule r: fits as fixed, but no series is there as moving"
    }


# ── as the node does it ──

SMALL: dict[str, Any] = {"shape": (8, 8, 8), "spacing_mm": (5.0, 4.0, 4.0), "study": "A", "patient_id": "A"}
WORK = """
version: 1
rules:
  - id: pre-post
    ready: {{min_moving: 2, deadline_s: 3600, at_deadline: {at_deadline}}}
    roles:
      fixed: {{match: {{contrast: false}}}}
      moving: {{match: {{contrast: true}}, many: true}}
"""


@pytest.mark.parametrize("at_deadline", ["leave", "pair", "ask"])
def test_the_scheduler_comes_back_at_the_deadline_by_itself(tmp_path: Path, at_deadline: str) -> None:
    held = Held(tmp_path / "node")
    workflow.migrate(held.url)
    held.put_rules(WORK.format(at_deadline=at_deadline))
    series = [phantoms.make_series(phase=phase, **SMALL) for phase in ("native", "portal")]
    held.receive([*series[0], *series[1]])
    uids = [str(each[0].SeriesInstanceUID) for each in series]
    scheduler, now = held.scheduler(), datetime.now(UTC) + timedelta(seconds=1)

    for seconds in (0, 60, 3500):
        scheduler.tick(now + timedelta(seconds=seconds))
    reasons = {row["reason"].split(" until")[0] for row in held.index.status()["series"]}
    waited = held.queued == [] == held.index.work_items()
    scheduler.tick(now + timedelta(seconds=3600))

    assert waited
    assert reasons == {"waiting: rule pre-post: it waits for 2 moving series"}
    assert [(job["fixed"], job["moving"]) for job in held.index.status()["jobs"]] == (
        [tuple(uids)] if at_deadline == "pair" else []
    )
    assert len(held.queued) == (at_deadline == "pair")
    items = held.index.work_items()
    assert len(items) == (at_deadline == "ask")
    if items:
        time.sleep(0.01)
        arguments = ["settle", str(items[0].id), "--fixed", uids[0], "--moving", uids[1]]
        assert cli.main([*arguments, "--config", str(held.config)]) == 0
        assert [(job["fixed"], job["moving"]) for job in held.index.status()["jobs"]] == [tuple(uids)]
