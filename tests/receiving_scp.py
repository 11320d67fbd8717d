"""A real Storage SCP on loopback that collects what it is sent, and can refuse, die, hang or turn callers away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socketserver import BaseServer
from typing import Any, Self

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.uid import UID
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

DIE = -1
"""An answer: the connection breaks off without one."""
HANG = -2
"""An answer: none comes, and the connection stays open."""


@dataclass(frozen=True)
class Received:
    """One C-STORE request; `data_set` is encoded as it came."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    data_set: bytes
    association: int
    status: int

    def dataset(self) -> Dataset:
        """The data set, decoded."""
        syntax = UID(self.transfer_syntax_uid)
        dataset = read_dataset(DicomBytesIO(self.data_set), syntax.is_implicit_VR, syntax.is_little_endian)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        return dataset


class ReceivingSCP:
    """Listens from `start` to `stop`, which a `with` block does.

    Parameters
    ----------
    port
        0 takes a free one at the first start; the same one is taken at every later start.
    answer
        SOP Instance UID → status, DIE or HANG. Default: success.
    sop_classes, transfer_syntaxes
        What it accepts. Default: everything.
    known
        Calling AE titles it accepts; others are rejected permanently (PS3.8 9.3.4: 1, 1, 3). Empty: anybody.
    """

    def __init__(
        self,
        *,
        ae_title: str = "PACS",
        port: int = 0,
        answer: Callable[[str], int] = lambda _uid: 0x0000,
        sop_classes: Sequence[str] | None = None,
        transfer_syntaxes: Sequence[str] | None = None,
        known: Sequence[str] = (),
        max_associations: int = 10,
    ) -> None:
        self.ae_title = ae_title
        self.port = port
        self.answer = answer
        self.requests: list[Received] = []
        self.associations = 0
        self._released = threading.Event()
        self._server: Any = None
        self._ae = AE(ae_title)
        self._ae.maximum_associations = max_associations
        self._ae.require_calling_aet = list(known)
        self._ae.add_supported_context(Verification)
        for uid in sop_classes or [str(each.abstract_syntax) for each in AllStoragePresentationContexts]:
            self._ae.add_supported_context(uid, list(transfer_syntaxes or ALL_TRANSFER_SYNTAXES))

    def start(self) -> None:
        """Listen."""
        self._released.clear()
        self._server = self._ae.make_server(
            ("127.0.0.1", self.port), evt_handlers=self.handlers(), server_class=ThreadedAssociationServer
        )
        self.port = self._server.server_address[1]
        # Not AE.start_server: its thread looks every half second whether it shall stop, too long for many tests.
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handlers(self) -> list[Any]:
        """What it does when something comes."""
        return [(evt.EVT_C_STORE, self._on_c_store), (evt.EVT_ACCEPTED, self._on_accepted)]

    def stop(self) -> None:
        """Close the port and every connection; what was received stays."""
        self._released.set()
        if self._server is None:
            return
        BaseServer.shutdown(self._server)
        self._server.server_close()
        for association in self._server.active_associations:
            association.abort()
            association.join(10)
        self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def stored(self) -> list[Received]:
        """What was answered with success or a storing warning, in order."""
        return [each for each in self.requests if each.status in (0x0000, 0xB000, 0xB006, 0xB007)]

    @property
    def stored_uids(self) -> list[str]:
        """Their SOP Instance UIDs, in order, repeated where an instance came again."""
        return [each.sop_instance_uid for each in self.stored]

    def _on_accepted(self, _event: evt.Event) -> None:
        self.associations += 1

    def _on_c_store(self, event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        status = self.answer(uid)
        self.requests.append(
            Received(
                sop_instance_uid=uid,
                sop_class_uid=str(event.request.AffectedSOPClassUID),
                transfer_syntax_uid=str(event.context.transfer_syntax),
                data_set=event.encoded_dataset(include_meta=False),
                association=self.associations,
                status=status,
            )
        )
        if status == HANG:
            self._released.wait()
        if status in (DIE, HANG):
            event.assoc.dul.socket.close()
            return 0x0110
        return status
