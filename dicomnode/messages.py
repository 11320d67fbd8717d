"""What the messages of one association do: C-STORE, C-ECHO and storage commitment.

Law: no socket, no timer; fragments in, responses out through `send`. One message costs no other its place: whatever
goes wrong with an instance becomes the status of its own answer, and success is answered only after the intake has
sealed the file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from dicomnode import dimse, negotiation
from dicomnode.commitment import CommitmentSCP
from dicomnode.dimse import Command, DataPart
from dicomnode.errors import LocalError, stack
from dicomnode.intake import DuplicateError, Intake, Reception
from dicomnode.model import RetrievedBy
from dicomnode.negotiation import STORAGE_COMMITMENT_PUSH_MODEL
from dicomnode.pdu import ContextAnswer, ProtocolError
from dicomnode.spool import Source
from dicomnode.upperlayer import Fragment

log = logging.getLogger(__name__)

_MAX_ACTION_BYTES = 32 << 20
_CANNOT_UNDERSTAND = 0xC000  # PS3.4 Table B.2-1

Send = Callable[[int, bytes, bytes], None]
"""Sends a message: presentation context, command set, data set."""


class Messages:
    """One association's, from its acceptance to its end.

    Parameters
    ----------
    source
        Whose association it is.
    contexts
        The accepted presentation contexts, by their id.
    commitment
        Answers storage commitment; None: that SOP class is not supported.
    """

    def __init__(
        self,
        source: Source,
        contexts: Mapping[int, ContextAnswer],
        intake: Intake,
        commitment: CommitmentSCP | None,
        send: Send,
    ) -> None:
        self._source = source
        self._contexts = contexts
        self._storage = {
            number
            for number, context in contexts.items()
            if negotiation.is_storage(context.abstract_syntax, unknown_sop_classes=True)
        }
        self._intake = intake
        self._commitment = commitment
        self._send = send
        self._opened_at = intake.clock()
        self._assembler = dimse.Assembler()
        self._command: Command | None = None  # whose data set is coming
        self._reception: Reception | None = None
        self._failure: Exception | None = None
        self._argument = bytearray()
        self._reports: dict[int, int] = {}  # of storage commitment, by message id
        self._stored = self._refused = 0

    @property
    def in_message(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._assembler.in_message

    def take(self, fragment: Fragment) -> None:
        """Take in a fragment and answer what is complete with it.

        Raises
        ------
        ProtocolError
            The association must be aborted.
        OSError
            The answer could not be sent.
        """
        for part in self._assembler.take(fragment):
            if isinstance(part, DataPart):
                self._on_data(part)
            else:
                self._on_command(part)

    def close(self, outcome: str) -> tuple[Source, int, int]:
        """Drop what was not finished, write down how it ended; whose it was, instances stored and not stored."""
        if self._reception is not None:
            self._reception.discard()
        self._intake.ended(self._source, self._opened_at, outcome=outcome, stored=self._stored, refused=self._refused)
        return self._source, self._stored, self._refused

    def _on_command(self, command: Command) -> None:
        context = self._contexts.get(command.context_id)
        if context is None:
            raise ProtocolError(f"message in presentation context {command.context_id}, which was not accepted")
        self._command, self._failure, self._reception = command, None, None
        self._argument.clear()
        if command.field == dimse.C_STORE_RQ and command.has_data_set and context.id in self._storage:
            try:
                self._reception = self._intake.begin(
                    sop_class_uid=command.sop_class_uid,
                    sop_instance_uid=command.sop_instance_uid,
                    transfer_syntax_uid=context.transfer_syntax,
                )
            except LocalError as error:
                self._failure = error
        elif not command.has_data_set:
            self._on_other_message()

    def _on_data(self, part: DataPart) -> None:
        if self._reception is not None:
            try:
                self._reception.write(part.data)
            except LocalError as error:
                self._failure = error
                self._reception.discard()
                self._reception = None
        elif self._failure is None:
            if len(self._argument) + len(part.data) > _MAX_ACTION_BYTES:
                raise ProtocolError(f"data set of more than {_MAX_ACTION_BYTES} bytes in a message that stores nothing")
            self._argument += part.data
        if part.is_last:
            if self._reception is not None or self._failure is not None:
                self._on_instance()
            else:
                self._on_other_message()

    def _on_instance(self) -> None:
        """Answer a C-STORE request; the only place where an outcome becomes a status."""
        assert self._command is not None
        status, comment = dimse.SUCCESS, ""
        try:
            if self._failure is not None:
                raise self._failure
            assert self._reception is not None
            self._intake.keep(
                self._reception,
                self._source,
                self._opened_at,
                retrieved_by=_retrieved_by(self._command, self._source),
            )
        except DuplicateError as error:
            status, comment = dimse.DUPLICATE_SOP_INSTANCE, str(error)
        except LocalError as error:
            status, comment = dimse.OUT_OF_RESOURCES, "Not stored: out of resources"
            log.error("instance not stored: %s", error)
        except Exception as error:
            status, comment = dimse.PROCESSING_FAILURE, "Not stored: internal error"
            log.error("instance not stored: %s\n%s", type(error).__name__, stack(error))
        finally:
            if self._reception is not None:
                self._reception.discard()
            self._reception = self._failure = None
        if status == dimse.SUCCESS:
            self._stored += 1
        else:
            self._refused += 1
            log.warning("%s: answered 0x%04X, %s", self._source.calling_ae_title, status, comment)
        self._answer(status, comment)

    def _on_other_message(self) -> None:
        command = self._command
        assert command is not None
        if command.field == dimse.C_ECHO_RQ:
            self._answer(dimse.SUCCESS)
        elif command.field == dimse.C_STORE_RQ:
            self._refused += 1
            self._answer(_CANNOT_UNDERSTAND, "No data set, or not in a context of a storage SOP class")
        elif self._is_commitment(command) and self._commitment is not None:
            self._on_commitment(command, self._commitment)
        elif command.field & dimse.IS_RESPONSE or command.field == dimse.C_CANCEL_RQ:
            log.warning("from %s: message 0x%04X is ignored", self._source.address, command.field)
        else:
            self._answer(dimse.UNRECOGNIZED_OPERATION)

    def _on_commitment(self, command: Command, commitment: CommitmentSCP) -> None:
        if command.field == dimse.N_ACTION_RQ:
            transfer_syntax = self._contexts[command.context_id].transfer_syntax
            status, report = commitment.requested(command, bytes(self._argument), transfer_syntax, self._source)
            self._answer(status)
            if report is not None:
                self._reports[report.message_id] = report.commitment_id
                self._send(command.context_id, report.command, report.data_set)
        elif command.field == dimse.N_EVENT_REPORT_RQ and commitment.on_report is not None:
            transfer_syntax = self._contexts[command.context_id].transfer_syntax
            self._answer(commitment.on_report(command, bytes(self._argument), transfer_syntax))
        elif command.field == dimse.N_EVENT_REPORT_RQ | dimse.IS_RESPONSE:
            commitment_id = self._reports.pop(command.message_id, None)
            if commitment_id is not None:
                commitment.answered(commitment_id, command.status)
        else:
            self._answer(dimse.UNRECOGNIZED_OPERATION)

    def _is_commitment(self, command: Command) -> bool:
        return self._contexts[command.context_id].abstract_syntax == STORAGE_COMMITMENT_PUSH_MODEL

    def _answer(self, status: int, comment: str = "") -> None:
        assert self._command is not None
        self._send(self._command.context_id, dimse.response(self._command, status, comment), b"")


def _retrieved_by(command: Command, source: Source) -> RetrievedBy:
    """Whose C-MOVE it is a part of. Ours goes to ourselves: its originator is whom the association calls."""
    if not command.move_originator:
        return RetrievedBy.UNKNOWN
    return RetrievedBy.NODE if command.move_originator == source.called_ae_title else RetrievedBy.OTHER
