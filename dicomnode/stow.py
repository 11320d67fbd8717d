"""Store Instances (STOW-RS, PS3.18 10.5): a multipart body goes part by part to the archive, by C-STORE's path.

Law: no instance is held in memory, and none is called stored before it would survive a power cut; what a part says of
itself is hostile. The HTTP server stands in `web`.
"""

from __future__ import annotations

import logging
from io import BytesIO
from typing import Any

import pydicom
from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.uid import UID
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from dicomnode.errors import LocalError, stack
from dicomnode.intake import DuplicateError, Intake, Reception
from dicomnode.part10 import LONGEST_HEAD_BYTES, FileHead, NotDicomError, read_head
from dicomnode.spool import Source

log = logging.getLogger(__name__)

CALLING_AE_TITLE = "STOW-RS"

# Failure Reason, PS3.18 Table I.2-2
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
DUPLICATE = 0x0111
PROCESSING_FAILURE = 0x0110


class BadRequestError(Exception):
    """The request is no multipart body of DICOM files; `status` is the HTTP status to answer with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def boundary_of(content_type: str) -> bytes:
    """The boundary of a Content-Type that this service takes.

    Raises
    ------
    BadRequestError
        415: not multipart/related of application/dicom. 400: no boundary.
    """
    kind, options = parse_options_header(content_type)
    part = options.get(b"type", b"application/dicom").lower()
    if kind.lower() != b"multipart/related" or part != b"application/dicom":
        raise BadRequestError(
            415, f'Content-Type: got {content_type[:100]!r}, expected multipart/related; type="application/dicom"'
        )
    if not options.get(b"boundary"):
        raise BadRequestError(400, "Content-Type: no boundary, expected one")
    return options[b"boundary"]


class Storing:
    """One request's instances on their way in.

    Parameters
    ----------
    boundary
        Of the multipart body.
    study_instance_uid
        The study that every instance must belong to; empty for any.
    """

    def __init__(self, boundary: bytes, intake: Intake, source: Source, *, study_instance_uid: str = "") -> None:
        self._intake = intake
        self._source = source
        self._study_instance_uid = study_instance_uid
        self._opened_at = intake.clock()
        self._stored: list[FileHead] = []
        self._failed: list[tuple[FileHead | None, int]] = []
        self._buffer = bytearray()  # of a part, until its head is known
        self._head: FileHead | None = None
        self._reception: Reception | None = None
        self._failure = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._complete,
            },
        )
        self._is_complete = False

    def write(self, data: bytes) -> None:
        """Take in bytes of the body as they come; BadRequestError (400) if it is not well formed."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise BadRequestError(400, f"multipart body: {error}") from None

    def close(self, outcome: str) -> None:
        """Drop what was not finished and write down how it ended. May be called after `answer`."""
        if self._reception is not None:
            self._reception.discard()
        stored, refused = len(self._stored), len(self._failed)
        self._intake.ended(self._source, self._opened_at, outcome=outcome, stored=stored, refused=refused)

    def answer(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and Store Instances Response Module as DICOM JSON (PS3.18 10.5.3, I.2).

        200: all stored; 202: some; 409: none; 503: none, for want of room.

        Raises
        ------
        BadRequestError
            400: the body broke off (what came whole before is stored), or has no part.
        """
        if not self._is_complete:
            raise BadRequestError(400, "multipart body: ended without its closing boundary, expected --boundary--")
        if not self._stored and not self._failed:
            raise BadRequestError(400, "multipart body: got no part, expected at least one")
        response = Dataset()
        with disable_value_validation():
            response.RetrieveURL = None
            response.ReferencedSOPSequence = [_item(head) for head in self._stored]
            response.FailedSOPSequence = [_item(head, reason) for head, reason in self._failed if head is not None]
            response.OtherFailuresSequence = [_item(None, reason) for head, reason in self._failed if head is None]
            body: dict[str, Any] = response.to_json_dict()
        if not self._failed:
            return 200, body
        if self._stored:
            return 202, body
        return (503 if {reason for _, reason in self._failed} == {OUT_OF_RESOURCES} else 409), body

    def _complete(self) -> None:
        self._is_complete = True

    def _begin(self) -> None:
        self._buffer.clear()
        self._head, self._reception, self._failure = None, None, 0

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._failure:
            return
        if self._reception is None:
            self._buffer += memoryview(data)[start:end]
            if len(self._buffer) >= LONGEST_HEAD_BYTES:
                self._attempt(self._begin_instance)
        else:
            reception, part = self._reception, memoryview(data)[start:end]
            self._attempt(lambda: reception.write(part))

    def _end(self) -> None:
        if self._reception is None and not self._failure:
            self._attempt(self._begin_instance)
        if not self._failure:
            self._attempt(self._keep)
        if self._failure:
            self._failed.append((self._head, self._failure))
        elif self._head is not None:
            self._stored.append(self._head)
        if self._reception is not None:
            self._reception.discard()
            self._reception = None

    def _begin_instance(self) -> None:
        self._head = head = read_head(BytesIO(self._buffer))
        self._reception = self._intake.begin(
            sop_class_uid=head.sop_class_uid,
            sop_instance_uid=head.sop_instance_uid,
            transfer_syntax_uid=head.transfer_syntax_uid,
        )
        self._reception.write(bytes(self._buffer[head.size_bytes :]))
        self._buffer.clear()

    def _keep(self) -> None:
        assert self._reception is not None
        if self._study_instance_uid:
            self._check_study(self._reception)
        self._intake.keep(self._reception, self._source, self._opened_at)

    def _check_study(self, reception: Reception) -> None:
        reception.incoming.flush()
        if UID(reception.incoming.transfer_syntax_uid).is_deflated:  # not to be inflated in this process
            raise NotDicomError("a deflated data set may be sent to /studies alone")
        dataset = pydicom.dcmread(
            reception.incoming.path, stop_before_pixels=True, specific_tags=["StudyInstanceUID"], force=True
        )
        if str(dataset.get("StudyInstanceUID", "")) != self._study_instance_uid:
            raise _OtherStudyError

    def _attempt(self, step: Any) -> None:
        """Run a step; what goes wrong becomes this part's Failure Reason, and costs no other part its place."""
        try:
            step()
        except _OtherStudyError:
            self._failure = DOES_NOT_MATCH
        except NotDicomError as error:
            log.warning("a part of a STOW-RS request: %s", error)
            self._failure = CANNOT_UNDERSTAND
        except DuplicateError:
            self._failure = DUPLICATE
        except LocalError as error:
            log.error("instance not stored: %s", error)
            self._failure = OUT_OF_RESOURCES
        except Exception as error:  # hostile bytes; without the error's text, which may quote them
            log.error("instance not stored: %s\n%s", type(error).__name__, stack(error))
            self._failure = PROCESSING_FAILURE


class _OtherStudyError(Exception):
    """The instance belongs to another study than the one it was sent to."""


def _item(head: FileHead | None, reason: int = 0) -> Dataset:
    item = Dataset()
    if head is not None:
        item.ReferencedSOPClassUID = head.sop_class_uid
        item.ReferencedSOPInstanceUID = head.sop_instance_uid
    if reason:
        item.FailureReason = reason
    return item
