"""The Storage Commitment SCP (PS3.4 Annex J, Push Model): who asks whether we hold instances gets a durable answer.

Law: a request is written down before it is answered; its report is repeated until the requestor has taken it, on the
association that asked and, where a port of the peer is configured, on associations of ours. What is in the journal
or in quarantine is held too: a commitment says that the bytes are safe, not that anybody understood them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from io import BytesIO

from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import UID
from pynetdicom import AE, build_role

from dicomnode import dimse
from dicomnode.dimse import Command, OnReport
from dicomnode.errors import LocalError, stack
from dicomnode.index import Index
from dicomnode.intake import Intake
from dicomnode.model import Commitment
from dicomnode.negotiation import STORAGE_COMMITMENT_PUSH_MODEL, Peer
from dicomnode.spool import Source

log = logging.getLogger(__name__)

PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"  # PS3.4 J.3.5
_SUCCESSFUL, _FAILURES_EXIST = 1, 2  # Event Type ID, PS3.4 J.3.3.1.1
_TICK_S = 1.0
_FIRST_RETRY_S, _LONGEST_RETRY_S = 5.0, 300.0
_GIVE_UP_AFTER = timedelta(days=2)


@dataclass(frozen=True)
class Report:
    """An N-EVENT-REPORT request for the association that asked; `message_id` is its own."""

    commitment_id: int
    message_id: int
    command: bytes
    data_set: bytes


class CommitmentSCP:
    """Takes requests, makes reports, and repeats those that were not taken.

    Parameters
    ----------
    ae_title
        Ours, on associations of our own.
    peers
        Those with a `port` can be reported to later.
    on_report
        Takes the reports of others, whom we have asked.
    """

    def __init__(
        self,
        ae_title: str,
        peers: Collection[Peer],
        index: Index,
        intake: Intake,
        *,
        on_report: OnReport | None = None,
    ) -> None:
        self.on_report = on_report
        self._ae_title = ae_title
        self._ports = {peer.ae_title: peer.port for peer in peers if peer.port is not None}
        self._index = index
        self._intake = intake
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Repeat reports from now on."""
        self._thread = threading.Thread(target=self._report_for_ever, name="commitment", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is not reported is taken up at the next start."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def requested(
        self, command: Command, argument: bytes, transfer_syntax: str, source: Source
    ) -> tuple[int, Report | None]:
        """The status of an N-ACTION request, and the report that may follow it at once."""
        if command.sop_instance_uid != PUSH_MODEL_INSTANCE:
            return dimse.NO_SUCH_OBJECT_INSTANCE, None
        if command.action_type != 1:
            return dimse.NO_SUCH_ACTION, None
        syntax = UID(transfer_syntax)
        try:
            asked = read_dataset(BytesIO(argument), syntax.is_implicit_VR, syntax.is_little_endian)
            transaction_uid = str(asked.TransactionUID)
            references = [
                (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))
                for item in asked.ReferencedSOPSequence
            ]
        except Exception as error:  # off the wire: anything may be wrong with it
            log.warning("storage commitment request cannot be read: %s\n%s", type(error).__name__, stack(error))
            return dimse.INVALID_ARGUMENT_VALUE, None
        if not transaction_uid or len(transaction_uid) > 64 or not references:
            return dimse.INVALID_ARGUMENT_VALUE, None
        now = self._intake.clock()
        try:
            self._intake.flush()
            commitment = self._index.add_commitment(
                transaction_uid, source.calling_ae_title, source.address, references,
                now=now, next_attempt_at=now + timedelta(seconds=_FIRST_RETRY_S),
            )  # fmt: skip
            data_set = self._data_set(commitment)
        except LocalError as error:
            log.error("storage commitment %s: %s", transaction_uid, error)
            return dimse.PROCESSING_FAILURE, None
        message_id = commitment.id % 65535 + 1
        event = dimse.event_report(
            message_id, STORAGE_COMMITMENT_PUSH_MODEL, PUSH_MODEL_INSTANCE, _event_type(data_set)
        )
        return dimse.SUCCESS, Report(commitment.id, message_id, event, _encode(data_set, syntax))

    def answered(self, commitment_id: int, status: int) -> None:
        """The requestor has answered a report."""
        if status == dimse.SUCCESS:
            self._index.end_commitment(commitment_id, "reported", "")
        else:
            log.warning("storage commitment %d: the report was answered 0x%04X", commitment_id, status)

    def _data_set(self, commitment: Commitment) -> Dataset:
        """Event information: what is held, and what is not and why (PS3.4 Table J.3-2)."""
        held = self._index.classes_held([uid for _, uid in commitment.references])
        report = Dataset()
        report.TransactionUID = commitment.transaction_uid
        done, failed = [], []
        for sop_class_uid, sop_instance_uid in commitment.references:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
            classes = held.get(sop_instance_uid, set())
            if sop_class_uid in classes:
                done.append(item)
            else:
                item.FailureReason = dimse.CLASS_INSTANCE_CONFLICT if classes else dimse.NO_SUCH_OBJECT_INSTANCE
                failed.append(item)
        if done:
            report.ReferencedSOPSequence = done
        if failed:
            report.FailedSOPSequence = failed
        return report

    def _report_for_ever(self) -> None:
        while not self._stopping.wait(_TICK_S):
            try:
                now = self._intake.clock()
                for commitment in self._index.due_commitments(now=now):
                    if self._stopping.is_set():
                        return
                    self._report_again(commitment, now)
            except Exception as error:
                what = error if isinstance(error, LocalError) else f"{type(error).__name__}\n{stack(error)}"
                log.error("storage commitment: trying again after: %s", what)

    def _report_again(self, commitment: Commitment, now: datetime) -> None:
        port = self._ports.get(commitment.calling_ae_title)
        reason = "no port is configured for this peer" if port is None else self._report_to(commitment, port)
        if not reason:
            self._index.end_commitment(commitment.id, "reported", "")
        elif now - commitment.created_at > _GIVE_UP_AFTER:
            log.error("storage commitment %s: given up: %s", commitment.transaction_uid, reason)
            self._index.end_commitment(commitment.id, "failed", reason)
        else:
            pause_s = min(_FIRST_RETRY_S * 2.0 ** min(commitment.attempts, 10), _LONGEST_RETRY_S)
            self._index.postpone_commitment(commitment.id, reason, next_attempt_at=now + timedelta(seconds=pause_s))

    def _report_to(self, commitment: Commitment, port: int) -> str:
        """Report on an association of our own, as its SCP (PS3.4 J.3.3.1); what went wrong, or nothing."""
        ae = AE(self._ae_title)
        ae.add_requested_context(STORAGE_COMMITMENT_PUSH_MODEL)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = 15
        role = build_role(STORAGE_COMMITMENT_PUSH_MODEL, scp_role=True)
        association = ae.associate(commitment.address, port, ext_neg=[role], ae_title=commitment.calling_ae_title)
        if not association.is_established:
            return "no association"
        try:
            report = self._data_set(commitment)
            status, _ = association.send_n_event_report(
                report, _event_type(report), STORAGE_COMMITMENT_PUSH_MODEL, PUSH_MODEL_INSTANCE
            )
            code = status.get("Status")
            return "" if code == dimse.SUCCESS else f"answered {'nothing' if code is None else f'0x{code:04X}'}"
        except (ValueError, RuntimeError) as error:  # the role or the context was not accepted; the association ended
            return str(error)
        finally:
            if association.is_established:
                association.release()


def _event_type(report: Dataset) -> int:
    return _FAILURES_EXIST if "FailedSOPSequence" in report else _SUCCESSFUL


def _encode(data_set: Dataset, syntax: UID) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = syntax.is_little_endian, syntax.is_implicit_VR
    write_dataset(buffer, data_set)
    content: bytes = buffer.getvalue()
    return content
