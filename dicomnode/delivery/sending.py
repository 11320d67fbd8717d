"""The due rows of one destination, each sent once, over as many associations as help.

Law: what was answered is recorded within a moment, several answers with one commit; a crash in between sends the very
same instance once more. A row that is refused, or that waits, holds up no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

from dicomnode.archive import Archive
from dicomnode.delivery import encoding, policy
from dicomnode.delivery.policy import Outcome
from dicomnode.errors import LocalError, NodeError, RemoteError, stack
from dicomnode.index import Attempt, Index
from dicomnode.model import Delivery, DeliveryPriority, DeliveryState
from dicomnode.remotes import Destination
from dicomnode.scu import Association

log = logging.getLogger(__name__)

_RECORD_EVERY_S = 0.05
_WORTH_ANOTHER = 8
"""Another association costs a connection and a negotiation: worth it from so many instances on."""
_C_STORE_PRIORITY = {DeliveryPriority.URGENT: 1, DeliveryPriority.NORMAL: 0, DeliveryPriority.OFF_PEAK: 2}


class Transport(Protocol):
    """One connection to a destination."""

    @property
    def is_open(self) -> bool:
        """Whether another instance can be sent on it."""

    def open(self) -> None:
        """Connect; RemoteError if the destination does not let us."""

    def send(self, delivery: Delivery) -> tuple[Outcome, int | None]:
        """Send one instance; what became of it, and the status if one came. Raises NodeError."""

    def release(self) -> None:
        """End it in good order."""

    def abort(self) -> None:
        """End it at once."""

    def cancel(self) -> None:
        """From another thread: end what it waits for."""


class CStore:
    """C-STORE on one association, with the contexts that `due` needs.

    One that accepts none of the contexts is good too: each instance then fails with its own reason.
    """

    def __init__(
        self,
        destination: Destination,
        archive: Archive,
        *,
        ae_title: str,
        contexts: Sequence[encoding.Pair],
    ) -> None:
        self._archive = archive
        self._contexts = contexts
        self._association = Association(destination, ae_title=ae_title, timeout_s=destination.timeout_s)
        self._name = destination.name
        self.release, self.abort, self.cancel = (
            self._association.release, self._association.abort, self._association.cancel,
        )  # fmt: skip

    @property
    def is_open(self) -> bool:
        """Whether another instance can be sent on it."""
        return self._association.is_open

    def open(self) -> None:
        """Connect and negotiate."""
        self._association.open([(sop_class, [syntax]) for sop_class, syntax in self._contexts])

    def send(self, delivery: Delivery) -> tuple[Outcome, int | None]:
        """Send one instance as it is, or in an encoding that was accepted."""
        instance, accepted = delivery.instance, self._association.accepted
        syntax = encoding.choose(instance, accepted)
        with encoding.encoded(self._archive.path(instance), instance, syntax) as (data_set, size):
            status = self._association.store(
                accepted[instance.sop_class_uid, syntax], instance, data_set, size,
                priority=_C_STORE_PRIORITY[DeliveryPriority(delivery.priority)],
            )  # fmt: skip
        result = policy.outcome(status)
        if result.state is not DeliveryState.DELIVERED and self._association.comment:
            result = Outcome(result.state, f"{result.meaning}: {self._association.comment}")
        return result, status


class Sending:
    """One try at each of `due`.

    Parameters
    ----------
    connect
        Makes a transport, not open yet.
    stopping
        Once set, the instances in hand are finished and no other is begun.

    Attributes
    ----------
    LONGEST_S
        After so long no other instance is begun: what has become due meanwhile may be more urgent, and what is left may
        have been held.
    tried
        How many rows were.
    is_crowded
        The destination did not give us another association beside the first.
    """

    LONGEST_S = 10.0

    def __init__(
        self,
        destination: Destination,
        due: Sequence[Delivery],
        connect: Callable[[], Transport],
        index: Index,
        *,
        clock: Callable[[], datetime],
        stopping: threading.Event,
    ) -> None:
        self._destination = destination
        self._due = deque(due)
        self._connect = connect
        self._clock = clock
        self._stopping = stopping
        self._recorder = _Recorder(index)
        self._until = 0.0
        self.tried = 0
        self.is_crowded = False

    def run(self, associations: int) -> None:
        """Send, over so many associations at most.

        If the first cannot be opened, every row waits, or has failed; if one is lost on the way, the row in hand
        waits, and what no other association takes stays due.

        Raises
        ------
        LocalError
            An answer could not be recorded; its instance will be sent again.
        """
        wanted = min(associations, -(-len(self._due) // _WORTH_ANOTHER))
        first, others = self._connect(), [self._connect() for _ in range(wanted - 1)]
        with self._recorder:
            try:
                first.open()
            except NodeError as error:
                while self._due:
                    self._record(self._due.popleft(), policy.outcome_of(error))
                return
            self._until = time.monotonic() + self.LONGEST_S
            threads = [threading.Thread(target=self._beside, args=(each,), daemon=True) for each in others]
            for thread in threads:
                thread.start()
            self._work(first)
            if not self._due or self._is_over() or time.monotonic() > self._until:
                for each in others:
                    if not each.is_open:  # it waits for an acceptor that is content with one association
                        each.cancel()
            for thread in threads:
                thread.join()

    def _beside(self, transport: Transport) -> None:
        try:
            transport.open()
        except NodeError as error:
            self.is_crowded = True
            log.info("%s: no other association beside the first: %s", self._destination.name, error)
            return
        self._work(transport)

    def _work(self, transport: Transport) -> None:
        try:
            while transport.is_open and not self._is_over():
                try:
                    delivery = self._due.popleft()
                except IndexError:
                    break
                self._record(delivery, *self._send(transport, delivery))
                if time.monotonic() > self._until:
                    break
        finally:
            transport.release()

    def _is_over(self) -> bool:
        return self._stopping.is_set() or self._recorder.has_failed

    def _send(self, transport: Transport, delivery: Delivery) -> tuple[Outcome, int | None]:
        try:
            return transport.send(delivery)
        except RemoteError as error:
            return policy.outcome_of(error), None
        except LocalError as error:
            return policy.outcome_of(error), None
        except Exception as error:
            # A file or data set that cannot be sent must not hold up those behind it, nor be tried for ever.
            uid = delivery.instance.sop_instance_uid
            log.error("%s cannot be sent: %s\n%s", uid, type(error).__name__, stack(error))
            transport.abort()
            return Outcome(DeliveryState.FAILED, f"cannot be sent: {type(error).__name__}"), None

    def _record(self, delivery: Delivery, result: Outcome, status: int | None = None) -> None:
        attempt = policy.attempt(self._destination, delivery, result, status, now=self._clock())
        self._recorder.add(attempt)
        self.tried += 1
        log.log(
            logging.INFO if attempt.state is DeliveryState.DELIVERED else logging.WARNING,
            "%s to %s: %s, status %s",
            delivery.instance.sop_instance_uid,
            delivery.destination,
            attempt.state,
            "none" if status is None else f"0x{status:04X}",
        )


class _Recorder:
    """Writes what became of attempts, several with one commit, from a thread of its own."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._attempts: list[Attempt] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._error: LocalError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def has_failed(self) -> bool:
        """What is sent from now on could not be recorded."""
        return self._error is not None

    def add(self, attempt: Attempt) -> None:
        """Take it in."""
        with self._lock:
            self._attempts.append(attempt)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        is_last = False
        while not is_last and self._error is None:
            is_last = self._closing.wait(_RECORD_EVERY_S)
            with self._lock:
                attempts, self._attempts = self._attempts, []
            if attempts:
                try:
                    self._index.record_attempts(attempts)
                except LocalError as error:
                    self._error = error
