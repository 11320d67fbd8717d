"""A thread for each destination that sends what is due, as long as the node runs.

Law: destinations are independent of each other: one that is down holds up nobody else. Nothing is sent outside a
destination's hours but what is urgent, and nothing while it is paused or held.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from dicomnode.archive import Archive
from dicomnode.delivery import encoding, policy, queries
from dicomnode.delivery.commitment import CommitmentSCU
from dicomnode.delivery.policy import Outcome
from dicomnode.delivery.sending import CStore, Sending, Transport
from dicomnode.delivery.stow import StowRs
from dicomnode.errors import LocalError, NodeError, stack
from dicomnode.index import Index
from dicomnode.model import Delivery, DeliveryPriority, DeliveryState
from dicomnode.remotes import Destination

log = logging.getLogger(__name__)

_POLL_S = 1.0
_BATCH = 1000
_CROWDED_FOR = timedelta(minutes=10)
"""So long one association is enough where a destination gave us no second: it may know only one at a time."""

_PAUSE_AFTER_TROUBLE = timedelta(minutes=5)
_ANNOUNCED_WITHIN = timedelta(days=1)
"""What arrived earlier is not announced any more: it is no news, and may be from before anybody was to be told."""


class DeliveryService:
    """Sends what is due.

    Parameters
    ----------
    ae_title
        Our calling AE title.

    Attributes
    ----------
    commitment
        Takes storage commitment reports from the listener, too.
    """

    def __init__(
        self,
        destinations: Sequence[Destination],
        index: Index,
        archive: Archive,
        *,
        ae_title: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._index = index
        self._archive = archive
        self._ae_title = ae_title
        self._clock = clock
        self.commitment = CommitmentSCU(list(destinations), index, ae_title=ae_title, clock=clock)
        self._stopping = threading.Event()
        self._crowded_until: dict[str, datetime] = {}
        self._announce_from: dict[str, datetime] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(each,), name=f"delivery-{each.name}", daemon=True)
            for each in destinations
            if not each.is_paused
        ]

    def start(self) -> None:
        """Begin to deliver."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish the instances in hand at each destination, then stop."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def deliver_due(self, destination: Destination) -> int:
        """Try, once, what is due at a destination; how many rows were tried.

        Raises
        ------
        LocalError
            The index cannot be read or written; what was not recorded will be sent again.
        """
        due = self._due(destination)
        if not due:
            return 0
        there = self._skip_present(destination, due) if destination.skip_present else []
        due = [each for each in due if each not in there]
        if not due:
            return len(there)
        contexts = encoding.contexts(each.instance for each in due)
        fitting = [each for each in due if destination.url or encoding.wanted(each.instance)[0] in contexts]

        def connect() -> Transport:
            if destination.url:
                return StowRs(destination, self._archive)
            return CStore(destination, self._archive, ae_title=self._ae_title, contexts=contexts)

        sending = Sending(destination, fitting, connect, self._index, clock=self._clock, stopping=self._stopping)
        now = self._clock()
        is_crowded = self._crowded_until.get(destination.name, now) > now
        sending.run(1 if is_crowded else destination.associations)
        if sending.is_crowded:
            self._crowded_until[destination.name] = now + _CROWDED_FOR
        return len(there) + sending.tried

    def announce(self, destination: Destination) -> int:
        """Tell whom it concerns of the jobs all of which has arrived; of how many. What fails is tried again."""
        now = self._clock()
        if destination.announce_to is None or self._announce_from.get(destination.name, now) > now:
            return 0
        jobs = self._index.unannounced(destination.name, since=now - _ANNOUNCED_WITHIN)
        try:
            for job_id in jobs:
                instances = self._index.arrived(job_id, destination.name)
                queries.announce(destination, queries.series_of(self._archive, instances), ae_title=self._ae_title)
                self._index.note_announced(job_id, destination.name, now=now)
        except NodeError as error:
            log.warning("%s", error)
            self._announce_from[destination.name] = now + _PAUSE_AFTER_TROUBLE
            return 0
        return len(jobs)

    def _skip_present(self, destination: Destination, due: list[Delivery]) -> list[Delivery]:
        """Those that the destination has; they count as delivered. None where it does not say."""
        try:
            series = queries.series_of(self._archive, [each.instance for each in due])
            present = queries.present(destination, series, ae_title=self._ae_title)
        except NodeError as error:  # what cannot be known is sent
            log.warning("%s", error)
            return []
        there = [each for each in due if each.instance.sop_instance_uid in present]
        result, now = Outcome(DeliveryState.DELIVERED, "was there already, by C-FIND"), self._clock()
        self._index.record_attempts([policy.attempt(destination, each, result, now=now) for each in there])
        return there

    def _due(self, destination: Destination) -> list[Delivery]:
        now = self._clock()
        is_open = destination.hours is None or destination.hours(now.astimezone()) <= now
        up_to = None if is_open else DeliveryPriority.URGENT
        return self._index.due_deliveries(destination.name, now=now, limit=_BATCH, up_to=up_to)

    def _run(self, destination: Destination) -> None:
        while not self._stopping.is_set():
            try:
                if self.deliver_due(destination) or self.commitment.ask(destination) or self.announce(destination):
                    continue
            except LocalError as error:
                log.error("delivery to %s: trying again after: %s", destination.name, error)
            except Exception as error:  # its text may quote a data set
                log.error("delivery to %s: %s\n%s", destination.name, type(error).__name__, stack(error))
            self._stopping.wait(_POLL_S)
