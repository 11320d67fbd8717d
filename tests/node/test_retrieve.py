"""Priors without a node around them: what is marked, what becomes current, what a source may answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orthanc
import phantoms
import pydicom
import pytest
from held import Held
from multi_frame import enhanced
from orthanc import DICOMWEB, Orthanc
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, MRImageStorage, RLELossless
from pydicom.uid import PositronEmissionTomographyImageStorage as PETImageStorage
from raw_scu import CT, EXPLICIT, RawSCU, c_store_rq, p_data
from running_node import free_port, wait_for
from sources import SMALL, answering, ask, new_mr, old_ct

from dicomnode.archive import Archive
from dicomnode.errors import RemoteError
from dicomnode.indexer import Indexer
from dicomnode.intake import Intake
from dicomnode.listener import Listener
from dicomnode.model import RetrievedBy
from dicomnode.negotiation import Access
from dicomnode.pacs_sources import client_of, multipart
from dicomnode.remotes import Source
from dicomnode.retrieve import MAX_ATTEMPTS
from dicomnode.spool import JournalRecord
from dicomnode.volumes import instance_header
from dicomnode.volumes.frames import SINGLE_FRAME_CLASS

RULES = """
version: 1
rules:
  - id: to-prior
    when: {Modality: MR}
    roles: {fixed: {from: prior, match: {contrast: false}}, moving: {match: {Modality: MR}}}
  - id: pre-post
    when: {Modality: CT}
    roles: {fixed: {match: {contrast: false}}, moving: {match: {contrast: true}}}
"""
needs_orthanc = pytest.mark.skipif(
    orthanc.EXECUTABLE is None, reason="Orthanc is not installed (Debian package orthanc)"
)


@pytest.fixture
def held(tmp_path: Path) -> Held:
    made = Held(tmp_path / "node")
    made.put_rules(RULES)
    return made


@pytest.fixture
def intake(held: Held) -> Iterator[Intake]:
    """Of `held`, with what comes read as it comes, as the indexer's process does."""
    made, stopping = Intake(held.archive, held.index), threading.Event()
    indexer = Indexer(held.index, held.archive, instance_header)

    def read() -> None:
        while not stopping.wait(0.05):
            while indexer.run_once():
                pass

    thread = threading.Thread(target=read)
    made.start()
    thread.start()
    yield made
    stopping.set()
    thread.join()
    made.stop()


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    running = Orthanc(tmp_path / "pacs")
    yield running
    running.stop()


@needs_orthanc
@pytest.mark.parametrize("fetch", ["c-get", "dicomweb"])
def test_what_was_fetched_starts_nothing_and_becomes_current_once_when_a_scanner_sends_it(
    held: Held, intake: Intake, pacs: Orthanc, tmp_path: Path, fetch: str
) -> None:
    if fetch == "dicomweb" and not DICOMWEB.exists():
        pytest.skip("Orthanc's DICOMweb plugin is not installed (Debian package orthanc-dicomweb)")
    native, portal, current = old_ct(), old_ct("portal"), new_mr()
    for path in phantoms.write_series([*native, *portal], tmp_path / "images"):
        pacs.upload(path)
    held.receive(current)
    source = Source(
        "pacs", "ORTHANC", "127.0.0.1", pacs.port, fetch, url=f"http://127.0.0.1:{pacs.http_port}/dicom-web"
    )
    service = ask(held, source, str(current[0].StudyInstanceUID), intake)

    service.fetch_due(datetime.now(UTC))
    held.tick()
    by_prior = [job["rule_id"] for job in held.index.status()["jobs"]]
    again = service.fetch_due(datetime.now(UTC) + timedelta(days=1))
    for _ in range(2):
        held.receive([*native, *portal])
        held.tick()

    assert held.index.status()["priors"][0]["state"] == "done"
    assert again == 0
    assert by_prior == ["to-prior"]
    assert sorted(job["rule_id"] for job in held.index.status()["jobs"]) == ["pre-post", "to-prior"]


@needs_orthanc
@pytest.mark.parametrize("fetch", ["c-get", "c-move"])
def test_every_class_that_is_read_comes_from_orthanc(tmp_path: Path, held: Held, intake: Intake, fetch: str) -> None:
    """By C-GET, and by C-MOVE with Orthanc as the Storage SCU."""
    port = free_port()
    pacs = Orthanc(tmp_path / "pacs", modalities={"NODE": ["DICOMNODE", "127.0.0.1", port]})
    listener = Listener("127.0.0.1", port, intake, access=Access())
    sent = prior_of_every_class()
    source = Source("pacs", "ORTHANC", "127.0.0.1", pacs.port, fetch)
    try:
        for path in phantoms.write_series(sent, tmp_path / "images"):
            pacs.upload(path)
        listener.start()
        with ask(held, source, "1.2.3", intake)._storing(source) as store:
            client = client_of(source, "DICOMNODE", store)
            for each in client.series(str(sent[0].StudyInstanceUID)):
                client.fetch(each)
    finally:
        listener.stop()
        pacs.stop()
    intake.flush()
    wait_for(lambda: len(held.index.status()["series"]) == len(sent), timeout_s=20, what="the index")

    assert {str(each.SOPClassUID) for each in sent} == {*SINGLE_FRAME_CLASS, *SINGLE_FRAME_CLASS.values()}
    for each in sent:
        stored = held.index.find_instance(str(each.SOPInstanceUID))
        assert stored is not None, each.SOPClassUID.name
        came = pydicom.dcmread(held.archive.path(stored))
        if fetch == "c-move":
            assert came == each
            assert stored.transfer_syntax_uid == each.file_meta.TransferSyntaxUID
        else:  # of what it may send, it prefers uncompressed
            assert np.array_equal(came.pixel_array, each.pixel_array)
    assert {activity.is_fetched for activity in held.index.activities()} == {True}


def prior_of_every_class() -> list[Any]:
    """One study; single-frame and multi-frame of CT, MR and PET, plain and compressed."""
    found = []
    for modality, single in (("CT", CTImageStorage), ("MR", MRImageStorage), ("PT", PETImageStorage)):
        slices = phantoms.make_series(modality=modality, study="old", patient_id="P", **SMALL)
        found.append(slices[0])
        for multi in [multi for multi, of in SINGLE_FRAME_CLASS.items() if of == single]:
            made = enhanced(slices, multi, of_frame=[{}] * len(slices))
            made.SeriesInstanceUID = phantoms.make_uid("multi", multi)
            made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = phantoms.make_uid("instance", multi)
            if multi == EnhancedMRImageStorage:
                made.compress(RLELossless)
            found.append(made)
    return found


@needs_orthanc
def test_what_is_here_is_not_fetched_and_more_than_allowed_neither(held: Held, pacs: Orthanc, tmp_path: Path) -> None:
    native, portal, current = old_ct(), old_ct("portal"), new_mr()
    for path in phantoms.write_series([*native, *portal], tmp_path / "images"):
        pacs.upload(path)
    held.receive([*current, *native])
    source = Source("pacs", "ORTHANC", "127.0.0.1", pacs.port, "c-get", max_instances=7)

    ask(held, source, str(current[0].StudyInstanceUID)).fetch_due(datetime.now(UTC))

    (row,) = held.index.status()["priors"]
    assert row["reason"] == "2 series found, 0 fetched, 1 were here, 1 left: more than max_instances"


def test_a_source_that_is_away_is_tried_again_with_growing_pauses_and_given_up(held: Held) -> None:
    current = new_mr()
    held.receive(current)
    source = Source("pacs", "ORTHANC", "127.0.0.1", free_port(), "c-get", timeout_s=1)
    service = ask(held, source, str(current[0].StudyInstanceUID))
    now, attempts = datetime.now(UTC), 0

    while service.fetch_due(now):
        attempts += 1
        now += timedelta(hours=1)

    (row,) = held.index.status()["priors"]
    assert (attempts, row["state"], row["attempts"]) == (MAX_ATTEMPTS, "failed", MAX_ATTEMPTS)
    assert "no association" in row["reason"]


def test_a_source_is_left_alone_outside_its_hours(held: Held) -> None:
    current = new_mr()
    held.receive(current)
    later = datetime.now(UTC) + timedelta(hours=3)
    source = Source("pacs", "ORTHANC", "127.0.0.1", free_port(), "c-get", hours=lambda _now: later)
    service = ask(held, source, str(current[0].StudyInstanceUID))

    assert service.fetch_due(datetime.now(UTC)) == 1
    assert service.fetch_due(datetime.now(UTC)) == 0
    (row,) = held.index.status()["priors"]
    assert (row["state"], row["attempts"], row["reason"]) == ("waiting", 0, "waits for the hours of pacs")


# ── what is marked as fetched ──


def arrive(held: Held, datasets: list[Any], *, calling: str, retrieved_by: RetrievedBy) -> None:
    now = datetime.now(UTC)
    association = held.index.open_association(calling_ae_title=calling, called_ae_title="NODE", address="x", now=now)
    for dataset in datasets:
        stored, header = held.archive.keep_dataset(dataset), instance_header(dataset)
        held.index.add_instance(stored, header, association_id=association, retrieved_by=retrieved_by, now=now)
    held.index.close_association(association, now=now)


@pytest.mark.parametrize(
    ("calling", "retrieved_by", "state", "expected"),
    [
        ("OUT_OF_PACS", RetrievedBy.NODE, "fetching", True),  # another AE title than was asked
        ("OUT_OF_PACS", RetrievedBy.NODE, "done", True),  # late
        ("ORTHANC", RetrievedBy.OTHER, "fetching", False),  # somebody sends it here at the same time
        ("ORTHANC", RetrievedBy.UNKNOWN, "fetching", True),
        ("ORTHANC", RetrievedBy.UNKNOWN, "failed", True),  # it still sends what it was asked for
        ("ORTHANC", RetrievedBy.UNKNOWN, "done", False),
        ("CT1", RetrievedBy.UNKNOWN, "fetching", False),
    ],
)
def test_a_series_was_fetched_if_we_asked_for_it(
    held: Held, calling: str, retrieved_by: RetrievedBy, state: str, expected: bool
) -> None:
    current, (old, *_) = new_mr(), old_ct()
    held.receive(current)
    ask(held, Source("pacs", "ORTHANC", "127.0.0.1", 104), str(current[0].StudyInstanceUID))
    (fetch,) = held.index.due_fetches(now=datetime.now(UTC))
    held.index.begin_fetch(fetch.id, "ORTHANC", [str(old.SeriesInstanceUID)], attempts=1)
    held.index.begin_fetch(fetch.id, "ORTHANC", [], attempts=2)  # another attempt found it complete
    if state != "fetching":
        held.index.end_fetch(fetch.id, state, "", next_attempt_at=datetime.now(UTC))

    arrive(held, [old], calling=calling, retrieved_by=retrieved_by)

    found = {each.series_instance_uid: each.is_fetched for each in held.index.activities()}
    assert found[str(old.SeriesInstanceUID)] is expected


def test_what_a_source_sends_twice_stays_what_it_is(held: Held) -> None:
    held.receive(new_mr())
    for _ in range(2):
        arrive(held, old_ct(), calling="OUT_OF_PACS", retrieved_by=RetrievedBy.NODE)
        held.tick()

    (before,) = [job["rule_id"] for job in held.index.status()["jobs"]]
    arrive(held, old_ct("portal"), calling="OUT_OF_PACS", retrieved_by=RetrievedBy.NODE)
    held.tick()

    assert before == "to-prior"
    assert [job["rule_id"] for job in held.index.status()["jobs"]] == ["to-prior"]


@pytest.mark.parametrize(
    ("originator", "expected"),
    [(b"", RetrievedBy.UNKNOWN), (b"NODE", RetrievedBy.NODE), (b"NODE \0", RetrievedBy.NODE),
     (b"WORKSTATION", RetrievedBy.OTHER), (b"\xff\xfe", RetrievedBy.OTHER)],
)  # fmt: skip
def test_the_move_originator_of_a_request_is_kept_with_the_instance(
    tmp_path: Path, held: Held, originator: bytes, expected: RetrievedBy
) -> None:
    intake = Intake(Archive(tmp_path / "listening"), held.index)
    listener = Listener("127.0.0.1", 0, intake, access=Access())
    listener.start()
    request = c_store_rq(CT.encode(), b"1.2.3", move_originator=originator)
    try:
        with RawSCU(listener.port, [(CT, EXPLICIT)], called=b"NODE") as scu:
            scu.send(p_data(1, request, is_command=True) + p_data(1, bytes(8), is_command=False))
            assert scu.status() == 0x0000
            scu.release()
        intake.flush()
        (entry,) = held.index.take_unindexed(10)
        record = JournalRecord.decode((tmp_path / "listening" / entry.path).read_bytes()[:128])
    finally:
        listener.stop()
        intake.stop()

    assert entry.retrieved_by is expected
    assert record is not None
    assert record.retrieved_by is expected


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/dicom", b"x"),
        ("multipart/related; boundary=b", b""),
        ("multipart/related; boundary=b", b"--b\r\n\r\nhalf"),
        ("multipart/related", b"--b\r\n\r\nx\r\n--b--"),
        (f"multipart/related; boundary={'b' * 300}", b"--" + b"b" * 300 + b"--"),
        ("multipart/related; boundary=b", b"--b\r\n" + b"x" * 100_000),
    ],
)
def test_an_answer_that_is_no_whole_multipart_body_is_trouble(kind: str, body: bytes) -> None:
    with pytest.raises(RemoteError):
        list(multipart(kind, [body]))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_parts_of_a_multipart_body_come_byte_for_byte(size: int) -> None:
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n\x00\r\n--x\r\n--b\r\n\r\n\xff\r\n\r\n--b--\r\n"
    chunks = [body[at : at + size] for at in range(0, len(body), size)]

    found = list(multipart('multipart/related; type="application/dicom"; boundary="b"', chunks))

    assert found == [b"\x00\r\n--x", b"\xff\r\n"]


def test_what_came_before_an_answer_broke_off_is_handed_over() -> None:
    parts = multipart("multipart/related; boundary=b", [b"--b\r\n\r\nfirst\r\n--b\r\n\r\nsec", b"ond"])

    assert next(parts) == b"first"
    with pytest.raises(RemoteError):
        next(parts)


@pytest.mark.parametrize(
    "answer",
    [
        b'[{"0020000D": 7, "00100020": {"Value": ["P"]}}]',
        b'[{"0020000D": {"Value": {"a": 1}}, "00100020": {"Value": ["P"]}}]',
        b"\xff",
        b"{",
        b"[" * 9,
    ],
)
def test_an_answer_that_makes_no_sense_is_one_attempt_like_any_other(held: Held, answer: bytes) -> None:
    current = new_mr()
    held.receive(current)
    with answering(answer) as (source, _):
        ask(held, source, str(current[0].StudyInstanceUID)).fetch_due(datetime.now(UTC))

    (row,) = held.index.status()["priors"]
    assert (row["state"], row["attempts"]) == ("waiting", 1)
    assert row["reason"].startswith("pacs: its answer")


def test_whose_prior_it_is_is_looked_at_again_after_it_came(held: Held, intake: Intake, tmp_path: Path) -> None:
    current, stranger = new_mr(), old_ct(patient_id="SOMEBODY ELSE")
    study, series = str(stranger[0].StudyInstanceUID), str(stranger[0].SeriesInstanceUID)
    parts = [path.read_bytes() for path in phantoms.write_series(stranger, tmp_path / "images")]
    body = b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n" for part in parts) + b"--b--"
    mistaken = [{"0020000D": {"Value": [study]}, "00080020": {"Value": ["20260101"]}, "00100020": {"Value": ["P"]}}]
    held_there = [{"0020000E": {"Value": [series]}, "00080060": {"Value": ["CT"]}, "00201209": {"Value": [len(parts)]}}]

    def answer(path: str) -> tuple[str, bytes]:
        if path.endswith(series):
            return "multipart/related; boundary=b", body
        return "application/dicom+json", json.dumps(held_there if "/series?" in path else mistaken).encode()

    held.receive(current)
    with answering(answer) as (source, _):
        ask(held, source, str(current[0].StudyInstanceUID), intake).fetch_due(datetime.now(UTC))
    held.tick()

    (row,) = held.index.status()["priors"]
    assert row["state"] == "failed"
    assert row["reason"] == f"series {series} is of another person than was asked for"
    assert "SOMEBODY" not in row["reason"]
    assert len(held.index.instances_of(series)) == len(stranger)  # kept, and by nobody's rule
    assert held.index.status()["jobs"] == []
