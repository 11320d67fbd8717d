"""The Storage SCP: what a sender is told was stored would survive a power cut, or the answer says why it was not.

Law: data sets go to the disk as they come, never through decode and re-encode; 0x0000 is answered only after the
intake has sealed the file; nothing a patient could be known by is logged. The protocol stands in `upperlayer` and
`dimse`, the decisions in `negotiation`, what a message does in `messages`; here are sockets, threads and timers, one
thread for each connection.
"""

from __future__ import annotations

import logging
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from contextlib import suppress

from dicomnode import negotiation
from dicomnode.commitment import CommitmentSCP
from dicomnode.errors import LocalError, stack
from dicomnode.intake import Intake, is_too_slow
from dicomnode.messages import Messages
from dicomnode.negotiation import Access
from dicomnode.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicomnode.pdu import AssociateRequest, Identity, ProtocolError
from dicomnode.spool import Source
from dicomnode.upperlayer import Abort, Event, Fragment, ReleaseRequest, UpperLayer

log = logging.getLogger(__name__)

_BACKLOG = 128
_BUFFER_BYTES = 262144
_WORTH_WAITING_BYTES = 65536
_LINGER_S = 5.0
_UNASKED_CONNECTIONS = 64  # beyond the associations: connections that have not asked for one yet


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
        An association silent for so long is aborted (in the middle of a PDU after twice as long at most), and one whose
        message has not come much further in so long.
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
        self._socket = accepted
        self._layer = UpperLayer(listener.max_pdu)
        self._messages: Messages | None = None  # once the association is accepted

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
        except (TimeoutError, BlockingIOError):
            outcome = "timed out"
            self._finish(_End(outcome, self._layer.abort() if self._messages else b""))  # PS3.8 9.2.3, AA-2 in Sta2
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
        began, came = time.monotonic(), 0  # the message in hand, and how many bytes since
        while True:
            if self._messages is None:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            must_come = 0 if listener.tls else self._layer.must_come
            if must_come < _WORTH_WAITING_BYTES:
                length = receive(view)
            else:  # senders write a large PDU in several pieces: be woken once
                length = receive(view, min(must_come, _BUFFER_BYTES), socket.MSG_WAITALL)
            if not length:
                if listener.stopping.is_set():
                    raise _End("aborted at stop", self._layer.abort())
                raise _End("connection lost" if self._messages else "no request")
            now = time.monotonic()
            came += length
            if self._messages is None or not (self._layer.in_pdu or self._messages.in_message):
                began, came = now, 0
            elif is_too_slow(now - began, came, silence_s=listener.network_timeout_s):
                raise TimeoutError
            for event in take(view[:length]):
                self._on_event(event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Fragment):
            assert self._messages is not None  # the upper layer takes no data before
            self._messages.take(event)
        elif isinstance(event, AssociateRequest):
            self._on_request(event)
        elif isinstance(event, ReleaseRequest):
            raise _End("released", self._layer.release())
        elif isinstance(event, Abort):
            raise _End("aborted by the peer", detail=f"source {event.source}, reason {event.reason}")

    def _finish(self, end: _End) -> None:
        """Leave, write down how it ended, then say the last words and wait for the peer to close (PS3.8 9.2, Sta13)."""
        self._listener.left(self)
        if self._messages is not None:
            outcome = f"{end.outcome}: {end.detail}" if end.detail else end.outcome
            source, stored, refused = self._messages.close(outcome)
            log.log(
                logging.INFO if end.outcome == "released" else logging.WARNING,
                "association of %s at %s: %s; %d instances stored, %d not stored",
                source.calling_ae_title, self.address, outcome, stored, refused,
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
        self._messages = Messages(
            Source.new(request.calling_ae_title, request.called_ae_title, self.address),
            {answer.id: answer for answer in answers if answer.result == 0},
            listener.intake,
            listener.commitment,
            self._send,
        )
        identity = Identity(IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME)
        _wait_at_most(self._socket, listener.network_timeout_s)
        self._socket.sendall(self._layer.accept(request, answers, implementation=identity))

    def _send(self, context_id: int, command: bytes, data_set: bytes) -> None:
        self._socket.sendall(self._layer.message(context_id, command, data_set))


def _wait_at_most(connection: socket.socket, seconds: float) -> None:
    """Bound every later send and receive; BlockingIOError or TimeoutError after so long."""
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(seconds)
        return
    # The system's own time-out spares a poll before each call.
    connection.settimeout(None)
    whole, part = divmod(seconds, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(whole), int(part * 1e6)))


def addresses_of(host: str) -> set[str]:
    """What a host name resolves to."""
    with suppress(OSError):  # a name that cannot be resolved matches nobody
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    return set()
