"""Rules in the database: versions, decisions with their trace, work items, hours; and the commands about them."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import phantoms
import pytest
import yaml
from held import Held

from dicomnode import cli, rules, workflow
from dicomnode import config as configuration
from dicomnode.config import PRESET_PARAMETERS
from dicomnode.model import JobPlan, JobState, Pair
from dicomnode.steps import Steps
from registration_engine import PRESETS

SMALL: dict[str, Any] = {"shape": (8, 8, 8), "spacing_mm": (5.0, 4.0, 4.0)}

RULES = """\
# Our rules.
version: 1
rules:
  - id: pre-post
    owner: Radiology
    when: {Modality: CT}
    roles:
      fixed: {match: {contrast: false}}
      moving: {match: {contrast: true}}
"""
TIED = RULES.replace("contrast: true", "Modality: CT").replace("contrast: false", "Modality: CT")


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return Held(tmp_path / "node")


def study(name: str) -> list[list[Any]]:
    return [phantoms.make_series(phase=phase, study=name, patient_id=name, **SMALL) for phase in ("native", "portal")]


def run(held: Held, *arguments: str, status: int = 0) -> None:
    assert cli.main([*arguments, "--config", str(held.config)]) == status


def answer(capsys: pytest.CaptureFixture[str], held: Held, *arguments: str) -> str:
    run(held, *arguments)
    return capsys.readouterr().out


# ── versions ──


def test_a_file_is_imported_listed_compared_and_taken_back(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(RULES)
    two.write_text(RULES.replace("pre-post", "before-after"))

    assert "1 rules, 1 enabled" in answer(capsys, held, "rules", "check", str(one))
    assert "version 1 is in force" in answer(capsys, held, "rules", "import", str(one), "--comment", "first")
    assert "has these rules already" in answer(capsys, held, "rules", "import", str(one))
    assert "version 2 is in force" in answer(capsys, held, "rules", "import", str(two))
    assert answer(capsys, held, "rules", "export", "--version", "1") == RULES
    assert "before-after  enabled  normal" in answer(capsys, held, "rules", "list")
    changed = answer(capsys, held, "rules", "diff").splitlines()
    assert [line for line in changed if line[1:].startswith("  -")] == ["-  - id: pre-post", "+  - id: before-after"]
    assert "version 3 is in force" in answer(capsys, held, "rules", "rollback", "1")
    assert answer(capsys, held, "rules", "export") == RULES
    history = answer(capsys, held, "rules", "history").splitlines()
    assert [line.split()[0] for line in history] == ["1", "2", "3"]
    assert "first" in history[0]
    assert "rollback" in history[2]
    assert "back to version 1" in history[2]


def test_a_bad_file_is_refused_whole_with_line_key_got_and_nearest_word(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(RULES.replace("Modality: CT", "Modalty: CT").replace("contrast: true", "contrast: maybe"))

    run(held, "rules", "import", str(bad), status=2)

    said = capsys.readouterr().err.splitlines()
    assert [line.split(": got")[0] for line in said] == [
        f"{bad}:6: rules[0](pre-post).when.Modalty",
        f"{bad}:9: rules[0](pre-post).roles.moving.match.contrast",
    ]
    assert "did you mean 'Modality'?" in said[0]
    assert held.index.newest_rule_version() == 0


def test_a_rule_may_only_name_a_destination_that_is_configured(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(RULES + "    destinations: [pacs]\n")

    run(held, "rules", "check", str(file), status=2)

    assert "rules(pre-post).destinations: got 'pacs'" in capsys.readouterr().err


def test_a_version_that_never_was_is_named(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    held.put_rules(RULES)

    for number in (7, 0, -1, 10**30):
        for command in (["rollback", str(number)], ["export", f"--version={number}"], ["list", f"--version={number}"]):
            run(held, "rules", *command, status=2)
            assert f"version: got {number}, expected a version from 1 to 1" in capsys.readouterr().err


def test_a_start_with_the_same_file_leaves_imported_rules_in_force_and_a_changed_file_does_not(held: Held) -> None:
    def start(text: str) -> int:
        file = rules.parse(text, "file")
        return held.index.rule_set_version(file.text, file.sha256, written=file.written, now=datetime.now(UTC))

    versions = [start(RULES), held.put_rules(TIED), start(RULES), start(RULES.replace("pre-post", "x"))]

    assert versions == [1, 2, 2, 3]


def test_parameters_that_a_rule_may_set_are_the_engine_s() -> None:
    for preset in PRESETS.values():
        for name, (_, _, is_whole) in PRESET_PARAMETERS.items():
            assert isinstance(getattr(preset, name), int if is_whole else float)


# ── decisions ──


def test_pairs_are_made_by_the_imported_rules_and_why_tells_every_condition(
    held: Held, capsys: pytest.CaptureFixture[str]
) -> None:
    native, portal = study("A")
    held.put_rules(RULES)
    held.receive([*native, *portal])

    held.tick()

    (job,) = held.index.status()["jobs"]
    assert (job["rule_id"], job["rule_version"]) == ("pre-post", 1)
    assert (job["fixed"], job["moving"]) == (native[0].SeriesInstanceUID, portal[0].SeriesInstanceUID)
    said = answer(capsys, held, "why", str(portal[0].SeriesInstanceUID))
    assert f"job {job['id']}  rule pre-post version 1" in said
    assert "pair of pre-post made" in said
    assert "yes match: contrast true, got true (ContrastBolusAgent 'Iomeprol' +1" in said
    assert "yes same StudyInstanceUID" in said
    told = json.loads(answer(capsys, held, "why", str(native[0].StudyInstanceUID), "--json"))
    assert [each["rules"] for each in told["decisions"]] == [["pre-post"], None]
    assert "PHANTOM" not in said


def test_why_of_an_unknown_uid_says_so(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    run(held, "why", "1.2.3", status=2)

    assert "a series or study that was received" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["--study", "--last", "--dicom"])
def test_a_dry_run_tells_the_pairs_with_the_trace_and_changes_nothing(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    native, portal = study("A")
    file = tmp_path / "new.yaml"
    file.write_text(RULES)
    held.put_rules(TIED)
    held.receive([*native, *portal])
    held.tick()
    phantoms.write_series([*native, *portal], tmp_path / "images")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    values = {"--study": str(native[0].StudyInstanceUID), "--last": "1d", "--dicom": str(tmp_path / "images")}

    said = answer(capsys, held, "rules", "test", "--rules", str(file), source, values[source])
    told = json.loads(answer(capsys, held, "rules", "test", "--rules", str(file), source, values[source], "--json"))

    pair = {"rule": "pre-post", "fixed": native[0].SeriesInstanceUID, "moving": portal[0].SeriesInstanceUID}
    assert [each["pairs"] for each in told["decisions"]] == [[pair]]
    assert set(told["refused"]) == ({"notes.txt"} if source == "--dicom" else set())
    assert "yes match: contrast false, got false (ContrastBolusAgent empty -1" in said
    assert held.index.newest_rule_version() == 1
    assert held.index.status()["jobs"] == []


# ── what a person decides ──


def test_a_tie_becomes_a_work_item_that_a_person_settles_once(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    workflow.migrate(held.url)
    native, portal = study("A")
    uids = sorted(str(each[0].SeriesInstanceUID) for each in (native, portal))
    held.put_rules(TIED)
    held.receive([*native, *portal])
    held.tick()
    held.tick()

    (item,) = held.index.work_items()
    said = answer(capsys, held, "settle")
    run(held, "settle", "1", "--fixed", "1.2.3", "--moving", uids[1], status=2)
    run(held, "settle", "1", "--fixed", uids[0], "--moving", uids[0], status=2)
    assert held.index.status()["jobs"] == []
    capsys.readouterr()
    settled = answer(capsys, held, "settle", str(item.id), "--fixed", uids[0], "--moving", uids[1])
    run(held, "settle", "1", "--fixed", uids[0], "--moving", uids[1], status=2)
    held.tick()

    assert item.ambiguity.fixed == item.ambiguity.moving == ((uids[0], 0), (uids[1], 0))
    assert "a tie for fixed between series" in said
    assert "pairs: 1" in settled
    (job,) = held.index.status()["jobs"]
    assert (job["fixed"], job["moving"], job["rule_version"]) == (*uids, 1)
    assert held.index.work_items() == []


def test_an_item_is_gone_once_other_rules_decide(held: Held) -> None:
    native, portal = study("A")
    held.put_rules(TIED)
    held.receive([*native, *portal])
    scheduler = held.scheduler()
    time.sleep(0.01)
    scheduler.tick(datetime.now(UTC))
    assert len(held.index.work_items()) == 1

    held.put_rules(RULES)
    scheduler.tick(datetime.now(UTC))

    assert held.index.work_items() == []
    assert [each.state for each in held.index.work_items(everything=True)] == ["gone"]
    assert [job["rule_version"] for job in held.index.status()["jobs"]] == [2]


# ── change ──


def test_rules_change_while_studies_arrive_and_no_pair_is_lost_or_doubled(held: Held) -> None:
    studies = [study(f"S{n}") for n in range(6)]
    versions = [held.put_rules(RULES)]
    scheduler, is_done = held.scheduler(), threading.Event()
    failures: list[BaseException] = []

    def arrive() -> None:
        try:
            for native, portal in studies:
                held.receive(native)
                held.receive(portal)
        except BaseException as error:
            failures.append(error)
        finally:
            is_done.set()

    sender = threading.Thread(target=arrive)
    sender.start()
    while not is_done.is_set():
        scheduler.tick(datetime.now(UTC))
        versions.append(held.put_rules(RULES + f"    comment: change {len(versions)}\n"))
    sender.join()
    time.sleep(0.01)
    scheduler.tick(datetime.now(UTC))

    jobs = held.index.status()["jobs"]
    assert failures == []
    assert Counter((job["fixed"], job["moving"]) for job in jobs) == Counter(
        (str(native[0].SeriesInstanceUID), str(portal[0].SeriesInstanceUID)) for native, portal in studies
    )
    used = {job["rule_version"] for job in jobs}
    assert used <= set(versions)
    assert len(used) > 1
    for job in jobs:
        (made, _) = held.index.traces_of(job["fixed"])
        assert made["rule_version"] == job["rule_version"]
    assert Counter(job_id for job_id, _ in held.queued) == Counter(job["id"] for job in jobs)


def test_what_was_paired_stands_under_new_rules(held: Held) -> None:
    native, portal = study("A")
    held.put_rules(RULES)
    held.receive([*native, *portal])
    held.tick()

    held.put_rules(yaml.safe_dump({"version": 1, "rules": []}))
    held.tick()

    assert [(job["rule_id"], job["rule_version"]) for job in held.index.status()["jobs"]] == [("pre-post", 1)]


# ── when ──


def test_the_urgent_begin_first_and_nobody_waits_for_ever() -> None:
    def due(priority: str, *, made: datetime) -> datetime:
        (rule,) = rules.parse(RULES + f"    priority: {priority}\n", "r").rules
        return made + timedelta(seconds=rule.plan(made).patience_s)

    now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    assert due("urgent", made=now) < due("normal", made=now) < due("off-peak", made=now)
    assert due("off-peak", made=now - timedelta(hours=13)) < due("urgent", made=now)


@pytest.mark.parametrize(
    ("schedule", "now", "expected"),
    [
        ({"from": "19:00", "to": "06:00"}, "2026-03-02 12:00", "2026-03-02 19:00"),
        ({"from": "19:00", "to": "06:00"}, "2026-03-02 23:00", "2026-03-02 23:00"),
        ({"from": "19:00", "to": "06:00"}, "2026-03-02 05:59", "2026-03-02 05:59"),
        ({"from": "08:00", "to": "12:00"}, "2026-03-02 12:00", "2026-03-03 08:00"),
        ({"days": ["sat", "sun"]}, "2026-03-02 12:00", "2026-03-07 00:00"),
        ({"days": ["sun"], "from": "20:00", "to": "04:00"}, "2026-03-02 03:00", "2026-03-02 03:00"),
        ({"days": ["sun"], "from": "20:00", "to": "04:00"}, "2026-03-02 05:00", "2026-03-08 20:00"),
    ],
)
def test_a_schedule_says_when_a_job_may_begin(schedule: dict[str, Any], now: str, expected: str) -> None:
    (rule,) = rules.parse(f"{RULES}    schedule: {json.dumps(schedule)}\n", "r").rules

    assert rule.schedule is not None
    assert f"{rule.schedule.next_start(datetime.fromisoformat(now).replace(tzinfo=UTC)):%Y-%m-%d %H:%M}" == expected


def test_a_job_outside_its_hours_is_held_and_let_on_when_they_come(held: Held) -> None:
    native, portal = study("A")
    now = datetime.now(UTC)
    closed = f"{(now - timedelta(hours=2)).astimezone():%H:%M}", f"{(now - timedelta(hours=1)).astimezone():%H:%M}"
    held.put_rules(RULES + f"    schedule: {{from: '{closed[0]}', to: '{closed[1]}'}}\n")
    held.receive([*native, *portal])
    scheduler = held.scheduler()
    time.sleep(0.01)

    scheduler.tick(datetime.now(UTC))
    (job,) = held.index.status()["jobs"]
    assert job["state"] == JobState.HELD
    assert "waits for the hours of its rule" in job["reason"]
    assert held.queued == []

    scheduler.tick(datetime.now(UTC) + timedelta(hours=22, minutes=30))
    assert [job_id for job_id, _ in held.queued] == [job["id"]]
    assert held.index.status()["jobs"][0]["state"] == JobState.WAITING


def test_a_held_job_whose_rules_this_version_cannot_read_fails_with_the_reason(held: Held) -> None:
    native, portal = study("A")
    held.receive([*native, *portal])
    held.put_rules("version: 1\nrules: []")
    held.tick()
    now = datetime.now(UTC)
    version = held.index.import_rule_set("version: 9", "sha", written="version: 9", source="import", now=now)
    pair = Pair("pre-post", str(native[0].SeriesInstanceUID), str(portal[0].SeriesInstanceUID))
    plans = {"pre-post": JobPlan(held="waits for the hours of its rule")}
    (job_id,) = held.index.add_pairs([pair], {}, rule_version=version, enqueue=held.enqueue, now=now, plans=plans)

    held.tick()

    assert [each for each, _ in held.queued] == [job_id]
    assert held.run(job_id) == JobState.FAILED
    assert f"rule set {version}:1: version: got 9, expected 1" in held.index.status()["jobs"][0]["reason"]


# ── a rule's own ──


def test_a_rule_s_own_exclude_and_require_stand_instead_of_the_defaults_for_it_alone(held: Held) -> None:
    native, portal = study("A")
    for dataset in portal:
        dataset.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    rule = yaml.safe_load(RULES)["rules"][0]
    taking, asking = {**rule, "id": "taking", "exclude": []}, {**rule, "id": "asking", "exclude": []}
    asking["require"] = {"n_slices": {"min": 9}}
    leaving = {**rule, "id": "leaving", "exclude": [{"ImageType": "DERIVED"}]}
    held.put_rules(yaml.safe_dump({"version": 1, "rules": [rule, taking, asking, leaving]}))
    held.receive([*native, *portal])

    held.tick()

    assert [job["rule_id"] for job in held.index.status()["jobs"]] == ["taking"]
    made = held.index.traces_of(str(portal[0].SeriesInstanceUID))
    told = json.dumps(made, default=str)
    for expected in ("defaults.exclude", "rule asking.require", "rule leaving.exclude"):
        assert expected in told


@pytest.mark.parametrize(
    ("asked", "expected"), [("", {"pacs", "research"}), ("destinations: [research]", {"research"})]
)
def test_results_go_to_the_rule_s_own_destinations_or_to_all(held: Held, asked: str, expected: set[str]) -> None:
    configured = yaml.safe_load(held.config.read_text())
    configured["destinations"] = [
        {"name": name, "ae_title": name.upper(), "host": "127.0.0.1", "port": 104} for name in ("pacs", "research")
    ]
    configured["worker"] = {"device": "cpu"}
    held.config.write_text(yaml.safe_dump(configured))
    small: dict[str, Any] = {"shape": (16, 32, 32), "spacing_mm": (10.0, 10.0, 10.0), "study": "A", "patient_id": "A"}
    series = [phantoms.make_series(phase=phase, **small) for phase in ("native", "portal")]
    held.put_rules(f"{RULES}    register: {{preset: rigid}}\n    outputs: [sro]\n    {asked}\n")
    held.receive([*series[0], *series[1]])
    workflow.migrate(held.url)
    held.tick()
    (job_id,) = [each for each, _ in held.queued]

    for step in Steps(configuration.load(held.config), held.index, held.archive).in_order().values():
        step(job_id)

    status = held.index.status()
    assert [job["state"] for job in status["jobs"]] == [JobState.DONE]
    assert {row["destination"] for row in status["deliveries"]} == expected


def test_a_destination_gets_of_a_rule_s_outputs_those_it_wants(held: Held) -> None:
    configured = yaml.safe_load(held.config.read_text())
    configured["destinations"] = [
        {"name": name, "ae_title": name.upper(), "host": "127.0.0.1", "port": 104, **more}
        for name, more in (
            ("pacs", {"outputs": ["series"]}), ("planning", {"outputs": ["sro", "dsr"]}), ("all", {}),
            ("other", {"outputs": ["sc"]}),
        )
    ]  # fmt: skip
    held.config.write_text(yaml.safe_dump(configured))
    small: dict[str, Any] = {"shape": (16, 32, 32), "spacing_mm": (10.0, 10.0, 10.0), "study": "A", "patient_id": "A"}
    held.put_rules(f"{RULES}    register: {{preset: rigid}}\n    outputs: [series, sro]\n")
    held.receive([each for phase in ("native", "portal") for each in phantoms.make_series(phase=phase, **small)])
    held.tick()
    (job_id,) = [each for each, _ in held.queued]

    assert held.run(job_id) == JobState.DONE

    rows = {(row["destination"], row["kind"]) for row in held.index.status()["deliveries"]}
    assert rows == {("pacs", "series"), ("planning", "sro"), ("all", "series"), ("all", "sro")}


def test_a_destination_that_wants_what_there_is_not_is_refused(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104, "outputs": ["series", "picture"]}
    held.config.write_text(yaml.safe_dump({"destinations": [pacs]}))

    assert cli.main(["check", "--config", str(held.config)]) == 2
    assert "destinations[0].outputs[1]" in capsys.readouterr().err


# ── the loop guard ──


@pytest.mark.parametrize("mark", ["its mark", "REG"])
def test_the_node_s_own_output_never_enters_whatever_a_rule_says(held: Held, mark: str) -> None:
    native, portal = study("A")
    everything = RULES.replace("contrast: true", "Modality: {any_of: [CT, REG]}").replace(
        "when: {Modality: CT}", "exclude: []"
    )
    held.put_rules(everything)
    for dataset in portal:
        if mark == "REG":
            dataset.Modality = "REG"
        else:
            item = phantoms.Dataset()
            item.ManufacturerModelName = "dicomnode"
            dataset.ContributingEquipmentSequence = [item]
    held.receive([*native, *portal])

    held.tick()

    states = {row["series_instance_uid"]: row for row in held.index.status()["series"]}
    assert held.index.status()["jobs"] == []
    assert "the node's own output" in states[str(portal[0].SeriesInstanceUID)]["reason"]
