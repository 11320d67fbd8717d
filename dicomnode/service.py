"""The node as one supervised process: listener, scheduler and delivery here, registration in a child process.

Law: this process never imports torch; whatever dies is started again with a growing pause; SIGTERM lets every
part finish what it has in hand.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from dicomnode import rules, volumes, workflow
from dicomnode.archive import Archive
from dicomnode.config import Config
from dicomnode.delivery import DeliveryService
from dicomnode.errors import LocalError
from dicomnode.index import Index
from dicomnode.listener import Listener
from dicomnode.retrieve import PriorService
from dicomnode.scheduler import Scheduler

log = logging.getLogger(__name__)

TICK_S = 0.5
STABLE_AFTER_S = 60.0
LONGEST_PAUSE_S = 30.0


def serve(config: Config, config_path: Path | None, stop: threading.Event) -> None:
    """Run the node until `stop` is set, then stop every part cleanly.

    Raises
    ------
    ConfigError
        The rules cannot be used.
    LocalError
        The data folder, the database or the port cannot be had.
    """
    for warning in config.warnings():
        log.warning(warning)
    archive = Archive(config.data_dir)
    archive.sweep()
    index = Index(config.database_url)
    index.migrate()
    workflow.migrate(config.database_url)
    now = datetime.now(UTC)
    index.close_all_associations(now=now)
    if config.rules_path is not None:
        file = rules.load(config.rules_path)
        index.rule_set_version(file.text, file.sha256, written=file.written, now=now)
    queue = workflow.JobQueue(index.engine)
    scheduler = Scheduler(
        index,
        archive,
        quiet_period_s=config.node.quiet_period_s,
        incomplete_wait_s=config.node.incomplete_wait_s,
        late_instances=config.node.late_instances,
        sources=config.sources,
        enqueue=queue.enqueue,
    )
    worker = WorkerProcess(config_path)
    delivery = DeliveryService(config.destinations, index, archive, ae_title=config.node.ae_title)
    listener = Listener(
        config.node.ae_title,
        config.node.host,
        config.node.port,
        archive,
        index,
        volumes.instance_header,
        known_peers=[(peer.ae_title, peer.host) for peer in config.peers] if config.access.mode == "known" else None,
        max_associations=config.limits.max_associations,
        max_pdu=config.limits.max_pdu,
        network_timeout_s=config.limits.network_timeout_s,
    )
    priors = PriorService(config.sources, index, archive, ae_title=config.node.ae_title)
    try:
        priors.start()
        worker.start()
        delivery.start()
        listener.start()
        while not stop.wait(TICK_S):
            worker.look_after()
            try:
                scheduler.tick(datetime.now(UTC))
            except LocalError as error:
                log.error("scheduler: trying again after: %s", error)
    finally:
        log.info("stopping")
        worker.ask_to_stop()
        priors.stop()
        listener.stop()
        delivery.stop()
        worker.wait()
        queue.close()
        index.close()
        log.info("stopped")


class WorkerProcess:
    """The child process that registers; restarted when it dies, with a pause that grows while it keeps dying.

    Its standard input is a pipe that nothing is written to: it closes when this process dies, however it dies,
    and the worker stops.
    """

    def __init__(self, config_path: Path | None) -> None:
        at = [] if config_path is None else ["--config", str(config_path)]
        self._command = [sys.executable, "-m", "dicomnode", "worker", "--supervised", *at]
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
            log.error("worker died with status %s; starting it again in %.0f s", status, self._pause_s)
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
