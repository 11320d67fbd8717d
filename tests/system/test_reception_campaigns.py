"""What a hospital does to a listener in months: hostile bytes, kill -9 under load, full disks, many associations.

Small by default; `make campaigns` runs the full sizes.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pydicom
import pytest
from listening_node import ListeningNode
from raw_scu import CT, EXPLICIT, RawSCU, associate_rq, c_store_rq, p_data, pdu

CORPUS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
FULL = bool(os.environ.get("CAMPAIGNS"))
MUTANTS = 20_000 if FULL else 2_000
PER_SENDER = 1_000 if FULL else 25
ASSOCIATIONS = 10_000 if FULL else 300
LARGEST = 60_000  # bytes of a mutant: what matters stands at a file's head
SEED = 20_261_124

pytestmark = pytest.mark.timeout(7200 if FULL else 300)


def instance(number: int, *, size: int = 2000) -> tuple[str, bytes]:
    """UID and encoded data set of a small CT instance."""
    uid = f"2.25.7.{number}"

    def element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
        value += b" " * (len(value) % 2)
        return (
            group.to_bytes(2, "little") + number.to_bytes(2, "little") + vr + len(value).to_bytes(2, "little") + value
        )

    head = element(8, 0x16, b"UI", CT.encode() + b"\0" * (len(CT) % 2)) + element(
        8, 0x18, b"UI", uid.encode() + b"\0" * (len(uid) % 2)
    )
    head += element(8, 0x60, b"CS", b"CT") + element(0x10, 0x20, b"LO", b"P")
    head += element(0x20, 0x0D, b"UI", b"2.25.71\0") + element(0x20, 0x0E, b"UI", b"2.25.72\0")
    pixels = random.Random(number).randbytes(size)
    return uid, head + b"\xe0\x7f\x10\x00OW\0\0" + size.to_bytes(4, "little") + pixels


def digest(data_set: bytes) -> str:
    return hashlib.sha256(data_set).hexdigest()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ListeningNode]:
    made = ListeningNode(tmp_path / "node")
    yield made
    made.kill()


# ── hostile bytes ──


def corpus() -> list[tuple[str, str, str, bytes]]:
    """SOP class, instance, transfer syntax and data set of every file that says what it is."""
    found = []
    for path in sorted(CORPUS.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        try:
            meta = pydicom.filereader.read_file_meta_info(path)
            start = 144 + int(meta.FileMetaInformationGroupLength)
            uids = str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID), str(meta.TransferSyntaxUID)
        except (pydicom.errors.InvalidDicomError, AttributeError, TypeError, ValueError):
            start, uids = 0, (CT, "2.25.8", EXPLICIT)  # whatever it is, it is sent
        found.append((*uids, content[start : start + LARGEST]))
    return found


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Flip bits, cut off, or overwrite a stretch."""
    content = bytearray(data)
    kind = chance.randrange(4)
    if kind == 0 and content:
        for _ in range(chance.randint(1, 20)):
            content[chance.randrange(min(len(content), 4000))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del content[chance.randrange(len(content) + 1) :]
    elif kind == 2 and content:
        at = chance.randrange(min(len(content), 4000))
        content[at : at + chance.randint(1, 64)] = chance.randbytes(chance.randint(0, 64))
    return bytes(content)


def send_broken_stream(port: int, instance_of: tuple[str, str, str, bytes], chance: random.Random) -> None:
    """A whole association's bytes, mutated anywhere; what the node answers is its affair."""
    sop_class, uid, syntax, data = instance_of
    stream = associate_rq([(sop_class, syntax)])
    stream += p_data(1, c_store_rq(sop_class.encode(), uid.encode()), is_command=True)
    stream += p_data(1, data[:3000], is_command=False, piece=chance.choice([1, 7, 500, 4000])) + pdu(5, bytes(4))
    kind = chance.randrange(3)
    if kind == 0:
        stream = chance.randbytes(chance.randint(1, 400))
    elif kind == 1:
        at = chance.randrange(len(stream))
        stream = stream[:at] + mutated(stream[at:], chance)
    else:
        stream = mutated(stream, chance)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as peer, suppress(OSError):
        peer.sendall(stream)
        if chance.randrange(2):
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass


@pytest.mark.data
@pytest.mark.skipif(not CORPUS.exists(), reason="../shared/data is not there")
def test_mutants_of_every_real_file_neither_stop_the_listener_nor_lose_what_was_acknowledged(
    node: ListeningNode,
) -> None:
    chance = random.Random(SEED)
    files = corpus()
    acknowledged: set[tuple[str, str]] = set()
    statuses: Counter[int] = Counter()
    for number in range(0, MUTANTS, 20):
        batch = [files[(number + offset) % len(files)] for offset in range(20)]
        for each in batch[:8]:
            send_broken_stream(node.port, each, chance)
        contexts = sorted({(sop_class, syntax) for sop_class, _, syntax, _ in batch[8:]})
        with RawSCU(node.port, [*contexts, (CT, EXPLICIT)]) as scu:
            assert scu.is_open
            for sop_class, uid, syntax, data in batch[8:]:
                content = mutated(data, chance)
                uid = uid if chance.randrange(2) else f"2.25.9.{number}.{chance.randrange(10**6)}"
                context = 2 * contexts.index((sop_class, syntax)) + 1
                status = scu.store(
                    context,
                    sop_class,
                    uid,
                    content,
                    piece=chance.choice([7, 999, 16000]) if len(content) < 3000 else 16000,
                )
                statuses[status] += 1
                if status == 0:
                    acknowledged.add((uid, digest(content)))
            uid, good = instance(number)
            assert scu.store(2 * len(contexts) + 1, CT, uid, good) == 0x0000
            acknowledged.add((uid, digest(good)))
            scu.release()

    assert node.process.poll() is None
    held = node.index_all()
    assert acknowledged <= set(held)
    assert statuses[0] == sum(statuses.values())  # store first: none of them is a reason to refuse
    assert "Traceback" not in node.logged()


@pytest.mark.data
@pytest.mark.skipif(
    not CORPUS.exists() or shutil.which("dcmsend") is None, reason="../shared/data or DCMTK is not there"
)
def test_the_real_files_are_taken_from_real_senders_as_they_are(node: ListeningNode, tmp_path: Path) -> None:
    report = tmp_path / "report.txt"
    options = ["+sd", "+r", "--no-halt", "--no-uid-checks", "--decompress-never", "+crf", str(report)]
    subprocess.run(["dcmsend", *options, "127.0.0.1", str(node.port), str(CORPUS)], check=False, capture_output=True)
    text = report.read_text()
    sent, successful = (
        int(re.findall(rf"{what} *: (\d+)$", text, re.MULTILINE)[-1])
        for what in (r"^- sent to the peer", r"with status SUCCESS")
    )

    assert sent == successful > 200
    assert len(node.index_all()) > 200  # some files are copies of others


# ── kill -9 under load ──


def test_four_senders_lose_nothing_and_double_nothing_when_the_node_is_killed_in_the_middle(
    node: ListeningNode,
) -> None:
    instances = [[instance(1000 * sender + number) for number in range(PER_SENDER)] for sender in range(4)]
    unsent = [dict(share) for share in instances]
    acknowledged: set[tuple[str, str]] = set()
    middle = threading.Event()

    def send(share: dict[str, bytes]) -> None:
        with suppress(OSError), RawSCU(node.port, [(CT, EXPLICIT)]) as scu:
            for uid, data_set in list(share.items()):
                if scu.store(1, CT, uid, data_set) == 0x0000:
                    acknowledged.add((uid, digest(data_set)))
                    del share[uid]
                if len(acknowledged) > 2 * PER_SENDER:
                    middle.set()
            scu.release()

    def send_all() -> list[threading.Thread]:
        threads = [threading.Thread(target=send, args=(share,)) for share in unsent]
        for thread in threads:
            thread.start()
        return threads

    senders = send_all()
    assert middle.wait(600)
    node.kill()
    for thread in senders:
        thread.join()
    before = set(acknowledged)
    assert any(unsent)
    node.start()
    for thread in send_all():
        thread.join()

    held = Counter(node.index_all())
    assert not any(unsent)
    assert before <= set(held)
    assert held == Counter({(uid, digest(data_set)): 1 for share in instances for uid, data_set in share})


# ── full disks ──


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("percent", [0, 50, 99])
def test_a_disk_that_is_full_in_mid_series_refuses_the_rest_and_recovers(small_disk: Path, percent: int) -> None:
    series = [instance(number, size=400_000) for number in range(20)]
    room = sum(len(data_set) for _, data_set in series) * percent // 100
    node = ListeningNode(small_disk / "node")
    try:
        with RawSCU(node.port, [(CT, EXPLICIT)]) as scu:
            uid, data_set = instance(99)
            assert scu.store(1, CT, uid, data_set) == 0x0000  # tables, folders and names stand
            time.sleep(0.5)
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            (small_disk / "filler").write_bytes(bytes(max(0, free - room)))
            first = [scu.store(1, CT, uid, data_set) for uid, data_set in series]
            assert set(first) <= {0x0000, 0xA700}
            assert first.count(0x0000) <= 20 * percent // 100
            assert first.count(0x0000) >= 20 * percent // 100 - 2
            half_written = [path for path in small_disk.rglob("*.part") if 0 < path.stat().st_size < 400_000]
            assert [path.stat().st_size for path in half_written if path.stat().st_size > 5_000] == []

            (small_disk / "filler").unlink()
            assert [scu.store(1, CT, uid, data_set) for uid, data_set in series] == [0x0000] * 20
            scu.release()
        held = Counter(node.index_all())
        assert [held[uid, digest(data_set)] for uid, data_set in series] == [1] * 20
    finally:
        node.kill()


# ── many associations ──


def test_many_associations_of_every_kind_leave_threads_handles_and_memory_as_they_were(node: ListeningNode) -> None:
    chance = random.Random(SEED)
    acknowledged: set[tuple[str, str]] = set()
    warm: dict[str, int] = {}
    for number in range(ASSOCIATIONS):
        kind = number % 5
        if kind < 2:
            with RawSCU(node.port, [(CT, EXPLICIT)]) as scu:
                uid, data_set = instance(number)
                assert scu.store(1, CT, uid, data_set) == 0x0000
                acknowledged.add((uid, digest(data_set)))
                scu.release()
        elif kind == 2:
            with RawSCU(node.port, [(CT, EXPLICIT)]) as scu:
                scu.send(p_data(1, c_store_rq(CT.encode(), b"2.25.1"), is_command=True))
                scu.send(p_data(1, bytes(5000), is_command=False)[:3000])
                if chance.randrange(2):
                    scu.send(pdu(7, bytes(4)))
        elif kind == 3:
            socket.create_connection(("127.0.0.1", node.port)).close()
        else:
            send_broken_stream(node.port, (CT, "2.25.2", EXPLICIT, bytes(500)), chance)
        if number == ASSOCIATIONS // 3:
            warm = settled(node)
    last = settled(node)

    assert last["threads"] <= warm["threads"]
    assert last["sockets"] <= warm["sockets"]
    assert last["handles"] <= warm["handles"] + 2  # the index may open one more connection
    assert last["resident_kib"] <= warm["resident_kib"] + 4096
    assert node.stop() == 0
    assert acknowledged <= set(node.index_all())


def settled(node: ListeningNode) -> dict[str, int]:
    """Its resources once no association is open any more."""
    time.sleep(6)  # the idle time-out, after which the last silent peer is cut off
    return node.resources()
