"""Approval, rejection and re-runs of jobs that really ran: what is sent, what is withdrawn, and what stands."""

from __future__ import annotations

import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import phantoms
import pydicom
import pytest
import yaml
from held import Held

from dicomnode import cli, workflow
from dicomnode.archive import Archive
from dicomnode.index import Attempt, Index
from dicomnode.model import DeliveryState, Product

RULES = """
version: 1
rules:
  - id: pre-post
    when: {Modality: CT}
    roles: {fixed: {match: {contrast: false}}, moving: {match: {contrast: true}}}
    register: {preset: fast, parameters: {voxels: 2000}}
    outputs: [series, sro, dsr, sr]
"""
HELD = RULES + "    hold: true\n"
NOTED = RULES + "    rejection_note: quality\n"
REJECTING = "    verdict: {similarity_gain: {reject: 0.99}%s}\n"
SIZE: dict[str, Any] = {"shape": (8, 24, 24), "spacing_mm": (12.0, 9.0, 9.0)}
PACS, SPARE = ({"name": n, "ae_title": n.upper(), "host": "127.0.0.1", "port": 104} for n in ("pacs", "spare"))


class Node(Held):
    """A node's folder in which one pair waits to be registered."""

    def __init__(self, folder: Path, rules: str) -> None:
        super().__init__(folder)
        self.configure(PACS, SPARE)
        workflow.migrate(self.url)
        self.put_rules(rules)
        for series in phantoms.make_pair(**SIZE):
            self.receive(series)
        self.tick()
        self.first = self.queued[0][0]

    def configure(self, *destinations: dict[str, Any]) -> None:
        node = {"data_dir": "data", "quiet_period_s": 0.001}
        text = {"node": node, "destinations": list(destinations), "worker": {"device": "cpu"}}
        self.config.write_text(yaml.safe_dump(text))

    def command(self, *arguments: str) -> int:
        return cli.main([*arguments, "--config", str(self.config)])

    def ledger(self, job_id: str) -> Counter[tuple[str, str, str]]:
        """How many rows there are of each kind, destination and state."""
        of_job = {each.instance.sop_instance_uid for each in self.index.products_of(job_id)}
        rows = [row for row in self.index.status()["deliveries"] if row["sop_instance_uid"] in of_job]
        return Counter((row["kind"], row["destination"], row["state"]) for row in rows)

    def arrive(self, destination: str) -> None:
        """Everything due there arrives."""
        now = datetime.now(UTC)
        due = self.index.due_deliveries(destination, now=now, limit=1000)
        self.index.record_attempts([Attempt(each.id, DeliveryState.DELIVERED, 0, "", None, now) for each in due])

    def again(self, *more: str) -> str:
        """Have the first job made again, run the new one, and give its id."""
        before = {row["id"] for row in self.index.status()["jobs"]}
        assert self.command("rerun", self.first, *more) == 0
        (new,) = {row["id"] for row in self.index.status()["jobs"]} - before
        self.run(new)
        return str(new)

    def row(self, job_id: str) -> dict[str, Any]:
        return next(row for row in self.index.status()["jobs"] if row["id"] == job_id)

    def notes(self, job_id: str) -> list[Product]:
        return [each for each in self.index.products_of(job_id) if each.kind == "note"]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """One job whose results arrived at `pacs` and wait for `spare`."""
    node = Node(tmp_path_factory.mktemp("sent") / "node", NOTED)
    assert node.run(node.first) == "done"
    node.arrive("pacs")
    return node


@pytest.fixture
def node(sent: Node, tmp_path: Path) -> Node:
    """A copy of its own."""
    copy = object.__new__(Node)
    shutil.copytree(sent.config.parent, tmp_path / "node")
    copy.config, copy.first, copy.queued = tmp_path / "node" / "node.yaml", sent.first, []
    copy.archive, copy.url = Archive(tmp_path / "node" / "data"), f"sqlite:///{tmp_path / 'node' / 'data' / 'node.db'}"
    copy.index = Index(copy.url)
    return copy


# ── approval ──


def test_nothing_is_sent_before_a_person_approves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = Node(tmp_path / "node", HELD)

    assert node.run(node.first) == "approval"

    assert len(node.index.products_of(node.first)) == 8 + 3
    assert node.index.status()["deliveries"] == []
    assert node.row(node.first)["reason"] == "awaits approval"
    out = tmp_path / "look"
    assert node.command("export", node.first, "--out", str(out)) == 0
    told = capsys.readouterr().out
    assert "8 series" in told
    assert "the job is approval: awaits approval" in told
    products = node.index.products_of(node.first)
    assert {path.read_bytes() for path in out.iterdir()} == {
        node.archive.path(each.instance).read_bytes() for each in products
    }
    assert len(list(out.iterdir())) == len(products)
    assert node.command("export", node.first, "--out", str(out)) == 2
    assert "expected a folder that is not there yet" in capsys.readouterr().err
    assert node.command("release", node.first, "--destination", "pacs") == 2
    assert "a job is approved as a whole" in capsys.readouterr().err
    assert node.index.status()["deliveries"] == []

    assert node.command("release", node.first[:8]) == 0

    assert node.row(node.first)["state"] == "done"
    assert node.row(node.first)["reason"].startswith("approved by ")
    assert node.ledger(node.first)["series", "pacs", "waiting"] == 8
    assert len(node.index.status()["deliveries"]) == 2 * 11
    assert node.command("release", node.first) == 1  # nothing is held any more


def test_what_a_person_rejects_is_never_sent_and_can_be_made_again(tmp_path: Path) -> None:
    node = Node(tmp_path / "node", HELD)
    node.run(node.first)

    assert node.command("reject", node.first, "--reason", "liver is off") == 0

    row = node.row(node.first)
    assert row["state"] == "rejected"
    assert row["reason"].startswith("rejected by ")
    assert row["reason"].endswith(": liver is off")
    assert node.command("release", node.first) == 1
    assert node.index.status()["deliveries"] == []
    new = node.again()
    assert node.row(new)["state"] == "approval"  # what was never sent becomes the new job's
    assert len(node.index.products_of(new)) == 11
    assert node.index.products_of(node.first) == []


# ── verdict ──


def test_of_a_rejected_result_nothing_is_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = Node(tmp_path / "node", RULES + REJECTING % "")

    assert node.run(node.first) == "rejected"

    assert node.index.products_of(node.first) == []
    assert "similarity gain" in node.row(node.first)["reason"]
    assert any("ALERT" in record.message and node.first in record.message for record in caplog.records)


def test_of_a_rejected_result_the_report_is_sent_where_the_rule_wants_it(tmp_path: Path) -> None:
    node = Node(tmp_path / "node", RULES + REJECTING % ", report_rejected: true")

    assert node.run(node.first) == "rejected"

    assert node.ledger(node.first) == {("sr", "pacs", "waiting"): 1, ("sr", "spare", "waiting"): 1}


# ── made again ──


def test_made_again_alike_it_sends_nothing_and_withdraws_nothing(node: Node) -> None:
    before = node.ledger(node.first)

    new = node.again()

    assert node.row(new)["state"] == "done"
    assert node.row(new)["reason"] == f"the same results as job {node.first}: nothing new is sent"
    assert node.index.products_of(new) == []
    assert node.ledger(node.first) == before


def test_other_results_get_other_uids_and_a_note_goes_to_who_had_the_former_ones(node: Node) -> None:
    former = {each.instance.sop_instance_uid for each in node.index.products_of(node.first)}
    node.put_rules(NOTED + "    comment: another version\n")

    new = node.again("--current-rules")

    made = [each for each in node.index.products_of(new) if each.kind != "note"]
    assert len(made) == len(former)
    assert former.isdisjoint(each.instance.sop_instance_uid for each in made)
    assert node.ledger(new)["series", "spare", "waiting"] == 8
    (note,) = node.notes(new)
    assert node.ledger(new)["note", "pacs", "waiting"] == 1
    assert node.ledger(new)["note", "spare", "waiting"] == 0  # nothing had arrived there
    dataset = pydicom.dcmread(node.archive.path(note.instance))
    assert dataset.ConceptNameCodeSequence[0].CodeValue == "113001"
    listed = {
        str(item.ReferencedSOPInstanceUID)
        for series in dataset.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert listed == former
    # what had not arrived never goes
    assert node.ledger(node.first)["series", "spare", "cancelled"] == 8
    assert node.ledger(node.first)["series", "pacs", "delivered"] == 8


def test_a_third_result_withdraws_the_second_alone(node: Node) -> None:
    node.put_rules(NOTED + "    comment: second\n")
    second = node.again("--current-rules")
    node.arrive("pacs")
    node.put_rules(NOTED + "    comment: third\n")
    node.first = second

    third = node.again("--current-rules")

    (note,) = node.notes(third)
    dataset = pydicom.dcmread(node.archive.path(note.instance))
    listed = {str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) for item in dataset.ContentSequence[2:]}
    of_second = {e.instance.sop_instance_uid for e in node.index.products_of(second) if e.kind != "note"}
    assert listed == of_second


def test_a_rejected_successor_withdraws_nothing(node: Node) -> None:
    before = node.ledger(node.first)
    node.put_rules(NOTED + REJECTING % "")

    new = node.again("--current-rules")

    assert node.row(new)["state"] == "rejected"
    assert node.ledger(node.first) == before


@pytest.mark.parametrize("by", ["rule", "destination"])
def test_notes_are_a_choice_of_rule_and_destination(node: Node, by: str) -> None:
    node.put_rules(RULES if by == "rule" else NOTED + "    comment: x\n")
    if by == "destination":
        node.configure({**PACS, "rejection_notes": False}, SPARE)

    new = node.again("--current-rules")

    assert node.ledger(new)["series", "pacs", "waiting"] == 8
    assert node.notes(new) == []


def test_a_delivered_result_that_a_person_rejects_is_withdrawn(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    assert node.command("reject", node.first) == 0

    assert "a rejection note goes to pacs" in capsys.readouterr().out
    ledger = node.ledger(node.first)
    assert ledger["note", "pacs", "waiting"] == 1
    assert ledger["sr", "spare", "cancelled"] == 1
    assert node.row(node.first)["state"] == "rejected"
    assert node.command("resend", node.first, "--destination", "spare") == 1  # what is cancelled stays so
    assert node.command("reject", node.first) == 2


def test_only_the_newest_job_that_has_ended_is_made_again(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    former = node.first
    new = node.again()

    assert node.command("rerun", former) == 2
    assert "this one was superseded" in capsys.readouterr().err
    assert node.command("rerun", new) == 0
    (waiting,) = [row["id"] for row in node.index.status()["jobs"] if row["state"] == "waiting"]
    assert node.command("rerun", waiting) == 2
    assert "a job that has ended; this one is waiting" in capsys.readouterr().err
    node.put_rules(RULES.replace("pre-post", "another"))
    node.run(waiting)
    assert node.command("rerun", waiting, "--current-rules") == 2
    assert "expected a rule pre-post" in capsys.readouterr().err


def test_a_job_that_awaits_approval_and_is_made_again_is_cancelled(tmp_path: Path) -> None:
    node = Node(tmp_path / "node", HELD)
    node.run(node.first)

    new = node.again()

    assert node.row(node.first)["state"] == "cancelled"
    assert node.row(new)["state"] == "approval"
    assert node.command("release", new) == 0
    assert node.ledger(new)["series", "pacs", "waiting"] == 8
