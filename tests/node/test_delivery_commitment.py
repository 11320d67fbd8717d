"""Destinations that are asked to commit: wholly, in part, late, on another association, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from committing_scp import CommittingSCP
from outbox import Delivering, Outbox, make_dataset, wait_until
from receiving_scp import ReceivingSCP

from dicomnode.commitment import CommitmentSCP
from dicomnode.intake import Intake
from dicomnode.listener import Listener
from dicomnode.negotiation import Access

HOUR_S = 3600.0
UIDS = ["2.25.7.0", "2.25.7.1", "2.25.7.2"]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    made = Outbox(tmp_path / "data")
    made.put(*(make_dataset(n) for n in range(3)))
    yield made
    made.index.close()


def asking(outbox: Outbox, pacs: ReceivingSCP) -> Delivering:
    return outbox.service(pacs, commitment_within_s=HOUR_S)


def round_trip(service: Delivering) -> int:
    """Send what is due, then ask; for how many instances."""
    while service.once():
        pass
    return service.commitment.ask(service.destinations[0])


def committed(outbox: Outbox) -> list[str]:
    return [uid for uid, row in outbox.rows().items() if row["committed_at"] is not None]


def test_what_is_committed_at_once_is_asked_for_once(outbox: Outbox) -> None:
    with CommittingSCP() as pacs:
        service = asking(outbox, pacs)
        assert round_trip(service) == 3
        wait_until(lambda: pacs.answers == [0x0000])
        outbox.clock.advance(days=1)
        assert round_trip(service) == 0

    assert committed(outbox) == UIDS
    assert pacs.asked == [UIDS]
    assert [row["state"] for row in outbox.index.status()["commitment_requests"]] == ["reported"]


def test_only_what_is_denied_is_sent_and_asked_for_again(outbox: Outbox) -> None:
    lost = {"2.25.7.1": 0x0112}
    with CommittingSCP(denies=lambda uid: lost.get(uid, 0)) as pacs:
        service = asking(outbox, pacs)
        round_trip(service)
        row = outbox.rows()["2.25.7.1"]
        assert (row["state"], committed(outbox)) == ("waiting", ["2.25.7.0", "2.25.7.2"])
        assert "0x0112 no such object instance" in row["reason"]
        lost.clear()
        outbox.clock.advance(minutes=5)
        round_trip(service)

    assert pacs.stored_uids == [*UIDS, "2.25.7.1"]
    assert pacs.asked == [UIDS, ["2.25.7.1"]]
    assert committed(outbox) == UIDS


def test_what_is_taken_and_denied_for_ever_is_given_up_by_name(outbox: Outbox) -> None:
    with CommittingSCP(denies=lambda uid: 0x0112 if uid == "2.25.7.1" else 0) as pacs:
        service = asking(outbox, pacs)
        for _ in range(8):
            round_trip(service)
            outbox.clock.advance(hours=1)

    row = outbox.rows()["2.25.7.1"]
    assert (row["state"], row["attempts"]) == ("failed", 5)
    assert "taken and denied 5 times" in row["reason"]
    assert pacs.stored_uids.count("2.25.7.1") == 5


@pytest.mark.parametrize(("reason", "state"), [(0x0119, "failed"), (0x0122, "delivered"), (0xFFFF, "failed")])
def test_a_denial_that_another_sending_would_not_change_is_named(outbox: Outbox, reason: int, state: str) -> None:
    with CommittingSCP(denies=lambda uid: reason if uid == "2.25.7.1" else 0) as pacs:
        service = asking(outbox, pacs)
        for _ in range(2):
            round_trip(service)
            outbox.clock.advance(hours=1)

    row = outbox.rows()["2.25.7.1"]
    assert (row["state"], f"0x{reason:04X}" in row["reason"]) == (state, True)
    assert (pacs.stored_uids, len(pacs.asked)) == (UIDS, 1)
    assert committed(outbox) == ["2.25.7.0", "2.25.7.2"]


def test_what_a_report_does_not_mention_is_asked_for_again_and_not_sent_again(outbox: Outbox) -> None:
    silent = {"2.25.7.1"}
    with CommittingSCP(denies=lambda uid: None if uid in silent else 0) as pacs:
        service = asking(outbox, pacs)
        round_trip(service)
        silent.clear()
        round_trip(service)

    assert pacs.asked == [UIDS, ["2.25.7.1"]]
    assert (pacs.stored_uids, committed(outbox)) == (UIDS, UIDS)


def test_without_a_report_in_time_it_is_asked_again(outbox: Outbox) -> None:
    with CommittingSCP(reports=False) as pacs:
        service = asking(outbox, pacs)
        round_trip(service)
        outbox.clock.advance(minutes=59)
        assert round_trip(service) == 0
        outbox.clock.advance(minutes=1)
        pacs.reports = True
        pacs.unreported.clear()
        assert round_trip(service) == 3

    assert (pacs.stored_uids, committed(outbox)) == (UIDS, UIDS)
    assert [row["state"] for row in outbox.index.status()["commitment_requests"]] == ["expired", "reported"]


@pytest.mark.parametrize("late", [False, True])
def test_a_report_on_an_association_of_the_destination_counts_late_or_in_part(outbox: Outbox, late: bool) -> None:
    intake = Intake(outbox.archive, outbox.index)
    with CommittingSCP(reports=False, denies=lambda uid: 0x0112 if uid == "2.25.7.2" else 0) as pacs:
        service = asking(outbox, pacs)
        scp = CommitmentSCP("NODE", (), outbox.index, intake, on_report=service.commitment.reported)
        listener = Listener("127.0.0.1", 0, intake, access=Access(), commitment=scp)
        listener.start()
        try:
            round_trip(service)
            if late:  # asked again meanwhile: the first report still counts for what it promises
                outbox.clock.advance(seconds=HOUR_S)
                assert round_trip(service) == 3
                pacs.unreported.pop()
            pacs.report_to(listener.port)
            assert committed(outbox) == UIDS[:2]
            assert outbox.states()["2.25.7.2"] == ("delivered" if late else "waiting")
            pacs.denies = lambda _uid: 0
            outbox.clock.advance(seconds=HOUR_S)
            round_trip(service)
            pacs.report_to(listener.port)
        finally:
            listener.stop(grace_s=0.1)

    assert (pacs.answers, committed(outbox)) == ([0x0000, 0x0000], UIDS)
    assert pacs.stored_uids == (UIDS if late else [*UIDS, "2.25.7.2"])


def test_a_report_of_what_nobody_asked_for_is_refused_and_changes_nothing(outbox: Outbox) -> None:
    intake = Intake(outbox.archive, outbox.index)
    with CommittingSCP(reports=False) as pacs:
        service = asking(outbox, pacs)
        scp = CommitmentSCP("NODE", (), outbox.index, intake, on_report=service.commitment.reported)
        listener = Listener("127.0.0.1", 0, intake, access=Access(), commitment=scp)
        listener.start()
        try:
            round_trip(service)
            pacs.unreported[0].TransactionUID = "2.25.1"
            pacs.report_to(listener.port)
        finally:
            listener.stop(grace_s=0.1)

    assert (pacs.answers, committed(outbox)) == ([0x0115], [])


@pytest.mark.parametrize("unwilling", [ReceivingSCP, lambda: CommittingSCP(takes=0x0110)])
def test_a_destination_that_takes_no_request_is_asked_again_later_and_gets_its_instances_all_the_same(
    outbox: Outbox, unwilling: type[ReceivingSCP]
) -> None:
    with unwilling() as pacs:
        service = asking(outbox, pacs)
        assert round_trip(service) == 0
        associations = pacs.associations
        outbox.clock.advance(minutes=4)
        assert round_trip(service) == 0
        assert pacs.associations == associations
        if isinstance(pacs, CommittingSCP):
            pacs.takes = 0x0000
            outbox.clock.now += timedelta(minutes=1)
            assert round_trip(service) == 3

    assert pacs.stored_uids == UIDS
    assert committed(outbox) == (UIDS if isinstance(pacs, CommittingSCP) else [])


def test_what_was_delivered_before_anybody_wanted_a_commitment_is_not_asked_for(outbox: Outbox) -> None:
    with CommittingSCP() as pacs:
        outbox.service(pacs).once()
        assert round_trip(asking(outbox, pacs)) == 0

    assert pacs.asked == []
