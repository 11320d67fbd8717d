"""Files of a folder, brought in by the path that C-STORE takes: each is durable before it counts as imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pydicom.uid import MediaStorageDirectoryStorage

from dicomnode.intake import DuplicateError, FullError, Intake
from dicomnode.part10 import NotDicomError, read_head
from dicomnode.spool import Source

CALLING_AE_TITLE = "IMPORT"
_CHUNK_BYTES = 1 << 20


def import_folder(folder: Path, intake: Intake, *, called_ae_title: str) -> Iterator[tuple[Path, str]]:
    """Bring in every file below a folder, in order of name; yields each with the reason why not, empty if it is in.

    A DICOMDIR is passed over without a word; links to folders are not followed.

    A folder that cannot be listed is yielded like a file that cannot be read.

    Raises
    ------
    LocalError
        The archive's disk is failing: what was yielded is safe, the rest can be imported again.
    """
    source = Source.new(CALLING_AE_TITLE, called_ae_title, "127.0.0.1")
    opened_at = intake.clock()
    stored = refused = 0
    for path, fault in _files(folder):
        try:
            if fault is not None:
                raise fault
            if not _import(path, intake, source):
                continue
            reason = ""
            stored += 1
        except NotDicomError as error:
            reason = str(error)
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        except (DuplicateError, FullError) as error:
            reason = str(error)
        refused += bool(reason)
        # After each file: no series may wait for an import that was killed.
        intake.ended(source, opened_at, outcome="import", stored=stored, refused=refused)
        yield path, reason


def _import(path: Path, intake: Intake, source: Source) -> bool:
    with path.open("rb") as file:
        head = read_head(file)
        if head.sop_class_uid == MediaStorageDirectoryStorage:
            return False
        file.seek(head.size_bytes)
        reception = intake.begin(
            sop_class_uid=head.sop_class_uid,
            sop_instance_uid=head.sop_instance_uid,
            transfer_syntax_uid=head.transfer_syntax_uid,
        )
        try:
            while chunk := file.read(_CHUNK_BYTES):
                reception.write(chunk)
            intake.keep(reception, source, intake.clock())
        finally:
            reception.discard()
    return True


def _files(folder: Path) -> Iterator[tuple[Path, OSError | None]]:
    """Every regular file, and every folder that cannot be listed with the reason."""
    faults: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=faults.append):
        folders.sort()
        yield from ((Path(error.filename), error) for error in faults)
        faults.clear()
        for name in sorted(names):
            path = Path(parent, name)
            try:
                if path.is_file():
                    yield path, None
            except OSError as error:  # a name too long to ask about
                yield path, error
    yield from ((Path(error.filename), error) for error in faults)
