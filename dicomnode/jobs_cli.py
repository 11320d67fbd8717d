"""What the commands about jobs and their deliveries do; their options stand in `jobs_parser`."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime

from dicomnode import config as configuration
from dicomnode.account import account
from dicomnode.archive import Archive
from dicomnode.errors import ConfigError
from dicomnode.index import Index, Which, open_index
from dicomnode.model import Job, JobState


def provenance(arguments: argparse.Namespace) -> int:
    """Print how a job came to its results, as JSON."""
    with _job(arguments) as (_, index, job):
        print(json.dumps({"job": asdict(job), "made": index.provenance(job.id)}, indent=2))
    return 0


def reproduce(arguments: argparse.Namespace) -> int:
    """Come to a job's results again; exit status 1 where they are not the same."""
    from dicomnode.reproduce import reproduce as again

    with _job(arguments) as (config, index, job):
        device = config.worker.device if arguments.device is None else arguments.device
        if not re.fullmatch(configuration.DEVICE, device):
            raise ConfigError("reproduce", "--device", device, configuration.DEVICES)
        found = again(index, Archive(config.data_dir), job.id, arguments.out, device=device)
    for line in found.lines:
        print(line)
    same = found.uids and found.values
    print(f"{arguments.out}: {'the same results' if same else 'other results'}; nothing was sent")
    return 0 if same else 1


def export(arguments: argparse.Namespace) -> int:
    """Write what a job has made to a folder: the very instances that are, or would be, sent."""
    with _job(arguments) as (config, index, job):
        products, archive = index.products_of(job.id), Archive(config.data_dir)
        if not products:
            raise ConfigError("export", "JOB", job.id, f"a job with results; this one is {job.state}")
        try:
            arguments.out.mkdir(parents=True)
        except OSError as error:
            expected = f"a folder that is not there yet and can be made ({error.strerror})"
            raise ConfigError("export", "--out", str(arguments.out), expected) from None
        count: Counter[str] = Counter()
        for product in products:
            count[product.kind] += 1
            target = arguments.out / f"{product.kind}-{count[product.kind]:04}.dcm"
            shutil.copyfile(archive.path(product.instance), target)
    told = ", ".join(f"{number} {kind}" for kind, number in count.items())
    print(f"{arguments.out}: {told}; the job is {job.state}{job.reason and ': '}{job.reason}")
    return 0


def rerun(arguments: argparse.Namespace) -> int:
    """Register a job's pairs again, as a new job."""
    from dicomnode import rules
    from dicomnode.workflow import JobQueue

    with _job(arguments) as (_, index, job):
        version = index.newest_rule_version() if arguments.current_rules else job.rule_version
        found = rules.parse(index.rule_set_text(version), f"rule set {version}")
        if job.rule_id not in {each.id for each in found.rules}:
            raise ConfigError("rerun", "JOB", job.id, f"a rule {job.rule_id} in version {version} of the rules")
        queue, now = JobQueue(index.engine), datetime.now(UTC)
        try:
            new_id = index.rerun_job(
                job.id,
                rule_version=version,
                plan=found.rule(job.rule_id).plan(now),
                reason="superseded: a person had it made again",
                enqueue=queue.enqueue,
                now=now,
            )
        finally:
            queue.close()
    print(f"job {new_id} makes it again, by version {version} of rule {job.rule_id}")
    return 0


def reject(arguments: argparse.Namespace) -> int:
    """Send nothing of a job any more; what has arrived is withdrawn by a rejection note."""
    from dicomnode.handover import HandOver

    with _job(arguments) as (config, index, job):
        over = HandOver(config, index, Archive(config.data_dir))
        noted = over.reject(job, by=account(), why=arguments.reason, now=datetime.now(UTC))
    told = f"; a rejection note goes to {', '.join(noted)}" if noted else ""
    print(f"job {job.id} is rejected: nothing of it is sent{told}")
    return 0


def resend(arguments: argparse.Namespace) -> int:
    """Put deliveries on their way again; exit status 1 where there are none."""
    with _deliveries(arguments, sop_instance_uid=arguments.instance) as (index, which):
        count = index.resend_deliveries(which, now=datetime.now(UTC), delivered=arguments.delivered)
    print(f"{count} deliveries are due again")
    return 0 if count else 1


def hold(arguments: argparse.Namespace) -> int:
    """Hold a job's deliveries, or a destination."""
    with _deliveries(arguments) as (index, which):
        now = datetime.now(UTC)
        if which.job_id is None:
            index.hold_destination(arguments.destination, arguments.reason, now=now)
            print(f"{arguments.destination} gets nothing until it is released")
            return 0
        count = index.hold_deliveries(which, arguments.reason, now=now)
    print(f"{count} deliveries are held")
    return 0 if count else 1


def release(arguments: argparse.Namespace) -> int:
    """Release them; exit status 1 where nothing was held."""
    with _deliveries(arguments) as (index, which):
        if which.job_id is None:
            was_held = index.release_destination(arguments.destination)
            print(f"{arguments.destination} {'is released' if was_held else 'was not held'}")
            return 0 if was_held else 1
        job = index.job(which.job_id)
        if job.state is JobState.APPROVAL:
            return _approve(arguments, index, job)
        count = index.release_deliveries(which, now=datetime.now(UTC))
    print(f"{count} deliveries are released")
    return 0 if count else 1


def _approve(arguments: argparse.Namespace, index: Index, job: Job) -> int:
    """Release a job that awaits approval, as a whole."""
    from dicomnode.handover import HandOver

    if arguments.destination is not None:
        raise ConfigError("release", "--destination", arguments.destination, "none: a job is approved as a whole")
    config = configuration.load(arguments.config)
    HandOver(config, index, Archive(config.data_dir)).approve(job, by=account(), now=datetime.now(UTC))
    print(f"job {job.id} is approved: its results are on their way")
    return 0


@contextmanager
def _job(arguments: argparse.Namespace) -> Iterator[tuple[configuration.Config, Index, Job]]:
    """The configuration, the node's index and the job that the command is about.

    Raises
    ------
    ConfigError
        No job, or more than one, has an id that begins like this.
    """
    config = configuration.load(arguments.config)
    index = open_index(config.database_url)
    try:
        yield config, index, index.job(_job_id(index, arguments.job))
    finally:
        index.close()


def _job_id(index: Index, beginning: str) -> str:
    ids = index.jobs_like(beginning) if beginning else []  # a script's empty variable means no job
    if len(ids) != 1:
        expected = "the id of one job, or its beginning" + (f"; {len(ids)} begin so" if ids else "")
        raise ConfigError("dicomnode", "JOB", beginning, expected)
    return ids[0]


@contextmanager
def _deliveries(arguments: argparse.Namespace, **more: str | None) -> Iterator[tuple[Index, Which]]:
    """The node's index, and which deliveries the command is about.

    Raises
    ------
    ConfigError
        Nothing says which, or there is no such job or destination.
    """
    config = configuration.load(arguments.config)
    known = [each.name for each in (*config.destinations, *config.peer_destinations)]
    if arguments.job is None and arguments.destination is None and not any(more.values()):
        raise ConfigError("dicomnode", "JOB", None, "a job, or --destination")
    if arguments.destination not in (None, *known):
        expected = f"a destination of the configuration ({', '.join(known) or 'none'})"
        raise ConfigError("dicomnode", "--destination", arguments.destination, expected)
    index = open_index(config.database_url)
    try:
        job_id = None if arguments.job is None else _job_id(index, arguments.job)
        yield index, Which(job_id=job_id, destination=arguments.destination, **more)
    finally:
        index.close()
