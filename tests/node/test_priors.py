"""Earlier examinations: which are old enough, which is taken, when they are asked for, and how that is told."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import phantoms
import pytest
import yaml
from held import Held
from pydicom.config import disable_value_validation
from sources import answering, ask, new_mr
from volume_refs import NOW, volume

from dicomnode import cli, pairing, rules
from dicomnode.errors import ConfigError
from dicomnode.model import VolumeRef
from dicomnode.remotes import Source
from dicomnode.retrieve import MAX_ATTEMPTS
from dicomnode.scheduler import Scheduler


def rule_set(**priors: Any) -> rules.RuleSet:
    rule: dict[str, Any] = {
        "id": "to-prior",
        "when": {"Modality": "MR"},
        "roles": {
            "fixed": {"from": "prior", "match": {"Modality": "CT"}, "prefer": [{"KVP": {"min": 110}, "score": 1}]},
            "moving": {"match": {"Modality": "MR"}},
        },
        "priors": priors,
    }
    return rules.parse(yaml.safe_dump({"version": 1, "rules": [rule]}), "rules")


def mr() -> VolumeRef:
    return volume("mr", Modality="MR", StudyDate="20260301", study="now")


def ct(uid: str, day: str, kvp: float = 100) -> VolumeRef:
    return volume(uid, StudyDate=day, study=uid, frame=uid, KVP=kvp)


def fixed_of(in_force: rules.RuleSet, *priors: VolumeRef) -> list[str]:
    return [pair.fixed_series_instance_uid for pair in pairing.pair(in_force, [mr(), *priors], now=NOW).pairs]


@pytest.mark.parametrize(
    ("day", "is_taken"),
    [("20260302", False), ("20260301", False), ("20260131", False), ("20260130", True), ("20250901", True),
     ("20250831", False), ("", False)],
)  # fmt: skip
def test_a_prior_is_as_many_days_earlier_as_the_rule_says(day: str, is_taken: bool) -> None:
    assert fixed_of(rule_set(min_age_days=30, max_age_days=181), ct("old", day)) == (["old"] if is_taken else [])


def test_days_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_age_days: got 9, expected at most max_age_days, 8"):
        rule_set(min_age_days=9, max_age_days=8)


@pytest.mark.parametrize(("pick", "expected"), [("newest", "new"), ("best", "good")])
def test_the_newest_prior_is_taken_or_the_best(pick: str, expected: str) -> None:
    priors = [ct("new", "20260201"), ct("good", "20260101", 120), ct("older", "20251201", 120)]

    assert fixed_of(rule_set(pick=pick), *priors) == [expected]
    assert fixed_of(rule_set(pick=pick), *reversed(priors)) == [expected]


def test_what_was_fetched_never_is_the_current_examination() -> None:
    fetched = replace(mr(), is_fetched=True)

    assert pairing.pair(rule_set(), [fetched, ct("old", "20260101")], now=NOW).pairs == ()


def test_priors_are_asked_for_with_the_first_instance_of_an_examination_that_some_rule_is_for(tmp_path: Path) -> None:
    held, source = Held(tmp_path), Source("pacs", "ORTHANC", "127.0.0.1", 104)
    held.put_rules(rule_set(query={"ModalitiesInStudy": "CT"}).text)
    scheduler = Scheduler(held.index, held.archive, quiet_period_s=60, sources=[source], enqueue=held.enqueue)

    held.receive(phantoms.make_series(modality="PT", study="other", header={"StudyDate": "20260301"})[:1])
    scheduler.tick(datetime.now(UTC))
    assert held.index.status()["priors"] == []
    held.receive(new_mr()[:1])
    scheduler.tick(datetime.now(UTC))

    (row,) = held.index.status()["priors"]
    assert (row["rule_id"], row["source"], row["state"]) == ("to-prior", "pacs", "waiting")
    assert {each["state"] for each in held.index.status()["series"]} == {"receiving"}


def test_a_number_that_no_computer_holds_stops_nobody(tmp_path: Path) -> None:
    held, source, (first, *_) = Held(tmp_path), Source("pacs", "ORTHANC", "127.0.0.1", 104), new_mr()
    with disable_value_validation():
        first.add_new(0x00200011, "IS", "9" * 400)
    rule = yaml.safe_load(rule_set().text)["rules"][0]
    gated = rule | {"id": "gated", "when": {"SeriesNumber": {"min": 3}, "Modality": "MR"}}
    held.put_rules(yaml.safe_dump({"version": 1, "rules": [gated, rule]}))
    scheduler = Scheduler(held.index, held.archive, quiet_period_s=60, sources=[source], enqueue=held.enqueue)

    with disable_value_validation():
        held.receive([first])
    scheduler.tick(datetime.now(UTC))

    assert {row["rule_id"] for row in held.index.status()["priors"]} == {"gated", "to-prior"}


def test_a_source_is_asked_for_the_days_and_modalities_of_the_rule(tmp_path: Path) -> None:
    held = Held(tmp_path)
    held.put_rules(rule_set(query={"ModalitiesInStudy": ["CT", "PT"]}, min_age_days=28, max_age_days=59).text)
    held.receive(new_mr()[:1])
    with answering(b"[]") as (source, asked):
        scheduler = Scheduler(held.index, held.archive, quiet_period_s=60, sources=[source], enqueue=held.enqueue)
        scheduler.tick(datetime.now(UTC))
        ask(held, source, "another").fetch_due(datetime.now(UTC))

    ours = [path for path in asked if "20260101-20260201" in path]
    assert len(ours) == 2
    assert {"CT", "PT"} == {modality for modality in ("CT", "PT") for path in ours if f"Study={modality}" in path}


def test_why_tells_what_came_of_asking_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held, current = Held(tmp_path), new_mr()
    held.put_rules(rule_set().text)
    held.receive(current)
    source = Source("pacs", "ORTHANC", "127.0.0.1", 1, "c-get", timeout_s=1)
    service = ask(held, source, str(current[0].StudyInstanceUID))
    now = time.time()
    for n in range(MAX_ATTEMPTS):
        service.fetch_due(datetime.fromtimestamp(now + 3600 * n, UTC))
    held.tick()

    assert cli.main(["why", str(current[0].SeriesInstanceUID), "--config", str(held.config)]) == 0

    said = capsys.readouterr().out
    assert "fits as moving, but no series is there as fixed" in said
    assert "priors for rule to-prior from pacs: failed; pacs: no association with ORTHANC at 127.0.0.1:1" in said
