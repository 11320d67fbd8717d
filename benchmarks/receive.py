"""C-STORE reception side by side with DCMTK's storescp and Debian's Orthanc, in one run: `make bench-receive`.

Synthetic 512x512 16-bit CT instances, sent by DCMTK's storescu over the loopback interface, TCP_NODELAY=1 on both
sides. The receivers take turns in every round; the figures are medians. storescp does not fsync. CPU is the receiver's
own up to the last answer; the node's indexer, which reads headers afterwards, is told separately. The large object is
one multi-frame instance; its memory is the peak of the receiving process less what it had before.

Every receiver is to find the machine alike. Before each run twice the memory that the instances fill is touched,
because a virtual machine gives what was free for some seconds back to its host, and who uses it next waits for it.
What is still to be written is written. And nothing is removed before the end (with the defaults that is 16 GB), because
ext4 looks at every inode that was freed in the last minutes before it makes a new file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MultiFrameGrayscaleWordSecondaryCaptureImageStorage

ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}
ORTHANC = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
TICKS = os.sysconf("SC_CLK_TCK")


class Receiver:
    """A receiver in a process of its own, with an empty folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.port, self.http_port = free_port(), free_port()
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                self.command(), env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: listens(self.port), "the receiver to listen")
        time.sleep(self.settle_s)

    settle_s = 0.5

    def command(self) -> list[str]:
        """How it is started."""
        raise NotImplementedError

    def stored(self) -> int:
        """How many instances it holds."""
        raise NotImplementedError

    def cpu_s(self) -> float:
        """Of the receiving process, user and system, with its reaped children."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(int(each) for each in fields[11:15]) / TICKS

    def memory_mib(self, what: str) -> float:
        """VmRSS or VmHWM (its peak)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{what}:")[1].split()[0]) / 1024

    def stop(self) -> None:
        """End it; what it stored stays."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Node(Receiver):
    """`dicomnode serve`."""

    name = "dicomnode"
    settle_s = 8.0  # its worker imports torch meanwhile

    def command(self) -> list[str]:
        """Any peer, no rules."""
        node = {"host": "127.0.0.1", "port": self.port, "data_dir": str(self.folder / "data")}
        (self.folder / "node.yaml").write_text(json.dumps({"node": node, "access": {"mode": "any"}}))
        return [sys.executable, "-m", "dicomnode", "serve", "--config", str(self.folder / "node.yaml")]

    def status(self) -> dict[str, list[dict[str, object]]]:
        """What `dicomnode status --json` prints."""
        command = [sys.executable, "-m", "dicomnode", "status", "--json", "--config", str(self.folder / "node.yaml")]
        found: dict[str, list[dict[str, object]]] = json.loads(subprocess.check_output(command))
        return found

    def stored(self) -> int:
        """Instances in its index."""
        return sum(int(str(each["instances"])) for each in self.status()["series"])

    def indexer_cpu_s(self) -> float:
        """Of the child process that reads headers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            if b"\0indexer\0" in Path(f"/proc/{child}/cmdline").read_bytes():
                fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
                return (int(fields[11]) + int(fields[12])) / TICKS
        raise RuntimeError("the node has no indexer")


class Storescp(Receiver):
    """DCMTK, one process for each association."""

    name = "storescp"

    def command(self) -> list[str]:
        """Bit-preserving, PDUs as large as ours."""
        (self.folder / "data").mkdir()
        return [
            "storescp", "--fork", "-pdu", "131072", "+B", "-od", str(self.folder / "data"), str(self.port),
        ]  # fmt: skip

    def stored(self) -> int:
        """Files in its folder."""
        return len(list((self.folder / "data").iterdir()))


class Orthanc(Receiver):
    """Debian's Orthanc with its SQLite index; fsync is its default."""

    name = "orthanc"
    settle_s = 2.0

    def command(self) -> list[str]:
        """Any peer."""
        options = {
            "DicomAet": "ORTHANC", "DicomPort": self.port, "HttpPort": self.http_port, "DicomAlwaysAllowStore": True,
            "StorageDirectory": str(self.folder / "data"), "IndexDirectory": str(self.folder / "data"),
            "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "Plugins": [],
        }  # fmt: skip
        (self.folder / "orthanc.json").write_text(json.dumps(options))
        assert ORTHANC is not None
        return [ORTHANC, str(self.folder / "orthanc.json")]

    def stored(self) -> int:
        """Instances by its REST interface."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/statistics") as answer:
            count: int = json.load(answer)["CountInstances"]
            return count


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large-mb", type=int, default=2000, help="size of the large object, 0 for none")
    parser.add_argument("--folder", type=Path, help="where files are written; the receivers' disk is this one's")
    arguments = parser.parse_args()
    receivers: list[type[Receiver]] = [Node, Storescp, *([Orthanc] if ORTHANC else [])]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        paths = make_instances(folder / "sent", arguments.instances)
        rates: dict[tuple[str, int], list[float]] = {}
        cpu_ms: dict[tuple[str, int], list[float]] = {}
        indexing_ms: list[float] = []
        for round_number in range(arguments.rounds):
            for receiver_class in (
                receivers[round_number % len(receivers) :] + receivers[: round_number % len(receivers)]
            ):
                for senders in (1, 4):
                    receiver = receiver_class(folder / f"{receiver_class.name}-{senders}-{round_number}")
                    try:
                        key = (receiver_class.name, senders)
                        rate, cpu = measure(receiver, paths, senders)
                        rates.setdefault(key, []).append(rate)
                        cpu_ms.setdefault(key, []).append(cpu)
                        wait_for(lambda held=receiver: held.stored() == len(paths), "all instances to be held")  # type: ignore[misc]
                        if isinstance(receiver, Node):
                            indexing_ms.append(1e3 * receiver.indexer_cpu_s() / len(paths))
                    finally:
                        receiver.stop()
                    print(f"  {key}: {rate:.0f}/s, {cpu:.2f} ms CPU", flush=True)
        print(f"\n{arguments.instances} instances of 512x512, median of {arguments.rounds} rounds\n")
        print("receiver    senders  inst/s   x orthanc  x storescp  CPU ms/inst")
        for (receiver_name, senders), values in rates.items():
            rate = statistics.median(values)
            ratios = [
                rate / statistics.median(rates[other, senders]) if (other, senders) in rates else float("nan")
                for other in ("orthanc", "storescp")
            ]
            cpu = statistics.median(cpu_ms[receiver_name, senders])
            print(f"{receiver_name:12}{senders:4}{rate:11.0f}{ratios[0]:11.2f}{ratios[1]:12.2f}{cpu:12.2f}")
        print(
            f"dicomnode's indexer, after the answers, its start included: {statistics.median(indexing_ms):.1f} ms/inst"
        )
        if arguments.large_mb:
            large = make_large(folder / "large.dcm", arguments.large_mb)
            for receiver_class in receivers:
                measure_large(receiver_class, folder, large, arguments.large_mb)


def measure(receiver: Receiver, paths: list[Path], senders: int) -> tuple[float, float]:
    """Instances per second and CPU milliseconds per instance, from the first connection to the last answer."""
    os.sync()
    np.ones(2 * sum(path.stat().st_size for path in paths), dtype=np.uint8)
    before = receiver.cpu_s()
    started = time.monotonic()
    send(receiver.port, [paths[number::senders] for number in range(senders)])
    elapsed = time.monotonic() - started
    time.sleep(0.1)  # a forked storescp must be reaped to be counted
    return len(paths) / elapsed, 1e3 * (receiver.cpu_s() - before) / len(paths)


def measure_large(receiver_class: type[Receiver], folder: Path, large: Path, size_mb: int) -> None:
    """Print speed and memory for one large instance."""
    receiver = receiver_class(folder / receiver_class.name)
    try:
        before = receiver.memory_mib("VmRSS")
        started = time.monotonic()
        send(receiver.port, [[large]])
        elapsed = time.monotonic() - started
        grown = receiver.memory_mib("VmHWM") - before
        print(f"{size_mb} MB object: {receiver_class.name:10} {size_mb / elapsed:5.0f} MB/s, memory +{grown:.0f} MiB")
    except subprocess.CalledProcessError as error:
        print(f"{size_mb} MB object: {receiver_class.name:10} not stored: storescu exit status {error.returncode}")
    finally:
        receiver.stop()


def send(port: int, shares: list[list[Path]]) -> None:
    """One storescu for each share, at once; CalledProcessError unless all of it was taken."""
    command = ["storescu", "-xe", "-aec", "ANY-SCP", "127.0.0.1", str(port)]
    processes = [subprocess.Popen([*command, *share], env=ENVIRONMENT) for share in shares]
    for process in processes:
        if process.wait() != 0:
            raise subprocess.CalledProcessError(process.returncode, "storescu")


def make_instances(folder: Path, count: int) -> list[Path]:
    """CT instances of one series, with noise for pixels."""
    folder.mkdir()
    random = np.random.default_rng(1)
    paths = []
    for number in range(count):
        dataset = header(CTImageStorage, f"2.25.1.{number}")
        dataset.InstanceNumber = number
        dataset.PixelData = random.integers(0, 4096, 512 * 512, dtype=np.uint16).tobytes()
        paths.append(write(dataset, folder / f"{number}.dcm"))
    return paths


def make_large(path: Path, size_mb: int) -> Path:
    """One multi-frame instance of that size, whose pixel data is a hole in its file."""
    dataset = header(MultiFrameGrayscaleWordSecondaryCaptureImageStorage, "2.25.2.1")
    dataset.NumberOfFrames = size_mb * 10**6 // (2 * 512 * 512)
    length = dataset.NumberOfFrames * 2 * 512 * 512
    dataset.PixelData = b""
    write(dataset, path)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(length.to_bytes(4, "little"))
        file.truncate(path.stat().st_size + length)
    return path


def header(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    """What an image needs around its pixels."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class_uid, sop_instance_uid
    dataset.PatientID, dataset.PatientName, dataset.Modality = "BENCH", "Bench^Receive", "CT"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "2.25.10", "2.25.11"
    dataset.Rows = dataset.Columns = 512
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [1, 1], 1
    return dataset


def write(dataset: Dataset, path: Path) -> Path:
    """As a PS3.10 file in Explicit VR Little Endian."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = 120.0) -> None:
    """RuntimeError after the time-out."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
