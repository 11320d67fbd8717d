"""The node as one supervised process: listener, scheduler and delivery here; indexing and registration in child
processes.

Law: this process never imports torch; whatever dies is started again with a growing pause; SIGTERM lets every
part finish what it has in hand.
"""

from __future__ import annotations

import fcntl
import logging
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dicomnode import rules, workflow
from dicomnode.archive import Archive
from dicomnode.commitment import CommitmentSCP
from dicomnode.config import Config, TlsSection
from dicomnode.counts import SeriesCounts
from dicomnode.delivery import DeliveryService
from dicomnode.errors import LocalError, stack
from dicomnode.index import Index
from dicomnode.intake import Intake, IntakeLimits
from dicomnode.listener import Listener, addresses_of
from dicomnode.model import DuplicatePolicy
from dicomnode.negotiation import Access, Peer, comes_from
from dicomnode.retrieve import PriorService
from dicomnode.scheduler import Scheduler
from dicomnode.tls import server_context
from dicomnode.web import WebServer, application

log = logging.getLogger(__name__)

TICK_S = 0.5
FAULT_PAUSE_S = 30.0
STABLE_AFTER_S = 60.0
LONGEST_PAUSE_S = 30.0


def serve(config: Config, config_path: Path | None, stop: threading.Event) -> None:
    """Run the node until `stop` is set, then stop every part cleanly.

    Raises
    ------
    ConfigError
        The rules cannot be used.
    LocalError
        The data folder, which another node may hold, the database or the port cannot be had.
    """
    for warning in config.warnings():
        log.warning(warning)
    archive = Archive(config.data_dir)
    with _alone(archive.root):
        _serve(config, config_path, archive, stop)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the data folder: two nodes on one would register and send everything twice."""
    path = folder / "node.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LocalError(f"{path}: another live node holds it, expected one node on a data folder") from error
        yield


def _serve(config: Config, config_path: Path | None, archive: Archive, stop: threading.Event) -> None:
    index = Index(config.database_url)
    index.migrate()
    workflow.migrate(config.database_url)
    now = datetime.now(UTC)
    index.close_all_associations(now=now)
    if config.rules_path is not None:
        file = rules.load(config.rules_path)
        index.rule_set_version(file.text, file.sha256, written=file.written, now=now)
    queue = workflow.JobQueue(index.engine)
    counts = SeriesCounts(config.sources, ae_title=config.node.ae_title)
    scheduler = Scheduler(
        index,
        archive,
        quiet_period_s=config.node.quiet_period_s,
        incomplete_wait_s=config.node.incomplete_wait_s,
        late_instances=config.node.late_instances,
        sources=config.sources,
        counts=counts.promises,
        enqueue=queue.enqueue,
    )
    children = [ChildProcess("indexer", config_path), ChildProcess("worker", config_path)]
    delivery = DeliveryService(
        (*config.destinations, *config.peer_destinations), index, archive, ae_title=config.node.ae_title
    )
    intake = intake_of(config, archive, index)
    peers = tuple(
        Peer(peer.ae_title, () if peer.host is None else (peer.host,), peer.max_associations, peer.port)
        for peer in config.peers
    )
    on_report = delivery.commitment.reported
    commitment = CommitmentSCP(config.node.ae_title, peers, index, intake, on_report=on_report)
    doors: list[Listener | WebServer] = [
        *_listeners(config, peers, intake, commitment),
        *_web_servers(config, peers, intake),
    ]
    priors = PriorService(config.sources, index, intake, ae_title=config.node.ae_title)
    try:
        intake.start()
        for child in children:
            child.start()
        priors.start()
        delivery.start()
        commitment.start()
        for door in doors:
            door.start()
        index.restart_quiet_periods(now=datetime.now(UTC))
        while not stop.wait(TICK_S):
            for child in children:
                child.look_after()
            try:
                scheduler.tick(datetime.now(UTC))
            except LocalError as error:
                log.error("scheduler: trying again after: %s", error)
            except Exception as error:  # a fault of ours must not end what receives and delivers
                log.error("scheduler: trying again after %s\n%s", type(error).__name__, stack(error))
                stop.wait(FAULT_PAUSE_S)
    finally:
        log.info("stopping")
        for child in children:
            child.ask_to_stop()
        for door in doors:
            door.stop()
        priors.stop()
        counts.stop()
        commitment.stop()
        intake.stop()
        delivery.stop()
        for child in children:
            child.wait()
        queue.close()
        index.close()
        log.info("stopped")


def intake_of(config: Config, archive: Archive, index: Index) -> Intake:
    """The archive path as it is configured."""
    limits = IntakeLimits(
        max_instance_bytes=config.limits.max_instance_mb << 20,
        refuse_below_bytes=config.limits.refuse_below_free_mb << 20,
        reject_below_bytes=config.limits.reject_below_free_mb << 20,
    )
    return Intake(archive, index, duplicates=DuplicatePolicy(config.node.duplicates), limits=limits)


def _listeners(config: Config, peers: tuple[Peer, ...], intake: Intake, commitment: CommitmentSCP) -> list[Listener]:
    access = Access(
        peers=peers if config.access.mode == "known" else None,
        called_ae_title=config.node.ae_title if config.access.require_called_ae_title else None,
        max_associations=config.limits.max_associations,
    )

    def listener(port: int, tls: ssl.SSLContext | None) -> Listener:
        return Listener(
            config.node.host,
            port,
            intake,
            access=access,
            commitment=commitment,
            tls=tls,
            unknown_sop_classes=config.access.unknown_sop_classes,
            max_pdu=config.limits.max_pdu,
            network_timeout_s=config.limits.network_timeout_s,
            artim_timeout_s=config.limits.artim_timeout_s,
        )

    if config.tls is None:
        return [listener(config.node.port, None)]
    context = _tls_context(config.tls)
    if config.tls.port is None:
        return [listener(config.node.port, context)]
    return [listener(config.node.port, None), listener(config.tls.port, context)]


def _web_servers(config: Config, peers: tuple[Peer, ...], intake: Intake) -> list[WebServer]:
    if config.web is None:
        return []
    hosts = tuple(peer.hosts for peer in peers) if config.access.mode == "known" else ((),)

    def is_admitted(address: str) -> bool:
        return any(comes_from(address, each, addresses_of) for each in hosts)

    app = application(
        intake,
        called_ae_title=config.node.ae_title,
        is_admitted=is_admitted,
        silence_s=config.limits.network_timeout_s,
    )
    tls = None if config.tls is None else _tls_context(config.tls)
    most = config.limits.max_associations
    head_s = config.limits.artim_timeout_s
    address = config.web.host, config.web.port
    return [WebServer(app, *address, max_connections=most, head_timeout_s=head_s, tls=tls)]


def _tls_context(tls: TlsSection) -> ssl.SSLContext:
    return server_context(tls.certificate, tls.key, tls.client_ca)


class ChildProcess:
    """A child process, `dicomnode COMMAND --supervised`; restarted when it dies, with a pause that grows.

    Its standard input is a pipe that nothing is written to: it closes when this process dies, however it dies,
    and the worker stops.
    """

    def __init__(self, command: str, config_path: Path | None) -> None:
        at = [] if config_path is None else ["--config", str(config_path)]
        self._name = command
        self._command = [sys.executable, "-m", "dicomnode", command, "--supervised", *at]
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._pause_s = 1.0
        self._restart_at = 0.0

    def start(self) -> None:
        """Start the child."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE)  # noqa: S603 - our own module
        self._started_at = time.monotonic()

    def look_after(self) -> None:
        """Start the child again if it has died and its pause is over."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            status = self._process.returncode
            self._pause_s = 1.0 if now - self._started_at > STABLE_AFTER_S else min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._restart_at = now + self._pause_s
            self._process = None
            log.error("%s died with status %s; starting it again in %.0f s", self._name, status, self._pause_s)
        if self._process is None and now >= self._restart_at:
            self.start()

    def ask_to_stop(self) -> None:
        """Ask the child to finish the step in hand and end."""
        if self._process is not None:
            self._process.terminate()

    def wait(self) -> None:
        """Wait for the child to end; a registration in hand may take its minutes."""
        if self._process is not None:
            self._process.wait()
