"""In which order the worker begins jobs: by when they are due, as the durable engine really claims them."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from held import Held
from phantoms import make_series

from dicomnode import rules, workflow
from dicomnode.model import Pair

WORKER = """
import os, sys, time
from pathlib import Path
from dicomnode.index import Index
from dicomnode.workflow import Worker
folder, count = Path(sys.argv[1]), int(sys.argv[2])
index, began = Index(f"sqlite:///{folder}/node.db"), folder / "began"
def note(job_id):
    with began.open("a") as file:
        print(job_id, file=file)
worker = Worker(index, {"note": note}, executor_id="one", lock_folder=folder)
worker.start()
while not began.exists() or len(began.read_text().split()) < count:
    time.sleep(0.05)
worker.stop()
os._exit(0)  # as the command does: a job between two steps waits for ever, and would keep the process
"""
NOW = datetime.now(UTC)


def made(priority: str, hours_ago: float) -> tuple[str, datetime]:
    """A job of that priority, and when it is due."""
    text = (
        f"version: 1\nrules: [{{id: r, priority: {priority}, "
        "roles: {fixed: {match: {Modality: CT}}, moving: {match: {Modality: MR}}}}]"
    )
    at = NOW - timedelta(hours=hours_ago)
    patience = rules.parse(text, "r").rule("r").plan(at).patience_s
    return f"{priority} made {hours_ago:g} h ago", at + timedelta(seconds=patience)


@pytest.mark.timeout(300)
def test_the_urgent_begin_first_and_none_is_overtaken_for_ever(tmp_path: Path) -> None:
    """One worker that comes up to a queue with everything on it, put there in a contrary order."""
    held = Held(tmp_path / "node")
    workflow.migrate(held.url)
    held.put_rules("version: 1\nrules: []")
    uids = []
    for name in ("a", "b"):
        series = make_series(shape=(2, 8, 8), study=name)
        held.receive(series)
        uids.append(str(series[0].SeriesInstanceUID))
    jobs = [
        made("off-peak", 0), made("normal", 0), made("urgent", 0), made("normal", 0.5), made("off-peak", 13),
        made("urgent", 0.25),
    ]  # fmt: skip
    queue = workflow.JobQueue(held.index.engine)
    names: dict[str, str] = {}
    for number, (name, due) in enumerate(jobs):
        (job_id,) = held.index.add_pairs(
            [Pair(f"rule-{number}", *uids)],
            {},
            rule_version=1,
            enqueue=lambda connection, job_id, _due, due=due: queue.enqueue(connection, job_id, due),
            now=NOW,
        )
        names[job_id] = name
    queue.close()

    subprocess.run([sys.executable, "-c", WORKER, held.archive.root, str(len(jobs))], check=True, timeout=240)

    began = (held.archive.root / "began").read_text().split()
    assert [names[job_id] for job_id in began] == [
        "off-peak made 13 h ago",  # it has waited long enough to come before what is urgent now
        "urgent made 0.25 h ago",
        "urgent made 0 h ago",
        "normal made 0.5 h ago",
        "normal made 0 h ago",
        "off-peak made 0 h ago",
    ]
