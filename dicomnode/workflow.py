"""The only room that speaks the durable engine (DBOS): one queue, one workflow, one step per arrow of the line.

Law: arguments and results are ids and plain JSON; a step can run twice; attempts are counted in our own job row,
so that a clean stop is no attempt and a job that kills its worker ends after MAX_ATTEMPTS. Two processes must never
share an executor id: the worker holds a file lock on it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, WorkflowSerializationFormat

from dicomnode.errors import LocalError, NodeError, RegistrationRejectedError, stack
from dicomnode.index import Index, create_engine
from dicomnode.model import JobState

log = logging.getLogger(__name__)

QUEUE = "registration"
WORKFLOW = "register_pair"
MAX_ATTEMPTS = 3

# The default is a hash of the workflow's code: an upgrade would strand every waiting job. Raise it only together
# with a plan for the jobs that still wait under the former number.
APPLICATION_VERSION = "1"
APPLICATION = "dicomnode"

_PRIORITY_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
"""A priority is the second a job is due, counted from here: 31 bits last until 2088."""

T = TypeVar("T")
Step = Callable[[str], None]
"""Does one arrow of the line for the job with that id; safe to run again."""


def migrate(url: str) -> None:
    """Make or bring forward the durable engine's own tables and the queue."""
    DBOS.migrate(url)
    client = _client(create_engine(url))
    try:
        client.register_queue(QUEUE, worker_concurrency=1, polling_interval_sec=0.5)
    finally:
        client.destroy()


class JobQueue:
    """Puts jobs on the queue in the caller's transaction; never runs one.

    Parameters
    ----------
    engine
        Of the database that holds the index and the durable engine's tables.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._client = _client(engine)

    def enqueue(self, connection: sa.Connection, job_id: str, due: datetime) -> None:
        """Enqueue once: the same id again changes nothing. The job that is due first begins first."""
        self._client.enqueue_in_transaction(
            connection,
            {
                "workflow_name": WORKFLOW,
                "queue_name": QUEUE,
                "workflow_id": job_id,
                "priority": max(1, int((due - _PRIORITY_EPOCH).total_seconds())),
                "app_version": APPLICATION_VERSION,
                "serialization_type": WorkflowSerializationFormat.PORTABLE,
            },
            job_id,
        )

    def close(self) -> None:
        """Give the client's resources back."""
        self._client.destroy()


class Worker:
    """Claims jobs one at a time and takes each through the steps; resumes what a crash left.

    Parameters
    ----------
    index
        Where jobs stand.
    steps
        Name and function of every arrow, in order; the name is the job's stage.
    executor_id
        Stable over restarts: what this id had in hand when it died is resumed at `start`.
    lock_folder
        Where the file lock on the executor id is held.

    Raises
    ------
    LocalError
        At `start`: another live process holds this executor id.
    """

    def __init__(self, index: Index, steps: dict[str, Step], *, executor_id: str, lock_folder: Path) -> None:
        self._index = index
        self._steps = steps
        self._executor_id = executor_id
        self._lock_path = lock_folder / f"{executor_id}.lock"
        self._between_steps = threading.Lock()
        self._stopping = threading.Event()
        self._in_hand: str | None = None

    def start(self) -> None:
        """Claim the executor id, resume what it had in hand, then take jobs from the queue."""
        self._lock = self._lock_path.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LocalError(f"worker {self._executor_id}: another live process holds {self._lock_path}") from error
        DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": self._index.url,
                "system_database_engine": create_engine(self._index.url),
                "serializer": DBOSPortableJSONSerializer(),
                "application_version": APPLICATION_VERSION,
                "executor_id": self._executor_id,
                "run_migrations": False,
                "log_level": "WARNING",
            }
        )

        # A recovery is no reason to give up: MAX_ATTEMPTS counts crashes in our own row, clean stops excluded.
        @DBOS.workflow(
            name=WORKFLOW,
            max_recovery_attempts=1_000_000,
            serialization_type=WorkflowSerializationFormat.PORTABLE,
        )
        def register_pair(job_id: str) -> None:
            self._register_pair(job_id)

        self._durable = {
            name: DBOS.step(
                name=name, retries_allowed=True, max_attempts=5, interval_seconds=1.0, should_retry=_is_local
            )(outcome_of(step))
            for name, step in self._steps.items()
        }
        DBOS.listen_queues([QUEUE])
        DBOS.launch()

    def stop(self) -> None:
        """Wait for the step in hand and its checkpoint, lay the job down, and let no further step begin."""
        self._stopping.set()
        self._between_steps.acquire()
        if self._in_hand is not None:
            job_id = self._in_hand
            _patiently(lambda: self._index.lay_down_job(job_id))

    def _register_pair(self, job_id: str) -> None:
        """The straight line of one job."""
        with self._step():
            if not self._take_up(job_id):
                return
        for name, step in self._durable.items():
            with self._step():
                outcome = self._run(name, step, job_id)
                if outcome:
                    self._close(job_id, JobState(outcome["state"]), outcome["reason"])
                    return
        with self._step():
            self._in_hand = None

    @contextmanager
    def _step(self) -> Iterator[None]:
        """One step and its checkpoint; none begins once the worker stops: its thread waits until the process ends."""
        if self._stopping.is_set():
            threading.Event().wait()
        with self._between_steps:
            yield

    def _close(self, job_id: str, state: JobState, reason: str) -> None:
        log.info("job %s %s: %s", job_id, state, reason)
        _patiently(lambda: self._index.finish_job(job_id, state, reason, now=_now()))
        self._in_hand = None

    def _take_up(self, job_id: str) -> bool:
        job = _patiently(lambda: self._index.job(job_id))
        if job.state not in (JobState.WAITING, JobState.RUNNING):
            return False
        attempts = _patiently(lambda: self._index.take_up_job(job_id, now=_now()))
        if attempts > MAX_ATTEMPTS:
            reason = f"given up: the worker died {MAX_ATTEMPTS} times with this job, the last time in stage {job.stage}"
            self._close(job_id, JobState.FAILED, reason)
            return False
        self._in_hand = job_id
        return True

    def _run(self, name: str, step: Callable[[str], dict[str, str]], job_id: str) -> dict[str, str]:
        _patiently(lambda: self._index.set_stage(job_id, name, now=_now()))
        try:
            return step(job_id)
        except Exception as error:  # the step's retries are used up
            log.error("job %s: step %s failed for good: %s\n%s", job_id, name, error, stack(error))
            return {"state": JobState.FAILED, "reason": f"{name}: {error}"}


def outcome_of(step: Step) -> Callable[[str], dict[str, str]]:
    """Turn a step's refusal into a plain value: an exception would come back from a checkpoint without its type."""

    def run(job_id: str) -> dict[str, str]:
        try:
            step(job_id)
        except LocalError:
            raise
        except NodeError as error:
            rejected = isinstance(error, RegistrationRejectedError)
            return {"state": JobState.REJECTED if rejected else JobState.FAILED, "reason": str(error)}
        except Exception as error:  # a bug: keep the trace, fail this job, go on with the next
            log.error("job %s: unexpected %s\n%s", job_id, type(error).__name__, stack(error))
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(where.filename)}:{where.lineno}"
            return {
                "state": JobState.FAILED,
                "reason": f"unexpected {type(error).__name__} at {place}: {error}",
            }
        return {}

    return run


def _patiently(action: Callable[[], T]) -> T:
    """Wait out database trouble: between steps nothing better can be done, and giving up would strand the job."""
    delay_s = 1.0
    while True:
        try:
            return action()
        except LocalError as error:
            log.warning("waiting for the database: %s", error)
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, 60.0)


def _is_local(error: BaseException) -> bool:
    return isinstance(error, LocalError)


def _client(engine: sa.Engine) -> DBOSClient:
    return DBOSClient(
        system_database_engine=engine, serializer=DBOSPortableJSONSerializer(), application_name=APPLICATION
    )


def _now() -> datetime:
    return datetime.now(UTC)
