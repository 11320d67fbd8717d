"""Storage commitment: what was asked is written down, answered truly, and reported until it is taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pynetdicom import AE, evt
from raw_scu import CT, EXPLICIT, RawSCU

from dicomnode.archive import Archive
from dicomnode.commitment import PUSH_MODEL_INSTANCE, CommitmentSCP
from dicomnode.index import Index
from dicomnode.intake import Intake
from dicomnode.listener import Listener
from dicomnode.negotiation import STORAGE_COMMITMENT_PUSH_MODEL, Access, Peer

MR = "1.2.840.10008.5.1.4.1.1.4"


class Committing:
    """A listener with storage commitment, and what its peers were told."""

    def __init__(self, folder: Path, peers: tuple[Peer, ...] = ()) -> None:
        self.index = Index(f"sqlite:///{folder}/node.db")
        self.index.migrate()
        self.intake = Intake(Archive(folder), self.index)
        self.intake.start()
        self.commitment = CommitmentSCP("NODE", peers, self.index, self.intake)
        self.commitment.start()
        self.listener = Listener("127.0.0.1", 0, self.intake, access=Access(), commitment=self.commitment)
        self.listener.start()

    def states(self) -> list[tuple[str, str]]:
        return [(each["state"], each["reason"]) for each in self.index.status()["commitments"]]

    def stop(self) -> None:
        self.listener.stop(grace_s=0.1)
        self.commitment.stop()
        self.intake.stop()
        self.index.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Committing]:
    made = Committing(tmp_path)
    with RawSCU(made.listener.port, [(CT, EXPLICIT)]) as scu:
        assert [scu.store(1, CT, uid, b"whatever") for uid in ("2.25.1", "2.25.2")] == [0x0000] * 2
        scu.release()
    yield made
    made.stop()


def request(transaction_uid: str, *references: tuple[str, str]) -> Dataset:
    dataset = Dataset()
    dataset.TransactionUID = transaction_uid
    dataset.ReferencedSOPSequence = []
    for sop_class_uid, sop_instance_uid in references:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
        dataset.ReferencedSOPSequence.append(item)
    return dataset


def ask(node: Committing, dataset: Dataset, *, stays: bool = True, action_type: int = 1) -> tuple[int, list[Any]]:
    """The status of an N-ACTION, and the reports that came on its association: (event type, information)."""
    reports: list[Any] = []
    came = threading.Event()

    def reported(event: evt.Event) -> tuple[int, None]:
        reports.append((event.request.EventTypeID, event.event_information))
        came.set()
        return (0x0000 if stays else 0x0110), None

    ae = AE("MODALITY")
    ae.add_requested_context(STORAGE_COMMITMENT_PUSH_MODEL)
    association = ae.associate("127.0.0.1", node.listener.port, evt_handlers=[(evt.EVT_N_EVENT_REPORT, reported)])
    status, _ = association.send_n_action(dataset, action_type, STORAGE_COMMITMENT_PUSH_MODEL, PUSH_MODEL_INSTANCE)
    if status.Status == 0x0000:
        assert came.wait(10)
        time.sleep(0.3)
    association.release()
    return status.Status, reports


def test_what_is_held_is_committed_and_what_is_not_is_named_with_the_reason(node: Committing) -> None:
    asked = request("2.25.77", (CT, "2.25.1"), (CT, "2.25.2"), (CT, "2.25.3"), (MR, "2.25.1"))

    status, reports = ask(node, asked)

    ((event_type, information),) = reports
    assert (status, event_type) == (0x0000, 2)
    assert information.TransactionUID == "2.25.77"
    assert [item.ReferencedSOPInstanceUID for item in information.ReferencedSOPSequence] == ["2.25.1", "2.25.2"]
    failed = [(item.ReferencedSOPInstanceUID, item.FailureReason) for item in information.FailedSOPSequence]
    assert failed == [("2.25.3", 0x0112), ("2.25.1", 0x0119)]
    assert node.states() == [("reported", "")]


def test_all_held_is_event_type_one_and_the_same_request_may_come_again(node: Committing) -> None:
    for _ in range(2):
        status, reports = ask(node, request("2.25.78", (CT, "2.25.1")))

        assert (status, [kind for kind, _ in reports]) == (0x0000, [1])
    assert node.states() == [("reported", "")]


def without_transaction() -> Dataset:
    dataset = request("2.25.79", (CT, "2.25.1"))
    del dataset.TransactionUID
    return dataset


@pytest.mark.parametrize(
    ("dataset", "action_type", "status"),
    [
        (request("2.25.79", (CT, "2.25.1")), 2, 0x0123),
        (request("2.25.79"), 1, 0x0115),
        (without_transaction(), 1, 0x0115),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    node: Committing, dataset: Dataset, action_type: int, status: int
) -> None:
    assert ask(node, dataset, action_type=action_type) == (status, [])
    assert node.states() == []


def test_a_report_that_is_not_taken_comes_again_on_an_association_of_ours(tmp_path: Path) -> None:
    taken: list[Dataset] = []

    def reported(event: evt.Event) -> tuple[int, None]:
        taken.append(event.event_information)
        return 0x0000, None

    modality = AE("MODALITY")
    modality.add_supported_context(STORAGE_COMMITMENT_PUSH_MODEL, scu_role=True, scp_role=True)
    server = modality.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, reported)])
    assert server is not None
    node = Committing(tmp_path, (Peer("MODALITY", port=server.server_address[1]),))
    try:
        status, reports = ask(node, request("2.25.80", (CT, "2.25.1")), stays=False)
        assert (status, len(reports)) == (0x0000, 1)
        assert node.states() == [("waiting", "")]

        deadline = time.monotonic() + 30
        while node.states() != [("reported", "")]:
            assert time.monotonic() < deadline, node.states()
            time.sleep(0.2)
        assert [each.TransactionUID for each in taken] == ["2.25.80"]
    finally:
        server.shutdown()
        node.stop()
