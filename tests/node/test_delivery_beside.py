"""Beside C-STORE: STOW-RS instead of it, what is there already, and who is told when all has arrived."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orthanc
import pytest
from orthanc import Orthanc
from outbox import Delivering, Outbox, data_set_of, make_dataset
from pydicom import Dataset
from pynetdicom import evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made at import
    InstanceAvailabilityNotification,
    StudyRootQueryRetrieveInformationModelFind,
)
from receiving_scp import ReceivingSCP
from running_node import free_port

from dicomnode.archive import Archive
from dicomnode.index import Index
from dicomnode.indexer import Indexer
from dicomnode.intake import Intake
from dicomnode.remotes import Availability, Destination
from dicomnode.volumes import instance_header
from dicomnode.web import WebServer, application


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    made = Outbox(tmp_path / "data")
    yield made
    made.index.close()


def image(number: int, *, series: str = "2.25.8.1") -> Dataset:
    dataset = make_dataset(number)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality = "2.25.8", series, "CT"
    dataset.PatientID = "P"
    return dataset


# ── STOW-RS ──


def stowing(outbox: Outbox, port: int, **options: Any) -> Delivering:
    destination = Destination(
        "pacs", "STOW-RS", "127.0.0.1", port, url=f"http://127.0.0.1:{port}/dicom-web", timeout_s=5.0, **options
    )
    return Delivering([destination], outbox.index, outbox.archive, ae_title="NODE", clock=outbox.clock)


def test_another_node_gets_by_stow_what_is_on_the_disk_byte_for_byte(outbox: Outbox, tmp_path: Path) -> None:
    archive, index = Archive(tmp_path / "other"), Index(f"sqlite:///{tmp_path}/other/node.db")
    index.migrate()
    intake = Intake(archive, index)
    intake.start()
    port = free_port()
    web = WebServer(
        application(intake, called_ae_title="NODE", is_admitted=lambda _: True, silence_s=5.0),
        "127.0.0.1", port, max_connections=20,
    )  # fmt: skip
    web.start()
    try:
        instances = outbox.put(*(image(n) for n in range(12)))
        assert stowing(outbox, port).once() == 12
        intake.flush()
        indexer = Indexer(index, archive, instance_header)
        while indexer.run_once():
            pass
        for each in instances:
            kept = index.find_instance(each.sop_instance_uid)
            assert kept is not None
            assert data_set_of(archive.path(kept)) == data_set_of(outbox.archive.path(each))
    finally:
        web.stop()
        intake.stop()
        index.close()

    assert {(row["state"], row["status"], row["reason"]) for row in outbox.rows().values()} == {("delivered", 0, "")}


@pytest.mark.skipif(orthanc.EXECUTABLE is None or not orthanc.DICOMWEB.exists(), reason="no Orthanc with DICOMweb")
def test_orthanc_stores_by_stow(outbox: Outbox, tmp_path: Path) -> None:
    pacs = Orthanc(tmp_path / "orthanc")
    try:
        outbox.put(*(image(n) for n in range(3)))
        stowing(outbox, pacs.http_port).once()
        assert set(pacs.instances()) == {"2.25.7.0", "2.25.7.1", "2.25.7.2"}
    finally:
        pacs.stop()

    assert set(outbox.states().values()) == {"delivered"}


class Answering:
    """An HTTP server that reads what is posted and answers as it is told."""

    def __init__(self, answer: Callable[[], tuple[int, Any]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                status, body = answer()
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def names(sequence: str, *, reason: tuple[str, int] | None = None, uid: str = "2.25.7.1") -> dict[str, Any]:
    item: dict[str, Any] = {"00081155": {"vr": "UI", "Value": [uid]}}
    if reason is not None:
        item[reason[0]] = {"vr": "US", "Value": [reason[1]]}
    return {sequence: {"vr": "SQ", "Value": [item]}}


@pytest.mark.parametrize(
    ("status", "body", "state", "code"),
    [
        (200, names("00081199"), "delivered", 0),
        (200, b"", "delivered", 0),
        (200, b"<NativeDicomModel/>", "delivered", 0),
        (200, names("00081199", reason=("00081196", 0xB000)), "delivered", 0xB000),
        (202, names("00081199", reason=("00081196", 0xB006)), "delivered", 0xB006),
        (202, names("00081198", reason=("00081197", 0xA700)), "waiting", 0xA700),
        (202, names("00081198", reason=("00081197", 0xC000)), "failed", 0xC000),
        (200, names("00081198", reason=("00081197", 0x0122)), "failed", 0x0122),
        (409, names("00081198", reason=("00081197", 0x0110)), "waiting", 0x0110),
        (409, names("00081198"), "failed", None),
        (202, b"", "waiting", None),
        (202, names("00081199", uid="2.25.9"), "waiting", None),
        (409, b"", "failed", None),
        (400, b"", "failed", None), (401, b"", "failed", None), (413, b"", "failed", None), (301, b"", "failed", None),
        (204, b"", "failed", None), (429, b"", "waiting", None), (503, b"busy", "waiting", None),
    ],
)  # fmt: skip
def test_each_answer_to_stow_means_delivered_try_again_or_never(
    outbox: Outbox, status: int, body: Any, state: str, code: int | None
) -> None:
    outbox.put(image(1))
    with Answering(lambda: (status, body)) as service:
        stowing(outbox, service.port).once()

    row = outbox.rows()["2.25.7.1"]
    assert (row["state"], row["status"]) == (state, code)
    assert (row["reason"] == "") is (state == "delivered" and code == 0)


def test_a_stow_service_that_is_down_is_tried_again(outbox: Outbox) -> None:
    outbox.put(image(1))
    stowing(outbox, free_port()).once()

    row = outbox.rows()["2.25.7.1"]
    assert (row["state"], "unreachable" in row["reason"]) == ("waiting", True)


# ── what is there ──


class AskedSCP(ReceivingSCP):
    """Knows what it has by C-FIND, and takes notifications.

    Parameters
    ----------
    has
        SOP Instance UIDs by Series Instance UID.
    """

    def __init__(self, has: dict[str, list[str]] | None = None, *, status: int = 0x0000, **options: Any) -> None:
        super().__init__(**options)
        self.has, self.status = has or {}, status
        self.queries: list[Dataset] = []
        self.notices: list[Dataset] = []
        self._ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        self._ae.add_supported_context(InstanceAvailabilityNotification)

    def handlers(self) -> list[Any]:
        return [*super().handlers(), (evt.EVT_C_FIND, self._on_find), (evt.EVT_N_CREATE, self._on_create)]

    def _on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.queries.append(event.identifier)
        for uid in self.has.get(event.identifier.SeriesInstanceUID, []):
            answer = Dataset()
            answer.QueryRetrieveLevel, answer.SOPInstanceUID = "IMAGE", uid
            yield 0xFF00, answer
        yield self.status, None

    def _on_create(self, event: evt.Event) -> tuple[int, Dataset | None]:
        self.notices.append(event.attribute_list)
        return self.status, None


def test_what_a_destination_has_is_not_sent_and_counts_as_delivered(outbox: Outbox) -> None:
    with AskedSCP({"2.25.8.1": ["2.25.7.1", "2.25.9"], "2.25.8.2": ["2.25.7.3"]}) as pacs:
        outbox.put(*(image(n) for n in range(3)), *(image(n, series="2.25.8.2") for n in (3, 4)))
        service = outbox.service(pacs, skip_present=True)
        assert service.once() == 5
        assert service.once() == 0

    assert sorted(pacs.stored_uids) == ["2.25.7.0", "2.25.7.2", "2.25.7.4"]
    assert set(outbox.states().values()) == {"delivered"}
    there = [uid for uid, row in outbox.rows().items() if "was there already" in row["reason"]]
    assert there == ["2.25.7.1", "2.25.7.3"]
    assert [(str(q.StudyInstanceUID), str(q.SeriesInstanceUID)) for q in pacs.queries] == [
        ("2.25.8", "2.25.8.1"), ("2.25.8", "2.25.8.2"),
    ]  # fmt: skip


@pytest.mark.parametrize("pacs", [ReceivingSCP(), AskedSCP({"2.25.8.1": ["2.25.7.1"]}, status=0xC000)])
def test_a_destination_that_does_not_say_what_it_has_gets_everything(outbox: Outbox, pacs: ReceivingSCP) -> None:
    with pacs:
        outbox.put(image(1), image(2))
        outbox.service(pacs, skip_present=True).once()

    assert pacs.stored_uids == ["2.25.7.1", "2.25.7.2"]


# ── who is told ──


def test_who_is_to_know_is_told_once_and_only_when_all_of_a_job_has_arrived(outbox: Outbox) -> None:
    full = {"2.25.7.1"}
    with ReceivingSCP(answer=lambda uid: 0xA700 if uid in full else 0) as pacs, AskedSCP(ae_title="RIS") as ris:
        outbox.put(image(0), image(1), image(2, series="2.25.8.2"))
        service = outbox.service(pacs, announce_to=Availability("RIS", "127.0.0.1", ris.port))
        pacs_destination = service.destinations[0]
        service.once()
        assert service.announce(pacs_destination) == 0
        full.clear()
        outbox.clock.advance(seconds=5)
        service.once()
        assert service.announce(pacs_destination) == 1
        assert service.announce(pacs_destination) == 0

    (notice,) = ris.notices
    assert notice.StudyInstanceUID == "2.25.8"
    told = {
        str(item.ReferencedSOPInstanceUID): (
            str(series.SeriesInstanceUID),
            item.InstanceAvailability,
            item.RetrieveAETitle,
        )
        for series in notice.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert told == {
        "2.25.7.0": ("2.25.8.1", "ONLINE", "PACS"),
        "2.25.7.1": ("2.25.8.1", "ONLINE", "PACS"),
        "2.25.7.2": ("2.25.8.2", "ONLINE", "PACS"),
    }


def test_who_cannot_be_told_now_is_told_later_and_after_a_day_no_more(outbox: Outbox) -> None:
    with ReceivingSCP() as pacs, AskedSCP(ae_title="RIS", status=0x0110) as ris:
        outbox.put(image(1))
        service = outbox.service(pacs, announce_to=Availability("RIS", "127.0.0.1", ris.port))
        pacs_destination = service.destinations[0]
        service.once()
        for minutes, notices in ((0, 1), (4, 1), (1, 2)):
            outbox.clock.advance(minutes=minutes)
            assert service.announce(pacs_destination) == 0
            assert len(ris.notices) == notices
        outbox.clock.advance(days=1)
        ris.status = 0x0000
        assert service.announce(pacs_destination) == 0

    assert len(ris.notices) == 2
