"""`kill -9` of the whole process tree at every arrow of the line, then start again.

One study goes through the node while it is killed at one arrow after the other; what arrives must be exactly what an
undisturbed node delivers, UID for UID, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from phantoms import make_pair
from postgres import Postgres
from pydicom.dataset import FileDataset
from receiving_scp import ReceivingSCP
from running_node import RunningNode, wait_for

RECEIVING = [
    "dicomnode.archive:Archive.seal:before",
    "dicomnode.archive:Archive.seal:after",
    "dicomnode.index.journal:Journal.enrol:before",
    "dicomnode.index.journal:Journal.enrol:after",
    "dicomnode.index.journal:Journal.take_unindexed:after",
    "dicomnode.archive:Archive.settle:before",
    "dicomnode.archive:Archive.settle:after",
    "dicomnode.index.journal:Journal.index_entries:before",
    "dicomnode.index.journal:Journal.index_entries:after",
    "dicomnode.index.receiving:Receiving.complete_series:before",
    "dicomnode.index.receiving:Receiving.complete_series:after",
    "dicomnode.index.pairs:Pairs.add_pairs:before",
    "dicomnode.index.pairs:Pairs.add_pairs:after",
]
"""Before the job: in the supervising process and in the indexer."""

# A job is given up after three crashes, so no study bears more than two.
WORKING = [
    ["dicomnode.index.jobs:Jobs.take_up_job:after", "dicomnode.steps:Steps.volumes:after"],
    ["dicomnode.steps:Steps.registration:before", "dicomnode.steps:Steps.registration:after"],
    ["dicomnode.steps:Steps.verdict:before", "dicomnode.steps:Steps.verdict:after"],
    ["dicomnode.steps:Steps.objects:before", "dicomnode.archive:Archive.keep_dataset:after"],
    ["dicomnode.index.jobs:Jobs.add_products:before", "dicomnode.index.jobs:Jobs.add_products:after"],
    ["dicomnode.index.jobs:Jobs.enqueue_deliveries:before", "dicomnode.index.jobs:Jobs.enqueue_deliveries:after"],
]

DELIVERING = [
    "dicomnode.index.deliveries:Deliveries.record_attempts:before",
    "dicomnode.index.deliveries:Deliveries.record_attempts:after",
]

CASES = [RECEIVING, *WORKING, DELIVERING]


@pytest.fixture(scope="module")
def study() -> tuple[list[FileDataset], list[FileDataset]]:
    return make_pair(shift_mm=(2.0, -3.0, 2.0))


@pytest.fixture(scope="module")
def undisturbed(
    study: tuple[list[FileDataset], list[FileDataset]], tmp_path_factory: pytest.TempPathFactory
) -> set[str]:
    """The SOP Instance UIDs that a node delivers when nobody disturbs it."""
    with ReceivingSCP() as pacs:
        node = RunningNode(tmp_path_factory.mktemp("calm") / "node", destinations=[("pacs", "PACS", pacs.port)])
        try:
            node.start()
            for series in study:
                assert node.send(series) == []
            wait_until_delivered(node)
            assert node.stop() == 0
        finally:
            node.kill()
        assert len(pacs.stored_uids) == len(set(pacs.stored_uids)) == len(study[0]) + 2
        return set(pacs.stored_uids)


@pytest.mark.parametrize("arrows", CASES, ids=lambda arrows: arrows[0].split(":")[1])
def test_killed_at_every_arrow_it_delivers_exactly_what_an_undisturbed_node_delivers(
    arrows: list[str],
    study: tuple[list[FileDataset], list[FileDataset]],
    undisturbed: set[str],
    tmp_path: Path,
) -> None:
    with ReceivingSCP() as pacs:
        node = RunningNode(tmp_path / "node", destinations=[("pacs", "PACS", pacs.port)])
        deliver_though_killed(node, arrows, study)

        assert_delivered_exactly(undisturbed, pacs)


def test_on_postgresql_too_it_is_killed_and_delivers_exactly_what_a_node_on_sqlite_delivers(
    postgresql: Postgres,
    study: tuple[list[FileDataset], list[FileDataset]],
    undisturbed: set[str],
    tmp_path: Path,
) -> None:
    arrows = [
        "dicomnode.index.journal:Journal.index_entries:after",
        "dicomnode.index.pairs:Pairs.add_pairs:after",
        "dicomnode.index.jobs:Jobs.take_up_job:after",
        "dicomnode.steps:Steps.objects:after",
        "dicomnode.index.deliveries:Deliveries.record_attempts:before",
    ]
    with ReceivingSCP() as pacs:
        destinations = [("pacs", "PACS", pacs.port)]
        node = RunningNode(tmp_path / "node", destinations=destinations, database_url=postgresql.new_database())
        deliver_though_killed(node, arrows, study)

        assert_delivered_exactly(undisturbed, pacs)


def test_a_job_that_kills_its_worker_is_given_up_with_the_reason_and_the_next_job_is_done(
    study: tuple[list[FileDataset], list[FileDataset]], tmp_path: Path
) -> None:
    with ReceivingSCP() as pacs:
        node = RunningNode(tmp_path / "node", destinations=[("pacs", "PACS", pacs.port)])
        try:
            node.start(die_at="dicomnode.steps:Steps.registration:before:self:")
            for series in study:
                node.send(series)
            (job,) = wait_for(
                lambda: [job for job in node.status()["jobs"] if job["state"] == "failed"],
                timeout_s=120,
                what="the job to be given up",
            )
            assert "died 3 times" in job["reason"]
            assert "registration" in job["reason"]
            assert not node.has_died()

            assert node.stop() == 0
            node.start()
            for series in make_pair(shift_mm=(2.0, -3.0, 2.0), patient_id="NEXT"):
                node.send(series)
            wait_until_delivered(node, given_up=[job["id"]])
            assert node.stop() == 0
        finally:
            node.kill()
        assert pacs.stored


def test_sigterm_in_the_middle_of_a_job_ends_cleanly_and_is_no_attempt(
    study: tuple[list[FileDataset], list[FileDataset]], undisturbed: set[str], tmp_path: Path
) -> None:
    with ReceivingSCP() as pacs:
        node = RunningNode(tmp_path / "node", destinations=[("pacs", "PACS", pacs.port)])
        try:
            node.start()
            for series in study:
                node.send(series)
            wait_for(
                lambda: [job for job in node.status()["jobs"] if job["stage"] == "registration"],
                timeout_s=60,
                what="the registration to begin",
            )

            assert node.stop() == 0

            (job,) = node.status()["jobs"]
            assert (job["state"], job["attempts"]) == ("running", 0)
            node.start()
            wait_until_delivered(node)
            assert node.stop() == 0
        finally:
            node.kill()
        assert set(pacs.stored_uids) == undisturbed


def wait_until_delivered(node: RunningNode, *, given_up: Collection[str] = ()) -> None:
    def all_delivered() -> bool:
        status = node.status()
        bad = [j for j in status["jobs"] if j["state"] in ("failed", "rejected") and j["id"] not in given_up]
        assert not bad, f"{bad}\n{node.logged()[-3000:]}"
        return bool(status["deliveries"]) and all(each["state"] == "delivered" for each in status["deliveries"])

    wait_for(all_delivered, timeout_s=120, what="all deliveries")


def deliver_though_killed(
    node: RunningNode, arrows: Sequence[str], study: tuple[list[FileDataset], list[FileDataset]]
) -> None:
    """Send the study and let the node die at one arrow after the other, then at none."""
    unsent = [list(series) for series in study]
    try:
        for number, arrow in enumerate(arrows):
            marker = node.folder / f"killed-{number}"
            node.start(die_at=f"{arrow}:tree:{marker}")
            unsent = [node.send(series) if series else [] for series in unsent]
            wait_for(node.has_died, timeout_s=60, what=f"death at {arrow}; log:\n{node.logged()[-2000:]}")
            node.kill()
            assert marker.exists()
        node.start()
        assert [node.send(series) if series else [] for series in unsent] == [[], []]
        wait_until_delivered(node)
        assert node.stop() == 0
    finally:
        node.kill()


def assert_delivered_exactly(expected: set[str], pacs: ReceivingSCP) -> None:
    received = {each.sop_instance_uid: each.data_set for each in pacs.stored}
    assert set(received) == expected
    # an answer may be lost between the PACS and our ledger: the very same instance comes again, never another
    assert all(received[each.sop_instance_uid] == each.data_set for each in pacs.stored)
