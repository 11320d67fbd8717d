"""The Storage SCP: what a sender is told was stored would survive a power cut, or the answer says why it was not.

Law: data sets go to the disk as they come, never through decode and re-encode; 0x0000 is answered only after the
intake has sealed the file; nothing a patient could be known by is logged. The protocol stands in `upperlayer` and
`dimse`, the decisions in `negotiation`; here are sockets, threads and timers, one thread for each connection.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime

from dicomnode import dimse, negotiation
from dicomnode.archive import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicomnode.commitment import CommitmentSCP
from dicomnode.dimse import Command, DataPart
from dicomnode.errors import LocalError, stack
from dicomnode.intake import DuplicateError, Intake, Reception
from dicomnode.negotiation import STORAGE_COMMITMENT_PUSH_MODEL, Access
from dicomnode.pdu import AssociateRequest, Identity, ProtocolError
from dicomnode.spool import Source
from dicomnode.upperlayer import Abort, Event, Fragment, ReleaseRequest, UpperLayer

log = logging.getLogger(__name__)

_BACKLOG = 128
_BUFFER_BYTES = 262144
_LINGER_S = 5.0
_UNASKED_CONNECTIONS = 64  # beyond the associations: connections that have not asked for one yet
_MAX_ACTION_BYTES = 32 << 20
_CANNOT_UNDERSTAND = 0xC000  # PS3.4 Table B.2-1


class Listener:
    """A Storage, Storage Commitment and Verification SCP for every transfer syntax.

    Parameters
    ----------
    host, port
        Where it listens; port 0 takes a free one, `port` tells which.
    commitment
        Answers storage commitment; None: that SOP class is not supported.
    tls
        Server side context: every connection is encrypted. None: none is.
    unknown_sop_classes
        Store what SOP classes nobody here has heard of, private ones too.
    max_pdu
        Largest PDU that peers may send, bytes (PS3.8 D.1).
    network_timeout_s
        An association silent for so long is aborted.
    artim_timeout_s
        From the connection to a whole A-ASSOCIATE-RQ, TLS handshake included (PS3.8 9.1.5).
    """

    def __init__(
        self,
        host: str,
        port: int,
        intake: Intake,
        *,
        access: Access,
        commitment: CommitmentSCP | None = None,
        tls: ssl.SSLContext | None = None,
        unknown_sop_classes: bool = True,
        max_pdu: int = 131072,
        network_timeout_s: float = 60.0,
        artim_timeout_s: float = 15.0,
    ) -> None:
        self.port = port
        self.intake = intake
        self.access = access
        self.commitment = commitment
        self.tls = tls
        self.unknown_sop_classes = unknown_sop_classes
        self.max_pdu = max_pdu
        self.network_timeout_s = network_timeout_s
        self.artim_timeout_s = min(artim_timeout_s, network_timeout_s)
        self.stopping = threading.Event()
        self._host = host
        self._socket: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._open: dict[_Connection, str] = {}  # associations, by calling AE title
        self._counts: Counter[str] = Counter()

    def start(self) -> None:
        """Bind and listen.

        Raises
        ------
        LocalError
            The port cannot be had.
        """
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._socket = socket.create_server((self._host, self.port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise LocalError(f"cannot listen on {self._host}:{self.port}: {error}") from error
        self.port = self._socket.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept_for_ever, name="listener", daemon=True)
        self._accepting.start()
        log.info("listening on %s:%d%s", self._host, self.port, "" if self.tls is None else " (TLS)")

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Take no more associations, let the open ones finish for `grace_s`, then abort them. May be called twice."""
        if self._socket is None or self._accepting is None:
            return
        self.stopping.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._accepting.join()
        self._socket.close()
        self._socket = None
        deadline = time.monotonic() + grace_s
        with self._lock:
            connections, associations = list(self._connections), list(self._open)
        for connection in associations:
            connection.thread.join(max(0.0, deadline - time.monotonic()))
        for connection in connections:
            connection.interrupt()
        for connection in connections:
            connection.thread.join(_LINGER_S)

    def counts(self) -> dict[str, int]:
        """How many connections ended how, since the start; `open` and `connections` as they stand now."""
        with self._lock:
            return {**self._counts, "open": len(self._open), "connections": len(self._connections)}

    def admit(self, connection: _Connection, request: AssociateRequest) -> negotiation.Rejection | None:
        """Let an association in, or say why not."""
        is_full = self.intake.is_full()
        with self._lock:
            rejection = negotiation.rejection(
                request,
                connection.address,
                self.access,
                open_calling=list(self._open.values()),
                is_full=is_full,
                resolve=addresses_of,
            )
            if rejection is None:
                self._open[connection] = request.calling_ae_title
        return rejection

    def left(self, connection: _Connection) -> None:
        """An association is over; its place is free."""
        with self._lock:
            self._open.pop(connection, None)

    def ended(self, connection: _Connection, outcome: str) -> None:
        """A connection's thread ends."""
        with self._lock:
            self._open.pop(connection, None)
            self._connections.discard(connection)
            self._counts[outcome] += 1

    def _accept_for_ever(self) -> None:
        assert self._socket is not None
        while not self.stopping.is_set():
            try:
                accepted, address = self._socket.accept()
            except OSError as error:
                if not self.stopping.is_set():
                    log.error("cannot accept a connection: %s", error)  # out of file handles, say
                    self.stopping.wait(0.1)
                continue
            connection = _Connection(self, accepted, address[0])
            with self._lock:
                is_flood = len(self._connections) >= self.access.max_associations + _UNASKED_CONNECTIONS
                if is_flood:
                    self._counts["turned away"] += 1
                else:
                    self._connections.add(connection)
            if is_flood:
                accepted.close()
            else:
                connection.thread.start()


class _End(Exception):  # noqa: N818 - how it ends, not an error
    """The association is over; `outcome` says how, `last_words` go to the peer."""

    def __init__(self, outcome: str, last_words: bytes = b"", detail: str = "") -> None:
        super().__init__(outcome)
        self.outcome, self.last_words, self.detail = outcome, last_words, detail


class _Connection:
    """One connection, from accept to close, in a thread of its own."""

    def __init__(self, listener: Listener, accepted: socket.socket, address: str) -> None:
        self.address = address
        self.thread = threading.Thread(target=self._run, name=f"association {address}", daemon=True)
        self._listener = listener
        self._intake = listener.intake
        self._socket = accepted
        self._layer = UpperLayer(listener.max_pdu)
        self._assembler = dimse.Assembler()
        self._source: Source | None = None
        self._opened_at: datetime | None = None
        self._abstract_syntaxes: dict[int, str] = {}
        self._transfer_syntaxes: dict[int, str] = {}
        self._command: Command | None = None  # whose data set is coming
        self._reception: Reception | None = None
        self._failure: Exception | None = None
        self._argument = bytearray()
        self._reports: dict[int, int] = {}  # of storage commitment, by message id
        self._stored = self._refused = 0

    def interrupt(self) -> None:
        """Have the thread abort its association and end."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RD)  # not SSLSocket's, which drops the encryption

    # ── the connection ──

    def _run(self) -> None:
        outcome = "failed"
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._converse()
        except _End as end:
            outcome = end.outcome
            self._finish(end)
        except ProtocolError as error:
            outcome = "protocol error"
            self._finish(_End(outcome, self._layer.abort(error.reason), str(error)))
        except TimeoutError:
            outcome = "timed out"
            self._finish(_End(outcome, self._layer.abort() if self._source else b""))  # PS3.8 9.2.3, AA-2 in Sta2
        except OSError as error:  # TLS errors too
            outcome = "connection lost"
            self._finish(_End(outcome, detail=str(error)))
        except Exception as error:
            # Without the error's text: it may quote the data set.
            log.error("association from %s: %s\n%s", self.address, type(error).__name__, stack(error))
            self._finish(_End(outcome, self._layer.abort()))
        finally:
            with suppress(OSError):
                self._socket.close()
            self._listener.ended(self, outcome)

    def _converse(self) -> None:
        listener = self._listener
        deadline = time.monotonic() + listener.artim_timeout_s
        self._socket.settimeout(listener.artim_timeout_s)
        if listener.tls is not None:
            self._socket = listener.tls.wrap_socket(self._socket, server_side=True)
        view = memoryview(bytearray(_BUFFER_BYTES))
        receive, take = self._socket.recv_into, self._layer.receive
        while True:
            if self._source is None:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            length = receive(view)
            if not length:
                if listener.stopping.is_set():
                    raise _End("aborted at stop", self._layer.abort())
                raise _End("connection lost" if self._source else "no request")
            for event in take(view[:length]):
                self._on_event(event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Fragment):
            for part in self._assembler.take(event):
                if isinstance(part, DataPart):
                    self._on_data(part)
                else:
                    self._on_command(part)
        elif isinstance(event, AssociateRequest):
            self._on_request(event)
        elif isinstance(event, ReleaseRequest):
            raise _End("released", self._layer.release())
        elif isinstance(event, Abort):
            raise _End("aborted by the peer", detail=f"source {event.source}, reason {event.reason}")

    def _finish(self, end: _End) -> None:
        """Leave, write down how it ended, then say the last words and wait for the peer to close (PS3.8 9.2, Sta13)."""
        if self._reception is not None:
            self._reception.discard()
        self._listener.left(self)
        if self._source is not None and self._opened_at is not None:
            outcome = f"{end.outcome}: {end.detail}" if end.detail else end.outcome
            self._intake.ended(
                self._source, self._opened_at, outcome=outcome, stored=self._stored, refused=self._refused
            )
            log.log(
                logging.INFO if end.outcome == "released" else logging.WARNING,
                "association of %s at %s: %s; %d instances stored, %d not stored",
                self._source.calling_ae_title, self.address, outcome, self._stored, self._refused,
            )  # fmt: skip
        elif end.outcome != "no request":
            log.warning("connection from %s: %s %s", self.address, end.outcome, end.detail)
        if not end.last_words:
            return
        with suppress(OSError):  # the peer may be gone: what had to be done is done
            self._socket.settimeout(_LINGER_S)
            self._socket.sendall(end.last_words)
            deadline = time.monotonic() + _LINGER_S
            while not self._listener.stopping.is_set() and time.monotonic() < deadline and self._socket.recv(65536):
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))

    def _on_request(self, request: AssociateRequest) -> None:
        listener = self._listener
        if rejection := listener.admit(self, request):
            result, source, reason, text = rejection.value
            detail = f"{request.calling_ae_title} calling {request.called_ae_title}: {text}"
            raise _End("rejected", self._layer.reject(result, source, reason), detail)
        answers = [
            negotiation.answer(
                context,
                unknown_sop_classes=listener.unknown_sop_classes,
                commitment=listener.commitment is not None,
            )
            for context in request.contexts
        ]
        for answer in answers:
            if answer.result == 0:
                self._abstract_syntaxes[answer.id] = answer.abstract_syntax
                self._transfer_syntaxes[answer.id] = answer.transfer_syntax
        self._source = Source.new(request.calling_ae_title, request.called_ae_title, self.address)
        self._opened_at = self._intake.clock()
        identity = Identity(IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME)
        self._socket.settimeout(listener.network_timeout_s)
        self._socket.sendall(self._layer.accept(request, answers, implementation=identity))

    # ── messages ──

    def _on_command(self, command: Command) -> None:
        abstract_syntax = self._abstract_syntaxes.get(command.context_id)
        if abstract_syntax is None:
            raise ProtocolError(f"message in presentation context {command.context_id}, which was not accepted")
        self._command, self._failure, self._reception = command, None, None
        self._argument.clear()
        if command.field == dimse.C_STORE_RQ and command.has_data_set and self._is_storage(abstract_syntax):
            try:
                self._reception = self._intake.begin(
                    sop_class_uid=command.sop_class_uid,
                    sop_instance_uid=command.sop_instance_uid,
                    transfer_syntax_uid=self._transfer_syntaxes[command.context_id],
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
        assert self._source is not None
        assert self._opened_at is not None
        status, comment = dimse.SUCCESS, ""
        try:
            if self._failure is not None:
                raise self._failure
            assert self._reception is not None
            self._intake.keep(self._reception, self._source, self._opened_at)
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
        abstract_syntax = self._abstract_syntaxes[command.context_id]
        if command.field == dimse.C_ECHO_RQ:
            self._answer(dimse.SUCCESS)
        elif command.field == dimse.C_STORE_RQ:
            self._refused += 1
            self._answer(_CANNOT_UNDERSTAND, "No data set, or not in a context of a storage SOP class")
        elif abstract_syntax == STORAGE_COMMITMENT_PUSH_MODEL and self._listener.commitment is not None:
            self._on_commitment(command, self._listener.commitment)
        elif command.field & dimse.IS_RESPONSE or command.field == dimse.C_CANCEL_RQ:
            log.warning("from %s: message 0x%04X is ignored", self.address, command.field)
        else:
            self._answer(dimse.UNRECOGNIZED_OPERATION)

    def _on_commitment(self, command: Command, commitment: CommitmentSCP) -> None:
        assert self._source is not None
        if command.field == dimse.N_ACTION_RQ:
            transfer_syntax = self._transfer_syntaxes[command.context_id]
            status, report = commitment.requested(command, bytes(self._argument), transfer_syntax, self._source)
            self._answer(status)
            if report is not None:
                self._reports[report.message_id] = report.commitment_id
                self._socket.sendall(self._layer.message(command.context_id, report.command, report.data_set))
        elif command.field == dimse.N_EVENT_REPORT_RQ | dimse.IS_RESPONSE:
            commitment_id = self._reports.pop(command.message_id, None)
            if commitment_id is not None:
                commitment.answered(commitment_id, command.status)
        else:
            self._answer(dimse.UNRECOGNIZED_OPERATION)

    def _is_storage(self, abstract_syntax: str) -> bool:
        return negotiation.is_storage(abstract_syntax, unknown_sop_classes=True)

    def _answer(self, status: int, comment: str = "") -> None:
        assert self._command is not None
        answer = dimse.response(self._command, status, comment)
        self._socket.sendall(self._layer.message(self._command.context_id, answer))


def addresses_of(host: str) -> set[str]:
    """What a host name resolves to."""
    with suppress(OSError):  # a name that cannot be resolved matches nobody
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    return set()
