"""What a destination is asked and told beside C-STORE: what it has (C-FIND), and that results are there (IAN)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO

import pydicom
from pydicom import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from dicomnode import dimse
from dicomnode.archive import Archive
from dicomnode.delivery import encoding
from dicomnode.errors import LocalError, RefusedError, RemoteError
from dicomnode.model import Instance
from dicomnode.remotes import Destination
from dicomnode.scu import Association

_STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
_INSTANCE_AVAILABILITY = "1.2.840.10008.5.1.4.33"
_SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
_FEW_FAIL = (0x0000, 0x0001, 0x0107, 0x0116)  # N-CREATE: success, and warnings (PS3.7 10.1.5.1.6)

Series = tuple[str, str]
"""Study and Series Instance UID."""


def series_of(archive: Archive, instances: Iterable[Instance]) -> dict[Series, list[Instance]]:
    """Our own instances by their series.

    Raises
    ------
    LocalError
        A file cannot be read.
    """
    found: dict[Series, list[Instance]] = {}
    for instance in instances:
        try:
            header = pydicom.dcmread(
                archive.path(instance), specific_tags=["StudyInstanceUID", "SeriesInstanceUID"], stop_before_pixels=True
            )
            key = str(header.StudyInstanceUID), str(header.SeriesInstanceUID)
        except Exception as error:  # the disk, or a damaged file
            raise LocalError(f"archive: cannot read an instance's header: {type(error).__name__}") from error
        found.setdefault(key, []).append(instance)
    return found


def present(destination: Destination, series: Iterable[Series], *, ae_title: str) -> set[str]:
    """SOP Instance UIDs that the destination says it has of these series (C-FIND at image level, PS3.4 C.6.2).

    Raises
    ------
    RemoteError
        It does not say.
    """
    found: set[str] = set()
    association, context_id, syntax = _associated(destination, _STUDY_ROOT_FIND, ae_title)
    try:
        for study_instance_uid, series_instance_uid in series:
            query = Dataset()
            query.QueryRetrieveLevel = "IMAGE"
            query.StudyInstanceUID, query.SeriesInstanceUID = study_instance_uid, series_instance_uid
            query.SOPInstanceUID = ""
            answers = association.ask(
                context_id,
                lambda message_id: dimse.composite_request(dimse.C_FIND_RQ, message_id, _STUDY_ROOT_FIND, priority=0),
                encoding.encode(query, syntax),
                dimse.C_FIND_RQ,
            )
            for answer, content in answers:
                if answer.status in dimse.PENDING:
                    found.add(_instance_in(destination, content, syntax))
                elif answer.status != dimse.SUCCESS:
                    raise RemoteError(f"{destination.name}: C-FIND was answered 0x{answer.status:04X}")
    finally:
        association.release()
    return found


def announce(destination: Destination, series: dict[Series, list[Instance]], *, ae_title: str) -> None:
    """Tell whom it concerns that instances can be retrieved from the destination (PS3.4 Annex R).

    Raises
    ------
    RemoteError
        It was not taken.
    """
    told = destination.announce_to
    assert told is not None
    peer = Destination(f"{destination.name}, announce_to", told.ae_title, told.host, told.port)
    association, context_id, syntax = _associated(peer, _INSTANCE_AVAILABILITY, ae_title)
    try:
        for study_instance_uid in dict.fromkeys(study for study, _ in series):
            notice = Dataset()
            notice.ReferencedPerformedProcedureStepSequence = []
            notice.StudyInstanceUID = study_instance_uid
            notice.ReferencedSeriesSequence = [
                _available(uid, instances, destination.ae_title)
                for (study, uid), instances in series.items()
                if study == study_instance_uid
            ]
            instance_uid = generate_uid(prefix=None)
            answers = association.ask(
                context_id,
                lambda message_id, uid=instance_uid: dimse.create(message_id, _INSTANCE_AVAILABILITY, uid),  # type: ignore[misc]
                encoding.encode(notice, syntax),
                dimse.N_CREATE_RQ,
            )
            for answer, _ in answers:
                if answer.status not in _FEW_FAIL:
                    raise RemoteError(f"{peer.name}: N-CREATE was answered 0x{answer.status:04X}")
    finally:
        association.release()


def _associated(peer: Destination, sop_class_uid: str, ae_title: str) -> tuple[Association, int, str]:
    association = Association(peer, ae_title=ae_title, timeout_s=peer.timeout_s)
    association.open([(sop_class_uid, _SYNTAXES)])
    for (_, syntax), context_id in association.accepted.items():
        return association, context_id, syntax
    association.release()
    raise RefusedError(f"{peer.name} does not support {UID(sop_class_uid).name}")


def _instance_in(destination: Destination, content: bytes, syntax: str) -> str:
    uid = UID(syntax)
    try:
        return str(read_dataset(BytesIO(content), uid.is_implicit_VR, uid.is_little_endian).SOPInstanceUID)
    except Exception as error:  # off the wire: anything may be wrong with it
        raise RemoteError(f"{destination.name}: an answer to C-FIND cannot be read: {type(error).__name__}") from error


def _available(series_instance_uid: str, instances: Sequence[Instance], retrieve_ae_title: str) -> Dataset:
    series = Dataset()
    series.SeriesInstanceUID = series_instance_uid
    series.ReferencedSOPSequence = []
    for instance in instances:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = instance.sop_class_uid, instance.sop_instance_uid
        item.InstanceAvailability = "ONLINE"
        item.RetrieveAETitle = retrieve_ae_title
        series.ReferencedSOPSequence.append(item)
    return series
