"""The PDUs of the DICOM Upper Layer (PS3.8 9.3): values to bytes and back, for both sides of an association.

Law: pure. Items that are not known are skipped; text is taken whatever its bytes; what cannot be read is a
ProtocolError that carries the A-ABORT to answer with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)

APPLICATION_CONTEXT_NAME = "1.2.840.10008.3.1.1.1"  # PS3.7 A.2.1


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
        return text(self.ae_titles[:16])

    @property
    def calling_ae_title(self) -> str:
        """Who the requestor says it is."""
        return text(self.ae_titles[16:])


@dataclass(frozen=True)
class Identity:
    """Who we are in the answer's user information (PS3.7 D.3.3.2)."""

    class_uid: str
    version_name: str


@dataclass(frozen=True)
class ContextAnswer:
    """What becomes of a proposed context: result 0 accepted, 3 abstract syntax, 4 transfer syntaxes not supported.

    Attributes
    ----------
    abstract_syntax
        Empty where the answer was read: it does not repeat it.
    scp_too
        The requestor may be the SCP of it, where it asked to be (PS3.7 D.3.3.4).
    """

    id: int
    abstract_syntax: str
    result: int
    transfer_syntax: str
    scp_too: bool = False


@dataclass(frozen=True)
class AssociateAccept:
    """An A-ASSOCIATE-AC (PS3.8 9.3.3); `roles` as in the request, as granted."""

    contexts: tuple[ContextAnswer, ...]
    max_pdu: int = 0
    roles: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class AssociateReject:
    """An A-ASSOCIATE-RJ (PS3.8 9.3.4)."""

    result: int
    source: int
    reason: int


def associate_request(request: AssociateRequest, implementation: Identity) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2)."""
    parts = [_item(0x10, request.application_context_name.encode())]
    for context in request.contexts:
        syntaxes = b"".join(_item(0x40, uid.encode("latin-1")) for uid in context.transfer_syntaxes)
        abstract = _item(0x30, context.abstract_syntax.encode("latin-1"))
        parts.append(_item(0x20, bytes((context.id, 0, 0, 0)) + abstract + syntaxes))
    parts.append(_user_information(request.max_pdu, implementation, request.roles))
    return pdu(ASSOCIATE_RQ, struct.pack(">Hxx", 1) + request.ae_titles + bytes(32) + b"".join(parts))


def associate_accept(
    request: AssociateRequest, answers: Sequence[ContextAnswer], *, max_pdu: int, implementation: Identity
) -> bytes:
    """An A-ASSOCIATE-AC (PS3.8 9.3.3)."""
    parts = [_item(0x10, APPLICATION_CONTEXT_NAME.encode())]
    for answer in answers:
        body = bytes((answer.id, 0, answer.result, 0)) + _item(0x40, answer.transfer_syntax.encode("latin-1"))
        parts.append(_item(0x21, body))
    scp_too = {answer.abstract_syntax: answer.scp_too for answer in answers if answer.result == 0}
    roles = {uid: (scu, scp and int(scp_too[uid])) for uid, (scu, scp) in request.roles.items() if uid in scp_too}
    # PS3.7 D.3.3.3: one operation at a time
    window = _item(0x53, struct.pack(">HH", 1, 1)) if request.asks_for_async_window else b""
    parts.append(_user_information(max_pdu, implementation, roles, window))
    return pdu(ASSOCIATE_AC, struct.pack(">Hxx", 1) + request.ae_titles + bytes(32) + b"".join(parts))


def parse_associate_request(body: bytes) -> AssociateRequest:
    """Read an A-ASSOCIATE-RQ without its six bytes of header (PS3.8 9.3.2)."""
    if len(body) < 68:
        raise ProtocolError(f"A-ASSOCIATE-RQ of {len(body)} bytes, expected at least 68")
    contexts: dict[int, ProposedContext] = {}
    application = ""
    user, roles = _user_items(body[68:])
    for kind, value in _items(body[68:]):
        if kind == 0x10:
            application = _uid(value)
        elif kind == 0x20:
            context = _proposed(value)
            if context.id in contexts:
                raise ProtocolError(f"presentation context {context.id} is proposed twice")
            contexts[context.id] = context
    return AssociateRequest(
        protocol_version=int.from_bytes(body[:2], "big"),
        ae_titles=body[4:36],
        application_context_name=application,
        contexts=tuple(contexts.values()),
        max_pdu=int.from_bytes(user.get(0x51, b"")[:4], "big"),
        implementation=text(user.get(0x55, b"")),
        asks_for_async_window=0x53 in user,
        roles=roles,
    )


def parse_associate_accept(body: bytes) -> AssociateAccept:
    """Read an A-ASSOCIATE-AC without its six bytes of header (PS3.8 9.3.3)."""
    if len(body) < 68:
        raise ProtocolError(f"A-ASSOCIATE-AC of {len(body)} bytes, expected at least 68")
    contexts = []
    for kind, value in _items(body[68:]):
        if kind == 0x21:
            if len(value) < 4:
                raise ProtocolError("presentation context item without content")
            # where it is not accepted, the transfer syntax is not significant and left out by some
            parts = () if value[2] else _items(value[4:])
            syntax = next((_uid(content) for sub, content in parts if sub == 0x40), "")
            contexts.append(ContextAnswer(value[0], "", value[2], syntax))
    user, roles = _user_items(body[68:])
    return AssociateAccept(tuple(contexts), int.from_bytes(user.get(0x51, b"")[:4], "big"), roles)


def pdu(pdu_type: int, body: bytes) -> bytes:
    """A PDU with its header."""
    return struct.pack(">BxL", pdu_type, len(body)) + body


def text(value: bytes) -> str:
    """Whatever bytes a sender takes for text, without padding and control characters."""
    try:
        decoded = value.decode()
    except UnicodeDecodeError:
        decoded = value.decode("latin-1")
    return "".join(c if c.isprintable() else "?" for c in decoded.strip("\0 "))


def _user_information(
    max_pdu: int, implementation: Identity, roles: Mapping[str, tuple[int, int]], window: bytes = b""
) -> bytes:
    parts = [_item(0x51, struct.pack(">L", max_pdu)), _item(0x52, implementation.class_uid.encode()), window]
    for uid, role in roles.items():
        name = uid.encode("latin-1")
        parts.append(_item(0x54, struct.pack(">H", len(name)) + name + bytes(role)))
    parts.append(_item(0x55, implementation.version_name.encode()))
    return _item(0x50, b"".join(parts))


def _user_items(body: bytes) -> tuple[dict[int, bytes], dict[str, tuple[int, int]]]:
    """User information, last of each kind, and the roles in it (PS3.7 D.3.3)."""
    user: dict[int, bytes] = {}
    roles: dict[str, tuple[int, int]] = {}
    for kind, value in _items(body):
        for sub, content in _items(value) if kind == 0x50 else ():
            user[sub] = content
            if sub == 0x54 and len(content) >= 4:
                length = int.from_bytes(content[:2], "big")
                scu, scp = (content[2 + length :] + bytes(2))[:2]
                roles[_uid(content[2 : 2 + length])] = (min(scu, 1), min(scp, 1))
    return user, roles


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


def _uid(value: bytes) -> str:
    return value.decode("latin-1").strip("\0 ")
