"""From stored instances to complete series, with a real index and archive and a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import phantoms
import pytest
from pydicom import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made at import
    StudyRootQueryRetrieveInformationModelFind,
)
from running_node import free_port, wait_for

from dicomnode import rules, volumes
from dicomnode.archive import Archive
from dicomnode.counts import SeriesCounts
from dicomnode.index import Index
from dicomnode.remotes import Source
from dicomnode.scheduler import Scheduler

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
RULES = """
version: 1
rules:
  - id: pre-post
    when: {Modality: CT}
    roles: {fixed: {match: {contrast: false}}, moving: {match: {contrast: true}}}
"""


class Node:
    """A node without its network: what is put in, the scheduler sees."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.now = NOW
        self.archive = Archive(folder)
        self.index = Index(f"sqlite:///{folder}/node.db")
        self.index.migrate()
        self.options = {"quiet_period_s": 30.0, "incomplete_wait_s": 300.0, **options}
        self.jobs: list[str] = []
        self.restart()

    def restart(self) -> None:
        rule_set = rules.parse(RULES, "rules.yaml")
        self.index.rule_set_version(rule_set.text, rule_set.sha256, now=NOW)
        self.scheduler = Scheduler(
            self.index, self.archive, enqueue=lambda _connection, job_id, _due: self.jobs.append(job_id), **self.options
        )

    def receive(self, datasets: Sequence[Dataset], *, close: bool = True) -> int:
        association = self.index.open_association(calling_ae_title="A", called_ae_title="B", address="c", now=self.now)
        for dataset in datasets:
            stored = self.archive.keep_dataset(dataset)
            header = volumes.instance_header(dataset)
            self.index.add_instance(stored, header, association_id=association, now=self.now)
        if close:
            self.index.close_association(association, now=self.now)
        return association

    def after(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.scheduler.tick(self.now)

    def series(self) -> list[tuple[str, str, str]]:
        return [(row["state"], row["reason"], row["note"]) for row in self.index.status()["series"]]

    def states(self) -> list[str]:
        return [state for state, _, _ in self.series()]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.index.close()


def pre_and_post(**header: Any) -> tuple[list[Any], list[Any]]:
    return (
        phantoms.make_series(phase="native", header=header),
        phantoms.make_series(phase="portal", header=header),
    )


def test_a_gap_is_waited_for_and_what_fills_it_makes_the_series_whole(node: Node) -> None:
    pre, post = pre_and_post()
    node.receive([*pre[:7], *pre[8:]])
    node.receive(post)

    node.after(31)
    waiting = node.series()
    node.receive(pre[7:8])
    node.after(31)

    assert waiting[0][0] == "receiving"
    assert waiting[0][2].startswith("waiting until 2026-03-01 12:05:00 UTC: Series")
    assert "1 slices are missing" in waiting[0][2]
    assert node.states() == ["paired", "paired"]
    assert node.series()[0][2] == ""
    assert len(node.jobs) == 1


def test_a_gap_that_nobody_fills_is_refused_with_its_figure_once_the_wait_is_over(node: Node) -> None:
    pre, _ = pre_and_post()
    node.receive([*pre[:7], *pre[8:]])

    node.after(299)
    early = node.states()
    node.restart()
    node.after(2)

    assert early == ["receiving"]
    state, reason, _ = node.series()[0]
    assert state == "refused"
    assert "1 slices are missing" in reason


def test_a_promise_that_is_not_kept_is_noted_and_holds_nothing_up_for_good(node: Node) -> None:
    pre, post = pre_and_post(ImagesInAcquisition=25)
    node.receive(pre)
    node.receive(post)

    node.after(31)
    early = node.series()
    node.after(270)

    assert {state for state, _, _ in early} == {"receiving"}
    assert "20 of 25 instances (ImagesInAcquisition" in early[0][2]
    assert node.states() == ["paired", "paired"]
    assert node.series()[0][2].startswith("complete as it is, with 20 of 25 instances")


@pytest.mark.parametrize(
    ("policy", "states", "jobs", "note"),
    [
        ("rerun", ["paired", "paired"], {"cancelled": 1, "waiting": 1}, ""),
        ("append", ["paired", "paired"], {"waiting": 1}, ""),
        ("ignore", ["paired", "paired"], {"waiting": 1}, "1 instances came after it was complete; they are stored"),
    ],
)
def test_late_instances_follow_the_policy(
    policy: str, states: list[str], jobs: dict[str, int], note: str, tmp_path: Path
) -> None:
    node = Node(tmp_path, late_instances=policy)
    pre, post = pre_and_post()
    node.receive(pre)
    node.receive(post[:-1])
    node.after(31)
    (first,) = node.jobs

    node.after(100)
    node.receive(post[-1:])
    node.after(1)
    node.after(31)
    node.after(1)

    status = node.index.status()
    found = [row["state"] for row in status["jobs"]]
    assert node.states() == states
    assert {state: found.count(state) for state in found} == jobs
    assert note in node.series()[1][2]
    newest = node.index.job(node.jobs[-1])
    members = node.index.members_of(newest.moving_series_instance_uid, 0)
    assert len(members) == (19 if policy == "ignore" else 20)
    assert (node.jobs[-1] != first) is (policy == "rerun")
    node.index.close()


def test_an_equal_duplicate_starts_nothing(node: Node) -> None:
    pre, post = pre_and_post()
    node.receive(pre)
    node.receive(post)
    node.after(31)
    before = node.series()

    node.receive(pre)
    node.after(31)

    assert node.series() == before
    assert len(node.jobs) == 1


def test_a_silent_association_is_reported_as_stuck(node: Node) -> None:
    pre, _ = pre_and_post()
    association = node.receive(pre, close=False)

    node.after(601)
    stuck = node.series()
    node.index.close_association(association, now=node.now)
    node.after(1)

    assert stuck[0][0] == "receiving"
    assert stuck[0][2].startswith("stuck: an association that sent it is still open")
    assert node.states() == ["unpaired"]


def test_a_file_that_cannot_be_read_keeps_its_series_waiting_and_stops_no_other(node: Node, tmp_path: Path) -> None:
    pre, post = pre_and_post()
    node.receive(pre)
    node.receive(post)
    (gone,) = (each for each in node.index.instances_of(str(pre[0].SeriesInstanceUID))[:1])
    hidden = tmp_path / "hidden"
    node.archive.path(gone).rename(hidden)

    node.after(31)
    meanwhile = node.series()
    hidden.rename(node.archive.path(gone))
    node.after(31)

    assert [state for state, _, _ in meanwhile] == ["receiving", "unpaired"]
    assert "cannot be read" in meanwhile[0][2]
    assert node.states() == ["paired", "paired"]


def test_a_dynamic_series_is_complete_as_its_phases_and_a_missing_phase_is_promised(node: Node) -> None:
    phases = [
        dataset
        for n in range(3)
        for dataset in phantoms.make_series(
            phase="portal",
            header={
                "SeriesInstanceUID": "1.2.3.4",
                "TemporalPositionIdentifier": n + 1,
                "NumberOfTemporalPositions": 3,
            },
        )
    ]
    for n, dataset in enumerate(phases):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{n}"
    node.receive(phases[:40])

    node.after(31)
    early = node.series()
    node.receive(phases[40:])
    node.after(31)

    assert "40 of 60 instances (NumberOfTemporalPositions 3)" in early[0][2]
    described = node.index.volumes_of("PHANTOM", "")
    assert [(each.volume_number, each.phase_index, each.phases) for each in described] == [(n, n, 3) for n in range(3)]
    assert [len(node.index.members_of("1.2.3.4", n)) for n in range(3)] == [20, 20, 20]


class AnsweringSCP:
    """A PACS that holds `count` instances of one series."""

    def __init__(self, series_instance_uid: str, count: int) -> None:
        self.series_instance_uid, self.count, self.asked = series_instance_uid, count, 0
        ae = AE("PACS")
        ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        handlers = [(evt.EVT_C_FIND, self._find)]
        self.server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)  # type: ignore[arg-type]
        self.port = self.server.server_address[1]

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.asked += 1
        answer = Dataset()
        answer.QueryRetrieveLevel = "SERIES"
        answer.StudyInstanceUID = event.identifier.StudyInstanceUID
        answer.SeriesInstanceUID = self.series_instance_uid
        answer.NumberOfSeriesRelatedInstances = self.count
        yield 0xFF00, answer


def test_a_series_waits_for_what_the_pacs_holds_more(tmp_path: Path) -> None:
    pre, _ = pre_and_post()
    pacs = AnsweringSCP(str(pre[0].SeriesInstanceUID), 20)
    source = Source("pacs", "PACS", "127.0.0.1", pacs.port, timeout_s=10, counts=True)
    counts = SeriesCounts([source], ae_title="NODE")
    node = Node(tmp_path, counts=counts.promises)
    node.receive(pre[:15])  # the lower part: regular, and nothing in the headers says that there is more

    node.after(31)
    wait_for(lambda: node.after(0.01) or node.series()[0][2], timeout_s=30, what="the answer")
    early = node.series()
    node.receive(pre[15:])
    node.after(31)
    wait_for(lambda: node.after(0.01) or node.states() != ["receiving"], timeout_s=30, what="the second answer")

    assert early[0][0] == "receiving"
    assert "15 of 20 instances (NumberOfSeriesRelatedInstances at pacs)" in early[0][2]
    assert node.series()[0][::2] == ("unpaired", "")
    assert pacs.asked == 2
    counts.stop()
    pacs.server.shutdown()
    node.index.close()


def test_a_source_that_is_down_holds_nothing_up(tmp_path: Path) -> None:
    source = Source("pacs", "PACS", "127.0.0.1", free_port(), timeout_s=5, counts=True)
    counts = SeriesCounts([source], ae_title="NODE")
    node = Node(tmp_path, counts=counts.promises)
    node.receive(pre_and_post()[0])

    node.after(31)
    early = node.states()
    wait_for(lambda: node.after(0.01) or node.states() != ["receiving"], timeout_s=30, what="the series to go on")

    assert early == ["receiving"]
    assert node.states() == ["unpaired"]
    counts.stop()
    node.index.close()


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_set_back_keeps_nobody_waiting_and_late_instances_are_late(
    node: Node, *, restarted: bool
) -> None:
    native, arterial = phantoms.make_pair(shape=(6, 8, 8))
    node.receive(native)
    node.receive(arterial[:3])
    node.after(1)
    node.now -= timedelta(days=1)
    if restarted:
        node.restart()
    node.after(1)
    node.receive(arterial[3:5])
    node.after(31)
    node.after(1)
    assert node.states() == ["paired", "paired"]
    assert len(node.jobs) == 1

    node.receive(arterial[5:])
    node.after(1)
    node.after(31)
    node.after(1)
    assert len(node.jobs) == 2
