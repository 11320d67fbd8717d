"""How a PACS source is spoken to: C-FIND, C-MOVE and C-GET, or QIDO-RS and WADO-RS.

Law: what a source answers is a stranger's: bounded, compared with what was asked, and kept as it came.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from http.client import HTTPException, HTTPResponse
from io import BytesIO
from typing import Any

import pydicom
from pydicom import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made at import
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dicomnode.errors import LocalError, RefusedError, RemoteError
from dicomnode.index import PriorFetch
from dicomnode.part10 import NotDicomError, read_head
from dicomnode.remotes import Source

Store = Callable[[str, str, str, bytes], None]
"""Keeps one instance: SOP class, SOP instance, transfer syntax, data set bytes. LocalError where it cannot."""

_LARGEST_JSON_BYTES = 64 << 20
_LARGEST_PART_BYTES = 2 << 30
_CHUNK_BYTES = 1 << 20

_IMAGES = (
    CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage,
    EnhancedCTImageStorage, EnhancedMRImageStorage, EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage, LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
)  # fmt: skip
_SYNTAXES: list[Any] = [
    pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.JPEGLosslessSV1,
    pydicom.uid.JPEGLSLossless, pydicom.uid.JPEG2000Lossless, pydicom.uid.RLELossless,
]  # fmt: skip


@dataclass(frozen=True)
class RemoteSeries:
    """One series that a source holds."""

    study_instance_uid: str
    series_instance_uid: str
    modality: str
    instances: int


class Client(ABC):
    """One source; children know its protocol.

    Parameters
    ----------
    source, ae_title
        Whom to ask, and our own name.
    store
        Keeps what comes back on our own association.
    """

    def __init__(self, source: Source, ae_title: str, store: Store) -> None:
        self.source = source
        self.ae_title = ae_title
        self.store = store

    def find(self, fetch: PriorFetch) -> list[RemoteSeries]:
        """Series of the patient's earlier studies, the newest studies first."""
        request = fetch.request
        day = date.fromisoformat(request["study_date"])
        first, last = (day - timedelta(days=request.get(key, 0)) for key in ("max_age_days", "min_age_days"))
        dates, modalities = f"{first:%Y%m%d}-{last:%Y%m%d}", set(request["modalities"])
        studies = {
            uid: on
            for modality in modalities or {""}
            for uid, on in self.studies(fetch.patient, dates, modality, request["description"])
            if uid != fetch.study_instance_uid
        }
        newest = sorted(studies, key=lambda uid: (studies[uid], uid), reverse=True)[: request["max_studies"]]
        return [
            each
            for uid in newest
            for each in self.series(uid)
            if each.modality in modalities or (not modalities and each.modality in ("CT", "MR", "PT"))
        ]

    @abstractmethod
    def studies(self, patient: tuple[str, str], dates: str, modality: str, description: str) -> list[tuple[str, str]]:
        """(Study Instance UID, StudyDate) of the patient's studies."""

    @abstractmethod
    def series(self, study_instance_uid: str) -> list[RemoteSeries]:
        """Every series of a study."""

    @abstractmethod
    def fetch(self, series: RemoteSeries) -> None:
        """Bring one series here."""


def client_of(source: Source, ae_title: str, store: Store) -> Client:
    """The client that speaks the source's protocol."""
    return (DicomWebClient if source.fetch == "dicomweb" else DimseClient)(source, ae_title, store)


class DimseClient(Client):
    """C-FIND at study and series level; C-MOVE to ourselves, or C-GET (PS3.4 Annex C)."""

    def studies(self, patient: tuple[str, str], dates: str, modality: str, description: str) -> list[tuple[str, str]]:
        """C-FIND at study level; the answers' PatientID is compared, since some sources ignore keys."""
        query = Dataset()
        query.QueryRetrieveLevel = "STUDY"
        query.PatientID, query.StudyDate, query.ModalitiesInStudy = patient[0], dates, modality
        query.StudyDescription = description
        if patient[1]:
            query.IssuerOfPatientID = patient[1]
        query.StudyInstanceUID = ""
        return [
            (str(answer.StudyInstanceUID), str(answer.get("StudyDate") or ""))
            for answer in self._find(query)
            if str(answer.get("PatientID") or "").strip() == patient[0].strip()
        ]

    def series(self, study_instance_uid: str) -> list[RemoteSeries]:
        """C-FIND at series level."""
        query = Dataset()
        query.QueryRetrieveLevel = "SERIES"
        query.StudyInstanceUID = study_instance_uid
        query.SeriesInstanceUID, query.Modality, query.NumberOfSeriesRelatedInstances = "", "", None
        return [
            RemoteSeries(
                study_instance_uid,
                str(answer.SeriesInstanceUID),
                str(answer.get("Modality") or ""),
                int(answer.get("NumberOfSeriesRelatedInstances") or 0),
            )
            for answer in self._find(query)
        ]

    def fetch(self, series: RemoteSeries) -> None:
        """C-MOVE or C-GET of one series."""
        query = Dataset()
        query.QueryRetrieveLevel = "SERIES"
        query.StudyInstanceUID, query.SeriesInstanceUID = series.study_instance_uid, series.series_instance_uid
        if self.source.fetch == "c-move":
            model = StudyRootQueryRetrieveInformationModelMove
            with self._associated([build_context(model)]) as association:
                self._finish("C-MOVE", association.send_c_move(query, self.ae_title, model))
            return
        model = StudyRootQueryRetrieveInformationModelGet
        contexts = [build_context(model), *(build_context(image, _SYNTAXES) for image in _IMAGES)]
        trouble: list[LocalError] = []

        def take(event: evt.Event) -> int:
            syntax = str(event.context.transfer_syntax)
            request: Any = event.request
            data = request.DataSet.getvalue()
            try:
                self.store(str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID), syntax, data)
            except LocalError as error:
                trouble.append(error)
                return 0xA700
            return 0x0000

        with self._associated(contexts, roles=True, handlers=[(evt.EVT_C_STORE, take)]) as association:
            self._finish("C-GET", association.send_c_get(query, model))
        if trouble:
            raise trouble[0]

    def _find(self, query: Dataset) -> list[Dataset]:
        model, found = StudyRootQueryRetrieveInformationModelFind, []
        with self._associated([build_context(model)]) as association:
            status = None
            for answer, identifier in association.send_c_find(query, model):
                status = answer.get("Status")
                if status in (0xFF00, 0xFF01) and identifier is not None:
                    found.append(identifier)
        self._judge("C-FIND", status)
        return found

    def _finish(self, what: str, answers: Iterator[tuple[Dataset, Dataset | None]]) -> None:
        status, failed = None, 0
        for answer, _ in answers:
            status = answer.get("Status")
            failed = int(answer.get("NumberOfFailedSuboperations") or 0)
        self._judge(what, status)
        if failed:
            raise RemoteError(f"{self.source.name}: {what} failed for {failed} instances")

    def _judge(self, what: str, status: int | None) -> None:
        if status is None:
            raise RemoteError(f"{self.source.name}: the association was lost during {what}")
        if status == 0x0000 or status & 0xF000 == 0xB000:
            return
        text = f"{self.source.name}: {what} was answered with 0x{status:04X}"
        if status == 0xA801:
            raise RefusedError(f"{text}: it does not know our AE title {self.ae_title}")
        # PS3.4 C.4.2.1.5: out of resources, or unable to process: later perhaps
        is_passing = status in (0xA700, 0xA701, 0xA702) or status & 0xF000 == 0xC000
        raise (RemoteError if is_passing else RefusedError)(text)

    @contextmanager
    def _associated(
        self, contexts: list[PresentationContext], *, roles: bool = False, handlers: Sequence[Any] = ()
    ) -> Iterator[Association]:
        source, ae = self.source, AE(self.ae_title)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = source.timeout_s
        ae.connection_timeout = min(10.0, source.timeout_s)
        negotiated: list[Any] = [build_role(image, scp_role=True) for image in _IMAGES] if roles else []
        association = ae.associate(
            source.host,
            source.port,
            contexts=contexts,
            ae_title=source.ae_title,
            ext_neg=negotiated,
            evt_handlers=list(handlers),
        )
        if not association.is_established:
            raise RemoteError(f"{source.name}: no association with {source.ae_title} at {source.host}:{source.port}")
        try:
            yield association
        finally:
            association.release()


class DicomWebClient(Client):
    """QIDO-RS and WADO-RS (PS3.18 10.6 and 10.4)."""

    def studies(self, patient: tuple[str, str], dates: str, modality: str, description: str) -> list[tuple[str, str]]:
        """Search for studies."""
        query = {"PatientID": patient[0], "StudyDate": dates, "includefield": "00080020"}
        query |= {"ModalitiesInStudy": modality} if modality else {}
        query |= {"StudyDescription": description} if description else {}
        return [
            (_value(study, "0020000D"), _value(study, "00080020"))
            for study in self._search("/studies?" + urllib.parse.urlencode(query))
            if _value(study, "00100020").strip() == patient[0].strip()
        ]

    def series(self, study_instance_uid: str) -> list[RemoteSeries]:
        """Search for series."""
        return [
            RemoteSeries(
                study_instance_uid,
                _value(each, "0020000E"),
                _value(each, "00080060"),
                int(_value(each, "00201209") or 0),
            )
            for each in self._search(f"/studies/{study_instance_uid}/series?includefield=00201209")
        ]

    def fetch(self, series: RemoteSeries) -> None:
        """Retrieve one series."""
        where = f"/studies/{series.study_instance_uid}/series/{series.series_instance_uid}"
        with self._answer(where, 'multipart/related; type="application/dicom"; transfer-syntax=*') as answer:
            chunks = iter(lambda: answer.read(_CHUNK_BYTES), b"")
            for part in multipart(str(answer.headers.get("Content-Type") or ""), chunks):
                self.store(*_part10(part))

    def _search(self, where: str) -> list[dict[str, Any]]:
        with self._answer(where, "application/dicom+json") as answer:
            body = answer.read(_LARGEST_JSON_BYTES + 1)
        if not body:
            return []
        if len(body) > _LARGEST_JSON_BYTES:
            raise RemoteError(f"{self.source.name}: an answer of more than {_LARGEST_JSON_BYTES} bytes")
        try:
            found = json.loads(body)
        except ValueError:
            raise RemoteError(f"{self.source.name}: its answer is no JSON") from None
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    @contextmanager
    def _answer(self, where: str, accept: str) -> Iterator[HTTPResponse]:
        """The answer to a request, to be read within."""
        request = urllib.request.Request(self.source.url + where, headers={"Accept": accept})  # noqa: S310 - http(s), checked in the configuration
        try:
            with urllib.request.urlopen(request, timeout=self.source.timeout_s) as answer:  # noqa: S310 - the same
                yield answer
        except urllib.error.HTTPError as error:
            refused = error.code in (400, 401, 403, 406)
            raise (RefusedError if refused else RemoteError)(f"{self.source.name}: HTTP {error.code}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise RemoteError(f"{self.source.name}: {type(error).__name__}") from error


def multipart(content_type: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The parts of a multipart/related body, without their headers, each as soon as it is whole (RFC 2046 5.1).

    Raises
    ------
    RemoteError
        It names no boundary, is not well formed, or does not end with the boundary.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RemoteError("the answer names no boundary of multipart/related")
    part, whole, ended = bytearray(), deque[bytes](), False

    def add(data: bytes, start: int, end: int) -> None:
        part.extend(memoryview(data)[start:end])
        if len(part) > _LARGEST_PART_BYTES:
            raise RemoteError(f"a part of the answer has more than {_LARGEST_PART_BYTES} bytes")

    def end() -> None:
        nonlocal ended
        ended = True

    steps: Any = {
        "on_part_begin": part.clear, "on_part_data": add, "on_part_end": lambda: whole.append(bytes(part)),
        "on_end": end,
    }  # fmt: skip
    try:
        parser = MultipartParser(boundary, steps)
        for chunk in chunks:
            parser.write(chunk)
            while whole:
                yield whole.popleft()
    except FormParserError as error:
        raise RemoteError(f"the answer is no multipart body: {error}") from None
    if not ended:
        raise RemoteError("the answer ended without its closing boundary")


def _part10(data: bytes) -> tuple[str, str, str, bytes]:
    """SOP class, SOP instance, transfer syntax and data set bytes of a DICOM file."""
    try:
        head = read_head(BytesIO(data))
    except NotDicomError as error:
        raise RemoteError(f"a part of the answer: {error}") from None
    return head.sop_class_uid, head.sop_instance_uid, head.transfer_syntax_uid, data[head.size_bytes :]


def _value(answer: dict[str, Any], tag: str) -> str:
    values = answer.get(tag, {}).get("Value") or [""]
    return str(values[0])
