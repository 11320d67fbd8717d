"""What an answer to C-STORE means for a delivery, and when it is tried again. Pure; `now` is an argument.

Law: only success and the storing warnings are success; what no table lists is a failure.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from dicomnode.errors import NodeError
from dicomnode.index import Attempt, Denial, Reference
from dicomnode.model import Delivery, DeliveryState
from dicomnode.remotes import Destination


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


_FAILURE_REASONS = {
    0x0110: "processing failure",
    0x0112: "no such object instance",
    0x0119: "class-instance conflict",
    0x0122: "referenced SOP Class not supported",
    0x0131: "duplicate transaction UID",
    0x0213: "resource limitation",
}

DENIED_AT_MOST = 5
"""So often an instance is sent that the destination takes and then denies to hold."""


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


def outcome_of(error: NodeError) -> Outcome:
    """What an error means for the row that was in hand."""
    return Outcome(_WAITING if error.retry else _FAILED, str(error))


def next_attempt(destination: Destination, attempts: int, *, now: datetime) -> datetime:
    """When to try again after `attempts` failed ones (at least 1): by default after 5 s, 10 s, 20 s … 5 minutes."""
    factor = destination.pause_factor ** min(attempts - 1, 64)  # more would only overflow
    return now + timedelta(seconds=min(destination.first_pause_s * factor, destination.longest_pause_s))


def denial(destination: Destination, row: Reference, reason: int, *, now: datetime) -> Denial:
    """What becomes of an instance that the destination took and does not commit to.

    References
    ----------
    PS3.3 C.14.1.1, Failure Reason.
    """
    said = f"storage commitment: 0x{reason:04X} {_FAILURE_REASONS.get(reason, 'no such failure reason')}"
    if reason == 0x0131:  # of the transaction, not of the instance
        return Denial(row.delivery_id, _DELIVERED, said, ask_again=True)
    if reason == 0x0122:  # it is there, and no more can be had
        return Denial(row.delivery_id, _DELIVERED, said)
    if reason not in (0x0110, 0x0112, 0x0213):
        return Denial(row.delivery_id, _FAILED, said)
    if row.attempts >= DENIED_AT_MOST:
        return Denial(row.delivery_id, _FAILED, f"taken and denied {row.attempts} times: {said}")
    return Denial(row.delivery_id, _WAITING, said, next_attempt(destination, row.attempts, now=now))


def attempt(
    destination: Destination, delivery: Delivery, result: Outcome, status: int | None = None, *, now: datetime
) -> Attempt:
    """What to record of an attempt; one that would wait beyond the destination's deadline has failed."""
    state, reason, again = result.state, result.meaning, None
    if state is _DELIVERED and status == 0:
        reason = ""
    elif state is _WAITING:
        again = next_attempt(destination, delivery.attempts + 1, now=now)
        since = delivery.queued_at or now
        if destination.give_up_after_s is not None and again > since + timedelta(seconds=destination.give_up_after_s):
            state, again = _FAILED, None
            reason = f"given up after {(now - since).total_seconds() / 3600:.1f} hours: {reason}"
    asks = destination.commitment_within_s is not None
    return Attempt(delivery.id, state, status, reason, again, now, asks_commitment=asks)
