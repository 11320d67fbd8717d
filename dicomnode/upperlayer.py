"""The DICOM Upper Layer as an acceptor sees it (PS3.8 9.3): bytes in, events out, answers as bytes.

Law: no I/O, no clock, no thread. Whatever a peer sends becomes an event or a ProtocolError that carries the A-ABORT
to answer with; nothing is buffered beyond one control PDU, so that a data set of any size passes through in pieces.
Items that are not known are skipped; text is taken whatever its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)

APPLICATION_CONTEXT_NAME = "1.2.840.10008.3.1.1.1"  # PS3.7 A.2.1

MAX_CONTROL_PDU = 524288  # 128 presentation contexts with 30 transfer syntaxes each are less
PDU_SLACK = 1024  # senders that count the PDU's own header are wrong and harmless
_PDV_HEADER = 6


class ProtocolError(Exception):
    """The peer broke the protocol; `reason` is the A-ABORT's reason/diagnostic (PS3.8 9.3.8)."""

    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNIZED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6

    def __init__(self, message: str, reason: int = INVALID_PARAMETER) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ProposedContext:
    """A presentation context as proposed (PS3.8 9.3.2.2)."""

    id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True)
class AssociateRequest:
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2).

    Attributes
    ----------
    ae_titles
        The 32 bytes of called and calling AE title as sent, which the answer repeats.
    max_pdu
        Largest PDU the requestor takes, bytes; 0 for any.
    roles
        SOP Class UID → (SCU, SCP) proposed for the requestor (PS3.7 D.3.3.4).
    """

    protocol_version: int
    ae_titles: bytes
    application_context_name: str
    contexts: tuple[ProposedContext, ...]
    max_pdu: int = 0
    implementation: str = ""
    asks_for_async_window: bool = False
    roles: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def called_ae_title(self) -> str:
        """Whom the requestor means to speak to."""
        return _text(self.ae_titles[:16])

    @property
    def calling_ae_title(self) -> str:
        """Who the requestor says it is."""
        return _text(self.ae_titles[16:])


@dataclass(frozen=True)
class Fragment:
    """A piece of a presentation data value; `data` is only valid until the next bytes are received."""

    context_id: int
    is_command: bool
    is_last: bool
    data: memoryview


class ReleaseRequest:
    """The requestor has finished."""


@dataclass(frozen=True)
class Abort:
    """The requestor, or its network, gave up."""

    source: int
    reason: int


Event = AssociateRequest | Fragment | ReleaseRequest | Abort


class _State(Enum):
    """PS3.8 9.2: what may come next. Sta2, Sta3, Sta6, and everything after our last PDU (Sta13)."""

    IDLE = "awaiting A-ASSOCIATE-RQ"
    DECIDING = "awaiting our answer"
    OPEN = "data transfer"
    CLOSED = "awaiting the connection's end"


class UpperLayer:
    """One association, from the acceptor's side.

    Parameters
    ----------
    max_pdu
        Largest P-DATA-TF that the requestor is told it may send, bytes.
    """

    def __init__(self, max_pdu: int) -> None:
        self._max_pdu = max_pdu
        self._state = _State.IDLE
        self._held = bytearray()  # an incomplete header or control PDU
        self._wanted = 0  # bytes, before it is worth looking at what is held
        self._pdu_left = 0  # of the P-DATA-TF in hand
        self._pdv_left = 0
        self._context_id = 0
        self._is_command = self._is_last = False
        self._peer_max_pdu = 0

    @property
    def in_pdu(self) -> bool:
        """Whether the peer has begun a PDU and not finished it."""
        return bool(self._held or self._pdu_left)

    def receive(self, data: memoryview) -> Iterator[Event]:
        """Take in bytes as they came; must be read to its end before the next call.

        Raises
        ------
        ProtocolError
            The association must be aborted.
        """
        if self._held:
            self._held += data
            if len(self._held) < self._wanted:
                return
            data = memoryview(bytes(self._held))
            self._held.clear()
        at, end = 0, len(data)
        while at < end:
            if self._state is _State.CLOSED:
                return  # PS3.8 9.2.3, AA-7: whatever still comes is of no interest
            if self._pdv_left:
                take = min(self._pdv_left, end - at)
                self._pdv_left -= take
                self._pdu_left -= take
                is_last = self._is_last and not self._pdv_left
                yield Fragment(self._context_id, self._is_command, is_last, data[at : at + take])
                at += take
            elif end - at < _PDV_HEADER:
                self._hold(data[at:], _PDV_HEADER)  # a header, of a PDU or of a PDV: both have six bytes
                return
            elif self._pdu_left:
                yield from self._begin_pdv(*struct.unpack_from(">LBB", data, at))
                at += _PDV_HEADER
            else:
                pdu_type, length = struct.unpack_from(">BxL", data, at)
                self._check_pdu(pdu_type, length)
                if pdu_type == P_DATA:
                    self._pdu_left = length
                    at += 6
                elif end - at < 6 + length:
                    self._hold(data[at:], 6 + length)
                    return
                else:
                    yield self._control(pdu_type, bytes(data[at + 6 : at + 6 + length]))
                    at += 6 + length

    def accept(self, request: AssociateRequest, answers: Sequence[ContextAnswer], *, implementation: Identity) -> bytes:
        """The A-ASSOCIATE-AC (PS3.8 9.3.3); the association is open."""
        self._state = _State.OPEN
        self._peer_max_pdu = request.max_pdu
        items = [_item(0x10, APPLICATION_CONTEXT_NAME.encode())]
        for answer in answers:
            body = bytes((answer.id, 0, answer.result, 0)) + _item(0x40, answer.transfer_syntax.encode("latin-1"))
            items.append(_item(0x21, body))
        user = [_item(0x51, struct.pack(">L", self._max_pdu)), _item(0x52, implementation.class_uid.encode())]
        if request.asks_for_async_window:
            user.append(_item(0x53, struct.pack(">HH", 1, 1)))  # PS3.7 D.3.3.3: one operation at a time
        accepted = {answer.abstract_syntax for answer in answers if answer.result == 0}
        for uid, (scu, _scp) in request.roles.items():
            if uid in accepted:  # the requestor may be the SCU; nobody is an SCP for us
                name = uid.encode("latin-1")
                user.append(_item(0x54, struct.pack(">H", len(name)) + name + bytes((scu, 0))))
        user.append(_item(0x55, implementation.version_name.encode()))
        items.append(_item(0x50, b"".join(user)))
        return _pdu(ASSOCIATE_AC, struct.pack(">Hxx", 1) + request.ae_titles + bytes(32) + b"".join(items))

    def reject(self, result: int, source: int, reason: int) -> bytes:
        """The A-ASSOCIATE-RJ (PS3.8 9.3.4)."""
        self._state = _State.CLOSED
        return _pdu(ASSOCIATE_RJ, bytes((0, result, source, reason)))

    def release(self) -> bytes:
        """The A-RELEASE-RP (PS3.8 9.3.7)."""
        self._state = _State.CLOSED
        return _pdu(RELEASE_RP, bytes(4))

    def abort(self, reason: int = 0) -> bytes:
        """The A-ABORT (PS3.8 9.3.8), by the service user, or for a reason by the service provider."""
        self._state = _State.CLOSED
        return _pdu(ABORT, bytes((0, 0, 2 if reason else 0, reason)))

    def message(self, context_id: int, command: bytes, data_set: bytes = b"") -> bytes:
        """A command set, and perhaps a data set, as P-DATA-TFs that the peer takes (PS3.8 9.3.5, E.2)."""
        room = self._peer_max_pdu - _PDV_HEADER if self._peer_max_pdu else 65536
        room = max(2, room - room % 2)
        pdus = []
        for content, is_command in ((command, 1), (data_set, 0)):
            for start in range(0, len(content), room):
                part = content[start : start + room]
                header = is_command | (2 if start + room >= len(content) else 0)
                pdus.append(_pdu(P_DATA, struct.pack(">LBB", len(part) + 2, context_id, header) + part))
        return b"".join(pdus)

    def _hold(self, data: memoryview, wanted: int) -> None:
        self._held += data
        self._wanted = wanted

    def _begin_pdv(self, length: int, context_id: int, header: int) -> Iterator[Fragment]:
        if not 2 <= length <= self._pdu_left - 4:
            raise ProtocolError(f"PDV length {length} in a PDU with {self._pdu_left} bytes left")
        self._pdu_left -= _PDV_HEADER
        self._pdv_left = length - 2
        self._context_id, self._is_command, self._is_last = context_id, bool(header & 1), bool(header & 2)
        if not self._pdv_left:
            yield Fragment(context_id, self._is_command, self._is_last, memoryview(b""))
        if 0 < self._pdu_left - self._pdv_left < _PDV_HEADER:
            raise ProtocolError("bytes are left over at the end of a P-DATA-TF")

    def _check_pdu(self, pdu_type: int, length: int) -> None:
        expected = {
            _State.IDLE: (ASSOCIATE_RQ, ABORT),
            _State.DECIDING: (ABORT,),
            _State.OPEN: (P_DATA, RELEASE_RQ, ABORT),
        }[self._state]
        if not ASSOCIATE_RQ <= pdu_type <= ABORT:
            raise ProtocolError(f"unknown PDU type 0x{pdu_type:02X}", ProtocolError.UNRECOGNIZED_PDU)
        if pdu_type not in expected:
            raise ProtocolError(f"PDU type {pdu_type} while {self._state.value}", ProtocolError.UNEXPECTED_PDU)
        if pdu_type == P_DATA:
            if length > self._max_pdu + PDU_SLACK:
                raise ProtocolError(f"P-DATA-TF of {length} bytes, expected at most {self._max_pdu}")
            if length < _PDV_HEADER:
                raise ProtocolError(f"P-DATA-TF of {length} bytes has room for no PDV")
        elif length > MAX_CONTROL_PDU:
            raise ProtocolError(f"PDU type {pdu_type} of {length} bytes, expected at most {MAX_CONTROL_PDU}")

    def _control(self, pdu_type: int, body: bytes) -> Event:
        if pdu_type == ASSOCIATE_RQ:
            self._state = _State.DECIDING
            return parse_associate_request(body)
        if pdu_type == RELEASE_RQ:
            return ReleaseRequest()
        self._state = _State.CLOSED
        return Abort(*(body + bytes(4))[2:4])


@dataclass(frozen=True)
class Identity:
    """Who we are in the answer's user information (PS3.7 D.3.3.2)."""

    class_uid: str
    version_name: str


@dataclass(frozen=True)
class ContextAnswer:
    """What becomes of a proposed context: result 0 accepted, 3 abstract syntax, 4 transfer syntaxes not supported."""

    id: int
    abstract_syntax: str
    result: int
    transfer_syntax: str


def parse_associate_request(body: bytes) -> AssociateRequest:
    """Read an A-ASSOCIATE-RQ without its six bytes of header (PS3.8 9.3.2)."""
    if len(body) < 68:
        raise ProtocolError(f"A-ASSOCIATE-RQ of {len(body)} bytes, expected at least 68")
    contexts: dict[int, ProposedContext] = {}
    application = ""
    user: dict[int, bytes] = {}
    roles: dict[str, tuple[int, int]] = {}
    for kind, value in _items(body[68:]):
        if kind == 0x10:
            application = _uid(value)
        elif kind == 0x20:
            context = _proposed(value)
            if context.id in contexts:
                raise ProtocolError(f"presentation context {context.id} is proposed twice")
            contexts[context.id] = context
        elif kind == 0x50:
            for sub, content in _items(value):
                user[sub] = content
                if sub == 0x54 and len(content) >= 4:
                    length = int.from_bytes(content[:2], "big")
                    scu, scp = (content[2 + length :] + bytes(2))[:2]
                    roles[_uid(content[2 : 2 + length])] = (min(scu, 1), min(scp, 1))
    return AssociateRequest(
        protocol_version=int.from_bytes(body[:2], "big"),
        ae_titles=body[4:36],
        application_context_name=application,
        contexts=tuple(contexts.values()),
        max_pdu=int.from_bytes(user.get(0x51, b"")[:4], "big"),
        implementation=_text(user.get(0x55, b"")),
        asks_for_async_window=0x53 in user,
        roles=roles,
    )


def _proposed(value: bytes) -> ProposedContext:
    if len(value) < 4:
        raise ProtocolError("presentation context item without content")
    parts = list(_items(value[4:]))
    abstract = next((_uid(content) for kind, content in parts if kind == 0x30), "")
    return ProposedContext(value[0], abstract, tuple(_uid(content) for kind, content in parts if kind == 0x40))


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if len(data) - at < 4:
            raise ProtocolError("bytes are left over after the last item")
        kind, length = struct.unpack_from(">BxH", data, at)
        if at + 4 + length > len(data):
            raise ProtocolError(f"item 0x{kind:02X} of {length} bytes reaches beyond the PDU")
        yield kind, data[at + 4 : at + 4 + length]
        at += 4 + length


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def _pdu(pdu_type: int, body: bytes) -> bytes:
    return struct.pack(">BxL", pdu_type, len(body)) + body


def _uid(value: bytes) -> str:
    return value.decode("latin-1").strip("\0 ")


def _text(value: bytes) -> str:
    """Whatever bytes a sender takes for text, without padding and control characters."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = value.decode("latin-1")
    return "".join(c if c.isprintable() else "?" for c in text.strip("\0 "))
