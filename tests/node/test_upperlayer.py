"""The protocol core by itself: bytes in, events out, whatever the split."""

from __future__ import annotations

import random
import struct

import pytest
from raw_scu import CT, EXPLICIT, associate_rq, c_store_rq, item, p_data, pdu

from dicomnode import dimse, negotiation
from dicomnode.dimse import Assembler, Command, DataPart
from dicomnode.negotiation import STORAGE_COMMITMENT_PUSH_MODEL, VERIFICATION
from dicomnode.pdu import AssociateRequest, ContextAnswer, Identity, ProposedContext, ProtocolError
from dicomnode.upperlayer import Abort, Event, Fragment, ReleaseRequest, UpperLayer

IDENTITY = Identity("1.2.3", "TEST")


def opened(*, max_pdu: int = 16384, **options: bytes) -> tuple[UpperLayer, bytes]:
    """An association in data transfer, and the A-ASSOCIATE-AC."""
    layer = UpperLayer(max_pdu)
    (request,) = layer.receive(memoryview(associate_rq([(CT, EXPLICIT)], **options)))
    assert isinstance(request, AssociateRequest)
    return layer, layer.accept(request, [ContextAnswer(1, CT, 0, EXPLICIT)], implementation=IDENTITY)


def received(layer: UpperLayer, stream: bytes, sizes: list[int]) -> tuple[list[Event], bytes]:
    """Events other than fragments, and the data set, of a stream that comes in pieces of these sizes."""
    assembler = Assembler()
    others: list[Event] = []
    data = b""
    at = 0
    while at < len(stream):
        size = sizes.pop(0) if sizes else len(stream)
        for event in layer.receive(memoryview(stream[at : at + size])):
            if not isinstance(event, Fragment):
                others.append(event)
                continue
            for part in assembler.take(event):
                if isinstance(part, DataPart):
                    data += part.data
                else:
                    assert isinstance(part, Command)
                    assert part.field == dimse.C_STORE_RQ
        at += size
    return others, data


@pytest.mark.parametrize("per_pdu", [1, 3])
@pytest.mark.parametrize("piece", [1, 7, 100, 16000])
def test_every_split_into_pdvs_pdus_and_reads_gives_the_same_data_set(piece: int, per_pdu: int) -> None:
    content = random.Random(1).randbytes(3000)
    piece = min(piece, 16000 // per_pdu - 6)
    stream = p_data(1, c_store_rq(CT.encode(), b"1.2.3.4"), is_command=True, piece=piece, per_pdu=per_pdu)
    stream += p_data(1, content, is_command=False, piece=piece, per_pdu=per_pdu) + pdu(5, bytes(4))
    chance = random.Random(piece)
    for sizes in ([1] * len(stream), [chance.randint(1, 40) for _ in range(2000)], []):
        layer, _ = opened()

        others, data = received(layer, stream, list(sizes))

        assert data == content
        assert [type(event) for event in others] == [ReleaseRequest]


@pytest.mark.parametrize("per_pdu", [1, 3])
@pytest.mark.parametrize("piece", [7, 1000])
def test_what_must_come_is_never_more_than_the_message_still_has(piece: int, per_pdu: int) -> None:
    stream = p_data(1, c_store_rq(CT.encode(), b"1.2.3.4"), is_command=True, piece=piece, per_pdu=per_pdu)
    stream += p_data(1, bytes(3000), is_command=False, piece=piece, per_pdu=per_pdu)
    layer, _ = opened()
    foreseen = []
    for at in range(len(stream)):
        list(layer.receive(memoryview(stream[at : at + 1])))
        foreseen.append(layer.must_come)
        assert layer.must_come < len(stream) - at

    assert max(foreseen) == per_pdu * (piece + 6)
    assert foreseen[-1] == 0


def test_the_asynchronous_window_is_answered_with_one_each_and_unknown_user_items_are_skipped() -> None:
    more = item(0x53, struct.pack(">HH", 0, 0)) + item(0xEE, b"whatever") + item(0x58, b"\x01\x00\x00\x01u\x00\x00")

    _, answer = opened(more_user_items=more)

    assert item(0x53, struct.pack(">HH", 1, 1)) in answer
    assert bytes((0xEE,)) + b"\0" not in answer


def test_no_window_is_answered_where_none_was_proposed() -> None:
    _, answer = opened()

    assert b"\x53\0\0\x04" not in answer


def test_the_answer_repeats_ae_titles_byte_for_byte() -> None:
    _, answer = opened(calling="RÖNTGEN".encode("latin-1"), called=b"\xff\x00ODD")

    assert answer[10:42] == b"\xff\x00ODD".ljust(16) + "RÖNTGEN".encode("latin-1").ljust(16)


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (pdu(9, bytes(4)), ProtocolError.UNRECOGNIZED_PDU),
        (pdu(2, bytes(4)), ProtocolError.UNEXPECTED_PDU),
        (associate_rq([(CT, EXPLICIT)]), ProtocolError.UNEXPECTED_PDU),
        (struct.pack(">BxL", 4, 1 << 30), ProtocolError.INVALID_PARAMETER),
        (pdu(4, struct.pack(">LBB", 100, 1, 0) + bytes(10)), ProtocolError.INVALID_PARAMETER),
        (pdu(4, struct.pack(">LBB", 0, 1, 0) + bytes(10)), ProtocolError.INVALID_PARAMETER),
        (pdu(4, struct.pack(">LBB", 3, 1, 0) + bytes(4)), ProtocolError.INVALID_PARAMETER),
        (pdu(4, b"abc"), ProtocolError.INVALID_PARAMETER),
        (p_data(1, b"data", is_command=False), ProtocolError.UNEXPECTED_PARAMETER),
        (p_data(1, b"no command set", is_command=True), ProtocolError.INVALID_PARAMETER),
        (p_data(1, b"", is_command=True), ProtocolError.INVALID_PARAMETER),
        (2 * p_data(1, c_store_rq(b"1", b"2"), is_command=True), ProtocolError.UNEXPECTED_PARAMETER),
        (
            p_data(1, c_store_rq(b"1", b"2"), is_command=True) + p_data(3, b"x", is_command=False),
            ProtocolError.UNEXPECTED_PARAMETER,
        ),
    ],
)
def test_what_breaks_the_protocol_aborts_with_the_standard_s_reason(stream: bytes, reason: int) -> None:
    layer, _ = opened()

    with pytest.raises(ProtocolError) as caught:
        received(layer, stream, [])

    assert caught.value.reason == reason
    assert layer.abort(reason) == pdu(7, bytes((0, 0, 2, reason)))


@pytest.mark.parametrize("cut", [1, 30, 60])
def test_a_request_whose_items_reach_beyond_it_is_a_protocol_error(cut: int) -> None:
    whole = associate_rq([(CT, EXPLICIT)])
    stream = struct.pack(">BxL", 1, len(whole) - 6 - cut) + whole[6 : len(whole) - cut]

    with pytest.raises(ProtocolError):
        list(UpperLayer(16384).receive(memoryview(stream)))


def test_an_abort_ends_everything() -> None:
    layer, _ = opened()

    events = list(layer.receive(memoryview(pdu(7, bytes((0, 0, 2, 6))) + p_data(1, b"x", is_command=False))))

    assert events == [Abort(2, 6)]


def test_a_peer_with_small_pdus_gets_small_pdus() -> None:
    layer = UpperLayer(16384)
    request = AssociateRequest(1, bytes(32), "", (), max_pdu=20)
    layer.accept(request, [], implementation=IDENTITY)

    message = layer.message(1, bytes(100))

    at, found = 0, 0
    while at < len(message):
        _, length = struct.unpack_from(">BxL", message, at)
        assert length <= 20
        found += length - 6
        at += 6 + length
    assert found == 100


@pytest.mark.parametrize(
    ("abstract", "proposed", "unknown", "result", "chosen"),
    [
        (CT, ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2", EXPLICIT), False, 0, EXPLICIT),
        (CT, ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.70"), False, 0, "1.2.840.10008.1.2.4.90"),
        (CT, ("1.3.46.670589.33.1.4.1",), False, 0, "1.3.46.670589.33.1.4.1"),  # a private transfer syntax
        (CT, (), False, 4, "1.2.840.10008.1.2"),
        ("1.3.12.2.1107.5.9.1", (EXPLICIT,), True, 0, EXPLICIT),  # Siemens CSA, private
        ("1.3.12.2.1107.5.9.1", (EXPLICIT,), False, 3, EXPLICIT),
        ("1.2.840.10008.5.1.4.1.2.1.1", (EXPLICIT,), True, 3, EXPLICIT),  # Patient Root Query: known, and not ours
        (VERIFICATION, ("1.2.840.10008.1.2",), False, 0, "1.2.840.10008.1.2"),
        (STORAGE_COMMITMENT_PUSH_MODEL, (EXPLICIT,), False, 0, EXPLICIT),
        ("", (EXPLICIT,), True, 3, EXPLICIT),
    ],
)
def test_contexts_are_answered_by_what_the_sop_class_is(
    abstract: str, proposed: tuple[str, ...], unknown: bool, result: int, chosen: str
) -> None:
    context = ProposedContext(5, abstract, proposed)

    answer = negotiation.answer(context, unknown_sop_classes=unknown, commitment=True)

    # who is asked for storage commitment reports as its SCP
    assert answer == ContextAnswer(5, abstract, result, chosen, scp_too=abstract == STORAGE_COMMITMENT_PUSH_MODEL)
