"""The Storage SCU against a real Storage SCP that is down, full, picky, dying, hanging or unfriendly."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
import sqlalchemy as sa
from outbox import NOW, Outbox, data_set_of, listens, make_dataset, wait_until
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    SpatialRegistrationStorage,
)
from pynetdicom import AE, AllStoragePresentationContexts
from receiving_scp import DIE, HANG, ReceivingSCP

from dicomnode.delivery import DeliveryService
from dicomnode.delivery.policy import next_attempt, outcome
from dicomnode.errors import LocalError, RefusedError
from dicomnode.model import DeliveryState
from dicomnode.pdu import AssociateReject
from dicomnode.remotes import Destination
from dicomnode.scu import rejection

DELIVERED, WAITING, FAILED = DeliveryState.DELIVERED, DeliveryState.WAITING, DeliveryState.FAILED


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    made = Outbox(tmp_path / "data")
    yield made
    made.index.close()


# ── decisions ──


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (0x0000, DELIVERED), (0xB000, DELIVERED), (0xB006, DELIVERED), (0xB007, DELIVERED),
        (0xA700, WAITING), (0xA702, WAITING), (0xA7FF, WAITING), (0x0110, WAITING), (0x0210, WAITING),
        (0x0213, WAITING),
        (0xA900, FAILED), (0xA9FF, FAILED), (0xC000, FAILED), (0xC123, FAILED), (0xCFFF, FAILED), (0x0111, FAILED),
        (0x0112, FAILED), (0x0117, FAILED), (0x0118, FAILED), (0x0119, FAILED), (0x0122, FAILED), (0x0124, FAILED),
        (0x0211, FAILED), (0x0212, FAILED),
        (0x0001, FAILED), (0xA800, FAILED), (0xB001, FAILED), (0xD000, FAILED), (0xFE00, FAILED), (0xFF00, FAILED),
    ],
)  # fmt: skip
def test_each_status_means_delivered_try_again_or_never(status: int, state: DeliveryState) -> None:
    assert outcome(status).state is state
    assert f"0x{status:04X}" in outcome(status).meaning


def test_no_status_outside_the_storing_ones_counts_as_delivered() -> None:
    assert [status for status in range(0x10000) if outcome(status).state is DELIVERED] == [0, 0xB000, 0xB006, 0xB007]


def test_pauses_double_up_to_five_minutes_and_never_overflow() -> None:
    pacs = Destination("pacs", "PACS", "", 104)
    pauses = [(next_attempt(pacs, attempts, now=NOW) - NOW).total_seconds() for attempts in (1, 2, 3, 6, 7, 8, 100_000)]

    assert pauses == [5, 10, 20, 160, 300, 300, 300]


@pytest.mark.parametrize(
    ("answer", "retry"),
    [
        ((1, 1, 3), False), ((1, 1, 7), False), ((1, 1, 1), False), ((1, 2, 2), False),
        ((2, 1, 1), True), ((2, 3, 1), True), ((2, 3, 2), True), ((1, 3, 2), True),
    ],
)  # fmt: skip
def test_a_rejected_association_is_retried_only_where_it_speaks_of_the_moment(
    answer: tuple[int, int, int], retry: bool
) -> None:
    error = rejection("pacs", AssociateReject(*answer))

    assert error.retry is retry
    assert isinstance(error, RefusedError) is not retry


# ── sending ──


def test_everything_due_goes_over_one_association_as_it_is_on_the_disk(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs:
        instances = outbox.put(*(make_dataset(n) for n in range(5)), make_dataset(9, sop_class_uid=MRImageStorage))

        assert outbox.service(pacs).once() == 6

    assert pacs.associations == 1
    assert [each.data_set for each in pacs.stored] == [data_set_of(outbox.archive.path(each)) for each in instances]
    assert {each.transfer_syntax_uid for each in pacs.stored} == {ExplicitVRLittleEndian}
    assert set(outbox.states().values()) == {"delivered"}
    assert {(row["status"], row["attempts"], row["reason"]) for row in outbox.rows().values()} == {(0, 1, "")}


def test_what_is_delivered_is_never_sent_again(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs:
        outbox.put(make_dataset(1))
        service = outbox.service(pacs)
        service.once()
        outbox.clock.advance(days=30)

        assert service.once() == 0

    assert pacs.stored_uids == ["2.25.7.1"]
    assert pacs.associations == 1


def test_storing_warnings_are_delivered_and_keep_their_reason(outbox: Outbox) -> None:
    warnings = {"2.25.7.0": 0xB000, "2.25.7.1": 0xB006, "2.25.7.2": 0xB007}
    with ReceivingSCP(answer=warnings.__getitem__) as pacs:
        outbox.put(*(make_dataset(n) for n in range(3)))
        outbox.service(pacs).once()

    rows = outbox.rows()
    assert {uid: row["status"] for uid, row in rows.items()} == warnings
    assert {row["state"] for row in rows.values()} == {"delivered"}
    assert all("stored" in row["reason"] for row in rows.values())


def test_refused_instances_fail_by_name_and_hold_up_no_other(outbox: Outbox) -> None:
    refusals = {"2.25.7.0": 0xA900, "2.25.7.2": 0xC000, "2.25.7.3": 0x0122, "2.25.7.4": 0x0124, "2.25.7.6": 0x0111}
    with ReceivingSCP(answer=lambda uid: refusals.get(uid, 0)) as pacs:
        outbox.put(*(make_dataset(n) for n in range(8)))
        service = outbox.service(pacs)
        service.once()
        outbox.clock.advance(days=1)

        assert service.once() == 0

    assert pacs.stored_uids == ["2.25.7.1", "2.25.7.5", "2.25.7.7"]
    rows = outbox.rows()
    assert {uid: row["status"] for uid, row in rows.items() if row["state"] == "failed"} == refusals
    assert all(f"0x{status:04X}" in rows[uid]["reason"] for uid, status in refusals.items())
    assert {row["attempts"] for row in rows.values()} == {1}


def test_an_instance_that_finds_no_room_waits_longer_each_time_until_it_is_taken(outbox: Outbox) -> None:
    full = {"2.25.7.1"}
    with ReceivingSCP(answer=lambda uid: 0xA700 if uid in full else 0) as pacs:
        outbox.put(*(make_dataset(n) for n in range(3)))
        service = outbox.service(pacs)

        for pause_s in (5, 10, 20):
            service.once()
            assert outbox.states() == {"2.25.7.0": "delivered", "2.25.7.1": "waiting", "2.25.7.2": "delivered"}
            outbox.clock.advance(seconds=pause_s - 0.1)
            assert service.once() == 0
            outbox.clock.advance(seconds=0.1)
        full.clear()
        service.once()

    assert outbox.rows()["2.25.7.1"] | {"kind": ""} == {
        "sop_instance_uid": "2.25.7.1", "kind": "", "destination": "pacs", "state": "delivered", "status": 0,
        "attempts": 4, "reason": "", "committed_at": None,
    }  # fmt: skip


def test_a_destination_that_is_down_delays_all_and_loses_none(outbox: Outbox) -> None:
    pacs = ReceivingSCP()
    pacs.start()
    pacs.stop()
    outbox.put(*(make_dataset(n) for n in range(3)))
    service = outbox.service(pacs)

    service.once()
    assert set(outbox.states().values()) == {"waiting"}
    assert all("unreachable" in row["reason"] for row in outbox.rows().values())
    assert service.once() == 0
    outbox.clock.advance(seconds=5)
    with pacs:
        service.once()

    assert pacs.stored_uids == ["2.25.7.0", "2.25.7.1", "2.25.7.2"]
    assert set(outbox.states().values()) == {"delivered"}


def test_a_host_that_cannot_be_resolved_is_tried_again(outbox: Outbox) -> None:
    outbox.put(make_dataset(1))
    nowhere = Destination("pacs", "PACS", "no-such-host.invalid", 104)
    service = DeliveryService([nowhere], outbox.index, outbox.archive, ae_title="NODE", clock=outbox.clock)

    service.deliver_due(nowhere)

    assert outbox.states() == {"2.25.7.1": "waiting"}
    assert "no-such-host.invalid" in outbox.rows()["2.25.7.1"]["reason"]


@pytest.mark.parametrize("trouble", [DIE, HANG])
def test_a_destination_that_breaks_off_or_hangs_in_mid_way_gets_the_rest_at_once_and_that_one_later(
    outbox: Outbox, trouble: int
) -> None:
    troubled = {"2.25.7.1"}
    with ReceivingSCP(answer=lambda uid: trouble if uid in troubled else 0) as pacs:
        outbox.put(*(make_dataset(n) for n in range(4)))
        service = outbox.service(pacs, timeout_s=1.0)

        service.once()
        assert list(outbox.states().values()) == ["delivered", "waiting", "waiting", "waiting"]
        assert [row["attempts"] for row in outbox.rows().values()] == [1, 1, 0, 0]
        service.once()
        assert list(outbox.states().values()) == ["delivered", "waiting", "delivered", "delivered"]
        troubled.clear()
        outbox.clock.advance(seconds=5)
        service.once()

    assert set(outbox.states().values()) == {"delivered"}
    assert sorted(pacs.stored_uids) == ["2.25.7.0", "2.25.7.1", "2.25.7.2", "2.25.7.3"]


def test_a_caller_that_is_not_known_to_the_destination_fails_for_good(outbox: Outbox) -> None:
    with ReceivingSCP(known=["SOMEBODY"]) as pacs:
        outbox.put(make_dataset(1), make_dataset(2))
        outbox.service(pacs).once()

    assert set(outbox.states().values()) == {"failed"}
    assert all("calling AE title not recognized" in row["reason"] for row in outbox.rows().values())


def test_a_destination_at_its_limit_of_associations_is_tried_again(outbox: Outbox) -> None:
    with ReceivingSCP(max_associations=1) as pacs:
        ae = AE("OTHER")
        ae.add_requested_context(CTImageStorage)
        other = ae.associate("127.0.0.1", pacs.port)
        outbox.put(make_dataset(1))
        outbox.service(pacs).once()
        other.release()

    assert outbox.states() == {"2.25.7.1": "waiting"}
    assert "local limit exceeded" in outbox.rows()["2.25.7.1"]["reason"]


def test_a_destination_that_knows_only_implicit_vr_gets_the_same_dataset_in_it(outbox: Outbox) -> None:
    dataset = make_dataset(1)
    with ReceivingSCP(transfer_syntaxes=[ImplicitVRLittleEndian]) as pacs:
        outbox.put(dataset)
        outbox.service(pacs).once()

    (received,) = pacs.stored
    assert received.transfer_syntax_uid == ImplicitVRLittleEndian
    assert received.dataset().PixelData == dataset.PixelData
    assert received.dataset().PatientName == dataset.PatientName
    assert outbox.states() == {"2.25.7.1": "delivered"}


def test_a_sop_class_the_destination_does_not_take_fails_by_name_and_the_others_go(outbox: Outbox) -> None:
    with ReceivingSCP(sop_classes=[CTImageStorage]) as pacs:
        outbox.put(make_dataset(1), make_dataset(2, sop_class_uid=SpatialRegistrationStorage), make_dataset(3))
        outbox.service(pacs).once()

    assert pacs.stored_uids == ["2.25.7.1", "2.25.7.3"]
    reason = outbox.rows()["2.25.7.2"]["reason"]
    assert outbox.states()["2.25.7.2"] == "failed"
    assert "Spatial Registration Storage" in reason
    assert "Explicit VR Little Endian" in reason


def test_a_destination_that_takes_nothing_of_ours_fails_each_instance_by_name(outbox: Outbox) -> None:
    with ReceivingSCP(sop_classes=[MRImageStorage]) as pacs:
        outbox.put(make_dataset(1), make_dataset(2))
        outbox.service(pacs).once()

    assert set(outbox.states().values()) == {"failed"}
    assert all("CT Image Storage" in row["reason"] for row in outbox.rows().values())


def test_a_file_that_cannot_be_read_waits_and_one_that_is_damaged_fails_and_neither_holds_up_the_rest(
    outbox: Outbox,
) -> None:
    with ReceivingSCP() as pacs:
        missing, damaged, _ = outbox.put(*(make_dataset(n) for n in range(3)))
        outbox.archive.path(missing).unlink()
        outbox.archive.path(damaged).write_bytes(b"rust")
        service = outbox.service(pacs)
        while service.once():
            pass

    assert list(outbox.states().values()) == ["waiting", "failed", "delivered"]
    assert "cannot read" in outbox.rows()["2.25.7.0"]["reason"]


def test_an_answer_that_could_not_be_recorded_means_the_same_instance_once_more(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs:
        outbox.put(make_dataset(1))
        service = outbox.service(pacs)
        with outbox.index.engine.begin() as connection:
            connection.execute(
                sa.text("CREATE TRIGGER no BEFORE UPDATE ON delivery BEGIN SELECT RAISE(FAIL, 'no'); END")
            )
        with pytest.raises(LocalError):
            service.once()
        with outbox.index.engine.begin() as connection:
            connection.execute(sa.text("DROP TRIGGER no"))
        service.once()

    assert pacs.stored_uids == ["2.25.7.1", "2.25.7.1"]
    assert pacs.stored[0].data_set == pacs.stored[1].data_set
    assert outbox.states() == {"2.25.7.1": "delivered"}


def test_more_kinds_of_instances_than_one_association_can_carry_all_arrive(outbox: Outbox) -> None:
    classes = [str(each.abstract_syntax) for each in AllStoragePresentationContexts[:70]]
    with ReceivingSCP() as pacs:
        outbox.put(*(make_dataset(n, sop_class_uid=uid) for n, uid in enumerate(classes)))
        service = outbox.service(pacs, associations=1)
        service.once()
        service.once()

    assert pacs.associations == 2
    assert len(set(pacs.stored_uids)) == 70


# ── the service ──


def test_the_service_delivers_what_comes_and_one_dead_destination_delays_no_other(outbox: Outbox) -> None:
    dead = ReceivingSCP()
    dead.start()
    dead.stop()
    with ReceivingSCP() as pacs:
        service = outbox.service(pacs, dead, names=("pacs", "dead"))
        service.start()
        outbox.put(make_dataset(1), make_dataset(2), destinations=("pacs", "dead"))
        wait_until(lambda: len(pacs.stored_uids) == 2)
        service.stop()

    states = {
        (row["sop_instance_uid"], row["destination"]): row["state"] for row in outbox.index.status()["deliveries"]
    }
    assert [states["2.25.7.1", name] for name in ("pacs", "dead")] == ["delivered", "waiting"]


def test_a_stop_finishes_the_instance_in_hand_and_leaves_the_rest_due(outbox: Outbox) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slowly(_uid: str) -> int:
        began.set()
        assert go_on.wait(5)
        return 0x0000

    with ReceivingSCP(answer=slowly) as pacs:
        outbox.put(make_dataset(1), make_dataset(2))
        service = outbox.service(pacs)
        service.start()
        assert began.wait(5)
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        wait_until(service._stopping.is_set)
        go_on.set()
        stopping.join(5)
        assert not stopping.is_alive()

    assert outbox.states() == {"2.25.7.1": "delivered", "2.25.7.2": "waiting"}
    assert outbox.rows()["2.25.7.2"]["attempts"] == 0


def test_a_kill_after_the_answer_sends_the_very_same_instance_again_and_nothing_else(outbox: Outbox) -> None:
    program = """
import sys
from pathlib import Path
from dicomnode.archive import Archive
from dicomnode.delivery import DeliveryService
from dicomnode.index import Index
from dicomnode.remotes import Destination
folder, port = Path(sys.argv[1]), int(sys.argv[2])
destination = Destination("pacs", "PACS", "127.0.0.1", port)
service = DeliveryService([destination], Index(f"sqlite:///{folder}/node.db"), Archive(folder), ae_title="NODE")
service.deliver_due(destination)
"""
    victims: list[subprocess.Popen[bytes]] = []

    def kill_on_the_second(uid: str) -> int:
        if uid == "2.25.7.1" and victims[-1].poll() is None:
            wait_until(lambda: outbox.states()["2.25.7.0"] == "delivered")  # what was answered is recorded soon
            victims[-1].send_signal(signal.SIGKILL)  # we store it; the sender never learns
            victims[-1].wait()
        return 0x0000

    with ReceivingSCP(answer=kill_on_the_second) as pacs:
        outbox.put(*(make_dataset(n) for n in range(3)))
        victims.append(subprocess.Popen([sys.executable, "-c", program, outbox.archive.root, str(pacs.port)]))
        victims[0].wait(timeout=30)
        wait_until(lambda: len(pacs.stored) == 2)
        assert list(outbox.states().values()) == ["delivered", "waiting", "waiting"]

        outbox.service(pacs).once()

    assert pacs.stored_uids == ["2.25.7.0", "2.25.7.1", "2.25.7.1", "2.25.7.2"]
    assert pacs.stored[1].data_set == pacs.stored[2].data_set
    assert set(outbox.states().values()) == {"delivered"}


@pytest.mark.skipif(shutil.which("storescp") is None, reason="DCMTK is not installed")
def test_storescp_stores_what_we_send(outbox: Outbox, tmp_path: Path) -> None:
    folder = tmp_path / "received"
    folder.mkdir()
    with ReceivingSCP() as probe:
        port = probe.port
    scp = subprocess.Popen(["storescp", "-aet", "PACS", "-od", folder, "--accept-all", str(port)])
    try:
        instances = outbox.put(*(make_dataset(n) for n in range(10)))
        destination = Destination("pacs", "PACS", "127.0.0.1", port)
        service = DeliveryService([destination], outbox.index, outbox.archive, ae_title="NODE", clock=outbox.clock)
        wait_until(lambda: listens(port))
        service.deliver_due(destination)
    finally:
        scp.terminate()
        scp.wait(10)

    assert set(outbox.states().values()) == {"delivered"}
    read = {str(ds.SOPInstanceUID): ds for ds in map(pydicom.dcmread, folder.iterdir())}
    assert [read[each.sop_instance_uid] for each in instances] == [
        pydicom.dcmread(outbox.archive.path(each)) for each in instances
    ]
