"""The node and the PACS of the demonstration as running things, each stopped when its `with` block ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import CTImageStorage, Verification  # type: ignore[attr-defined]  # made at import

from dicomnode.errors import RemoteError
from dicomnode.part10 import read_head
from dicomnode.remotes import Destination
from dicomnode.scu import Association

START_TIMEOUT_S = 60.0
DELIVERED_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 60.0
GIVEN_UP_TIMEOUT_S = 10.0  # the node lets a registration in hand finish; nobody waits for it any more
POLL_S = 4.0  # asking costs about a second of the processor that the registration wants

RULES = """\
version: 1
rules:
  - id: ct-native-portal
    when: {Modality: CT}
    roles:
      fixed: {match: {contrast: false}}
      moving: {match: {contrast: true}}
    pair: {same: [StudyInstanceUID]}
    register: {preset: balanced}
    outputs: [series, sro, dsr, sr, sc]
"""
CONFIG = """\
node: {{ae_title: DICOMNODE, host: 127.0.0.1, port: {port}, data_dir: dicomnode-data, quiet_period_s: 2}}
access: {{mode: any}}
destinations: [{{name: pacs, ae_title: STANDIN, host: 127.0.0.1, port: {pacs_port}}}]
rules: rules.yaml
"""


class DemoError(Exception):
    """The demonstration cannot go on; the message says at what."""


class StandInPacs:
    """A Storage SCP on a free port that writes down whatever it gets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ae = AE(ae_title="STANDIN")
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(str(context.abstract_syntax), [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        ae.add_supported_context(Verification)
        folder.mkdir(parents=True, exist_ok=True)
        server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._keep)])
        assert server is not None  # with block=False it never is
        self._server = server
        self.port: int = server.server_address[1]

    def files(self) -> list[Path]:
        """One file for each SOP Instance received."""
        return sorted(self._folder.glob("*.dcm"))

    def _keep(self, event: evt.Event) -> int:
        name = hashlib.sha256(event.file_meta.MediaStorageSOPInstanceUID.encode()).hexdigest()[:32]
        (self._folder / f"{name}.dcm").write_bytes(event.encoded_dataset())
        return 0x0000

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


class RunningNode:
    """`dicomnode serve` in a process of its own, with a configuration written for it."""

    def __init__(self, folder: Path, pacs_port: int) -> None:
        self.port = _free_port()
        self._log = folder / "node.log"
        self._config = folder / "node.yaml"
        self._config.write_text(CONFIG.format(port=self.port, pacs_port=pacs_port))
        (folder / "rules.yaml").write_text(RULES)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 -- our own command
                self._command("serve"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that it can be killed with its worker where it does not stop by itself
            )

    def wait_until_it_answers(self) -> None:
        """Wait for its first answer to C-ECHO."""
        ae = AE(ae_title="DEMO")
        ae.add_requested_context(Verification)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self._must_run()
            with socket.socket() as probe:  # a refused association would be logged as an error
                reachable = probe.connect_ex(("127.0.0.1", self.port)) == 0
            if reachable:
                association = ae.associate("127.0.0.1", self.port, ae_title="DICOMNODE")
                if association.is_established:
                    status = association.send_c_echo()
                    association.release()
                    if status and status.Status == 0x0000:
                        return
            time.sleep(0.3)
        raise DemoError(f"the node did not answer C-ECHO within {START_TIMEOUT_S:.0f} s")

    def wait_until_delivered(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Tell how the node gets on until its job is done and all of its results are delivered; its last status."""
        deadline = time.monotonic() + DELIVERED_TIMEOUT_S
        told, last, idle = "", {}, 0
        while time.monotonic() < deadline:
            self._must_run()
            last = self.status()
            text = _where_it_stands(last)
            if text != told:
                say(text)
                told = text
            settled = len(last["series"]) == 2 and all(row["state"] != "receiving" for row in last["series"])
            idle = idle + 1 if settled and not last["jobs"] else 0
            _must_succeed(last, abandoned=idle > 3)
            if last["deliveries"] and _all(last["jobs"], "done") and _all(last["deliveries"], "delivered"):
                return last
            time.sleep(POLL_S)
        raise DemoError(f"not delivered within {DELIVERED_TIMEOUT_S:.0f} s; last: {told}")

    def status(self) -> dict[str, Any]:
        """What `dicomnode status --json` says."""
        try:
            asked = subprocess.run(  # noqa: S603 -- our own command
                [*self._command("status"), "--json"], capture_output=True, text=True, timeout=120, check=False
            )
        except subprocess.TimeoutExpired:
            raise DemoError("dicomnode status: no answer within 120 s") from None
        if asked.returncode != 0:
            raise DemoError(f"dicomnode status: exit status {asked.returncode}: {asked.stderr.strip()[-500:]}")
        answer: dict[str, Any] = json.loads(asked.stdout)
        return answer

    def stop(self) -> int:
        """Ask it to stop, as an init system does; its exit status."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the node did not stop within {STOP_TIMEOUT_S:.0f} s of SIGTERM") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(GIVEN_UP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        if kind is not None:
            lines = self._log.read_text(errors="replace").splitlines()[-30:]
            print(f"\nthe last lines of {self._log}:", *lines, sep="\n  ", flush=True)

    def _command(self, verb: str) -> list[str]:
        return [sys.executable, "-m", "dicomnode", verb, "--config", str(self._config)]

    def _must_run(self) -> None:
        if (status := self._process.poll()) is not None:
            raise DemoError(f"the node ended by itself with exit status {status}")


def send(files: Sequence[Path], port: int) -> None:
    """Send instances by C-STORE on one association.

    Raises
    ------
    DemoError
        The association or one of the instances was refused.
    """
    association = Association(Destination("node", "DICOMNODE", "127.0.0.1", port), ae_title="DEMO")
    try:
        association.open([(CTImageStorage, [ExplicitVRLittleEndian])])
        if not association.accepted:
            raise DemoError(f"port {port}: the node did not accept CT Image Storage")
        for path in files:
            with path.open("rb") as file:
                head = read_head(file)
                file.seek(head.size_bytes)
                context_id = association.accepted[head.sop_class_uid, head.transfer_syntax_uid]
                status = association.store(context_id, head, file, path.stat().st_size - head.size_bytes)
            if status != 0x0000:
                raise DemoError(f"C-STORE of {path}: got status 0x{status:04X}, expected 0x0000")
    except RemoteError as error:
        raise DemoError(f"port {port}: {error}") from error
    finally:
        association.release()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _where_it_stands(status: dict[str, Any]) -> str:
    if status["deliveries"]:
        delivered = sum(row["state"] == "delivered" for row in status["deliveries"])
        return f"delivered {delivered} of {len(status['deliveries'])} instances"
    if status["jobs"]:
        job = status["jobs"][0]
        share = f" {10 * int(10 * job['progress'])} %" if job.get("progress") else ""
        return f"job {job['state']}: {job['stage'] or 'not begun'} {job['activity']}".rstrip() + share
    return "series: " + (", ".join(f"{row['state']} ({row['instances']})" for row in status["series"]) or "none")


def _must_succeed(status: dict[str, Any], *, abandoned: bool) -> None:
    for row in status["series"]:
        if row["state"] == "refused" or (abandoned and row["state"] == "unpaired"):
            raise DemoError(f"series {row['series_instance_uid']}: {row['state']}: {row['reason']}")
    for row in status["jobs"]:
        if row["state"] in ("rejected", "failed", "cancelled", "held"):
            raise DemoError(f"job {row['id']}: {row['state']}: {row['reason']}")
    for row in status["deliveries"]:
        if row["state"] == "failed":
            raise DemoError(f"delivery of {row['sop_instance_uid']}: failed: {row['reason']}")


def _all(rows: list[dict[str, Any]], state: str) -> bool:
    return all(row["state"] == state for row in rows)
