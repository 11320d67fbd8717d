"""The doors beside C-STORE: STOW-RS and import bring instances in by the same path, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import orthanc
import pytest
from orthanc import Orthanc
from phantoms import make_series
from pydicom import dcmread, dcmwrite
from pydicom.dataset import FileDataset
from running_node import free_port

from dicomnode.archive import Archive
from dicomnode.importing import import_folder
from dicomnode.index import Index
from dicomnode.indexer import Indexer
from dicomnode.intake import Intake, IntakeLimits
from dicomnode.model import DuplicatePolicy
from dicomnode.volumes import instance_header
from dicomnode.web import WebServer, application

CORPUS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom" / "corpus-pydicom"
BOUNDARY = "a-boundary"


class Door:
    """An intake with a real archive and index, and an HTTP server before it."""

    def __init__(self, folder: Path, *, limits: IntakeLimits, duplicates: DuplicatePolicy, admitted: bool) -> None:
        self.archive = Archive(folder)
        self.index = Index(f"sqlite:///{folder}/node.db")
        self.index.migrate()
        self.indexer = Indexer(self.index, self.archive, instance_header, duplicates=duplicates)
        self.intake = Intake(self.archive, self.index, limits=limits, duplicates=duplicates)
        self.intake.start()
        app = application(self.intake, called_ae_title="NODE", is_admitted=lambda _: admitted, silence_s=2.0)
        self.port = free_port()
        self.web = WebServer(app, "127.0.0.1", self.port, max_connections=20)
        self.web.start()

    def stop(self) -> None:
        self.web.stop()
        self.intake.stop()
        self.index.close()

    def index_all(self) -> None:
        self.intake.flush()
        while self.indexer.run_once():
            pass

    def data_set(self, uid: str) -> bytes | None:
        """What is kept under a SOP Instance UID."""
        self.index_all()
        instance = self.index.find_instance(uid)
        return None if instance is None else data_set_of(self.archive.path(instance).read_bytes())

    def open_associations(self) -> int:
        return sum(activity.receiving for activity in self.index.activities())

    def post(
        self, *parts: bytes, to: str = "", content_type: str | None = None, body: bytes | None = None
    ) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": content_type or f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'}
        url = f"http://127.0.0.1:{self.port}/dicom-web/studies{to}"
        request = urllib.request.Request(url, multipart(*parts) if body is None else body, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - our own server
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Callable[..., Door]]:
    doors: list[Door] = []

    def start(
        *,
        limits: IntakeLimits | None = None,
        duplicates: DuplicatePolicy = DuplicatePolicy.FLAG,
        admitted: bool = True,
    ) -> Door:
        folder = tmp_path / f"node{len(doors)}"
        doors.append(Door(folder, limits=limits or IntakeLimits(), duplicates=duplicates, admitted=admitted))
        return doors[-1]

    yield start
    for each in doors:
        each.stop()


def multipart(*parts: bytes) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    return b"".join(head + part + b"\r\n" for part in parts) + f"--{BOUNDARY}--\r\n".encode()


def small_series(slices: int, patient_id: str = "PHANTOM") -> list[FileDataset]:
    return make_series(shape=(slices, 16, 16), patient_id=patient_id)


def file_of(dataset: FileDataset) -> bytes:
    buffer = BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def data_set_of(file: bytes) -> bytes:
    """What comes after the file meta information, found by its group length (PS3.10 7.1)."""
    return file[144 + int.from_bytes(file[140:144], "little") :]


def uids_in(answer: dict[str, Any], sequence: str) -> list[str]:
    return [item["00081155"]["Value"][0] for item in answer.get(sequence, {}).get("Value", [])]


def test_a_request_of_several_instances_is_stored_byte_for_byte_and_answered_with_all_of_them(
    door: Callable[..., Door],
) -> None:
    node, series = door(), small_series(4)
    files = [file_of(dataset) for dataset in series]

    status, answer = node.post(*files)

    assert status == 200
    assert uids_in(answer, "00081199") == [dataset.SOPInstanceUID for dataset in series]
    assert uids_in(answer, "00081198") == []
    assert [node.data_set(dataset.SOPInstanceUID) for dataset in series] == [data_set_of(file) for file in files]
    assert node.open_associations() == 0


def test_a_part_that_is_no_dicom_file_costs_the_others_nothing(door: Callable[..., Door]) -> None:
    node, (first, second) = door(), small_series(2)

    status, answer = node.post(file_of(first), b"\x00" * 500, os.urandom(70_000), b"", file_of(second))

    assert status == 202
    assert uids_in(answer, "00081199") == [first.SOPInstanceUID, second.SOPInstanceUID]
    assert [item["00081197"]["Value"] for item in answer["0008119A"]["Value"]] == [[0xC000]] * 3


def test_to_a_study_only_its_own_instances_are_stored(door: Callable[..., Door]) -> None:
    node, (own, *_), (other, *_) = door(), small_series(2), small_series(2, "OTHER")
    assert own.StudyInstanceUID != other.StudyInstanceUID

    status, answer = node.post(file_of(own), file_of(other), to=f"/{own.StudyInstanceUID}")

    assert status == 202
    assert uids_in(answer, "00081199") == [own.SOPInstanceUID]
    (failed,) = answer["00081198"]["Value"]
    assert (failed["00081155"]["Value"], failed["00081197"]["Value"]) == ([other.SOPInstanceUID], [0xA900])
    assert node.data_set(other.SOPInstanceUID) is None


def test_what_there_is_no_room_for_is_refused_and_nothing_of_it_stays(door: Callable[..., Door]) -> None:
    (dataset, *_) = small_series(2)
    small = door(limits=IntakeLimits(max_instance_bytes=1000))
    full = door(limits=IntakeLimits(refuse_below_bytes=1 << 60))

    for node in (small, full):
        status, answer = node.post(file_of(dataset))

        assert status == 503
        assert answer["00081198"]["Value"][0]["00081197"]["Value"] == [0xA700]
        assert node.data_set(dataset.SOPInstanceUID) is None


def test_other_content_under_a_stored_uid_is_refused_where_the_first_is_kept(door: Callable[..., Door]) -> None:
    node, (dataset, *_) = door(duplicates=DuplicatePolicy.KEEP_FIRST), small_series(2)
    first = file_of(dataset)
    assert node.post(first)[0] == 200
    dataset.SeriesDescription = "other"

    status, answer = node.post(file_of(dataset))

    assert status == 409
    assert answer["00081198"]["Value"][0]["00081197"]["Value"] == [0x0111]
    assert node.data_set(dataset.SOPInstanceUID) == data_set_of(first)
    assert node.post(first)[0] == 200


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ('multipart/related; type="application/dicom+xml"; boundary=x', b"", 415),
        ("multipart/related; type=application/dicom", b"", 400),
        (None, b"", 400),
        (None, b"no boundary at all", 400),
        (None, multipart(b"x")[:60], 400),
    ],
)
def test_what_is_no_multipart_of_dicom_is_refused_with_the_reason(
    door: Callable[..., Door], content_type: str | None, body: bytes, status: int
) -> None:
    got, answer = door().post(content_type=content_type, body=body)

    assert got == status
    assert "expected" in answer["detail"] or "multipart" in answer["detail"]


def test_a_body_that_breaks_off_leaves_only_what_was_whole(door: Callable[..., Door]) -> None:
    node, (first, second) = door(), small_series(2)
    body = multipart(file_of(first), file_of(second))

    status, _ = node.post(body=body[:-400])

    assert status == 400
    assert node.data_set(first.SOPInstanceUID) is not None
    assert node.data_set(second.SOPInstanceUID) is None
    assert node.open_associations() == 0


def test_whom_nobody_knows_is_turned_away(door: Callable[..., Door]) -> None:
    node, (dataset, *_) = door(admitted=False), small_series(2)

    assert node.post(file_of(dataset))[0] == 403
    assert node.data_set(dataset.SOPInstanceUID) is None


@pytest.mark.skipif(orthanc.EXECUTABLE is None, reason="Orthanc is not installed (Debian package orthanc)")
@pytest.mark.skipif(not orthanc.DICOMWEB.exists(), reason="Debian package orthanc-dicomweb is not installed")
def test_orthanc_stores_into_the_node_by_stow(door: Callable[..., Door], tmp_path: Path) -> None:
    node, series = door(), small_series(3)
    pacs = Orthanc(tmp_path / "orthanc")
    try:
        for number, dataset in enumerate(series):
            (tmp_path / f"{number}.dcm").write_bytes(file_of(dataset))
            pacs.upload(tmp_path / f"{number}.dcm")
        base = f"http://127.0.0.1:{pacs.http_port}/dicom-web/servers/node"
        server = json.dumps({"Url": f"http://127.0.0.1:{node.port}/dicom-web/"}).encode()
        order = json.dumps({"Resources": [str(each) for each in pacs.instances().values()]}).encode()
        for url, data, method in ((base, server, "PUT"), (f"{base}/stow", order, "POST")):
            request = urllib.request.Request(url, data, method=method)  # noqa: S310 - our own server
            urllib.request.urlopen(request, timeout=60).close()  # noqa: S310
    finally:
        pacs.stop()

    assert all(node.data_set(dataset.SOPInstanceUID) for dataset in series)


def test_a_folder_is_imported_byte_for_byte_and_each_file_that_is_not_is_named(
    door: Callable[..., Door], tmp_path: Path
) -> None:
    node, series, folder = door(), small_series(3), tmp_path / "files"
    (folder / "below").mkdir(parents=True)
    for number, dataset in enumerate(series):
        (folder / "below" / f"{number}").write_bytes(file_of(dataset))
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.dcm").touch()

    outcome = {path.name: reason for path, reason in import_folder(folder, node.intake, called_ae_title="NODE")}

    assert {name for name, reason in outcome.items() if not reason} == {"0", "1", "2"}
    assert "DICM" in outcome["notes.txt"]
    assert "DICM" in outcome["empty.dcm"]
    for number, dataset in enumerate(series):
        assert node.data_set(dataset.SOPInstanceUID) == data_set_of((folder / "below" / f"{number}").read_bytes())
    assert node.open_associations() == 0


@pytest.mark.data
@pytest.mark.skipif(not CORPUS.is_dir(), reason="the real images of ../shared/data are not here")
def test_every_real_file_is_imported_or_named(door: Callable[..., Door], tmp_path: Path) -> None:
    node = door()
    shutil.copytree(CORPUS, tmp_path / "corpus")

    outcome = dict(import_folder(tmp_path / "corpus", node.intake, called_ae_title="NODE"))

    node.index_all()
    assert len(outcome) > 30
    for path, reason in outcome.items():
        if not reason:
            with path.open("rb") as file:
                uid = dcmread(file, stop_before_pixels=True, force=True).file_meta.MediaStorageSOPInstanceUID
            quarantined = {each["sop_instance_uid"] for each in node.index.status()["quarantine"]}
            assert node.index.find_instance(uid) is not None or uid in quarantined, path
