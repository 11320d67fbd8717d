"""A real node in a process group of its own, with its configuration in a temporary folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import FileDataset
from pynetdicom import AE

from dicomnode import config as configuration
from dicomnode.index import Index

FAULTS = Path(__file__).parent / "system" / "faults"

PRE_POST = """
version: 1
rules:
  - id: pre-post
    when: {Modality: CT}
    roles: {fixed: {match: {contrast: false}}, moving: {match: {contrast: true}}}
    register: {preset: fast}
    outputs: [series, sro, dsr]
"""


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(condition: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    """The first true value of `condition`; AssertionError after the time-out."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}")


class RunningNode:
    """`dicomnode serve` on a free port; started, killed and started again at will.

    Parameters
    ----------
    folder
        Holds configuration, data and the log of every run.
    destinations
        (name, AE title, port) on the loopback interface.
    rules
        The rule file's text.
    quiet_period_s
        Short, for tests.
    sources
        As in the configuration.
    database_url
        SQLite in its data folder, unless told otherwise.
    """

    def __init__(
        self,
        folder: Path,
        *,
        destinations: Sequence[tuple[str, str, int]] = (),
        rules: str = PRE_POST,
        quiet_period_s: float = 1.0,
        database_url: str = "sqlite:///{data_dir}/node.db",
        sources: Sequence[dict[str, Any]] = (),
        port: int | None = None,
    ) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.config = folder / "node.yaml"
        self.data = folder / "data"
        self.log = folder / "node.log"
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rules.yaml").write_text(rules)
        peers = [
            {"name": name, "ae_title": ae_title, "host": "127.0.0.1", "port": port}
            for name, ae_title, port in destinations
        ]
        node = {"host": "127.0.0.1", "port": self.port, "data_dir": "data"}
        waits = {"quiet_period_s": quiet_period_s, "incomplete_wait_s": quiet_period_s}
        text = {
            "node": {**node, **waits},
            "database": {"url": database_url},
            "access": {"mode": "any"},
            "destinations": peers,
            "sources": list(sources),
            "worker": {"device": "cpu"},
            "rules": "rules.yaml",
        }
        self.config.write_text(json.dumps(text))  # JSON is YAML

    def start(self, *, die_at: str = "") -> None:
        """Start it in a process group of its own; returns once it is up or, where it is to die, dead."""
        environment = {**os.environ, "DIE_AT": die_at}
        if die_at:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FAULTS), os.environ.get("PYTHONPATH")]))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dicomnode", "serve", "--config", str(self.config)],
                env=environment,
                stderr=log,
                start_new_session=True,
            )
        wait_for(lambda: self.has_died() or self._listens(), timeout_s=60, what="the node to listen")

    def has_died(self) -> bool:
        """Whether the supervising process has ended."""
        return self.process is not None and self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL to the whole process tree."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            finally:
                self.process.wait()

    def stop(self, *, timeout_s: float = 90) -> int:
        """SIGTERM to the supervising process alone; its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout_s)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `dicomnode ARGUMENTS --config` of this node."""
        return subprocess.run(
            [sys.executable, "-m", "dicomnode", *arguments, "--config", str(self.config)],
            capture_output=True,
            text=True,
            check=False,
        )

    def status(self) -> dict[str, list[dict[str, Any]]]:
        """What `status --json` prints, without the cost of a process: tests ask many times."""
        index = Index(configuration.load(self.config).database_url)
        try:
            found: dict[str, list[dict[str, Any]]] = json.loads(json.dumps(index.status(), default=str))
            return found
        finally:
            index.close()

    def send(self, series: Sequence[FileDataset]) -> list[FileDataset]:
        """C-STORE every instance on one association; those that were not acknowledged with success."""
        ae = AE("SCANNER")
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
        for uid in {dataset.SOPClassUID for dataset in series}:
            ae.add_requested_context(uid, series[0].file_meta.TransferSyntaxUID)
        association = ae.associate("127.0.0.1", self.port)
        if not association.is_established:
            return list(series)
        left = []
        for dataset in series:
            answer = association.send_c_store(dataset) if association.is_established else None
            if answer is None or answer.get("Status") != 0x0000:
                left.append(dataset)
        if association.is_established:
            association.release()
        return left

    def logged(self) -> str:
        """Everything every run has logged."""
        return self.log.read_text() if self.log.exists() else ""

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
