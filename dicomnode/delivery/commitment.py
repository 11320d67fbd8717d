"""The Storage Commitment SCU (PS3.4 Annex J, Push Model): destinations are asked whether they keep what they took.

Law: only what a destination denies to hold is sent again. A report counts whenever and on whichever association it
comes; what no report mentions is asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from io import BytesIO

from pydicom import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from dicomnode import dimse
from dicomnode.delivery import encoding, policy
from dicomnode.dimse import Command
from dicomnode.errors import LocalError, RefusedError, RemoteError, stack
from dicomnode.index import Index
from dicomnode.remotes import Destination
from dicomnode.scu import Association

log = logging.getLogger(__name__)

PUSH_MODEL = "1.2.840.10008.1.20.1"
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"  # PS3.4 J.3.5

_AT_ONCE = 1000
_LISTEN_S = 2.0
"""Destinations that report at once do so on the association that asked; the others on one of their own."""
_PAUSE_AFTER_TROUBLE = timedelta(minutes=5)


class CommitmentSCU:
    """Asks, and takes reports, for destinations that are to be asked."""

    def __init__(
        self, destinations: list[Destination], index: Index, *, ae_title: str, clock: Callable[[], datetime]
    ) -> None:
        self._destinations = {each.name: each for each in destinations}
        self._index = index
        self._ae_title = ae_title
        self._clock = clock
        self._not_before: dict[str, datetime] = {}

    def ask(self, destination: Destination) -> int:
        """Ask for what has arrived and was not asked for; for how many instances.

        Raises
        ------
        LocalError
            The index cannot be read or written.
        """
        now, within_s = self._clock(), destination.commitment_within_s
        if within_s is None or self._not_before.get(destination.name, now) > now:
            return 0
        for transaction_uid in self._index.expire_requests(destination.name, now=now):
            log.warning("%s has not reported storage commitment %s in time", destination.name, transaction_uid)
        wanted = self._index.uncommitted(destination.name, limit=_AT_ONCE)
        if not wanted:
            return 0
        request = Dataset()
        request.TransactionUID = generate_uid(prefix=None)
        request.ReferencedSOPSequence = []
        for each in wanted:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = each.sop_class_uid, each.sop_instance_uid
            request.ReferencedSOPSequence.append(item)
        self._index.open_request(
            request.TransactionUID, destination.name, [each.delivery_id for each in wanted],
            now=now, expires_at=now + timedelta(seconds=within_s),
        )  # fmt: skip
        try:
            self._send(destination, request)
        except RemoteError as error:
            log.warning("%s: storage commitment: %s", destination.name, error)
            self._not_before[destination.name] = now + _PAUSE_AFTER_TROUBLE
            if not self._index.is_settled(request.TransactionUID):
                self._index.drop_request(request.TransactionUID)
            return 0
        return len(wanted)

    def reported(self, command: Command, argument: bytes, transfer_syntax: str) -> int:
        """Take an N-EVENT-REPORT request from whichever association; the status to answer (PS3.4 J.3.3)."""
        if command.sop_class_uid != PUSH_MODEL or command.event_type not in (1, 2):
            return dimse.NO_SUCH_OBJECT_INSTANCE if command.sop_class_uid != PUSH_MODEL else dimse.NO_SUCH_EVENT_TYPE
        syntax = UID(transfer_syntax)
        try:
            report = read_dataset(BytesIO(argument), syntax.is_implicit_VR, syntax.is_little_endian)
            transaction_uid = str(report.TransactionUID)
            committed = [str(item.ReferencedSOPInstanceUID) for item in report.get("ReferencedSOPSequence") or []]
            failed = {
                str(item.ReferencedSOPInstanceUID): int(item.get("FailureReason") or dimse.PROCESSING_FAILURE)
                for item in report.get("FailedSOPSequence") or []
            }
        except Exception as error:  # off the wire: anything may be wrong with it
            log.warning("storage commitment report cannot be read: %s\n%s", type(error).__name__, stack(error))
            return dimse.INVALID_ARGUMENT_VALUE
        try:
            return self._settle(transaction_uid, committed, failed)
        except LocalError as error:  # it will be reported again
            log.error("storage commitment report: %s", error)
            return dimse.PROCESSING_FAILURE

    def _settle(self, transaction_uid: str, committed: list[str], failed: dict[str, int]) -> int:
        destination = self._destinations.get(self._index.request_destination(transaction_uid) or "")
        if destination is None:
            log.warning("a storage commitment is reported that nobody here has asked for")
            return dimse.INVALID_ARGUMENT_VALUE
        now = self._clock()
        denied = [
            policy.denial(destination, row, failed[row.sop_instance_uid], now=now)
            for row in self._index.requested(transaction_uid)
            if row.sop_instance_uid in failed
        ]
        outcome = f"{len(committed)} committed, {len(failed)} not"
        self._index.settle_request(
            transaction_uid, destination.name, [uid for uid in committed if uid not in failed], denied, outcome, now=now
        )
        log.log(
            logging.WARNING if failed else logging.INFO,
            "%s: storage commitment %s: %s", destination.name, transaction_uid, outcome,
        )  # fmt: skip
        return dimse.SUCCESS

    def _send(self, destination: Destination, request: Dataset) -> None:
        """N-ACTION, and the report where it comes at once; RemoteError where the request was not taken."""
        association = Association(
            destination, ae_title=self._ae_title, timeout_s=destination.timeout_s, on_report=self.reported
        )
        association.open([(PUSH_MODEL, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])])
        try:
            if not association.accepted:
                raise RefusedError("it is not supported by this destination")
            ((_, syntax), context_id), *_ = association.accepted.items()
            answers = association.ask(
                context_id,
                lambda message_id: dimse.action(message_id, PUSH_MODEL, PUSH_MODEL_INSTANCE, 1),
                encoding.encode(request, syntax),
                dimse.N_ACTION_RQ,
            )
            for answer, _ in answers:
                if answer.status != dimse.SUCCESS:
                    raise RemoteError(f"the request was answered 0x{answer.status:04X} {answer.comment}".rstrip())
            association.listen(_LISTEN_S, lambda: self._index.is_settled(request.TransactionUID))
        finally:
            association.release()
