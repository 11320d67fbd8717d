"""Whatever a destination does, everything is delivered once or named with the reason."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from outbox import NOW, Outbox, make_dataset
from raw_scu import command_set, p_data, pdu
from receiving_scp import DIE, ReceivingSCP

from dicomnode.pdu import AssociateRequest, ContextAnswer, Identity
from dicomnode.upperlayer import Fragment, UpperLayer

STORED = (0x0000, 0xB000, 0xB006, 0xB007)


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    made = Outbox(tmp_path / "data")
    yield made
    made.index.close()


def assert_delivered_once_or_named(outbox: Outbox, pacs: ReceivingSCP) -> None:
    """What the ledger calls delivered the destination has taken exactly once; what it does not has a reason."""
    taken, rows = Counter(pacs.stored_uids), outbox.rows()
    assert taken == Counter(uid for uid, row in rows.items() if row["state"] == "delivered")
    assert all(row["reason"] for row in rows.values() if row["state"] != "delivered")


def test_down_for_ten_minutes(outbox: Outbox) -> None:
    pacs = ReceivingSCP()
    pacs.start()
    pacs.stop()
    outbox.put(*(make_dataset(n) for n in range(20)))
    service = outbox.service(pacs)
    while (outbox.clock.now - NOW).total_seconds() < 600:
        service.once()
        assert all("unreachable" in row["reason"] for row in outbox.rows().values())
        outbox.clock.advance(seconds=5)
    attempts = {row["attempts"] for row in outbox.rows().values()}
    with pacs:
        outbox.clock.advance(minutes=5)  # the longest pause
        while service.once():
            pass

    assert attempts == {7}  # at 0, 5, 15, 35, 75, 155, 315 s: it is not hammered
    assert set(outbox.states().values()) == {"delivered"}
    assert_delivered_once_or_named(outbox, pacs)


def test_accepting_slowly(outbox: Outbox) -> None:
    def slowly(_uid: str) -> int:
        time.sleep(0.15)
        return 0x0000

    with ReceivingSCP(answer=slowly) as pacs:
        outbox.put(*(make_dataset(n) for n in range(20)))
        outbox.service(pacs, timeout_s=0.5).once()  # for each answer, not for all of them

    assert {(row["state"], row["attempts"]) for row in outbox.rows().values()} == {("delivered", 1)}
    assert_delivered_once_or_named(outbox, pacs)


@pytest.mark.parametrize("associations", [1, 2])
def test_aborting_in_the_middle_again_and_again(outbox: Outbox, associations: int) -> None:
    lock, count = threading.Lock(), 0

    def every_seventh_dies(_uid: str) -> int:
        nonlocal count
        with lock:
            count += 1
            return DIE if count % 7 == 0 else 0x0000

    with ReceivingSCP(answer=every_seventh_dies) as pacs:
        outbox.put(*(make_dataset(n) for n in range(40)))
        service = outbox.service(pacs, associations=associations)
        for _ in range(20):
            while service.once():
                pass
            outbox.clock.advance(minutes=5)

    assert set(outbox.states().values()) == {"delivered"}
    assert_delivered_once_or_named(outbox, pacs)


def test_refusing_one_of_three_hundred(outbox: Outbox) -> None:
    with ReceivingSCP(answer=lambda uid: 0xC123 if uid == "2.25.7.170" else 0) as pacs:
        outbox.put(*(make_dataset(n) for n in range(300)))
        service = outbox.service(pacs)
        for _ in range(3):
            while service.once():
                pass
            outbox.clock.advance(hours=1)

    refused = {uid: row for uid, row in outbox.rows().items() if row["state"] != "delivered"}
    assert list(refused) == ["2.25.7.170"]
    assert (refused["2.25.7.170"]["state"], refused["2.25.7.170"]["status"]) == ("failed", 0xC123)
    assert len(pacs.requests) == 300
    assert_delivered_once_or_named(outbox, pacs)


def test_answering_every_status_of_the_storage_service(outbox: Outbox) -> None:
    """PS3.4 Table B.2-1 at both ends of its ranges, and the general ones of PS3.7 Annex C."""
    statuses = [
        0x0000, 0xB000, 0xB006, 0xB007, 0xA700, 0xA7FF, 0xA900, 0xA9FF, 0xC000, 0xCFFF,
        0x0110, 0x0111, 0x0117, 0x0118, 0x0119, 0x0122, 0x0124, 0x0210, 0x0211, 0x0212, 0x0213, 0xFF00, 0x1234,
    ]  # fmt: skip
    answers = {f"2.25.7.{number}": status for number, status in enumerate(statuses)}
    with ReceivingSCP(answer=answers.__getitem__) as pacs:
        outbox.put(*(make_dataset(n) for n in range(len(statuses))))
        outbox.service(pacs).once()
        once = {uid: row["state"] for uid, row in outbox.rows().items()}
        later = outbox.service(pacs, give_up_after_s=3600.0)  # what is never taken is given up, and says so
        for _ in range(20):
            while later.once():
                pass
            outbox.clock.advance(minutes=5)

    rows = outbox.rows()
    assert {answers[uid] for uid, state in once.items() if state == "delivered"} == set(STORED)
    assert {answers[uid] for uid, state in once.items() if state == "waiting"} == {
        0xA700, 0xA7FF, 0x0110, 0x0210, 0x0213,
    }  # fmt: skip
    assert {uid: row["status"] for uid, row in rows.items()} == answers
    assert {row["state"] for uid, row in rows.items() if answers[uid] not in STORED} == {"failed"}
    assert_delivered_once_or_named(outbox, pacs)


@pytest.mark.parametrize("what", ["no status", "of another message", "an abort", "nonsense"])
def test_an_answer_that_is_none_is_never_taken_for_success(outbox: Outbox, what: str) -> None:
    with Lying(what) as pacs:
        outbox.put(make_dataset(1))
        service = outbox.service(pacs)  # type: ignore[arg-type]  # it has what is asked for: AE title and port
        assert service.once() == 1

    row = outbox.rows()["2.25.7.1"]
    assert (row["state"], row["status"], bool(row["reason"])) == ("waiting", None, True)


class Lying:
    """Accepts one association, takes an instance, and answers with something that is no C-STORE response to it."""

    ae_title = "PACS"

    def __init__(self, what: str) -> None:
        self._what = what
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Lying:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._socket.close()

    def _serve(self) -> None:
        layer, peer = UpperLayer(16384), self._socket.accept()[0]
        with peer:
            taken = 0
            while taken < 2:  # the last fragments of a command and of its data set
                data = peer.recv(65536)
                if not data:
                    return
                for event in layer.receive(memoryview(data)):
                    if isinstance(event, AssociateRequest):
                        answers = [
                            ContextAnswer(each.id, each.abstract_syntax, 0, each.transfer_syntaxes[0])
                            for each in event.contexts
                        ]
                        peer.sendall(layer.accept(event, answers, implementation=Identity("1.2.3", "LYING")))
                    elif isinstance(event, Fragment):
                        taken += event.is_last
            peer.sendall(self._answer())
            while peer.recv(65536):
                pass

    def _answer(self) -> bytes:
        def response(message_id: int, *more: tuple[int, bytes]) -> bytes:
            responded = (0x0120, struct.pack("<H", message_id))
            elements = [(0x0100, struct.pack("<H", 0x8001)), responded, (0x0800, struct.pack("<H", 0x0101)), *more]
            return p_data(1, command_set(elements), is_command=True)

        return {
            "no status": response(1),
            "of another message": response(2, (0x0900, struct.pack("<H", 0))),
            "an abort": pdu(7, bytes(4)),
            "nonsense": b"HTTP/1.1 200 OK\r\n\r\n",
        }[self._what]
