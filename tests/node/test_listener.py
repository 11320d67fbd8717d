"""The Storage SCP against real senders: what it acknowledges is on the disk and in the index, byte for byte."""

from __future__ import annotations

import itertools
import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest
import sqlalchemy as sa
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
)
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, _config
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import AddressInformation

from dicomnode import completion
from dicomnode.archive import Archive
from dicomnode.errors import LocalError
from dicomnode.index import Index
from dicomnode.indexer import Indexer
from dicomnode.intake import Intake, IntakeLimits
from dicomnode.listener import Listener
from dicomnode.model import DuplicatePolicy, InstanceHeader
from dicomnode.negotiation import Access, Peer
from dicomnode.volumes import instance_header

CORPUS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom" / "corpus-pydicom"


class Node:
    """A listener with a real archive and a real index in one folder."""

    def __init__(
        self,
        folder: Path,
        *,
        access: Access | None = None,
        duplicates: DuplicatePolicy = DuplicatePolicy.FLAG,
        limits: IntakeLimits | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        **options: Any,
    ) -> None:
        self.archive = Archive(folder)
        self.index = Index(f"sqlite:///{folder}/node.db")
        self.index.migrate()
        self.indexer = Indexer(self.index, self.archive, instance_header, duplicates=duplicates)
        self.intake = Intake(self.archive, self.index, duplicates=duplicates, limits=limits, clock=clock)
        self.intake.start()
        self.listener = Listener("127.0.0.1", 0, self.intake, access=access or Access(), **options)
        self.listener.start()
        self.port = self.listener.port

    def stop(self) -> None:
        self.listener.stop(grace_s=0.5)
        self.intake.stop()
        self.index.close()

    def index_all(self) -> None:
        self.intake.flush()
        while self.indexer.run_once():
            pass

    def files(self) -> list[Path]:
        """Every file that holds anything, sealed, being received or kept."""
        found = [path for path in self.archive.root.rglob("*") if path.suffix in (".dcm", ".part")]
        return [path for path in found if path.stat().st_size]

    def quarantine(self) -> list[dict[str, Any]]:
        self.index_all()
        return self.index.status()["quarantine"]

    def data_set(self, uid: str) -> bytes:
        self.index_all()
        instance = self.index.find_instance(uid)
        assert instance is not None
        return data_set_of(self.archive.path(instance))

    def open_associations(self) -> int:
        with self.index.engine.connect() as connection:
            query = sa.text("SELECT count(*) FROM association WHERE closed_at IS NULL")
            return int(connection.execute(query).scalar_one())


@pytest.fixture(scope="module")
def stopping() -> Iterator[ThreadPoolExecutor]:
    """Stops nodes while the next tests run."""
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: ThreadPoolExecutor
) -> Iterator[Callable[..., Node]]:
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # files are sent as they are
    nodes: list[Node] = []

    def start_node(**options: Any) -> Node:
        nodes.append(Node(tmp_path / f"node{len(nodes)}", **options))
        return nodes[-1]

    yield start_node
    for node in nodes:
        stopping.submit(node.stop)


@pytest.fixture
def node(start: Callable[..., Node]) -> Node:
    return start()


def make_dataset(number: int = 1, *, pixel_bytes: int = 2048, patient_name: str = "Phantom^One") -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = f"2.25.100.{number}"
    dataset.PatientName = patient_name
    dataset.PatientID = "P1"
    dataset.StudyInstanceUID = "2.25.1"
    dataset.SeriesInstanceUID = "2.25.2"
    dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = ""
    dataset.Modality = "CT"
    dataset.InstanceNumber = number
    dataset.BitsAllocated = 16
    dataset.PixelRepresentation = 1
    dataset.PixelData = os.urandom(pixel_bytes)
    return dataset


def write(dataset: Dataset, path: Path, *, syntax: str = ExplicitVRLittleEndian, **meta: str) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = meta.get("sop_class_uid", dataset.SOPClassUID)
    dataset.file_meta.MediaStorageSOPInstanceUID = meta.get("sop_instance_uid", dataset.SOPInstanceUID)
    dataset.file_meta.FileMetaInformationGroupLength = 0  # set by pydicom
    dataset.preamble = bytes(128)
    pydicom.dcmwrite(path, dataset)
    return path


def data_set_of(path: Path) -> bytes:
    """What follows the file meta information, by its group length (PS3.10 7.1)."""
    content = path.read_bytes()
    return content[144 + int.from_bytes(content[140:144], "little") :]


@contextmanager
def associated(node: Node, paths: Sequence[Path], *, calling: str = "SENDER") -> Iterator[Association]:
    association = associate(node.port, paths, calling=calling)
    yield association
    association.release()


def associate(port: int, paths: Sequence[Path], *, calling: str = "SENDER") -> Association:
    metas = [pydicom.filereader.read_file_meta_info(path) for path in paths]
    pairs = {(str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)) for meta in metas}
    return AE(calling).associate("127.0.0.1", port, contexts=[build_context(*pair) for pair in pairs])


def send(node: Node, *paths: Path) -> list[int]:
    """The statuses of sending files as they are on one association."""
    with associated(node, paths) as association:
        assert association.is_established
        return [association.send_c_store(path).Status for path in paths]


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# ── what is stored ──


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_the_stored_data_set_is_the_sent_one_byte_for_byte(node: Node, tmp_path: Path, syntax: str) -> None:
    path = write(make_dataset(pixel_bytes=300_000), tmp_path / "a.dcm", syntax=syntax)

    assert send(node, path) == [0x0000]

    assert node.data_set("2.25.100.1") == data_set_of(path)
    instance = node.index.find_instance("2.25.100.1")
    assert instance is not None
    assert instance.transfer_syntax_uid == syntax
    assert node.files() == [node.archive.path(instance)]


def test_every_transfer_syntax_that_pynetdicom_knows_is_stored_byte_for_byte(node: Node, tmp_path: Path) -> None:
    paths = []
    for number, uid in enumerate(ALL_TRANSFER_SYNTAXES):
        dataset = make_dataset(number)
        if UID(uid).is_encapsulated:
            dataset.PixelData = pydicom.encaps.encapsulate([b"not really compressed."])
            dataset["PixelData"].is_undefined_length = True
        paths.append(write(dataset, tmp_path / f"{number}.dcm", syntax=uid))

    assert send(node, *paths) == [0x0000] * len(paths)

    for number, path in enumerate(paths):
        assert node.data_set(f"2.25.100.{number}") == data_set_of(path)


def test_every_storage_sop_class_that_pynetdicom_knows_is_accepted(node: Node) -> None:
    classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]

    for some in (classes[:100], classes[100:]):
        association = AE().associate("127.0.0.1", node.port, contexts=[build_context(uid) for uid in some])
        assert association.rejected_contexts == []
        association.release()


@pytest.mark.data
@pytest.mark.skipif(not CORPUS.exists(), reason="../shared/data is not there")
def test_real_files_of_many_transfer_syntaxes_are_stored_byte_for_byte(node: Node) -> None:
    names = (
        "emri_small_jpeg_ls_lossless.dcm", "JPEG-LL.dcm", "US1_J2KI.dcm", "OBXXXX1A_rle.dcm", "SC_rgb_expb.dcm",
        "liver_deflate.dcm", "explicit_VR-UN.dcm", "gdcm-US-ALOKA-16.dcm",
    )  # fmt: skip
    for path in (CORPUS / name for name in names):
        meta = pydicom.filereader.read_file_meta_info(path)

        assert send(node, path) == [0x0000]

        assert node.data_set(meta.MediaStorageSOPInstanceUID) == data_set_of(path)


@pytest.mark.filterwarnings("ignore:Unknown encoding")
def test_a_private_element_and_an_invalid_value_do_not_keep_an_instance_out(node: Node, tmp_path: Path) -> None:
    dataset = make_dataset()
    dataset.private_block(0x0009, "SOMEBODY", create=True).add_new(0x01, "LO", "theirs")
    dataset.SpecificCharacterSet = "ISO_IR 100"
    with pydicom.config.disable_value_validation():
        dataset.StudyDate = "tomorrow"
        path = write(dataset, tmp_path / "odd.dcm")
    path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 999"))

    assert send(node, path) == [0x0000]

    assert node.data_set("2.25.100.1") == data_set_of(path)


def test_a_uid_that_looks_like_a_path_is_stored_inside_the_archive(node: Node, tmp_path: Path) -> None:
    dataset = make_dataset()
    with pydicom.config.disable_value_validation():
        dataset.SOPInstanceUID = "../../../../evil"
        path = write(dataset, tmp_path / "evil.dcm")

    assert send(node, path) == [0x0000]

    assert node.data_set("../../../../evil") == data_set_of(path)
    assert [file.parent.parent for file in node.files()] == [node.archive.root / "instances"]


def test_an_equal_instance_is_acknowledged_again_and_stored_once(node: Node, tmp_path: Path) -> None:
    path = write(make_dataset(), tmp_path / "a.dcm")

    assert send(node, path, path) == [0x0000, 0x0000]
    assert send(node, path) == [0x0000]

    node.index_all()
    assert len(node.files()) == 1
    assert node.quarantine() == []


@pytest.mark.parametrize(
    ("policy", "second_status", "in_use", "aside"),
    [
        (DuplicatePolicy.FLAG, 0x0000, "first", "both are kept, the first is used"),
        (DuplicatePolicy.KEEP_FIRST, 0x0111, "first", None),
        (DuplicatePolicy.REPLACE, 0x0000, "second", "replaced by other content"),
    ],
)
def test_other_content_under_a_stored_uid_is_dealt_with_as_configured_and_never_in_silence(
    start: Callable[..., Node], tmp_path: Path, policy: DuplicatePolicy, second_status: int, in_use: str, aside: str
) -> None:
    node = start(duplicates=policy)
    contents = {name: write(make_dataset(), tmp_path / f"{name}.dcm") for name in ("first", "second")}

    assert send(node, contents["first"], contents["second"], contents["first"]) == [0x0000, second_status, 0x0000]

    if policy is DuplicatePolicy.REPLACE:
        node.index_all()
        assert send(node, contents["second"]) == [0x0000]  # the last one that came is in use
    assert node.data_set("2.25.100.1") == data_set_of(contents[in_use])
    reasons = [each["reason"] for each in node.quarantine()]
    assert all(aside in reason for reason in reasons)
    assert bool(reasons) is (aside is not None)


# ── what is kept aside, and what is refused ──


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"sop_instance_uid": "2.25.999"}, "SOP Instance UID: got '2.25.100.1', expected '2.25.999'"),
        ({"sop_class_uid": MRImageStorage}, "SOP Class UID: got"),
    ],
)
def test_another_data_set_than_announced_is_kept_aside_with_the_reason(
    node: Node, tmp_path: Path, meta: dict[str, str], reason: str
) -> None:
    path = write(make_dataset(), tmp_path / "a.dcm", **meta)

    assert send(node, path) == [0x0000]

    (aside,) = node.quarantine()
    assert reason in aside["reason"]
    assert data_set_of(node.archive.root / aside["path"]) == data_set_of(path)


def test_what_cannot_be_read_is_kept_aside_and_what_follows_it_is_stored(node: Node, tmp_path: Path) -> None:
    good = write(make_dataset(), tmp_path / "good.dcm")
    head = good.read_bytes()[: -len(data_set_of(good))]
    contents = (b"\xff" * 5000, b"not DICOM at all", bytes(64), data_set_of(good)[:90])
    with associated(node, [good]) as association:
        for number, garbage in enumerate(contents):
            bad = tmp_path / f"bad{number}.dcm"
            bad.write_bytes(head.replace(b"2.25.100.1", b"2.25.100.9") + garbage)
            assert association.send_c_store(bad).Status == 0x0000
        assert association.send_c_store(good).Status == 0x0000

    aside = node.quarantine()

    assert [data_set_of(node.archive.root / each["path"]) for each in aside] == list(contents)
    assert all(each["reason"] for each in aside)
    assert node.data_set("2.25.100.1") == data_set_of(good)
    assert len(node.files()) == 5


def test_an_instance_without_a_series_is_kept_aside(node: Node, tmp_path: Path) -> None:
    dataset = make_dataset()
    del dataset.SeriesInstanceUID

    assert send(node, write(dataset, tmp_path / "a.dcm")) == [0x0000]

    assert "Series Instance UID of 0 characters" in node.quarantine()[0]["reason"]


def test_an_entry_that_ends_the_indexer_again_and_again_is_kept_aside_and_the_others_are_indexed(
    node: Node, tmp_path: Path
) -> None:
    paths = [write(make_dataset(number), tmp_path / f"{number}.dcm") for number in range(3)]
    send(node, *paths)
    node.intake.flush()

    def deadly(dataset: Dataset) -> InstanceHeader:
        if dataset.InstanceNumber == 1:
            raise KeyboardInterrupt  # as a process ends: nothing of ours gets to see it
        return instance_header(dataset)

    dying = Indexer(node.index, node.archive, deadly)
    for _ in range(10):
        with suppress(KeyboardInterrupt):
            dying.run_once()

    assert [each["reason"] for each in node.quarantine()] == ["reading it ended the indexer 6 times"]
    assert all(node.index.find_instance(f"2.25.100.{number}") for number in (0, 2))


def test_trouble_of_our_own_disk_is_no_reason_for_quarantine(node: Node, tmp_path: Path) -> None:
    send(node, write(make_dataset(), tmp_path / "a.dcm"))
    node.intake.flush()
    (node.archive.root / "instances").rename(tmp_path / "away")
    for _ in range(4):
        with pytest.raises(LocalError):
            node.indexer.run_once()
    (tmp_path / "away").rename(node.archive.root / "instances")

    assert node.quarantine() == []
    assert node.data_set("2.25.100.1")


def test_what_was_sealed_by_a_process_that_died_is_indexed_at_the_next_start(node: Node, tmp_path: Path) -> None:
    path = write(make_dataset(), tmp_path / "a.dcm")
    with node.index.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE journal RENAME TO lost"))

    assert send(node, path) == [0x0000]  # the database is in trouble; the file and its record are safe

    shutil.copytree(node.archive.root, tmp_path / "after", ignore=shutil.ignore_patterns("node.db*"))
    after = Node(tmp_path / "after")
    assert after.data_set("2.25.100.1") == data_set_of(path)
    (association,) = after.index.status()["associations"]
    assert (association["calling_ae_title"], association["outcome"]) == ("SENDER", "node died")
    after.stop()


def test_trouble_in_the_database_loses_nothing_and_the_index_catches_up(node: Node, tmp_path: Path) -> None:
    path = write(make_dataset(), tmp_path / "a.dcm")
    with node.index.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE journal RENAME TO lost"))

    assert send(node, path) == [0x0000]

    with node.index.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE lost RENAME TO journal"))
    assert node.data_set("2.25.100.1") == data_set_of(path)
    assert len(node.files()) == 1


def test_a_series_waits_for_what_is_received_and_not_yet_indexed(node: Node, tmp_path: Path) -> None:
    send(node, write(make_dataset(1), tmp_path / "1.dcm"))
    node.index_all()
    assert [each.oldest_unindexed_at for each in node.index.activities()] == [None]

    send(node, write(make_dataset(2), tmp_path / "2.dcm"))
    node.intake.flush()

    (activity,) = node.index.activities()
    assert activity.oldest_unindexed_at is not None
    assert not completion.is_complete(activity, now=activity.last_received_at + timedelta(hours=1), quiet_s=30)


def test_a_disk_that_takes_no_more_is_answered_0xa700_and_the_association_goes_on(node: Node, tmp_path: Path) -> None:
    large = write(make_dataset(1, pixel_bytes=3_000_000), tmp_path / "large.dcm")
    small = write(make_dataset(2), tmp_path / "small.dcm")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        assert send(node, large, small) == [0xA700, 0x0000]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    node.index_all()
    assert len(node.files()) == 1
    assert send(node, large) == [0x0000]
    assert node.data_set("2.25.100.1") == data_set_of(large)


def test_an_archive_that_is_gone_is_answered_0xa700(node: Node, tmp_path: Path) -> None:
    path = write(make_dataset(), tmp_path / "a.dcm")
    shutil.rmtree(node.archive.root / "incoming")

    assert send(node, path) == [0xA700]

    (node.archive.root / "incoming").mkdir()
    assert send(node, path) == [0x0000]


def test_a_bug_is_answered_0x0110_and_logged_with_its_place(
    tmp_path: Path, start: Callable[..., Node], caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset()

    calls = itertools.count()

    def clock() -> datetime:
        if next(calls) == 1:
            raise ZeroDivisionError(dataset.PatientName)
        return datetime.now(UTC)

    node = start(clock=clock)

    assert send(node, write(dataset, tmp_path / "a.dcm")) == [0x0110]

    assert "ZeroDivisionError" in caplog.text
    assert "in clock" in caplog.text
    assert "Phantom" not in caplog.text


def test_patients_do_not_appear_in_the_log(node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    good = write(make_dataset(1), tmp_path / "good.dcm")
    conflicting = write(make_dataset(1), tmp_path / "conflicting.dcm")
    mismatched = write(make_dataset(2), tmp_path / "mismatched.dcm", sop_instance_uid="2.25.999")
    broken = make_dataset(3)
    del broken.SeriesInstanceUID

    send(node, good, conflicting, mismatched, write(broken, tmp_path / "broken.dcm"))
    wait_until(lambda: "4 instances stored, 0 not stored" in caplog.text)
    assert len(node.quarantine()) == 3

    assert "Phantom" not in caplog.text
    assert "P1" not in caplog.text


# ── associations ──


def test_a_series_is_receiving_until_the_association_that_sent_it_ends(node: Node, tmp_path: Path) -> None:
    path = write(make_dataset(), tmp_path / "a.dcm")

    with associated(node, [path]) as association:
        association.send_c_store(path)
        node.index_all()
        assert [each.receiving for each in node.index.activities()] == [True]
    wait_until(lambda: node.open_associations() == 0)

    assert [each.receiving for each in node.index.activities()] == [False]


def test_an_association_that_breaks_off_in_mid_instance_is_closed_and_leaves_no_file(
    node: Node, tmp_path: Path
) -> None:
    whole = write(make_dataset(1), tmp_path / "whole.dcm")
    half = write(make_dataset(2, pixel_bytes=1_500_000), tmp_path / "half.dcm")

    with associated(node, [whole]) as association:
        association.send_c_store(whole)
        for pdu in store_request(association, half)[:-1]:
            association.dul.send_pdu(pdu)
        wait_until(lambda: len(node.files()) == 2)
        association.abort()
    wait_until(lambda: node.open_associations() == 0)

    assert len(node.files()) == 1
    assert node.data_set("2.25.100.1")
    assert node.index.find_instance("2.25.100.2") is None


def test_instances_that_came_before_the_break_but_were_not_answered_leave_no_file(node: Node, tmp_path: Path) -> None:
    """A peer that does not wait for answers, though no asynchronous operations were agreed on."""
    paths = [write(make_dataset(number), tmp_path / f"{number}.dcm") for number in (1, 2, 3)]

    with associated(node, paths) as association:
        for path in paths:
            for pdu in store_request(association, path):
                association.dul.send_pdu(pdu)
        wait_until(lambda: len(node.files()) >= 2)
        association.abort()
    wait_until(lambda: node.listener.counts()["connections"] == 0)
    node.index_all()

    assert {path.suffix for path in node.files()} <= {".dcm"}
    assert all(node.index.find_instance(pydicom.dcmread(path).SOPInstanceUID) for path in node.files())
    assert node.open_associations() == 0


def test_a_fragment_that_makes_no_sense_aborts_the_association_and_hurts_no_other(node: Node, tmp_path: Path) -> None:
    path = write(make_dataset(), tmp_path / "a.dcm")

    with associated(node, [path]) as association:
        pdu = store_request(association, path)[0]
        pdu.presentation_data_value_list[0] = (99, pdu.presentation_data_value_list[0][1])  # no such context
        association.dul.send_pdu(pdu)
        wait_until(lambda: association.is_aborted)

    assert send(node, path) == [0x0000]


def test_an_end_that_the_database_does_not_take_is_recorded_once_it_does(node: Node, tmp_path: Path) -> None:
    path = write(make_dataset(), tmp_path / "a.dcm")

    with associated(node, [path]) as association:
        association.send_c_store(path)
        node.intake.flush()
        with node.index.engine.begin() as connection:
            connection.execute(
                sa.text("CREATE TRIGGER no BEFORE UPDATE ON association BEGIN SELECT RAISE(FAIL, 'no'); END")
            )
    time.sleep(0.3)
    assert node.open_associations() == 1
    with node.index.engine.begin() as connection:
        connection.execute(sa.text("DROP TRIGGER no"))

    wait_until(lambda: node.open_associations() == 0)


def test_a_peer_that_stops_in_the_middle_of_a_pdu_is_cut_off(start: Callable[..., Node]) -> None:
    node = start(network_timeout_s=0.3)
    with socket.create_connection(("127.0.0.1", node.port)) as peer:
        peer.settimeout(5)
        peer.sendall(associate_request(b"STALLED")[:50])

        assert peer.recv(100) == b""


def test_odd_bytes_in_an_ae_title_do_not_refuse_the_sender(node: Node) -> None:
    with socket.create_connection(("127.0.0.1", node.port)) as peer:
        peer.settimeout(5)
        peer.sendall(associate_request("RÖNTGEN".encode("latin-1")))

        assert peer.recv(1) == b"\x02"  # A-ASSOCIATE-AC, PS3.8 9.3.3


PEERS = (
    Peer("ANYWHERE"),
    Peer("HERE", ("localhost",)),
    Peer("NET", ("127.0.0.0/8",)),
    Peer("THERE", ("192.0.2.1",)),
    Peer("ONE", max_associations=1),
)


@pytest.mark.parametrize(
    ("calling", "called", "answer"),
    [
        ("ANYWHERE", "NODE", None),
        ("HERE", "NODE", None),
        ("NET", "NODE", None),
        ("THERE", "NODE", (1, 1, 3)),
        ("NOBODY", "NODE", (1, 1, 3)),
        ("NET", "ANY-SCP", (1, 1, 7)),
    ],
)
def test_known_peers_that_call_us_by_name_are_served_and_others_are_rejected_for_good(
    start: Callable[..., Node], calling: str, called: str, answer: tuple[int, int, int] | None
) -> None:
    node = start(access=Access(PEERS, called_ae_title="NODE"))

    with asking(node, calling=calling, called=called) as (_, rejected):
        assert rejected == answer


@pytest.mark.parametrize("access", [Access(max_associations=1), Access(PEERS)], ids=["all", "one peer's"])
def test_more_associations_than_allowed_are_rejected_for_now(start: Callable[..., Node], access: Access) -> None:
    node = start(access=access)

    with asking(node, calling="ONE") as (_, first), asking(node, calling="ONE") as (_, second):
        assert first is None
        assert second == (2, 3, 2)
    wait_until(lambda: node.listener.counts()["open"] == 0)

    with asking(node, calling="ONE") as (_, third):
        assert third is None


def test_an_almost_full_disk_refuses_instances_then_associations_and_recovers_by_itself(
    start: Callable[..., Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start(limits=IntakeLimits(refuse_below_bytes=2000, reject_below_bytes=1000))
    paths = [write(make_dataset(number), tmp_path / f"{number}.dcm") for number in range(2)]
    free = 5000
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=free, f_frsize=1))

    with associated(node, paths) as association:
        assert association.send_c_store(paths[0]).Status == 0x0000
        free = 1500
        time.sleep(0.3)
        assert association.send_c_store(paths[1]).Status == 0xA700
        free = 500
        time.sleep(0.3)
        with asking(node) as (_, rejected):
            assert rejected == (2, 3, 1)
        free = 5000
        time.sleep(0.3)
        assert association.send_c_store(paths[1]).Status == 0x0000
    assert send(node, paths[0]) == [0x0000]


def test_an_instance_larger_than_allowed_is_answered_0xa700(start: Callable[..., Node], tmp_path: Path) -> None:
    node = start(limits=IntakeLimits(max_instance_bytes=10_000))
    large = write(make_dataset(1, pixel_bytes=300_000), tmp_path / "large.dcm")
    small = write(make_dataset(2), tmp_path / "small.dcm")

    assert send(node, large, small) == [0xA700, 0x0000]
    assert len(node.files()) == 1


def test_connections_that_never_ask_for_an_association_do_not_use_up_the_limit(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    node = start(access=Access(max_associations=2))
    path = write(make_dataset(), tmp_path / "a.dcm")

    for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", associate_request(b"HALF")[:50]) * 3:
        with socket.create_connection(("127.0.0.1", node.port)) as probe:
            probe.sendall(sent)
    wait_until(lambda: node.listener.counts()["open"] == 0)

    assert send(node, path) == [0x0000]


def test_a_sender_that_offers_several_transfer_syntaxes_gets_explicit_little_endian(node: Node) -> None:
    ae = AE("SENDER")
    ae.add_requested_context(CTImageStorage, [JPEG2000Lossless, ImplicitVRLittleEndian, ExplicitVRLittleEndian])
    association = ae.associate("127.0.0.1", node.port)

    assert association.accepted_contexts[0].transfer_syntax == [ExplicitVRLittleEndian]
    association.release()


def test_a_stop_lets_a_running_association_finish_and_takes_no_new_one(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    node = start()
    paths = [write(make_dataset(number), tmp_path / f"{number}.dcm") for number in (1, 2)]

    with associated(node, paths) as association:
        assert association.send_c_store(paths[0]).Status == 0x0000
        stopping = threading.Thread(target=node.listener.stop)
        stopping.start()
        wait_until(lambda: not accepts_connections(node.port))
        assert association.send_c_store(paths[1]).Status == 0x0000
    stopping.join(5)
    node.index_all()

    assert not stopping.is_alive()
    assert node.open_associations() == 0
    assert len(node.files()) == 2


def test_a_stop_aborts_an_association_that_does_not_end(start: Callable[..., Node], tmp_path: Path) -> None:
    node = start()
    path = write(make_dataset(), tmp_path / "a.dcm")

    with associated(node, [path]) as association:
        association.send_c_store(path)
        node.listener.stop(grace_s=0.1)
        wait_until(lambda: association.is_aborted)
    node.intake.flush()

    assert node.open_associations() == 0


def test_a_port_in_use_is_a_local_error(node: Node) -> None:
    other = Listener("127.0.0.1", node.port, node.intake, access=Access())

    with pytest.raises(LocalError, match="cannot listen on 127"):
        other.start()


# ── other people's senders ──


@pytest.mark.skipif(shutil.which("echoscu") is None, reason="DCMTK is not installed")
def test_echoscu_is_answered(node: Node) -> None:
    subprocess.run(["echoscu", "127.0.0.1", str(node.port)], check=True, timeout=20)


@pytest.mark.skipif(shutil.which("storescu") is None, reason="DCMTK is not installed")
@pytest.mark.parametrize("command", [["storescu", "-v"], ["storescu", "-xi"], ["dcmsend", "-v"]])
def test_dcmtk_sends_a_series_that_is_read_back_equal(node: Node, tmp_path: Path, command: list[str]) -> None:
    datasets = [make_dataset(number, pixel_bytes=131072) for number in range(1, 6)]
    paths = [write(dataset, tmp_path / f"{dataset.InstanceNumber}.dcm") for dataset in datasets]

    subprocess.run([*command, "127.0.0.1", str(node.port), *paths], check=True, timeout=20, capture_output=True)

    node.index_all()
    for dataset in datasets:
        instance = node.index.find_instance(dataset.SOPInstanceUID)
        assert instance is not None
        assert pydicom.dcmread(node.archive.path(instance)) == dataset
    wait_until(lambda: node.open_associations() == 0)


@pytest.mark.skipif(shutil.which("storescu") is None, reason="DCMTK is not installed")
def test_four_senders_at_once_lose_nothing(node: Node, tmp_path: Path) -> None:
    datasets = [make_dataset(number) for number in range(40)]
    paths = [write(dataset, tmp_path / f"{dataset.InstanceNumber}.dcm") for dataset in datasets]
    command = ["storescu", "127.0.0.1", str(node.port)]

    senders = [subprocess.Popen([*command, *paths[first::4]]) for first in range(4)]

    assert [sender.wait(timeout=30) for sender in senders] == [0, 0, 0, 0]
    assert all(node.data_set(dataset.SOPInstanceUID) for dataset in datasets)
    assert len(node.files()) == 40


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_success_is_sent_after_name_and_content_are_synced(tmp_path: Path) -> None:
    path = write(make_dataset(), tmp_path / "a.dcm")
    program = """
import sys
from pathlib import Path
from dicomnode.archive import Archive
from dicomnode.index import Index
from dicomnode.intake import Intake
from dicomnode.listener import Listener
from dicomnode.negotiation import Access
folder = Path(sys.argv[1])
archive = Archive(folder)
index = Index(f"sqlite:///{folder}/node.db")
index.migrate()
intake = Intake(archive, index)
intake.start()
listener = Listener("127.0.0.1", 0, intake, access=Access())
listener.start()
print(listener.port, flush=True)
sys.stdin.read()
listener.stop()
intake.stop()
"""
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "--seccomp-bpf", "-yy", "-o", trace, "-e", "trace=pwrite64,ftruncate,fsync,rename,sendto"]
    traced = subprocess.Popen(
        [*strace, sys.executable, "-c", program, tmp_path / "data"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert traced.stdout is not None
    port = traced.stdout.readline()
    if port:
        association = associate(int(port), [path])
        status = association.send_c_store(path).Status
        association.release()
    _, errors = traced.communicate("", timeout=30)
    if not port and "ptrace" in errors:
        pytest.skip("this machine does not allow tracing")
    assert status == 0x0000, errors

    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    named = next(i for i, call in enumerate(calls) if "fsync(" in call and re.search(r"/incoming/[^/]+>", call))
    answered = next(i for i, call in enumerate(calls) if call.startswith("sendto(") and r'"\4\0' in call)
    of_the_file = [i for i, call in enumerate(calls[:answered]) if ".part" in call]
    assert named < of_the_file[0]
    assert [calls[i].split("(")[0] for i in of_the_file] == ["pwrite64", "fsync"]


# ── helpers for peers that misbehave ──


def store_request(association: Association, path: Path) -> list[Any]:
    """A C-STORE request as P-DATA primitives of at most 16 KB."""
    meta = pydicom.filereader.read_file_meta_info(path)
    request = C_STORE()
    request.MessageID = 7
    request.Priority = 0
    request.AffectedSOPClassUID = meta.MediaStorageSOPClassUID
    request.AffectedSOPInstanceUID = meta.MediaStorageSOPInstanceUID
    request._dataset_path = (path, path.stat().st_size - len(data_set_of(path)))
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    return list(message.encode_msg(association.accepted_contexts[0].context_id, 16382))


def associate_request(calling_ae_title: bytes) -> bytes:
    """An A-ASSOCIATE-RQ PDU for Verification, PS3.8 9.3.2."""
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = 16382
    implementation.implementation_class_uid = "1.2.3"
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = "CALLING", "CALLED"
    primitive.calling_presentation_address = AddressInformation("127.0.0.1", 0)
    primitive.called_presentation_address = AddressInformation("127.0.0.1", 0)
    context = build_context(Verification)
    context.context_id = 1
    primitive.presentation_context_definition_list = [context]
    primitive.user_information = [length, implementation]
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(primitive)
    encoded = pdu.encode()
    return encoded[:26] + calling_ae_title.ljust(16) + encoded[42:]


@contextmanager
def asking(
    node: Node, *, calling: str = "SENDER", called: str = "NODE"
) -> Iterator[tuple[socket.socket, tuple[int, int, int] | None]]:
    """Ask for an association by hand; the connection and, where it is rejected, result, source and reason."""
    with socket.create_connection(("127.0.0.1", node.port)) as peer:
        peer.settimeout(5)
        request = associate_request(calling.encode())
        peer.sendall(request[:10] + called.encode().ljust(16) + request[26:])
        answer = peer.recv(4096)
        yield peer, None if answer[0] == 2 else (answer[7], answer[8], answer[9])


def accepts_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
