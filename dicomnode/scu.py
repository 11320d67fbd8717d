"""An association that we open (PS3.8 7), and the operations that we ask for on it (PS3.7): blocking, in one thread.

Law: an association is open or gone, never in between: whatever goes wrong on it ends it and leaves as RemoteError
(worth another attempt) or RefusedError (not). Only an answer of the peer's own is an answer. TCP_NODELAY is set, and
before every read TCP_QUICKACK: a peer that writes its answers in two pieces with Nagle's algorithm on would otherwise
wait 40 ms for our delayed acknowledgement of the first.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO

from dicomnode import dimse, tls
from dicomnode.dimse import Assembler, Command, OnReport
from dicomnode.errors import LocalError, NodeError, RefusedError, RemoteError
from dicomnode.model import Instance
from dicomnode.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, FileHead
from dicomnode.pdu import (
    APPLICATION_CONTEXT_NAME,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
    Identity,
    ProposedContext,
    ProtocolError,
)
from dicomnode.remotes import Destination
from dicomnode.upperlayer import Abort, Event, Fragment, ReleaseRequest, ReleaseResponse, UpperLayer

CONTEXTS_AT_MOST = 128  # PS3.8 9.3.2.2: odd context IDs up to 255

_CONNECTION_TIMEOUT_S = 10.0
_RELEASE_TIMEOUT_S = 5.0
_MAX_PDU = 131072
_SENT_AT_ONCE = 262144
_SLOWEST_BYTES_PER_S = 100_000
_MAX_ANSWER_BYTES = 32 << 20


def rejection(peer: str, answer: AssociateReject) -> RemoteError:
    """The error for an A-ASSOCIATE-RJ, PS3.8 9.3.4: retried when the result, or its source, speaks of the moment."""
    reasons = {
        (1, 2): "application context name not supported",
        (1, 3): "calling AE title not recognized",
        (1, 7): "called AE title not recognized",
        (2, 2): "protocol version not supported",
        (3, 1): "temporary congestion",
        (3, 2): "local limit exceeded",
    }
    reason = reasons.get((answer.source, answer.reason), "no reason given")
    # Source 3 knows only congestion and limits; peers that call these permanent are not taken at their word.
    if answer.result == 1 and answer.source != 3:
        return RefusedError(f"{peer} rejected the association for good: {reason}")
    return RemoteError(f"{peer} rejected the association for now: {reason}")


class Association:
    """One association with a destination; made closed, `open` does all that may fail.

    Parameters
    ----------
    ae_title
        Ours.
    timeout_s
        How long the peer may take to answer, or the network not move; for the connection 10 s at most.
    on_report
        Takes storage commitment reports that come on this association.

    Attributes
    ----------
    accepted
        (abstract syntax, transfer syntax) → presentation context ID; empty where the peer accepted none.
    is_open
        Whether another operation makes sense.
    """

    def __init__(
        self, peer: Destination, *, ae_title: str, timeout_s: float = 60.0, on_report: OnReport | None = None
    ) -> None:
        self._peer = peer
        self._ae_title = ae_title
        self._timeout_s = timeout_s
        self._on_report = on_report
        self.accepted: dict[tuple[str, str], int] = {}
        self.is_open = False
        self._layer = UpperLayer(_MAX_PDU)
        self._assembler = Assembler()
        self._socket: socket.socket | None = None
        self._view = memoryview(bytearray(65536))
        self._last: Event | None = None
        self._command: Command | None = None
        self._data_set = bytearray()
        self._messages: deque[tuple[Command, bytes]] = deque()
        self._message_id = 0
        self._is_cancelled = False

    def open(self, contexts: Sequence[tuple[str, Sequence[str]]], *, scp_of: Sequence[str] = ()) -> None:
        """Connect and negotiate.

        Parameters
        ----------
        contexts
            Abstract syntax and transfer syntaxes of each presentation context, at most 128.
        scp_of
            Abstract syntaxes of which we want to be the SCP.

        Raises
        ------
        RefusedError
            The peer rejects us for good.
        RemoteError
            No association this time.
        LocalError
            Our certificate cannot be used.
        """
        proposed = tuple(
            ProposedContext(2 * number + 1, abstract, tuple(syntaxes))
            for number, (abstract, syntaxes) in enumerate(contexts)
        )
        titles = self._peer.ae_title.encode().ljust(16) + self._ae_title.encode().ljust(16)
        request = AssociateRequest(
            1, titles, APPLICATION_CONTEXT_NAME, proposed, _MAX_PDU, roles=dict.fromkeys(scp_of, (0, 1))
        )
        identity = Identity(IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME)
        with self._ending("no association"):
            self._connect()
            self._send(self._layer.request(request, implementation=identity))
            deadline = time.monotonic() + self._timeout_s
            while not isinstance(self._last, AssociateAccept):
                self._read(deadline)
            self.is_open = True
        known = {each.id: each for each in proposed}
        for answer in self._last.contexts:
            context = known.get(answer.id)
            if answer.result == 0 and context is not None and answer.transfer_syntax in context.transfer_syntaxes:
                self.accepted[context.abstract_syntax, answer.transfer_syntax] = context.id

    def store(
        self, context_id: int, instance: Instance | FileHead, data_set: BinaryIO, size: int, *, priority: int = 0
    ) -> int:
        """C-STORE `size` bytes of `data_set`; the status answered (PS3.4 B.2.3), with its Error Comment in `comment`.

        Parameters
        ----------
        priority
            0 medium, 1 high, 2 low (PS3.7 9.3.1.1).

        Raises
        ------
        RemoteError
            No answer came; the association is gone.
        LocalError
            The data set cannot be read; the association is gone, since part of it is on its way.
        """
        self._message_id = self._message_id % 65535 + 1
        command = dimse.composite_request(
            dimse.C_STORE_RQ, self._message_id, instance.sop_class_uid, instance.sop_instance_uid, priority=priority
        )
        with self._ending("the instance was not sent whole"):
            parts = self._layer.fragments(context_id, command, is_command=True)
            step = self._layer.room * max(1, _SENT_AT_ONCE // self._layer.room)
            left = size
            while True:
                content = _read_from(data_set, min(step, left))
                left -= len(content)
                parts += self._layer.fragments(context_id, memoryview(content), is_last=not left)
                self._send(b"".join(parts))
                parts = []
                if not left:
                    break
        # what the network has taken is not what the peer has written to its disk
        answer, _ = self._answer(dimse.C_STORE_RQ, self._timeout_s + size / _SLOWEST_BYTES_PER_S)
        self.comment = answer.comment
        return answer.status

    comment = ""
    """Error Comment of the last C-STORE answer."""

    def ask(
        self, context_id: int, request: Callable[[int], bytes], data_set: bytes, field: int
    ) -> Iterator[tuple[Command, bytes]]:
        """Every answer to a request, to its last; must be read to its end.

        Parameters
        ----------
        request
            Message ID → command set, of Command Field `field`.
        """
        self._message_id = self._message_id % 65535 + 1
        with self._ending("the request was not sent"):
            self._send(self._layer.message(context_id, request(self._message_id), data_set))
        while True:
            answer = self._answer(field, self._timeout_s)
            yield answer
            if answer[0].status not in dimse.PENDING:
                return

    def listen(self, for_s: float, until: Callable[[], bool]) -> None:
        """Take reports until `until` holds, for so long at most, or until the peer ends the association."""
        deadline = time.monotonic() + for_s
        try:
            while self.is_open and not until() and time.monotonic() < deadline:
                with self._ending("listening"):
                    with suppress(TimeoutError):
                        self._read(min(deadline, time.monotonic() + 1.0))
                    while self._messages:
                        self._on_request(*self._messages.popleft())
        except RemoteError:  # it may end the association: its report then comes on one of its own
            return

    def release(self) -> None:
        """End it in good order; nothing happens where it has ended. Everything was answered, so no error matters."""
        if self.is_open:
            self.is_open = False
            with suppress(NodeError), self._ending("release"):
                self._send(self._layer.request_release())
                deadline = time.monotonic() + min(_RELEASE_TIMEOUT_S, self._timeout_s)
                while not isinstance(self._last, ReleaseResponse):
                    self._read(deadline)
        self._close()

    def abort(self) -> None:
        """End it at once."""
        self.is_open = False
        if self._socket is not None and not self._layer.is_closed:
            with suppress(OSError):  # the peer may be gone
                self._socket.settimeout(1.0)
                self._socket.sendall(self._layer.abort())
        self._close()

    def cancel(self) -> None:
        """From another thread: end whatever it waits for."""
        self._is_cancelled = True
        sock = self._socket
        if sock is not None:
            with suppress(OSError):  # closed already
                sock.shutdown(socket.SHUT_RDWR)

    # ── the connection ──

    def _connect(self) -> None:
        peer = self._peer
        context = None if peer.tls is None else tls.client_context(peer.tls)
        try:
            sock = socket.create_connection((peer.host, peer.port), min(_CONNECTION_TIMEOUT_S, self._timeout_s))
        except socket.gaierror as error:
            raise RemoteError(f"{peer.name}: cannot resolve {peer.host}: {error.strerror}") from error
        except OSError as error:
            raise RemoteError(f"{peer.name}: unreachable at {peer.host}:{peer.port}: {error}") from error
        self._socket = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if context is not None:
            try:
                self._socket = context.wrap_socket(sock, server_hostname=peer.host)
            except (ssl.SSLError, ssl.CertificateError) as error:
                raise RemoteError(f"{peer.name}: no TLS with {peer.host}:{peer.port}: {error}") from error
        if self._is_cancelled:
            raise RemoteError(f"{peer.name}: not needed any more")

    def _send(self, data: bytes) -> None:
        if self._socket is None:
            raise RemoteError(f"{self._peer.name}: the association has ended")
        self._socket.settimeout(self._timeout_s)
        self._socket.sendall(data)

    def _read(self, deadline: float) -> None:
        """Take in what comes next; TimeoutError when nothing came by then."""
        sock = self._socket
        if sock is None:
            raise RemoteError(f"{self._peer.name}: the association has ended")
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        if hasattr(socket, "TCP_QUICKACK"):  # Linux; it forgets the wish
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        length = sock.recv_into(self._view)
        if not length:
            raise RemoteError(f"{self._peer.name} closed the connection")
        for event in self._layer.receive(self._view[:length]):
            self._on_event(event)

    def _on_event(self, event: Event) -> None:
        self._last = event
        if isinstance(event, Fragment):
            self._on_fragment(event)
        elif isinstance(event, AssociateReject):
            raise rejection(self._peer.name, event)
        elif isinstance(event, Abort):
            raise RemoteError(f"{self._peer.name} aborted: source {event.source}, reason {event.reason}")
        elif isinstance(event, ReleaseRequest):
            self._send(self._layer.release())
            raise RemoteError(f"{self._peer.name} released the association")

    def _on_fragment(self, fragment: Fragment) -> None:
        for part in self._assembler.take(fragment):
            if isinstance(part, Command):
                self._command, is_whole = part, not part.has_data_set
            else:
                self._data_set += part.data
                is_whole = part.is_last
                if len(self._data_set) > _MAX_ANSWER_BYTES:
                    raise ProtocolError(f"data set of more than {_MAX_ANSWER_BYTES} bytes in an answer")
            if is_whole:
                assert self._command is not None
                self._messages.append((self._command, bytes(self._data_set)))
                self._data_set.clear()

    def _answer(self, field: int, timeout_s: float) -> tuple[Command, bytes]:
        """The answer to the request in hand; requests of the peer are dealt with on the way."""
        with self._ending(f"no answer within {timeout_s:.0f} s, or it broke off"):
            deadline = time.monotonic() + timeout_s
            while True:
                while not self._messages:
                    self._read(deadline)
                command, data_set = self._messages.popleft()
                if not command.field & dimse.IS_RESPONSE:
                    self._on_request(command, data_set)
                elif (command.field, command.message_id) == (field | dimse.IS_RESPONSE, self._message_id):
                    return command, data_set
                else:
                    raise ProtocolError(f"answer 0x{command.field:04X} to message {command.message_id}, not asked for")

    def _on_request(self, command: Command, data_set: bytes) -> None:
        status = dimse.UNRECOGNIZED_OPERATION
        if command.field == dimse.C_ECHO_RQ:
            status = dimse.SUCCESS
        elif command.field == dimse.N_EVENT_REPORT_RQ and self._on_report is not None:
            syntaxes = {context_id: syntax for (_, syntax), context_id in self.accepted.items()}
            if command.context_id not in syntaxes:
                raise ProtocolError(f"message in presentation context {command.context_id}, which was not accepted")
            status = self._on_report(command, data_set, syntaxes[command.context_id])
        self._send(self._layer.message(command.context_id, dimse.response(command, status)))

    @contextmanager
    def _ending(self, what: str) -> Iterator[None]:
        """Whatever is raised within ends the association, and leaves as an error of the node."""
        name = self._peer.name
        try:
            yield
        except NodeError:
            self.abort()
            raise
        except ProtocolError as error:
            self.abort()
            raise RemoteError(f"{name} broke the protocol: {error}") from error
        except TimeoutError as error:
            self.abort()
            raise RemoteError(f"{name}: {what}: timed out") from error
        except OSError as error:
            self.abort()
            raise RemoteError(f"{name}: {what}: {error.strerror or type(error).__name__}") from error

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _read_from(file: BinaryIO, size: int) -> bytes:
    try:
        content = file.read(size)
    except OSError as error:
        raise LocalError(f"archive: cannot read the instance: {error}") from error
    if len(content) != size:
        raise LocalError("archive: cannot read the instance: its file is shorter than it was")
    return content
