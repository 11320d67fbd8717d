"""The Storage SCP: what a sender is told was stored is on the disk and in the index, or the answer says why not.

Law: data sets go to the disk as they come, never through decode and re-encode; 0x0000 is answered only after the
file is durable and the index has committed; nothing a patient could be known by is logged.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pydicom
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import (
    AE,
    ALL_TRANSFER_SYNTAXES,
    AllStoragePresentationContexts,
    _config,
    evt,
)
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import by pynetdicom
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.archive import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    Archive,
    Incoming,
)
from dicomnode.errors import LocalError, stack
from dicomnode.index import Added, Index
from dicomnode.model import InstanceHeader

log = logging.getLogger(__name__)

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110  # PS3.7 C.5.22
DUPLICATE_SOP_INSTANCE = 0x0111  # PS3.7 C.5.9
OUT_OF_RESOURCES = 0xA700  # PS3.4 Table B.2-1, as the next two
DATA_SET_DOES_NOT_MATCH_SOP_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000

# PS3.8 9.3.4: rejected-permanent, by the service user, calling-AE-title-not-recognized.
_CALLING_AE_TITLE_NOT_RECOGNIZED = (1, 1, 3)

# The acceptor chooses among the transfer syntaxes of one context, in this order. Explicit VR first: it keeps private
# elements' VRs, and no sender is made to compress what it proposes both ways.
_TRANSFER_SYNTAXES = [
    ExplicitVRLittleEndian,
    *(uid for uid in ALL_TRANSFER_SYNTAXES if uid != ExplicitVRLittleEndian),
]

_LARGE_ELEMENT_BYTES = 65536
_BACKLOG = 128
_ACSE_TIMEOUT_S = 15.0  # from the connection to the A-ASSOCIATE-RQ; it counts as an association meanwhile
_RETRY_S = 2.0


class Listener:
    """A Storage and Verification SCP for every storage SOP class and transfer syntax that pynetdicom knows.

    Parameters
    ----------
    ae_title, host, port
        Where it listens; port 0 takes a free one, `port` tells which. Any called AE title is served.
    header_of
        What the index must know, from a data set without its pixel data; whatever it raises means that the instance
        cannot be understood.
    known_peers
        (calling AE title, host name or address, None for any) of those who may open an association; None: anybody.
    max_associations
        Above it, associations are rejected transiently (PS3.8 9.3.4).
    max_pdu
        Largest PDU that peers may send, bytes (PS3.8 D.1).
    network_timeout_s
        An association silent for so long, or a peer that stops in the middle of a PDU, is cut off.
    """

    def __init__(
        self,
        ae_title: str,
        host: str,
        port: int,
        archive: Archive,
        index: Index,
        header_of: Callable[[Dataset], InstanceHeader],
        *,
        known_peers: Collection[tuple[str, str | None]] | None = None,
        max_associations: int = 20,
        max_pdu: int = 131072,
        network_timeout_s: float = 60.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.port = port
        self._host = host
        self._archive = archive
        self._index = index
        self._header_of = header_of
        self._known_peers = known_peers
        self._clock = clock
        self._stopping = threading.Event()
        self._server: ThreadedAssociationServer | None = None
        self._ae = AE(ae_title)
        self._ae.implementation_class_uid = pydicom.uid.UID(IMPLEMENTATION_CLASS_UID)
        self._ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        self._ae.maximum_associations = max_associations
        self._ae.maximum_pdu_size = max_pdu
        self._ae.network_timeout = self._ae.dimse_timeout = network_timeout_s
        self._ae.acse_timeout = min(_ACSE_TIMEOUT_S, network_timeout_s)
        self._ae.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            self._ae.add_supported_context(str(context.abstract_syntax), _TRANSFER_SYNTAXES)

    def start(self) -> None:
        """Bind and listen.

        Raises
        ------
        LocalError
            The port cannot be had.
        """
        # A calling AE title or implementation name with odd bytes is no reason to refuse images.
        _config.CODECS = ("ascii", "utf-8", "latin-1")
        # Nor is a value that its VR does not allow; and the warnings of pydicom would quote it.
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, self._on_connection),
            (evt.EVT_CONN_CLOSE, _on_connection_closed),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_C_ECHO, lambda _event: SUCCESS),
            (evt.EVT_C_STORE, self._on_c_store),
        ]
        try:
            self._server = self._ae.start_server((self._host, self.port), block=False, evt_handlers=handlers)
        except OSError as error:
            raise LocalError(f"cannot listen on {self._host}:{self.port}: {error}") from error
        assert self._server is not None
        assert self._server.socket is not None
        self._server.socket.listen(_BACKLOG)  # pynetdicom's own backlog is 5
        self.port = self._server.server_address[1]
        log.info("listening as %s on %s:%d", self._ae.ae_title, self._host, self.port)

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Take no more associations, let the open ones finish for `grace_s`, then abort them. May be called twice."""
        if self._server is None:
            return
        self._stopping.set()
        self._server.shutdown()
        deadline = time.monotonic() + grace_s
        open_associations = self._server.active_associations
        for association in open_associations:
            association.join(max(0.0, deadline - time.monotonic()))
        for association in open_associations:
            if association.is_alive():
                log.warning("aborting an association that did not end within %.0f s", grace_s)
                association.abort()
                association.join(_RETRY_S)
        self._server = None

    # ── associations ──

    def _on_connection(self, event: evt.Event) -> None:
        """Before the association's threads run: stream its data sets to the archive, and see its end."""
        association = event.assoc
        reception = _Reception(association, self._archive)
        association.dimse = reception
        sock = association.dul.socket.socket  # type: ignore[union-attr]  # set for an acceptor
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # type: ignore[union-attr]
        sock.settimeout(self._ae.network_timeout)  # type: ignore[union-attr]  # or half a PDU would hold us forever
        run = association.run

        def run_and_close() -> None:
            # pynetdicom has several events for an association's end, and ends that raise none. The thread's end is
            # the one that all share, and no instance of the association can come after it.
            try:
                run()
            finally:
                self._close(reception)

        association.run = run_and_close  # type: ignore[method-assign]

    def _on_requested(self, event: evt.Event) -> None:
        """Turn away those who are not known."""
        requestor = event.assoc.requestor
        calling_ae_title = requestor.primitive.calling_ae_title  # type: ignore[union-attr]
        if self._known_peers is None or _is_known(calling_ae_title, requestor.address, self._known_peers):
            return
        log.warning("rejected association: %s at %s is not known", calling_ae_title, requestor.address)
        event.assoc.acse.send_reject(*_CALLING_AE_TITLE_NOT_RECOGNIZED)
        event.assoc.kill()  # returns once the rejection is out and the connection closed

    def _association_id(self, association: Association, reception: _Reception) -> int:
        """The association's row, opened with its first instance: nobody waits for one that sends none."""
        if reception.association_id is None:
            primitive = association.requestor.primitive
            reception.association_id = self._index.open_association(
                calling_ae_title=primitive.calling_ae_title,  # type: ignore[union-attr]
                called_ae_title=primitive.called_ae_title,  # type: ignore[union-attr]
                address=association.requestor.address,
                now=self._clock(),
            )
        return reception.association_id

    def _close(self, reception: _Reception) -> None:
        reception.discard()
        if reception.association_id is None:
            return
        while True:
            try:
                self._index.close_association(reception.association_id, now=self._clock())
                break
            except LocalError as error:
                # Its series would never be complete. After a stop, the next start closes what was left open.
                log.error("association %d: cannot record its end: %s", reception.association_id, error)
                if self._stopping.wait(_RETRY_S):
                    return
        log.info(
            "association %d closed: %d instances stored, %d not stored",
            reception.association_id,
            reception.stored,
            reception.refused,
        )

    # ── instances ──

    def _on_c_store(self, event: evt.Event) -> int | Dataset:
        """Answer a C-STORE request; the only place where an outcome becomes a status."""
        reception: object = event.assoc.dimse
        received: object = event.request._dataset_file
        assert isinstance(reception, _Reception)
        assert isinstance(received, _DataSetFile)
        try:
            self._store(event.assoc, reception, received)
            reception.stored += 1
            return SUCCESS
        except _Refusal as refusal:
            status, comment = refusal.status, str(refusal)
        except LocalError as error:
            status, comment = OUT_OF_RESOURCES, "Not stored: out of resources"
            log.error("instance not stored: %s", error)
        except Exception as error:
            status, comment = PROCESSING_FAILURE, "Not stored: internal error"
            # Without the error's text: it may quote the data set.
            log.error("instance not stored: %s\n%s", type(error).__name__, stack(error))
        reception.refused += 1
        log.warning("association %s: answered 0x%04X, %s", reception.association_id, status, comment)
        answer = Dataset()
        answer.Status = status
        answer.ErrorComment = comment
        return answer

    def _store(self, association: Association, reception: _Reception, received: _DataSetFile) -> None:
        incoming = received.complete()
        header = self._understand(incoming)
        association_id = self._association_id(association, reception)
        instance = self._archive.keep(incoming)
        added = self._index.add_instance(instance, header, association_id=association_id, now=self._clock())
        if added is Added.CONFLICT:
            self._archive.remove(instance)
            # The sender still owns it. Which of two contents a UID means is not for us to choose.
            raise _Refusal(DUPLICATE_SOP_INSTANCE, "SOP Instance UID is stored with other content")

    def _understand(self, incoming: Incoming) -> InstanceHeader:
        """Read what comes before the pixel data; refuse what is not a DICOM data set, or another than announced."""
        try:
            dataset = pydicom.dcmread(incoming.path, stop_before_pixels=True, defer_size=_LARGE_ELEMENT_BYTES)
            uids = str(dataset.SOPInstanceUID), str(dataset.SOPClassUID)
            header = self._header_of(dataset)
        except Exception as error:
            log.warning("cannot understand a data set: %s\n%s", type(error).__name__, stack(error))
            raise _Refusal(CANNOT_UNDERSTAND, "Data set cannot be parsed") from None
        if not (header.study_instance_uid and header.series_instance_uid):
            # Type 1 in every composite IOD (PS3.3 C.7.2.1, C.7.3.1); without them strangers would make one series.
            raise _Refusal(CANNOT_UNDERSTAND, "No Study or Series Instance UID")
        if uids != (incoming.sop_instance_uid, incoming.sop_class_uid):
            raise _Refusal(
                DATA_SET_DOES_NOT_MATCH_SOP_CLASS,
                "SOP Class or Instance UID differs from the command's",
            )
        return header


class _Refusal(Exception):  # noqa: N818 - an answer, not an error
    """An instance is not stored, and that is the sender's affair; the text is the Error Comment (LO, 64)."""

    def __init__(self, status: int, comment: str) -> None:
        super().__init__(comment)
        self.status = status


class _Reception(DIMSEServiceProvider):
    """One association's DIMSE layer, whose incoming data sets go to the archive instead of into memory.

    pynetdicom can write to files itself, but then a full disk ends the association instead of being answered, the
    folder is the whole process's temporary one, and aborted transfers leave their files behind.
    """

    def __init__(self, association: Association, archive: Archive) -> None:
        super().__init__(association)
        self._archive = archive
        self._files: list[_DataSetFile] = []
        self.association_id: int | None = None
        self.stored = 0
        self.refused = 0

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Take in fragments one by one, so that the file is there before the first of a data set's."""
        for fragment in primitive.presentation_data_value_list:
            part = P_DATA()
            part.presentation_data_value_list.append(fragment)
            try:
                super().receive_primitive(part)
                self._prepare_file()
            except Exception as error:
                log.error("cannot understand a message: %s\n%s", type(error).__name__, stack(error))
                self.dul.event_queue.put("Evt19")  # PS3.8 9.2: invalid PDU, the association is aborted
                return

    def _prepare_file(self) -> None:
        """Once a C-STORE command is complete, have its data set written to a file."""
        message = self.message
        if not isinstance(message, C_STORE_RQ) or message._data_set_file is not None:
            return
        context = self.assoc._accepted_cx[message.context_id]  # type: ignore[index]
        file = _DataSetFile(
            self._archive,
            sop_class_uid=str(message.command_set.AffectedSOPClassUID),
            sop_instance_uid=str(message.command_set.AffectedSOPInstanceUID),
            transfer_syntax_uid=str(context.transfer_syntax[0]),
        )
        self._files = [each for each in self._files if not each.closed] + [file]
        message._data_set_file = file  # type: ignore[assignment]

    def discard(self) -> None:
        """Remove what came only in part, or came and was never answered."""
        for file in self._files:
            file.close()


class _DataSetFile:
    """Stands in for the temporary file that pynetdicom writes a data set to and closes after the answer.

    Trouble is kept for the answer: an exception here, in the thread that reads the network, would only abort.
    """

    def __init__(self, archive: Archive, **uids: str) -> None:
        self.closed = False
        self.file = self  # pynetdicom calls file.flush() after every fragment
        self.name = ""  # pynetdicom removes the file of this name after the answer: `close` is enough
        self._incoming: Incoming | None = None
        self._failure: LocalError | None = None
        try:
            self._incoming = archive.receive(**uids)
        except LocalError as error:
            self._failure = error

    def write(self, data: bytes) -> None:
        """Append a fragment, unless one could not be written before."""
        if self._incoming is None:
            return
        try:
            self._incoming.write(data)
        except LocalError as error:
            self._failure = error
            self._incoming.discard()
            self._incoming = None

    def flush(self) -> None:
        """Nothing: once, when complete, is enough."""

    def complete(self) -> Incoming:
        """The whole instance, readable at its path; LocalError if the disk did not take it."""
        if self._incoming is None:
            raise self._failure or LocalError("archive: the data set was closed before it was stored")
        self._incoming.flush()
        return self._incoming

    def close(self) -> None:
        """Remove the temporary file, unless the archive has kept it."""
        self.closed = True
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None


def _on_connection_closed(event: evt.Event) -> None:
    """Wake an association that still waits for its request: load balancers that only connect would use up all."""
    if event.assoc.requestor.primitive is None:
        event.assoc.dul.to_user_queue.put(None)  # what a time-out looks like


def _is_known(calling_ae_title: str, address: str, known_peers: Collection[tuple[str, str | None]]) -> bool:
    hosts = [host for ae_title, host in known_peers if ae_title == calling_ae_title]
    return None in hosts or any(address in _addresses(host) for host in hosts if host is not None)


def _addresses(host: str) -> set[str]:
    with suppress(OSError):  # a name that cannot be resolved matches nobody
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    return set()
