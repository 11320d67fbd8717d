"""A Storage SCU by hand: it sends what no library would, and knows exactly what was answered."""

from __future__ import annotations

import socket
import struct
from types import TracebackType

EXPLICIT = "1.2.840.10008.1.2.1"
CT = "1.2.840.10008.5.1.4.1.1.2"


def item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxL", kind, len(body)) + body


def associate_rq(
    contexts: list[tuple[str, str]], *, calling: bytes = b"RAW", called: bytes = b"NODE", more_user_items: bytes = b""
) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2); contexts are (abstract syntax, transfer syntax), numbered 1, 3, 5, …"""
    items = item(0x10, b"1.2.840.10008.3.1.1.1")
    for number, (abstract, transfer) in enumerate(contexts):
        body = bytes((2 * number + 1, 0, 0, 0)) + item(0x30, abstract.encode()) + item(0x40, transfer.encode())
        items += item(0x20, body)
    user = item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3") + more_user_items
    head = struct.pack(">Hxx", 1) + called.ljust(16) + calling.ljust(16) + bytes(32)
    return pdu(1, head + items + item(0x50, user))


def command_set(elements: list[tuple[int, bytes]]) -> bytes:
    """Elements of group 0000 with their group length (PS3.7 E.1)."""
    body = b"".join(struct.pack("<HHL", 0, number, len(value)) + value for number, value in elements)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def c_store_rq(sop_class: bytes, sop_instance: bytes, *, message_id: int = 1, move_originator: bytes = b"") -> bytes:
    def padded(uid: bytes) -> bytes:
        return uid + b"\0" * (len(uid) % 2)

    return command_set(
        [
            (0x0002, padded(sop_class)), (0x0100, struct.pack("<H", 1)), (0x0110, struct.pack("<H", message_id)),
            (0x0700, struct.pack("<H", 0)), (0x0800, struct.pack("<H", 1)), (0x1000, padded(sop_instance)),
            *([(0x1030, move_originator)] if move_originator else []),
        ]
    )  # fmt: skip


def p_data(context: int, content: bytes, *, is_command: bool, piece: int = 16000, per_pdu: int = 1) -> bytes:
    """P-DATA-TFs (PS3.8 9.3.5): pieces of that many bytes, so many PDVs in each PDU."""
    pieces = [content[at : at + piece] for at in range(0, len(content), piece)] or [b""]
    pdvs = [
        struct.pack(">LBB", len(part) + 2, context, is_command | (2 if number == len(pieces) - 1 else 0)) + part
        for number, part in enumerate(pieces)
    ]
    return b"".join(pdu(4, b"".join(pdvs[at : at + per_pdu])) for at in range(0, len(pdvs), per_pdu))


class RawSCU:
    """One association; every method may raise OSError where the node has ended it."""

    def __init__(
        self, port: int, contexts: list[tuple[str, str]], *, timeout_s: float = 20.0, **options: bytes
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.socket.sendall(associate_rq(contexts, **options))
        self.answer = self.read_pdu()
        self.is_open = self.answer[0] == 2

    def __enter__(self) -> RawSCU:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.socket.close()

    def read_pdu(self) -> tuple[int, bytes]:
        """Type and body; ConnectionError where there is none."""
        kind, length = struct.unpack(">BxL", self._read(6))
        return kind, self._read(length)

    def send(self, data: bytes) -> None:
        """Raw bytes."""
        self.socket.sendall(data)

    def store(self, context: int, sop_class: str, sop_instance: str, data_set: bytes, **split: int) -> int:
        """The status answered."""
        self.send(p_data(context, c_store_rq(sop_class.encode(), sop_instance.encode()), is_command=True))
        self.send(p_data(context, data_set, is_command=False, **split))
        return self.status()

    def status(self) -> int:
        """Of the response that comes next."""
        kind, body = self.read_pdu()
        if kind != 4:
            raise ConnectionError(f"PDU type {kind} instead of an answer")
        at = body.index(struct.pack("<HHL", 0, 0x0900, 2), 6)
        (status,) = struct.unpack_from("<H", body, at + 8)
        return int(status)

    def release(self) -> None:
        """A-RELEASE and its answer."""
        self.send(pdu(5, bytes(4)))
        self.read_pdu()

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise ConnectionError("the node closed the connection")
            data += more
        return data
