from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicomnode.archive import Archive, Incoming
from dicomnode.errors import LocalError
from dicomnode.model import RetrievedBy
from dicomnode.spool import JournalRecord, Source, takes_direct_writes

EXPLICIT = str(ExplicitVRLittleEndian)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "data")


def receive(archive: Archive, content: bytes, *, uid: str = "1.2.3", transfer_syntax: str = EXPLICIT) -> Incoming:
    incoming = archive.receive(
        sop_class_uid=str(CTImageStorage), sop_instance_uid=uid, transfer_syntax_uid=transfer_syntax
    )
    incoming.write(content)
    return incoming


def files(archive: Archive) -> list[Path]:
    """Every file that holds anything."""
    return sorted(path for path in archive.root.rglob("*") if path.is_file() and path.stat().st_size)


def data_set_of(path: Path) -> bytes:
    """What follows the file meta information, by its group length (PS3.10 7.1)."""
    content = path.read_bytes()
    return content[144 + int.from_bytes(content[140:144], "little") :]


def test_what_was_written_stands_in_the_kept_file_after_its_meta_information(archive: Archive) -> None:
    content = os.urandom(300_000)

    instance = archive.keep(receive(archive, content))

    path = archive.path(instance)
    assert files(archive) == [path]
    assert data_set_of(path) == content
    assert instance.sha256 == hashlib.sha256(content).hexdigest()
    assert instance.size_bytes == path.stat().st_size
    meta = pydicom.filereader.read_file_meta_info(path)
    assert meta.MediaStorageSOPInstanceUID == instance.sop_instance_uid == "1.2.3"
    assert meta.MediaStorageSOPClassUID == instance.sop_class_uid == CTImageStorage
    assert meta.TransferSyntaxUID == instance.transfer_syntax_uid == ExplicitVRLittleEndian


@pytest.mark.parametrize("piece", [131_060, 2**21])
@pytest.mark.parametrize("size", [0, 4096, 2**20 - 1, 2**20, 2**20 + 1, 2**21 + 4096, 3_000_001])
def test_an_instance_of_any_length_is_sealed_and_settled_as_it_came(archive: Archive, size: int, piece: int) -> None:
    content = os.urandom(size)
    incoming = receive(archive, b"")
    for at in range(0, size, piece):
        incoming.write(content[at : at + piece])

    entry = archive.seal(incoming, Source.new("CT1", "NODE", "10.0.0.7"), now=datetime(2026, 1, 2, tzinfo=UTC))

    (instance,) = archive.settle([entry])
    path = archive.path(instance)
    assert data_set_of(path) == content
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert entry.size_bytes == instance.size_bytes == path.stat().st_size
    record = JournalRecord.decode(path.read_bytes()[:128])
    assert record is not None
    assert (record.sha256, record.data_set_bytes) == (entry.sha256, size)


def test_what_cannot_be_written_past_the_page_cache_is_written_through_it(tmp_path: Path) -> None:
    path = tmp_path / "1.part"
    incoming = Incoming(
        str(path),
        os.open(path, os.O_CREAT | os.O_RDWR),
        [],
        sop_class_uid="1",
        sop_instance_uid="2",
        transfer_syntax_uid="3",
    )
    content = os.urandom(2_000_001)
    incoming.write(content)
    size_bytes = incoming.seal(b"record")

    assert not takes_direct_writes(Path("/proc/self/comm"))
    os.truncate(path, size_bytes)  # as what takes it up does
    assert path.read_bytes()[:6] == b"record"
    assert data_set_of(path) == content


def test_keeping_equal_content_twice_is_keeping_it_once(archive: Archive) -> None:
    first = archive.keep(receive(archive, b"same"))
    second = archive.keep(receive(archive, b"same"))

    assert first == second
    assert files(archive) == [archive.path(first)]


@pytest.mark.parametrize(
    "other",
    [
        {"content": b"two"},
        {"uid": "1.2.4"},
        {"transfer_syntax": str(ImplicitVRLittleEndian)},
    ],
)
def test_other_content_uid_or_transfer_syntax_never_replaces_a_kept_file(
    archive: Archive, other: dict[str, object]
) -> None:
    first = archive.keep(receive(archive, b"one"))
    second = archive.keep(receive(archive, **({"content": b"one"} | other)))  # type: ignore[arg-type]

    assert len({first.path, second.path}) == 2
    assert data_set_of(archive.path(first)) == b"one"


def test_a_uid_that_looks_like_a_path_does_not_become_one(archive: Archive) -> None:
    instance = archive.keep(receive(archive, b"x", uid="../../../etc/passwd"))

    assert archive.path(instance).is_relative_to(archive.root / "instances")
    assert "passwd" not in instance.path
    assert ".." not in instance.path


def test_what_is_discarded_leaves_nothing_behind(archive: Archive) -> None:
    incoming = receive(archive, b"half")

    incoming.discard()
    incoming.discard()

    assert files(archive) == []


def test_discarding_after_keeping_keeps_the_file(archive: Archive) -> None:
    incoming = receive(archive, b"whole")
    instance = archive.keep(incoming)

    incoming.discard()

    assert archive.path(instance).exists()


def test_removing_takes_the_file_away_and_may_be_repeated(archive: Archive) -> None:
    instance = archive.keep(receive(archive, b"unwanted"))

    archive.remove(instance)
    archive.remove(instance)

    assert files(archive) == []


@pytest.mark.parametrize("times", [1000, 100_000], ids=["written at once", "written in pieces"])
def test_what_a_killed_process_sealed_is_recovered_and_what_it_did_not_is_removed(archive: Archive, times: int) -> None:
    program = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from dicomnode.archive import Archive
from dicomnode.spool import Source
archive = Archive(Path(sys.argv[1]))
for uid in ("1.1", "1.2"):
    incoming = archive.receive(sop_class_uid="1", sop_instance_uid=uid, transfer_syntax_uid="3")
    incoming.write(uid.encode() * int(sys.argv[2]))
    if uid == "1.1":
        archive.seal(incoming, Source(bytes(16), "CT1", "NODE", "10.0.0.7"), now=datetime(2026, 1, 2, tzinfo=UTC))
    else:
        incoming.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program, archive.root, str(times)], check=False)
    alive = receive(archive, b"still coming")
    assert len(files(archive)) == 2

    ((entry, source),) = archive.recover()

    assert (entry.sop_instance_uid, entry.sop_class_uid, entry.transfer_syntax_uid) == ("1.1", "1", "3")
    assert entry.sha256 == hashlib.sha256(b"1.1" * times).hexdigest()
    assert (entry.received_at, source) == (
        datetime(2026, 1, 2, tzinfo=UTC),
        Source(bytes(16), "CT1", "NODE", "10.0.0.7"),
    )
    (instance,) = archive.settle([entry])
    assert archive.settle([entry]) == [instance]
    assert data_set_of(archive.path(instance)) == b"1.1" * times
    assert data_set_of(archive.path(archive.keep(alive))) == b"still coming"
    assert list(archive.recover()) == []
    assert [path.parent.parent.name for path in files(archive)] == ["instances", "instances"]


def test_what_a_killed_process_had_written_and_not_yet_cut_to_measure_is_recovered_whole(archive: Archive) -> None:
    program = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from dicomnode.archive import Archive
from dicomnode.spool import Source
archive = Archive(Path(sys.argv[1]))
incoming = archive.receive(sop_class_uid="1", sop_instance_uid="2", transfer_syntax_uid="3")
incoming.write(b"content")
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
archive.seal(incoming, Source(bytes(16), "CT1", "NODE", "10.0.0.7"), now=datetime.now(UTC))
"""
    killed = subprocess.run([sys.executable, "-c", program, archive.root], check=False)
    assert killed.returncode == -9

    ((entry, _),) = archive.recover()

    assert entry.sha256 == hashlib.sha256(b"content").hexdigest()
    assert data_set_of(archive.path_of(entry)) == b"content"
    assert entry.size_bytes == archive.path_of(entry).stat().st_size


def test_what_is_shorter_than_what_was_to_be_sealed_was_never_acknowledged_and_is_removed(archive: Archive) -> None:
    program = """
import os, sys
from datetime import UTC, datetime
from pathlib import Path
from dicomnode.archive import Archive
from dicomnode.spool import Source
archive = Archive(Path(sys.argv[1]))
incoming = archive.receive(sop_class_uid="1", sop_instance_uid="2", transfer_syntax_uid="3")
incoming.write(b"content" * 10_000)
entry = archive.seal(incoming, Source(bytes(16), "CT1", "NODE", "10.0.0.7"), now=datetime.now(UTC))
os.truncate(archive.path_of(entry), 65536)
"""
    subprocess.run([sys.executable, "-c", program, archive.root], check=True)

    assert list(archive.recover()) == []
    assert files(archive) == []


@pytest.mark.parametrize("retrieved_by", RetrievedBy)
@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
def test_a_journal_record_is_read_back_equal_and_a_damaged_one_is_none(address: str, retrieved_by: RetrievedBy) -> None:
    source = Source.new("RÖNTGEN", "NODE", address)
    record = JournalRecord(source, datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC), 2**40, "ab" * 32, retrieved_by)

    encoded = record.encode()

    assert len(encoded) == 128
    assert JournalRecord.decode(encoded) == record
    for at in range(125):
        assert JournalRecord.decode(encoded[:at] + bytes((encoded[at] ^ 1,)) + encoded[at + 1 :]) is None
    assert JournalRecord.decode(bytes(128)) is None


def test_a_dataset_made_here_is_read_back_equal(archive: Archive) -> None:
    dataset = made_here()

    instance = archive.keep_dataset(dataset)

    read = pydicom.dcmread(archive.path(instance))
    assert read == dataset
    assert read.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert instance.sop_instance_uid == dataset.SOPInstanceUID
    assert archive.keep_dataset(dataset) == instance


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="DCMTK is not installed")
def test_dcmtk_reads_the_meta_information_without_complaint(archive: Archive) -> None:
    instance = archive.keep_dataset(made_here())

    dumped = subprocess.run(["dcmdump", "+Ep", archive.path(instance)], check=True, capture_output=True, text=True)

    assert "(0002,0000) UL" in dumped.stdout
    assert "DICOMNODE_0.1" in dumped.stdout
    assert "Phantom^One" in dumped.stdout
    assert dumped.stderr == ""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("archive.keep(incoming)", ["pwrite64", "ftruncate", "fsync", "rename", "fsync"]),
        (
            "archive.settle([archive.seal(incoming, Source(bytes(16), 'A', 'B', '::1'), now=datetime.now(UTC))])",
            ["pwrite64", "fsync", "truncate", "fsync", "rename", "fsync", "fsync"],
        ),
    ],
    ids=["kept at once", "sealed and settled"],
)
def test_the_file_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, how: str, expected: list[str]
) -> None:
    program = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from dicomnode.archive import Archive
from dicomnode.spool import Source
archive = Archive(Path(sys.argv[1]))
incoming = archive.receive(sop_class_uid="1", sop_instance_uid="2", transfer_syntax_uid="3")
incoming.write(b"content")
"""
    trace = tmp_path / "trace"
    traced = subprocess.run(
        [
            "strace",
            "-f",
            "-y",
            "-o",
            trace,
            "-e",
            "trace=write,pwrite64,truncate,ftruncate,fsync,rename",
            sys.executable,
            "-c",
            program + how,
            tmp_path / "data",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    if traced.returncode != 0 and "ptrace" in traced.stderr:
        pytest.skip("this machine does not allow tracing")
    assert traced.returncode == 0, traced.stderr

    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines() if str(tmp_path) in line]
    of_the_instance = calls[next(i for i, call in enumerate(calls) if ".part" in call) :]
    assert [call.split("(")[0] for call in of_the_instance] == expected
    renamed = expected.index("rename")
    assert ".part" in of_the_instance[renamed - 1]
    assert any("/instances/" in call for call in of_the_instance[renamed + 1 :])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is not there")
def test_a_full_disk_is_a_local_error_and_nothing_is_kept(archive: Archive) -> None:
    incoming = receive(archive, b"x")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, incoming._descriptor)  # from here on every write to the file answers ENOSPC
    os.close(full)

    with pytest.raises(LocalError, match="No space left"):
        archive.keep(incoming)

    assert files(archive) == []


def test_a_folder_that_is_gone_is_a_local_error(archive: Archive) -> None:
    incoming = receive(archive, b"x")
    shutil.rmtree(archive.root / "instances")

    with pytest.raises(LocalError, match=r"archive: .*No such file"):
        archive.keep(incoming)

    assert files(archive) == []


def test_a_root_that_cannot_be_made_is_a_local_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(LocalError, match="archive: "):
        Archive(tmp_path / "file" / "data")


def made_here() -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = "2.25.1234"
    dataset.PatientName = "Phantom^One"
    dataset.BitsAllocated = 16
    dataset.PixelRepresentation = 1
    dataset.PixelData = bytes(range(256)) * 8
    item = Dataset()
    item.ReferencedSOPInstanceUID = "2.25.99"
    dataset.SourceImageSequence = [item]
    return dataset
