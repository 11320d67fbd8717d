"""The Storage SCU: every waiting (instance, destination) row is sent until the destination has it or refuses it.

Law: each answer is recorded before the next instance is sent; only success and the storing warnings are success; a
delivered row is never sent again. A crash between answer and record sends the very same instance once more, which a
receiver sees as the one it has.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pydicom
from pydicom import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from dicomnode.archive import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, Archive
from dicomnode.errors import LocalError, NodeError, RefusedError, RemoteError, stack
from dicomnode.index import Attempt, Index
from dicomnode.model import Delivery, DeliveryState, Destination, Instance

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 5
LONGEST_PAUSE_S = 300

_POLL_S = 1.0
_CONNECTION_TIMEOUT_S = 10.0
_BATCH = 1000
_MAX_PDU = 131072
_SLOWEST_BYTES_PER_S = 100_000
_MEDIUM = 0  # Priority, PS3.7 9.3.1.1
# PS3.8 9.3.2.2: odd context IDs up to 255, hence 128 contexts; each pair may need a second one for Implicit VR.
_MAX_SYNTAX_PAIRS = 64
_TRANSCODABLE = (ExplicitVRLittleEndian, ExplicitVRBigEndian)


@dataclass(frozen=True)
class Outcome:
    """What an answer, or the lack of one, means for a row."""

    state: DeliveryState
    meaning: str


_DELIVERED, _WAITING, _FAILED = DeliveryState.DELIVERED, DeliveryState.WAITING, DeliveryState.FAILED

_STATUSES: tuple[tuple[int, int, DeliveryState, str], ...] = (
    (0x0000, 0x0000, _DELIVERED, "success"),
    # PS3.4 Table B.2-1: the three warnings say that the instance was stored, and what was done to it.
    (0xB000, 0xB000, _DELIVERED, "stored with coercion of data elements"),
    (0xB006, 0xB006, _DELIVERED, "stored with elements discarded"),
    (0xB007, 0xB007, _DELIVERED, "stored though the data set does not match the SOP Class"),
    # PS3.4 Table B.2-1, failures. Resources come back; a data set does not change by waiting.
    (0xA700, 0xA7FF, _WAITING, "out of resources"),
    (0xA900, 0xA9FF, _FAILED, "data set does not match SOP Class"),
    (0xC000, 0xCFFF, _FAILED, "cannot understand"),
    # PS3.7 Annex C, general statuses. 0110 is what many peers answer when their database or disk is in trouble, 0210
    # and 0213 speak of this association and this moment.
    (0x0110, 0x0110, _WAITING, "processing failure"),
    (0x0210, 0x0210, _WAITING, "duplicate invocation"),
    (0x0213, 0x0213, _WAITING, "resource limitation"),
    # It holds an instance of that UID. Ours from an attempt whose answer was lost, or another's: only a person can
    # tell, and sending again would not change it.
    (0x0111, 0x0111, _FAILED, "duplicate SOP Instance: the destination already holds this UID"),
    # 0112 is used by some, and by PS3.2, in the sense of 0122.
    (0x0112, 0x0112, _FAILED, "no such SOP Instance, or SOP Class not supported"),
    (0x0117, 0x0117, _FAILED, "invalid SOP Instance"),
    (0x0118, 0x0118, _FAILED, "no such SOP Class"),
    (0x0119, 0x0119, _FAILED, "class-instance conflict"),
    (0x0122, 0x0122, _FAILED, "SOP Class not supported"),
    (0x0124, 0x0124, _FAILED, "not authorized"),
    (0x0211, 0x0211, _FAILED, "unrecognized operation"),
    (0x0212, 0x0212, _FAILED, "mistyped argument"),
)


def outcome(status: int) -> Outcome:
    """What a C-STORE status means for the row: delivered, waiting (try again) or failed (for good).

    A status that no table lists is a failure: it does not promise that anything was stored.

    References
    ----------
    PS3.4 Table B.2-1; PS3.7 9.1.1.1.9 and Annex C.
    """
    for first, last, state, meaning in _STATUSES:
        if first <= status <= last:
            return Outcome(state, f"0x{status:04X} {meaning}")
    return Outcome(DeliveryState.FAILED, f"0x{status:04X} is no C-STORE status")


def next_attempt(attempts: int, *, now: datetime) -> datetime:
    """When to try again after `attempts` failed ones (at least 1): 5 s, 10 s, 20 s … at most 5 minutes from `now`."""
    doublings = min(attempts - 1, 10)  # more would only overflow
    return now + timedelta(seconds=min(FIRST_PAUSE_S * 2**doublings, LONGEST_PAUSE_S))


def rejection(destination: str, result: int, source: int, diagnostic: int) -> RemoteError:
    """The error for an A-ASSOCIATE-RJ, PS3.8 9.3.4: retried when the result, or its source, speaks of the moment."""
    reasons = {
        (1, 2): "application context name not supported",
        (1, 3): "calling AE title not recognized",
        (1, 7): "called AE title not recognized",
        (2, 2): "protocol version not supported",
        (3, 1): "temporary congestion",
        (3, 2): "local limit exceeded",
    }
    reason = reasons.get((source, diagnostic), "no reason given")
    # Source 3 knows only congestion and limits; peers that call these permanent are not taken at their word.
    if result == 1 and source != 3:
        return RefusedError(f"{destination} rejected the association for good: {reason}")
    return RemoteError(f"{destination} rejected the association for now: {reason}")


class DeliveryService:
    """Sends what is due, with one thread and one association at a time for each destination.

    Parameters
    ----------
    destinations
        Independent of each other: one that is down holds up nobody else.
    ae_title
        Our calling AE title.
    timeout_s
        How long to wait for an answer or for the network to move; for a connection 10 s at most.
    """

    def __init__(
        self,
        destinations: Sequence[Destination],
        index: Index,
        archive: Archive,
        *,
        ae_title: str,
        timeout_s: float = 60.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._index = index
        self._archive = archive
        self._ae_title = ae_title
        self._timeout_s = timeout_s
        self._clock = clock
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(each,), name=f"delivery-{each.name}", daemon=True)
            for each in destinations
        ]

    def start(self) -> None:
        """Begin to deliver."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish the instance in hand at each destination, then stop."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def deliver_due(self, destination: Destination) -> int:
        """Try, once, what is due at a destination; how many rows were tried.

        A row that is refused, or that waits, holds up no other. If the association cannot be opened, every due row
        waits; if it is lost on the way, the row in hand waits and the rest stays due.

        Raises
        ------
        LocalError
            The index cannot be read or written; what was not recorded will be sent again.
        """
        due = self._index.due_deliveries(destination.name, now=self._clock(), limit=_BATCH)
        if not due:
            return 0
        due = _of_one_association(due)
        tried = 0
        try:
            with self._association(destination, due) as association:
                for delivery in due:
                    if self._stopping.is_set():
                        break
                    self._record(delivery, *self._send(association, destination, delivery.instance, tried + 1))
                    tried += 1
                    if association.accepted_contexts and not association.is_established:
                        break
        except RemoteError as error:
            for delivery in due:
                self._record(delivery, _outcome_of(error))
            tried = len(due)
        return tried

    def _run(self, destination: Destination) -> None:
        while not self._stopping.is_set():
            try:
                if self.deliver_due(destination):
                    continue
            except LocalError as error:
                log.error("delivery to %s: trying again after: %s", destination.name, error)
            except Exception:
                log.exception("delivery to %s: trying again", destination.name)
            self._stopping.wait(_POLL_S)

    @contextmanager
    def _association(self, destination: Destination, due: Sequence[Delivery]) -> Iterator[Association]:
        """An association with the contexts that `due` needs; RemoteError if the destination does not grant one.

        One that accepts none of the contexts is granted too: each instance then fails with its own reason.
        """
        _config.STORE_SEND_CHUNKED_DATASET = True  # a file is sent as it is, without being decoded or held in memory
        ae = AE(self._ae_title)
        ae.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = self._timeout_s
        ae.connection_timeout = min(_CONNECTION_TIMEOUT_S, self._timeout_s)
        handlers: list[Any] = [(evt.EVT_CONN_OPEN, self._on_connection)]
        if hasattr(socket, "TCP_QUICKACK"):
            handlers += [(evt.EVT_DATA_SENT, _acknowledge_quickly), (evt.EVT_DATA_RECV, _acknowledge_quickly)]
        try:
            association = ae.associate(
                destination.host,
                destination.port,
                contexts=_contexts(due),
                ae_title=destination.ae_title,
                max_pdu=_MAX_PDU,
                evt_handlers=handlers,
            )
        except OSError as error:
            raise RemoteError(f"{destination.name}: cannot resolve {destination.host}: {error}") from error
        if association.is_rejected:
            answer: Any = association.acceptor.primitive
            raise rejection(destination.name, answer.result, answer.result_source, answer.diagnostic)
        if not association.is_established and not association.rejected_contexts:
            raise RemoteError(
                f"{destination.name}: no association with {destination.ae_title} "
                f"at {destination.host}:{destination.port}: unreachable, aborted or no answer"
            )
        try:
            yield association
        finally:
            association.release()

    def _on_connection(self, event: evt.Event) -> None:
        sock = event.assoc.dul.socket.socket  # type: ignore[union-attr]  # just connected
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # type: ignore[union-attr]
        sock.settimeout(self._timeout_s)  # type: ignore[union-attr]  # pynetdicom has set it to wait for ever

    def _send(
        self, association: Association, destination: Destination, instance: Instance, message_id: int
    ) -> tuple[Outcome, int | None]:
        """Send one instance; what became of it, and the status if one came."""
        try:
            answer = self._c_store(association, destination, instance, message_id)
        except NodeError as error:
            return _outcome_of(error), None
        except Exception as error:
            # A file or data set that cannot be sent must not hold up those behind it, nor be tried for ever.
            log.error("%s cannot be sent: %s\n%s", instance.sop_instance_uid, type(error).__name__, stack(error))
            association.abort()
            return Outcome(DeliveryState.FAILED, f"cannot be sent: {type(error).__name__}"), None
        result = outcome(answer.Status)
        comment = str(answer.get("ErrorComment", ""))
        if result.state is not DeliveryState.DELIVERED and comment:
            result = Outcome(result.state, f"{result.meaning}: {comment}")
        return result, int(answer.Status)

    def _c_store(
        self, association: Association, destination: Destination, instance: Instance, message_id: int
    ) -> Dataset:
        accepted = {(str(each.abstract_syntax), str(each.transfer_syntax[0])) for each in association.accepted_contexts}
        path = self._archive.path(instance)
        transcodable = instance.transfer_syntax_uid in _TRANSCODABLE
        # pynetdicom queues the whole instance at once and waits from then on; a stalled network shows at the socket.
        association.dimse_timeout = self._timeout_s + instance.size_bytes / _SLOWEST_BYTES_PER_S
        if not association.is_established and accepted:
            raise RemoteError(f"{destination.name}: the association was lost before this instance was sent")
        try:
            if (instance.sop_class_uid, instance.transfer_syntax_uid) in accepted:
                answer = association.send_c_store(path, message_id, _MEDIUM)
            elif transcodable and (instance.sop_class_uid, ImplicitVRLittleEndian) in accepted:
                answer = association.send_c_store(pydicom.dcmread(path), message_id, _MEDIUM)
            else:
                raise RefusedError(
                    f"{destination.name} accepts no presentation context for {UID(instance.sop_class_uid).name} "
                    f"with {UID(instance.transfer_syntax_uid).name}"
                )
        except OSError as error:
            association.abort()  # part of it may be on its way
            raise LocalError(f"archive: cannot read the instance: {error}") from error
        except RuntimeError as error:
            raise RemoteError(f"{destination.name}: {error}") from error
        if "Status" not in answer:
            association.abort()
            raise RemoteError(
                f"{destination.name} gave no answer within {association.dimse_timeout:.0f} s, or broke off"
            )
        return answer

    def _record(self, delivery: Delivery, result: Outcome, status: int | None = None) -> None:
        now = self._clock()
        waits = result.state is DeliveryState.WAITING
        attempt = Attempt(
            delivery.id,
            state=result.state,
            status=status,
            reason="" if result.state is DeliveryState.DELIVERED and status == 0 else result.meaning,
            next_attempt_at=next_attempt(delivery.attempts + 1, now=now) if waits else None,
            at=now,
        )
        self._index.record_attempts([attempt])
        log.log(
            logging.INFO if result.state is DeliveryState.DELIVERED else logging.WARNING,
            "%s to %s: %s, status %s",
            delivery.instance.sop_instance_uid,
            delivery.destination,
            result.state,
            "none" if status is None else f"0x{status:04X}",
        )


def _of_one_association(due: Sequence[Delivery]) -> list[Delivery]:
    """Those that fit into one association's presentation contexts; the others are due next time."""
    pairs = list(dict.fromkeys((each.instance.sop_class_uid, each.instance.transfer_syntax_uid) for each in due))
    fitting = set(pairs[:_MAX_SYNTAX_PAIRS])
    return [each for each in due if (each.instance.sop_class_uid, each.instance.transfer_syntax_uid) in fitting]


def _contexts(due: Sequence[Delivery]) -> list[PresentationContext]:
    """One context for each SOP class and transfer syntax, so that the acceptor cannot choose a re-encoding for us.

    Implicit VR Little Endian, which every acceptor must know (PS3.5 10.1), is a context of its own.
    """
    pairs: dict[tuple[str, str], None] = {}
    for each in due:
        pairs[each.instance.sop_class_uid, each.instance.transfer_syntax_uid] = None
        if each.instance.transfer_syntax_uid in _TRANSCODABLE:
            pairs[each.instance.sop_class_uid, str(ImplicitVRLittleEndian)] = None
    return [build_context(sop_class_uid, transfer_syntax_uid) for sop_class_uid, transfer_syntax_uid in pairs]


def _acknowledge_quickly(event: evt.Event) -> None:
    """Ask for an immediate TCP acknowledgement; Linux forgets the wish, so after every send and receive.

    A peer that writes its answer in two pieces with Nagle's algorithm on would wait for our delayed one, 40 ms.
    """
    sock = event.assoc.dul.socket.socket  # type: ignore[union-attr]
    if sock is not None:
        with suppress(OSError):  # closed meanwhile: nothing to acknowledge
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _outcome_of(error: NodeError) -> Outcome:
    return Outcome(DeliveryState.WAITING if error.retry else DeliveryState.FAILED, str(error))
