"""What the commands about jobs do: `provenance`, `reproduce`; their options stand in `jobs_parser`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from dicomnode import config as configuration
from dicomnode.archive import Archive
from dicomnode.errors import ConfigError
from dicomnode.index import Index, open_index
from dicomnode.model import Job


def provenance(arguments: argparse.Namespace) -> int:
    """Print how a job came to its results, as JSON."""
    with _job(arguments) as (_, index, job):
        print(json.dumps({"job": asdict(job), "made": index.provenance(job.id)}, indent=2))
    return 0


def reproduce(arguments: argparse.Namespace) -> int:
    """Come to a job's results again; exit status 1 where they are not the same."""
    from dicomnode.reproduce import reproduce as again

    with _job(arguments) as (config, index, job):
        device = arguments.device or config.worker.device
        found = again(index, Archive(config.data_dir), job.id, arguments.out, device=device)
    for line in found.lines:
        print(line)
    same = found.uids and found.values
    print(f"{arguments.out}: {'the same results' if same else 'other results'}; nothing was sent")
    return 0 if same else 1


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
        ids = index.jobs_like(arguments.job)
        if len(ids) != 1:
            expected = "the id of one job, or its beginning" + (f"; {len(ids)} begin so" if ids else "")
            raise ConfigError("dicomnode", "JOB", arguments.job, expected)
        yield config, index, index.job(ids[0])
    finally:
        index.close()
