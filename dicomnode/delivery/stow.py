"""STOW-RS (PS3.18 10.5) as the way to a destination: one request for each instance, over connections that stay.

Law: 200 means stored, as the standard says, unless the answer names the instance among the failed ones; of any other
answer only what it says itself counts.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from dicomnode.archive import Archive
from dicomnode.delivery import encoding, policy
from dicomnode.delivery.policy import Outcome
from dicomnode.errors import LocalError, RefusedError, RemoteError
from dicomnode.model import Delivery, DeliveryState
from dicomnode.remotes import Destination
from dicomnode.tls import client_context

_MAX_ANSWER_BYTES = 4 << 20
_SENT_AT_ONCE = 262144
_BOUNDARY = b"dicomnode-5d1d4bd6c3f94a7f9f6a0c1c0b7f1e52"
_HEAD = b"--" + _BOUNDARY + b"\r\nContent-Type: application/dicom\r\n\r\n" + bytes(128)
_TAIL = b"\r\n--" + _BOUNDARY + b"--\r\n"
_PREAMBLE_BYTES = 128
_FAILED_SEQUENCE, _FAILURE_REASON, _WARNING_REASON = "00081198", "00081197", "00081196"
_REFERENCED_SEQUENCE, _REFERENCED_INSTANCE = "00081199", "00081155"
_TRY_AGAIN = (408, 425, 429)


class StowRs:
    """One HTTP connection to a STOW-RS service."""

    def __init__(self, destination: Destination, archive: Archive) -> None:
        self._name = destination.name
        self._archive = archive
        self._destination = destination
        self._path = urlsplit(destination.url).path + "/studies"
        self._connection: http.client.HTTPConnection | None = None

    @property
    def is_open(self) -> bool:
        """Whether another instance can be sent on it."""
        return self._connection is not None

    def open(self) -> None:
        """Connect.

        Raises
        ------
        RemoteError
            The service cannot be reached.
        LocalError
            Our certificate cannot be used.
        """
        peer = self._destination
        connection: http.client.HTTPConnection
        if urlsplit(peer.url).scheme == "https":
            context = ssl.create_default_context() if peer.tls is None else client_context(peer.tls)
            connection = http.client.HTTPSConnection(peer.host, peer.port, timeout=peer.timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(peer.host, peer.port, timeout=peer.timeout_s)
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError(f"{peer.name}: unreachable at {peer.url}: {error}") from error
        self._connection = connection

    def send(self, delivery: Delivery) -> tuple[Outcome, int | None]:
        """Store one instance as it is; what became of it, and its failure or warning reason or 0 where it was told."""
        connection, instance = self._connection, delivery.instance
        if connection is None:
            raise RemoteError(f"{self._name}: the connection has ended")
        with encoding.encoded(self._archive.path(instance), instance, instance.transfer_syntax_uid) as (file, _):
            size = os.fstat(file.fileno()).st_size - _PREAMBLE_BYTES
            file.seek(_PREAMBLE_BYTES)
            headers = {
                "Content-Type": f'multipart/related; type="application/dicom"; boundary={_BOUNDARY.decode()}',
                "Content-Length": str(len(_HEAD) + size + len(_TAIL)),
                "Accept": "application/dicom+json",
            }
            try:
                with suppress(BrokenPipeError, ConnectionResetError):  # its answer may be on its way already
                    connection.request("POST", self._path, body=_body(file, size), headers=headers)
                answer = connection.getresponse()
                status, content = answer.status, answer.read(_MAX_ANSWER_BYTES + 1)
            except LocalError:
                self.abort()
                raise
            except (OSError, http.client.HTTPException) as error:
                self.abort()
                raise RemoteError(f"{self._name}: no answer, or it broke off: {type(error).__name__}") from error
        if len(content) > _MAX_ANSWER_BYTES or answer.will_close:
            self.abort()
        return _outcome(self._name, instance.sop_instance_uid, status, _parsed(content))

    def release(self) -> None:
        """Close it."""
        self.abort()

    def abort(self) -> None:
        """Close it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def cancel(self) -> None:
        """From another thread: end what it waits for."""
        sock = None if self._connection is None else self._connection.sock
        if sock is not None:
            with suppress(OSError):  # closed already
                sock.shutdown(socket.SHUT_RDWR)


def _body(file: BinaryIO, size: int) -> Iterator[bytes]:
    yield _HEAD
    left = size
    while left:
        try:
            content = file.read(min(left, _SENT_AT_ONCE))
        except OSError as error:
            raise LocalError(f"archive: cannot read the instance: {error}") from error
        if not content:
            raise LocalError("archive: cannot read the instance: its file is shorter than it was")
        left -= len(content)
        yield content
    yield _TAIL


def _outcome(name: str, sop_instance_uid: str, status: int, answer: Any) -> tuple[Outcome, int | None]:
    """What an answer means for the one instance of its request (PS3.18 Tables 10.5.3-1 and I.2-2)."""
    failure = _reason(answer, _FAILED_SEQUENCE, _FAILURE_REASON, sop_instance_uid)
    if failure is not None:
        result = policy.outcome(failure)
        # what stands among the failed was not stored, whatever reason is given
        state = DeliveryState.FAILED if result.state is DeliveryState.DELIVERED else result.state
        meaning = result.meaning if failure else "among the failed, without a reason"
        return Outcome(state, f"HTTP {status}: {meaning}"), failure or None
    stored = _reason(answer, _REFERENCED_SEQUENCE, _WARNING_REASON, sop_instance_uid)
    if status == 200 or (status == 202 and stored is not None):
        warning = stored or 0
        meaning = policy.outcome(warning).meaning if warning else ""
        return Outcome(DeliveryState.DELIVERED, meaning), warning
    if status >= 500 or status in _TRY_AGAIN or status == 202:
        raise RemoteError(f"{name}: HTTP {status}, which does not say that it was stored")
    raise RefusedError(f"{name}: HTTP {status}")


def _reason(answer: Any, sequence: str, reason: str, sop_instance_uid: str) -> int | None:
    """The reason given for the instance in a sequence, 0 where none is; None where it does not stand there."""
    try:
        for item in answer[sequence]["Value"]:
            if item[_REFERENCED_INSTANCE]["Value"][0] == sop_instance_uid:
                return int(item[reason]["Value"][0]) if reason in item else 0
    except (KeyError, TypeError, IndexError, ValueError):  # no such sequence, or not as PS3.18 F.2 has it
        return None
    return None


def _parsed(content: bytes) -> Any:
    try:
        found = json.loads(content)
    except ValueError:  # XML, HTML or nothing
        return {}
    return found[0] if isinstance(found, list) and found else found
