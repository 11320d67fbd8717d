"""The DICOM Upper Layer as acceptor and as requestor (PS3.8 9.2): bytes in, events out, what to send as bytes.

Law: no I/O, no clock, no thread. Whatever a peer sends becomes an event or a ProtocolError that carries the A-ABORT
to answer with; nothing is buffered beyond one control PDU, so that a data set of any size passes through in pieces.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from dicomnode.pdu import (
    ABORT,
    ASSOCIATE_AC,
    ASSOCIATE_RJ,
    ASSOCIATE_RQ,
    P_DATA,
    RELEASE_RP,
    RELEASE_RQ,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
    ContextAnswer,
    Identity,
    ProtocolError,
    associate_accept,
    associate_request,
    parse_associate_accept,
    parse_associate_request,
    pdu,
)

MAX_CONTROL_PDU = 524288  # 128 presentation contexts with 30 transfer syntaxes each are less
PDU_SLACK = 1024  # senders that count the PDU's own header are wrong and harmless
_PDU_HEADER = _PDV_HEADER = 6
_LARGEST_SENT = 131072  # also where the peer takes any


@dataclass(frozen=True)
class Fragment:
    """A piece of a presentation data value; `data` is only valid until the next bytes are received."""

    context_id: int
    is_command: bool
    is_last: bool
    data: memoryview


class ReleaseRequest:
    """The requestor has finished."""


class ReleaseResponse:
    """The acceptor knows that we have finished."""


@dataclass(frozen=True)
class Abort:
    """The peer, or its network, gave up."""

    source: int
    reason: int


Event = AssociateRequest | AssociateAccept | AssociateReject | Fragment | ReleaseRequest | ReleaseResponse | Abort


class _State(Enum):
    """PS3.8 9.2: what may come next. Sta2, Sta3, Sta5, Sta6, Sta7, and everything after our last PDU (Sta13)."""

    IDLE = "awaiting A-ASSOCIATE-RQ"
    DECIDING = "awaiting our answer"
    REQUESTED = "awaiting the answer to our A-ASSOCIATE-RQ"
    RELEASING = "awaiting the answer to our A-RELEASE-RQ"
    OPEN = "data transfer"
    CLOSED = "awaiting the connection's end"


_EXPECTED = {
    _State.IDLE: (ASSOCIATE_RQ, ABORT),
    _State.DECIDING: (ABORT,),
    _State.REQUESTED: (ASSOCIATE_AC, ASSOCIATE_RJ, ABORT),
    _State.OPEN: (P_DATA, RELEASE_RQ, ABORT),
    _State.RELEASING: (P_DATA, RELEASE_RQ, RELEASE_RP, ABORT),
}


class UpperLayer:
    """One association; its requestor begins with `request`.

    Parameters
    ----------
    max_pdu
        Largest P-DATA-TF that the peer is told it may send, bytes.
    """

    def __init__(self, max_pdu: int) -> None:
        self._max_pdu = max_pdu
        self._state = _State.IDLE
        self._held = bytearray()  # an incomplete header or control PDU
        self._wanted = 0  # bytes, before it is worth looking at what is held
        self._pdu_left = 0  # of the P-DATA-TF in hand
        self._pdv_left = 0
        self._context_id = 0
        self._is_command, self._is_last = False, True
        self._peer_max_pdu = 0

    @property
    def in_pdu(self) -> bool:
        """Whether the peer has begun a PDU and not finished it."""
        return bool(self._held or self._pdu_left)

    @property
    def must_come(self) -> int:
        """How many bytes the peer must still send, whatever it means to do, before it may wait for us."""
        is_last = self._is_last or self._pdv_left < self._pdu_left  # of what is known; an A-ABORT begins like any PDU
        return max(0, self._pdu_left + (0 if is_last else _PDU_HEADER) - len(self._held))

    @property
    def is_closed(self) -> bool:
        """Whether one side has said its last word."""
        return self._state is _State.CLOSED

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
        return associate_accept(request, answers, max_pdu=self._max_pdu, implementation=implementation)

    def request(self, request: AssociateRequest, *, implementation: Identity) -> bytes:
        """The A-ASSOCIATE-RQ (PS3.8 9.3.2); an AssociateAccept, AssociateReject or Abort comes next."""
        self._state = _State.REQUESTED
        return associate_request(request, implementation)

    def reject(self, result: int, source: int, reason: int) -> bytes:
        """The A-ASSOCIATE-RJ (PS3.8 9.3.4)."""
        self._state = _State.CLOSED
        return pdu(ASSOCIATE_RJ, bytes((0, result, source, reason)))

    def release(self) -> bytes:
        """The A-RELEASE-RP (PS3.8 9.3.7)."""
        self._state = _State.CLOSED
        return pdu(RELEASE_RP, bytes(4))

    def request_release(self) -> bytes:
        """The A-RELEASE-RQ (PS3.8 9.3.6); a ReleaseResponse comes, perhaps after data."""
        self._state = _State.RELEASING
        return pdu(RELEASE_RQ, bytes(4))

    def abort(self, reason: int = 0) -> bytes:
        """The A-ABORT (PS3.8 9.3.8), by the service user, or for a reason by the service provider."""
        self._state = _State.CLOSED
        return pdu(ABORT, bytes((0, 0, 2 if reason else 0, reason)))

    @property
    def room(self) -> int:
        """Bytes of a message that one P-DATA-TF takes to this peer; even, as PS3.8 E.2 wants all but the last."""
        room = min(self._peer_max_pdu or _LARGEST_SENT, _LARGEST_SENT) - _PDV_HEADER
        return max(2, room - room % 2)

    def message(self, context_id: int, command: bytes, data_set: bytes = b"") -> bytes:
        """A command set, and perhaps a data set, as P-DATA-TFs that the peer takes (PS3.8 9.3.5, E.2)."""
        parts = self.fragments(context_id, command, is_command=True)
        if data_set:
            parts += self.fragments(context_id, data_set)
        return b"".join(parts)

    def fragments(
        self, context_id: int, content: bytes | memoryview, *, is_command: bool = False, is_last: bool = True
    ) -> list[bytes | memoryview]:
        """P-DATA-TFs in pieces to be sent one after the other; where not `is_last`, whole multiples of `room`."""
        room, found = self.room, list[bytes | memoryview]()
        for start in range(0, max(len(content), 1), room):
            part = content[start : start + room]
            flags = int(is_command) | (2 if is_last and start + room >= len(content) else 0)
            found += (struct.pack(">BxLLBB", P_DATA, len(part) + 6, len(part) + 2, context_id, flags), part)
        return found

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
        if not ASSOCIATE_RQ <= pdu_type <= ABORT:
            raise ProtocolError(f"unknown PDU type 0x{pdu_type:02X}", ProtocolError.UNRECOGNIZED_PDU)
        if pdu_type not in _EXPECTED[self._state]:
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
        if pdu_type == ASSOCIATE_AC:
            accepted = parse_associate_accept(body)
            self._state, self._peer_max_pdu = _State.OPEN, accepted.max_pdu
            return accepted
        if pdu_type == RELEASE_RQ:
            return ReleaseRequest()
        self._state = _State.CLOSED
        if pdu_type == ASSOCIATE_RJ:
            return AssociateReject(*(body + bytes(4))[1:4])
        if pdu_type == RELEASE_RP:
            return ReleaseResponse()
        return Abort(*(body + bytes(4))[2:4])
