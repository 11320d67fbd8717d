"""Listener, intake, archive and index in a process of their own, without worker and scheduler: to be killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import sqlalchemy as sa

from dicomnode.archive import Archive
from dicomnode.index import Index
from dicomnode.indexer import Indexer
from dicomnode.volumes import instance_header

PROGRAM = """
import sys, threading
from pathlib import Path
from dicomnode.archive import Archive
from dicomnode.commitment import CommitmentSCP
from dicomnode.index import Index
from dicomnode.intake import Intake
from dicomnode.listener import Listener
from dicomnode.negotiation import Access
folder = Path(sys.argv[1])
index = Index(f"sqlite:///{folder}/node.db")
index.migrate()
intake = Intake(Archive(folder), index)
intake.start()
commitment = CommitmentSCP("NODE", (), index, intake)
listener = Listener("127.0.0.1", 0, intake, access=Access(max_associations=50), commitment=commitment,
                    network_timeout_s=5)
listener.start()
print(listener.port, flush=True)
sys.stdin.read()
listener.stop()
intake.stop()
"""


class ListeningNode:
    """The node's receiving half, killed and started at will."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder.parent / f"{folder.name}.log"
        folder.mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        """Start it; returns once it listens."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, self.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()[-3000:]
        self.port = int(line)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self._reap()

    def stop(self) -> int:
        """Clean stop; its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self._reap()

    def resources(self) -> dict[str, int]:
        """Threads, file handles, sockets among them, and resident KiB of the process."""
        proc = Path("/proc") / str(self.process.pid)
        handles = [link.readlink() for link in (proc / "fd").iterdir() if link.is_symlink()]
        resident = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS"))
        return {
            "threads": len(list((proc / "task").iterdir())),
            "handles": len(handles),
            "sockets": sum(str(each).startswith("socket:") for each in handles),
            "resident_kib": int(resident.split()[1]),
        }

    def index_all(self) -> list[tuple[str, str]]:
        """Kill and start it, empty the journal; (SOP Instance UID, digest) of all it holds, one for each file."""
        self.kill()
        self.start()  # what was acknowledged and had not reached the journal is recovered before it listens
        index, archive = Index(f"sqlite:///{self.folder}/node.db"), Archive(self.folder)
        indexer = Indexer(index, archive, instance_header)
        while indexer.run_once():
            pass
        with index.engine.connect() as connection:
            rows = [
                row
                for table in ("instance", "quarantine")
                for row in connection.execute(sa.text(f"SELECT sop_instance_uid, sha256, path FROM {table}"))  # noqa: S608
            ]
        index.close()
        assert all((self.folder / path).exists() for _, _, path in rows)
        return [(uid, digest) for uid, digest, _ in rows]

    def logged(self) -> str:
        """What it wrote to standard error."""
        return self._log.read_text()

    def _reap(self) -> int:
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.process.stdout.close()
        self.process.stdin.close()
        return self.process.wait(60)
