"""Peers that send next to nothing: cut off like silent ones, while whoever gets on at all may take its time."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from raw_scu import CT, EXPLICIT, RawSCU, c_store_rq, p_data, pdu
from running_node import free_port

from dicomnode.archive import Archive
from dicomnode.index import Index
from dicomnode.intake import Intake
from dicomnode.listener import Listener
from dicomnode.negotiation import Access
from dicomnode.web import WebServer, application

TIMEOUT_S = 0.5
AN_HOUR = bytes(36_000)
"""What a peer sends a byte at a time; the node must have ended it long before."""


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    index = Index(f"sqlite:///{tmp_path}/node.db")
    index.migrate()
    intake = Intake(Archive(tmp_path), index)
    intake.start()
    yield intake
    intake.stop()
    index.close()


@pytest.fixture
def listener(intake: Intake) -> Iterator[Listener]:
    listener = Listener("127.0.0.1", 0, intake, access=Access(), network_timeout_s=TIMEOUT_S)
    listener.start()
    yield listener
    listener.stop()


def drip(peer: socket.socket, pieces: Iterator[bytes]) -> int:
    """Send a piece every now and then until the node says something; how many it took."""
    for taken, piece in enumerate(pieces):
        if select.select([peer], [], [], 0.1)[0]:
            return taken
        peer.sendall(piece)
    raise AssertionError("nobody ended it")


def bytes_of(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def in_a_pdu() -> Iterator[bytes]:
    return bytes_of(p_data(1, AN_HOUR, is_command=False, piece=30_000))


def in_a_large_pdu() -> Iterator[bytes]:
    return bytes_of(p_data(1, bytes(120_000), is_command=False, piece=120_000))


def in_a_header() -> Iterator[bytes]:
    return bytes_of(pdu(5, AN_HOUR))


def in_small_pdus() -> Iterator[bytes]:
    return (pdu(4, b"\0\0\0\4\1\0\0\0") for _ in AN_HOUR)


def in_a_command() -> Iterator[bytes]:
    return bytes_of(p_data(1, c_store_rq(CT.encode(), b"1.2.3") + AN_HOUR, is_command=True, piece=30_000))


@pytest.mark.parametrize("pieces", [in_a_pdu, in_a_large_pdu, in_a_header, in_small_pdus, in_a_command])
def test_a_byte_now_and_then_is_no_progress(listener: Listener, pieces: object) -> None:
    assert callable(pieces)
    with RawSCU(listener.port, [(CT, EXPLICIT)]) as scu:
        if pieces in (in_a_pdu, in_a_large_pdu, in_small_pdus):
            scu.send(p_data(1, c_store_rq(CT.encode(), b"1.2.3"), is_command=True))

        taken = drip(scu.socket, pieces())
        assert scu.read_pdu()[0] == 7

    assert taken * 0.1 > TIMEOUT_S / 3
    deadline = time.monotonic() + 10
    while listener.counts()["connections"] and time.monotonic() < deadline:
        time.sleep(0.05)
    counts = listener.counts()
    assert (counts["open"], counts["connections"], counts["timed out"]) == (0, 0, 1)


def test_who_gets_on_may_take_longer_than_a_silent_peer(listener: Listener) -> None:
    data_set = os.urandom(40_000)
    with RawSCU(listener.port, [(CT, EXPLICIT)]) as scu:
        scu.send(p_data(1, c_store_rq(CT.encode(), b"1.2.3"), is_command=True))
        stream = p_data(1, data_set, is_command=False)
        for at in range(0, len(stream), 2000):
            scu.send(stream[at : at + 2000])
            time.sleep(2 * TIMEOUT_S / 20)

        assert scu.status() == 0x0000

        for _ in range(2):  # between messages the time begins anew
            time.sleep(0.8 * TIMEOUT_S)
            assert scu.store(1, CT, "1.2.4", b"") == 0x0000


def test_a_request_by_http_that_drips_is_cut_off(intake: Intake) -> None:
    app = application(intake, called_ae_title="NODE", is_admitted=lambda _: True, silence_s=TIMEOUT_S)
    port = free_port()
    web = WebServer(app, "127.0.0.1", port, max_connections=20)
    web.start()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
            peer.sendall(
                b"POST /dicom-web/studies HTTP/1.1\r\nHost: x\r\nContent-Length: 36000\r\n"
                b'Content-Type: multipart/related; type="application/dicom"; boundary=b\r\n\r\n'
            )

            drip(peer, bytes_of(b"--b\r\n\r\n" + AN_HOUR))

            answer = b"".join(iter(lambda: peer.recv(1000), b""))  # up to the connection's end
            assert b" 408 " in answer
    finally:
        web.stop()


def test_who_connects_by_http_and_asks_nothing_does_not_shut_the_door(intake: Intake) -> None:
    app = application(intake, called_ae_title="NODE", is_admitted=lambda _: True, silence_s=TIMEOUT_S)
    port = free_port()
    web = WebServer(app, "127.0.0.1", port, max_connections=3, head_timeout_s=TIMEOUT_S)
    web.start()
    ask = b"POST /dicom-web/studies HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    try:
        silent, dripping = (socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(2))
        with silent, dripping:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
                peer.sendall(ask)
                assert b" 503 " in b"".join(iter(lambda: peer.recv(1000), b""))
            drip(dripping, bytes_of(b"POST / HTTP/1.1\r\nX: " + AN_HOUR))
            assert [silent.recv(1000), dripping.recv(1000)] == [b"", b""]
            with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
                peer.sendall(ask)
                assert b" 415 " in b"".join(iter(lambda: peer.recv(1000), b""))
    finally:
        web.stop()
