"""Earlier examinations from PACS sources: found by C-FIND and fetched by C-MOVE or C-GET, or by QIDO-RS and WADO-RS.

Law: only what the index was asked to fetch is fetched, only what is not here, never more than is allowed; every
request is noted before it is sent, so that what comes of it is known for what it is; whose it is is checked again.
What comes goes by the path of every door: stored first, read later, by the indexer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from dicomnode import spool
from dicomnode.errors import NodeError, RefusedError, RemoteError, stack
from dicomnode.index import Index, PriorFetch
from dicomnode.intake import DuplicateError, Intake
from dicomnode.model import RetrievedBy
from dicomnode.pacs_sources import Client, RemoteSeries, Store, client_of
from dicomnode.remotes import Source

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 900.0
_POLL_S = 1.0
_INDEXED_WITHIN_S = 20.0


class PriorService:
    """Tries every request that is due, one at a time, until stopped.

    Parameters
    ----------
    sources, index, intake
        Whom to ask, where requests stand, where images go.
    ae_title
        Ours; C-MOVE sends to it, so the source must know it with our host and port.
    """

    def __init__(self, sources: Sequence[Source], index: Index, intake: Intake, *, ae_title: str) -> None:
        self._sources = {source.name: source for source in sources}
        self._index = index
        self._intake = intake
        self._ae_title = ae_title
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="priors", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Let the request in hand end; what is left is taken up at the next start."""
        self._stopping.set()
        self._thread.join()

    def fetch_due(self, now: datetime) -> int:
        """Try every request that is due; how many."""
        due = self._index.due_fetches(now=now)
        for fetch in due:
            if self._stopping.is_set():
                break
            self._try(fetch, now)
        return len(due)

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_S):
            try:
                self.fetch_due(datetime.now(UTC))
            except Exception as error:  # never die silently: the rules wait for this thread
                log.error("priors: %s\n%s", type(error).__name__, stack(error))

    def _try(self, fetch: PriorFetch, now: datetime) -> None:
        source = self._sources.get(fetch.source)
        if source is None:
            self._index.end_fetch(fetch.id, "failed", "the source is not configured any more", next_attempt_at=now)
            return
        begins = now if source.hours is None or fetch.request.get("urgent") else source.hours(now.astimezone())
        if begins > now:
            self._index.end_fetch(fetch.id, "waiting", f"waits for the hours of {source.name}", next_attempt_at=begins)
            return
        try:
            with self._storing(source) as store:
                reason = self._fetch(fetch, client_of(source, self._ae_title, store))
            self._intake.flush()  # done means that the index knows all of it, and that no more comes
            self._index.end_fetch(fetch.id, "done", reason, next_attempt_at=now)
            log.info("priors for study %s from %s: %s", fetch.study_instance_uid, source.name, reason)
        except NodeError as error:
            self._failed(fetch, str(error), retry=error.retry)
        except Exception as error:  # a stranger's answer: an attempt like any other, or it would be tried for ever
            log.error("priors from %s: %s\n%s", source.name, type(error).__name__, stack(error))
            self._failed(fetch, f"{source.name}: its answer cannot be used: {type(error).__name__}", retry=True)

    def _failed(self, fetch: PriorFetch, reason: str, *, retry: bool) -> None:
        final = not retry or fetch.attempts + 1 >= MAX_ATTEMPTS
        pause = timedelta(seconds=min(FIRST_PAUSE_S * 2**fetch.attempts, LONGEST_PAUSE_S))
        log.warning("priors for study %s: %s", fetch.study_instance_uid, reason)
        self._index.end_fetch(
            fetch.id, "failed" if final else "waiting", reason, next_attempt_at=datetime.now(UTC) + pause
        )

    def _fetch(self, fetch: PriorFetch, client: Client) -> str:
        """Find and fetch; what came of it."""
        source, attempts = client.source, fetch.attempts + 1
        self._index.begin_fetch(fetch.id, source.ae_title, [], attempts=attempts)
        found = client.find(fetch)
        held = self._index.held_instances([each.series_instance_uid for each in found])
        missing = [
            each
            for each in found
            if each.instances == 0 or held.get(each.series_instance_uid, ("", 0))[1] < each.instances
        ]
        wanted, room = [], source.max_instances
        for each in missing:
            if each.instances <= room:
                wanted.append(each)
                room -= each.instances
        asked = [each.series_instance_uid for each in wanted]
        self._index.begin_fetch(fetch.id, source.ae_title, asked, attempts=attempts)
        for each in wanted:
            if self._stopping.is_set():
                raise RemoteError(f"{source.name}: the node stops; the rest comes after its start")
            client.fetch(each)
        self._check(fetch, wanted)
        left = len(missing) - len(wanted)
        beyond = f", {left} left: more than max_instances" if left else ""
        return f"{len(found)} series found, {len(wanted)} fetched, {len(found) - len(missing)} were here{beyond}"

    def _check(self, fetch: PriorFetch, wanted: Sequence[RemoteSeries]) -> None:
        """Everything asked for came, and of whom it was asked for. What was received is indexed a little later."""
        uids = [each.series_instance_uid for each in wanted]
        expected, here, until = sum(each.instances for each in wanted), -1, 0.0
        while True:
            held = self._index.held_instances(uids)
            former, here = here, sum(count for _, count in held.values())
            if here > former:
                until = time.monotonic() + _INDEXED_WITHIN_S
            if here >= expected or time.monotonic() > until or self._stopping.wait(0.2):
                break
        for each in wanted:
            person, count = held.get(each.series_instance_uid, (fetch.patient, 0))
            if person != fetch.patient:
                raise RefusedError(f"series {each.series_instance_uid} is of another person than was asked for")
            if count < max(each.instances, 1):
                raise RemoteError(f"series {each.series_instance_uid}: {count} of {each.instances} instances came")

    @contextmanager
    def _storing(self, source: Source) -> Iterator[Store]:
        """What keeps the instances of one attempt that come on our own association; success only once they are safe."""
        sender = spool.Source.new(source.ae_title, self._ae_title, source.host)
        opened_at, stored = self._intake.clock(), 0

        def store(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, data: bytes) -> None:
            nonlocal stored
            reception = self._intake.begin(
                sop_class_uid=sop_class_uid,
                sop_instance_uid=sop_instance_uid,
                transfer_syntax_uid=transfer_syntax_uid,
            )
            try:
                reception.write(data)
                self._intake.keep(reception, sender, opened_at, retrieved_by=RetrievedBy.NODE)
                stored += 1
            except DuplicateError as error:  # the policy is to keep the first, and the first is here
                log.warning("from %s: %s", source.name, error)
            finally:
                reception.discard()

        outcome = "broken off"
        try:
            yield store
            outcome = "fetched"
        finally:
            self._intake.ended(sender, opened_at, outcome=outcome, stored=stored, refused=0)
