"""Destinations differ: hours, priorities, several associations, deadlines, what encodings they take."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pydicom
import pytest
from outbox import NOW, Outbox, listens, make_dataset, wait_until
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from receiving_scp import ReceivingSCP

from dicomnode.delivery import DeliveryService
from dicomnode.delivery.sending import Sending
from dicomnode.index import Which
from dicomnode.model import DeliveryPriority
from dicomnode.remotes import Destination


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    made = Outbox(tmp_path / "data")
    yield made
    made.index.close()


def test_many_instances_go_over_several_associations_and_each_once(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs:
        outbox.put(*(make_dataset(n) for n in range(30)))
        assert outbox.service(pacs, associations=3).once() == 30

    assert pacs.associations == 3
    assert sorted(pacs.stored_uids) == sorted(outbox.states())
    assert set(outbox.states().values()) == {"delivered"}


def test_a_destination_with_room_for_one_association_gets_all_over_one_and_is_not_asked_for_more_again(
    outbox: Outbox,
) -> None:
    with ReceivingSCP(max_associations=1) as pacs:
        service = outbox.service(pacs)
        for first in (0, 100):
            outbox.put(*(make_dataset(n) for n in range(first, first + 20)))
            while service.once():
                pass

    assert pacs.associations == 2
    assert {(row["state"], row["attempts"]) for row in outbox.rows().values()} == {("delivered", 1)}


@pytest.mark.skipif(shutil.which("storescp") is None, reason="DCMTK is not installed")
def test_an_acceptor_that_serves_one_association_after_the_other_delays_nothing(outbox: Outbox, tmp_path: Path) -> None:
    folder = tmp_path / "received"
    folder.mkdir()
    with ReceivingSCP() as probe:
        port = probe.port
    scp = subprocess.Popen(["storescp", "-aet", "PACS", "-od", folder, "--accept-all", str(port)])
    try:
        outbox.put(*(make_dataset(n) for n in range(30)))
        destination = Destination("pacs", "PACS", "127.0.0.1", port)
        service = DeliveryService([destination], outbox.index, outbox.archive, ae_title="NODE", clock=outbox.clock)
        wait_until(lambda: listens(port))
        service.deliver_due(destination)
    finally:
        scp.terminate()
        scp.wait(10)

    assert {(row["state"], row["attempts"]) for row in outbox.rows().values()} == {("delivered", 1)}
    assert len(list(folder.iterdir())) == 30


def test_outside_its_hours_a_destination_gets_what_is_urgent_alone(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs:
        outbox.put(make_dataset(1))
        outbox.put(make_dataset(2), priority=DeliveryPriority.URGENT)
        opens = NOW + timedelta(hours=1)
        service = outbox.service(pacs, hours=lambda now: max(now, opens))
        while service.once():
            pass
        assert pacs.stored_uids == ["2.25.7.2"]

        outbox.clock.advance(hours=1)
        while service.once():
            pass

    assert pacs.stored_uids == ["2.25.7.2", "2.25.7.1"]


def test_a_paused_destination_gets_nothing_while_another_does(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs, ReceivingSCP() as other:
        service = DeliveryService(
            [
                Destination("pacs", "PACS", "127.0.0.1", pacs.port, is_paused=True),
                Destination("other", "PACS", "127.0.0.1", other.port),
            ],
            outbox.index,
            outbox.archive,
            ae_title="NODE",
        )
        service.start()
        outbox.put(make_dataset(1), destinations=("pacs", "other"))
        wait_until(lambda: len(other.stored) == 1)
        service.stop()

    assert pacs.stored == []


def test_what_is_urgent_goes_first(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs:
        outbox.put(make_dataset(1), priority=DeliveryPriority.OFF_PEAK)
        outbox.put(make_dataset(2))
        outbox.put(make_dataset(3), priority=DeliveryPriority.URGENT)
        outbox.service(pacs).once()

    assert pacs.stored_uids == ["2.25.7.3", "2.25.7.2", "2.25.7.1"]


def test_what_becomes_urgent_or_is_held_while_others_are_sent_does_not_wait_for_them_all(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sending, "LONGEST_S", 0.0)  # one instance, then another look

    def answer(uid: str) -> int:
        if uid == "2.25.7.0":
            outbox.put(make_dataset(9), priority=DeliveryPriority.URGENT)
        if uid == "2.25.7.1":
            outbox.index.hold_deliveries(Which(sop_instance_uid="2.25.7.2"), "a person", now=NOW)
        return 0x0000

    with ReceivingSCP(answer=answer) as pacs:
        outbox.put(*(make_dataset(n) for n in range(4)))
        service = outbox.service(pacs)
        while service.once():
            pass

    assert pacs.stored_uids == ["2.25.7.0", "2.25.7.9", "2.25.7.1", "2.25.7.3"]
    assert outbox.states()["2.25.7.2"] == "held"


def test_the_pauses_are_those_of_the_destination_and_beyond_its_deadline_it_is_given_up_by_name(
    outbox: Outbox,
) -> None:
    down = ReceivingSCP()
    down.start()
    down.stop()
    outbox.put(make_dataset(1))
    service = outbox.service(down, first_pause_s=60.0, pause_factor=3.0, longest_pause_s=400.0, give_up_after_s=900.0)

    for pause_s in (60, 180, 400):
        service.once()
        assert outbox.states() == {"2.25.7.1": "waiting"}
        outbox.clock.advance(seconds=pause_s - 1)
        assert service.once() == 0
        outbox.clock.advance(seconds=1)
    service.once()

    row = outbox.rows()["2.25.7.1"]
    assert (row["state"], row["attempts"]) == ("failed", 4)
    assert "given up after 0.2 hours" in row["reason"]
    assert "unreachable" in row["reason"]


def compressed_dataset(number: int) -> Dataset:
    dataset = make_dataset(number)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns, dataset.BitsStored, dataset.HighBit = 100, 250, 16, 15
    dataset.PixelRepresentation = 0
    dataset["PixelData"].VR = "OW"
    dataset.compress(RLELossless, generate_instance_uid=False)
    return dataset


def test_what_is_compressed_goes_as_it_is_or_with_the_very_same_pixels_where_the_peer_takes_it_only_so(
    outbox: Outbox,
) -> None:
    dataset = compressed_dataset(1)
    pixels = dataset.pixel_array.tobytes()
    outbox.put(dataset, destinations=("rle", "explicit", "implicit"))
    for name in ("rle", "explicit", "implicit"):
        syntaxes = {"rle": None, "explicit": [ExplicitVRLittleEndian], "implicit": [ImplicitVRLittleEndian]}
        with ReceivingSCP(transfer_syntaxes=syntaxes[name]) as scp:
            outbox.service(scp, names=(name,)).once()
        (received,) = scp.stored
        assert received.transfer_syntax_uid == (syntaxes[name] or [RLELossless])[0]
        assert received.dataset().SOPInstanceUID == "2.25.7.1"
        assert received.dataset().pixel_array.tobytes() == pixels

    assert {row["state"] for row in outbox.index.status()["deliveries"]} == {"delivered"}


def test_what_is_compressed_and_cannot_be_decompressed_fails_by_name_and_holds_up_no_other(outbox: Outbox) -> None:
    compressed = make_dataset(1, syntax=JPEG2000Lossless)
    compressed.PixelData = pydicom.encaps.encapsulate([b"frame."])
    compressed["PixelData"].is_undefined_length = True
    with ReceivingSCP(transfer_syntaxes=[ExplicitVRLittleEndian, ImplicitVRLittleEndian]) as pacs:
        outbox.put(compressed, make_dataset(2))
        outbox.service(pacs).once()

    assert outbox.states() == {"2.25.7.1": "failed", "2.25.7.2": "delivered"}
    assert "JPEG 2000" in outbox.rows()["2.25.7.1"]["reason"]
