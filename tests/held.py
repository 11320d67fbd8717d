"""A node's folder with images in it, as if a scanner had sent them: index, archive and scheduler without a network."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
import yaml
from pydicom import Dataset

from dicomnode import config as configuration
from dicomnode import rules, volumes
from dicomnode.archive import Archive
from dicomnode.index import Index
from dicomnode.model import JobState
from dicomnode.scheduler import Scheduler

# The command line may be asked for local time.
os.environ.setdefault("TZ", "UTC")
time.tzset()


class Held:
    """One node's data.

    Parameters
    ----------
    folder
        Empty; gets node.yaml and the data folder.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "node.yaml"
        self.config.write_text(yaml.safe_dump({"node": {"data_dir": "data", "quiet_period_s": 0.001}}))
        self.archive = Archive(folder / "data")
        self.url = f"sqlite:///{folder / 'data' / 'node.db'}"
        self.index = Index(self.url)
        self.index.migrate()
        self.queued: list[tuple[str, datetime]] = []

    def put_rules(self, text: str) -> int:
        """Import rules; their version."""
        found = rules.parse(text, "rules")
        return self.index.import_rule_set(
            found.text, found.sha256, written=found.written, source="import", now=datetime.now(UTC)
        )

    def receive(self, datasets: Sequence[Dataset]) -> None:
        """Store and index instances of one association."""
        now = datetime.now(UTC)
        association = self.index.open_association(calling_ae_title="CT1", called_ae_title="NODE", address="x", now=now)
        for dataset in datasets:
            stored = self.archive.keep_dataset(dataset)
            self.index.add_instance(stored, volumes.instance_header(dataset), association_id=association, now=now)
        self.index.close_association(association, now=now)

    def scheduler(self) -> Scheduler:
        """A scheduler whose jobs are noted in `queued`."""
        return Scheduler(self.index, self.archive, quiet_period_s=0.001, enqueue=self.enqueue)

    def enqueue(self, _connection: sa.Connection, job_id: str, due: datetime) -> None:
        """Note a job."""
        self.queued.append((job_id, due))

    def run(self, job_id: str) -> str:
        """Take a job through every step in this process, as a worker does; its state after that."""
        from dicomnode.steps import Steps
        from dicomnode.workflow import outcome_of

        steps = Steps(configuration.load(self.config), self.index, self.archive)
        for step in steps.in_order().values():
            outcome = outcome_of(step)(job_id)
            if outcome:
                self.index.finish_job(job_id, JobState(outcome["state"]), outcome["reason"], now=datetime.now(UTC))
                break
        return str(self.index.job(job_id).state)

    def tick(self) -> None:
        """Let a fresh scheduler do all that is due."""
        time.sleep(0.01)
        self.scheduler().tick(datetime.now(UTC))
