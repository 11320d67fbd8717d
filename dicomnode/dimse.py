"""DIMSE messages (PS3.7 6.3, 9.3, Annex E): command sets to and from bytes, fragments put together.

Law: pure. Command sets are Implicit VR Little Endian whatever the context's transfer syntax; a data set's bytes are
handed on and never looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dicomnode.pdu import ProtocolError, text
from dicomnode.upperlayer import Fragment

C_STORE_RQ, C_FIND_RQ, C_ECHO_RQ, C_CANCEL_RQ = 0x0001, 0x0020, 0x0030, 0x0FFF
N_EVENT_REPORT_RQ, N_ACTION_RQ, N_CREATE_RQ = 0x0100, 0x0130, 0x0140
IS_RESPONSE = 0x8000
NO_DATA_SET = 0x0101

SUCCESS = 0x0000
PENDING = (0xFF00, 0xFF01)  # PS3.4 C.4.1.1.4: more answers follow
PROCESSING_FAILURE = 0x0110  # PS3.7 C.5.22
DUPLICATE_SOP_INSTANCE = 0x0111  # PS3.7 C.5.9
NO_SUCH_OBJECT_INSTANCE = 0x0112
NO_SUCH_EVENT_TYPE = 0x0113
INVALID_ARGUMENT_VALUE = 0x0115
CLASS_INSTANCE_CONFLICT = 0x0119
NO_SUCH_ACTION = 0x0123
DUPLICATE_TRANSACTION_UID = 0x0131
UNRECOGNIZED_OPERATION = 0x0211
OUT_OF_RESOURCES = 0xA700  # PS3.4 Table B.2-1

_MAX_COMMAND_BYTES = 65536

# Element numbers of group 0000, PS3.7 E.1.
_AFFECTED_CLASS, _REQUESTED_CLASS, _FIELD, _MESSAGE_ID, _RESPONDED_TO = 0x0002, 0x0003, 0x0100, 0x0110, 0x0120
_PRIORITY = 0x0700
_DATA_SET_TYPE, _STATUS, _ERROR_COMMENT, _MOVE_ORIGINATOR = 0x0800, 0x0900, 0x0902, 0x1030
_AFFECTED_INSTANCE, _REQUESTED_INSTANCE, _EVENT_TYPE, _ACTION_TYPE = 0x1000, 0x1001, 0x1002, 0x1008


@dataclass(frozen=True)
class Command:
    """A command set; what it lacks is empty or 0.

    Attributes
    ----------
    field
        Command Field: which operation, request or response.
    sop_class_uid, sop_instance_uid
        The affected or requested ones, as sent but for padding.
    move_originator
        AE title of whose C-MOVE this C-STORE is a part of (PS3.7 9.1.1.1).
    """

    context_id: int
    field: int
    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    has_data_set: bool
    status: int = 0
    action_type: int = 0
    event_type: int = 0
    comment: str = ""
    move_originator: str = ""


@dataclass(frozen=True)
class DataPart:
    """Bytes of the last command's data set; valid until the next bytes are received."""

    data: memoryview
    is_last: bool


OnReport = Callable[[Command, bytes, str], int]
"""An N-EVENT-REPORT request, its data set and that one's transfer syntax → the status to answer."""


class Assembler:
    """Puts the fragments of one association together; fragments of two messages may not mix (PS3.8 E.2)."""

    def __init__(self) -> None:
        self._command = bytearray()
        self._context_id: int | None = None
        self._in_data_set = False

    @property
    def in_message(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._context_id is not None

    def take(self, fragment: Fragment) -> Iterator[Command | DataPart]:
        """What is known with this fragment.

        Raises
        ------
        ProtocolError
            It makes no sense here, or the command set cannot be read.
        """
        if self._context_id not in (None, fragment.context_id):
            raise ProtocolError("fragments of two messages are mixed", ProtocolError.UNEXPECTED_PARAMETER)
        if fragment.is_command == self._in_data_set:
            what = "command while a data set is due" if fragment.is_command else "data set without a command"
            raise ProtocolError(what, ProtocolError.UNEXPECTED_PARAMETER)
        self._context_id = fragment.context_id
        if self._in_data_set:
            if fragment.is_last:
                self._in_data_set, self._context_id = False, None
            yield DataPart(fragment.data, fragment.is_last)
            return
        self._command += fragment.data
        if len(self._command) > _MAX_COMMAND_BYTES:
            raise ProtocolError(f"command set of more than {_MAX_COMMAND_BYTES} bytes")
        if fragment.is_last:
            command = decode(fragment.context_id, bytes(self._command))
            self._command.clear()
            self._in_data_set = command.has_data_set
            if not command.has_data_set:
                self._context_id = None
            yield command


def decode(context_id: int, content: bytes) -> Command:
    """Read a command set."""
    elements: dict[int, bytes] = {}
    at = 0
    while at < len(content):
        if len(content) - at < 8:
            raise ProtocolError("command set ends in the middle of an element")
        group, element, length = struct.unpack_from("<HHL", content, at)
        if group != 0 or at + 8 + length > len(content):
            raise ProtocolError(f"command set with element ({group:04x},{element:04x}) of {length} bytes")
        elements[element] = content[at + 8 : at + 8 + length]
        at += 8 + length
    if len(elements.get(_FIELD, b"")) != 2:
        raise ProtocolError("command set without Command Field")
    field = _number(elements, _FIELD)
    if field & IS_RESPONSE and len(elements.get(_STATUS, b"")) != 2:
        raise ProtocolError("response without Status")  # not to be taken for 0x0000
    return Command(
        context_id=context_id,
        field=field,
        message_id=_number(elements, _MESSAGE_ID if _MESSAGE_ID in elements else _RESPONDED_TO),
        sop_class_uid=_uid(elements, _AFFECTED_CLASS) or _uid(elements, _REQUESTED_CLASS),
        sop_instance_uid=_uid(elements, _AFFECTED_INSTANCE) or _uid(elements, _REQUESTED_INSTANCE),
        has_data_set=_number(elements, _DATA_SET_TYPE, NO_DATA_SET) != NO_DATA_SET,
        status=_number(elements, _STATUS),
        action_type=_number(elements, _ACTION_TYPE),
        event_type=_number(elements, _EVENT_TYPE),
        comment=text(elements.get(_ERROR_COMMENT, b""))[:64],
        move_originator=text(elements.get(_MOVE_ORIGINATOR, b"")),
    )


def response(request: Command, status: int, comment: str = "") -> bytes:
    """The answer to a request, without a data set; `comment` is the Error Comment (LO, 64 characters)."""
    elements = {
        _AFFECTED_CLASS: request.sop_class_uid.encode("latin-1"),
        _FIELD: struct.pack("<H", request.field | IS_RESPONSE),
        _RESPONDED_TO: struct.pack("<H", request.message_id),
        _DATA_SET_TYPE: struct.pack("<H", NO_DATA_SET),
        _STATUS: struct.pack("<H", status),
    }
    if comment:
        elements[_ERROR_COMMENT] = comment[:64].encode("ascii", "replace")
    if request.sop_instance_uid:
        elements[_AFFECTED_INSTANCE] = request.sop_instance_uid.encode("latin-1")
    if request.action_type:
        elements[_ACTION_TYPE] = struct.pack("<H", request.action_type)
    if request.event_type:
        elements[_EVENT_TYPE] = struct.pack("<H", request.event_type)
    return encode(elements)


def composite_request(
    field: int, message_id: int, sop_class_uid: str, sop_instance_uid: str = "", *, priority: int
) -> bytes:
    """A C-STORE or C-FIND request that a data set follows (PS3.7 9.3.1, 9.3.2).

    Parameters
    ----------
    priority
        0 medium, 1 high, 2 low.
    """
    elements = {
        _AFFECTED_CLASS: sop_class_uid.encode("latin-1"),
        _FIELD: struct.pack("<H", field),
        _MESSAGE_ID: struct.pack("<H", message_id),
        _PRIORITY: struct.pack("<H", priority),
        _DATA_SET_TYPE: struct.pack("<H", 0x0001),
    }
    if sop_instance_uid:
        elements[_AFFECTED_INSTANCE] = sop_instance_uid.encode("latin-1")
    return encode(elements)


def action(message_id: int, sop_class_uid: str, sop_instance_uid: str, action_type: int) -> bytes:
    """An N-ACTION request that a data set follows (PS3.7 10.3.4)."""
    return encode(
        {
            _REQUESTED_CLASS: sop_class_uid.encode(),
            _FIELD: struct.pack("<H", N_ACTION_RQ),
            _MESSAGE_ID: struct.pack("<H", message_id),
            _DATA_SET_TYPE: struct.pack("<H", 0x0001),
            _REQUESTED_INSTANCE: sop_instance_uid.encode(),
            _ACTION_TYPE: struct.pack("<H", action_type),
        }
    )


def create(message_id: int, sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """An N-CREATE request that a data set follows (PS3.7 10.3.5)."""
    return encode(
        {
            _AFFECTED_CLASS: sop_class_uid.encode(),
            _FIELD: struct.pack("<H", N_CREATE_RQ),
            _MESSAGE_ID: struct.pack("<H", message_id),
            _DATA_SET_TYPE: struct.pack("<H", 0x0001),
            _AFFECTED_INSTANCE: sop_instance_uid.encode(),
        }
    )


def event_report(message_id: int, sop_class_uid: str, sop_instance_uid: str, event_type: int) -> bytes:
    """An N-EVENT-REPORT request that a data set follows (PS3.7 10.3.1)."""
    return encode(
        {
            _AFFECTED_CLASS: sop_class_uid.encode(),
            _FIELD: struct.pack("<H", N_EVENT_REPORT_RQ),
            _MESSAGE_ID: struct.pack("<H", message_id),
            _DATA_SET_TYPE: struct.pack("<H", 0x0001),
            _AFFECTED_INSTANCE: sop_instance_uid.encode(),
            _EVENT_TYPE: struct.pack("<H", event_type),
        }
    )


def encode(elements: Mapping[int, bytes]) -> bytes:
    """A command set from its elements' values, in order and with its group length."""
    is_uid = (_AFFECTED_CLASS, _REQUESTED_CLASS, _AFFECTED_INSTANCE, _REQUESTED_INSTANCE)
    parts = []
    for element, value in sorted(elements.items()):
        padded = value + (b"\0" if element in is_uid else b" ") * (len(value) % 2)
        parts.append(struct.pack("<HHL", 0, element, len(padded)) + padded)
    body = b"".join(parts)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def _number(elements: Mapping[int, bytes], element: int, default: int = 0) -> int:
    return int.from_bytes(elements[element][:2], "little") if element in elements else default


def _uid(elements: Mapping[int, bytes], element: int) -> str:
    return elements.get(element, b"").decode("latin-1").strip("\0 ")
