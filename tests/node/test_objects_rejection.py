from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import counterparts
import phantoms
import pytest
from hand_made import make_objects
from pydicom import Dataset, dcmread

from dicomnode import volumes
from dicomnode.objects import rejection_note
from dicomnode.objects.rejection import TITLES

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="module")
def sent() -> list[Dataset]:
    fixed, moving = phantoms.make_pair(shape=(4, 16, 20), spacing_mm=(5.0, 9.0, 9.0))
    return [dataset for _, dataset in make_objects(fixed, moving)]


def note(of: list[Dataset], **changes: Any) -> Dataset:
    values = {"title": "quality", "text": "superseded", "job_id": "a", "software_version": "1", "created_at": NOW}
    return rejection_note(of, **{**values, **changes})


@pytest.mark.parametrize("title", TITLES)
def test_every_note_stands_before_the_validators(title: str, sent: list[Dataset], tmp_path: Path) -> None:
    path = tmp_path / "note.dcm"
    note(sent, title=title).save_as(path, enforce_file_format=True)
    others = []
    for number, each in enumerate(sent):
        others.append(tmp_path / f"{number}.dcm")
        each.save_as(others[-1], enforce_file_format=True)

    assert counterparts.dciodvfy_errors([path]) == set()
    assert counterparts.dcentvfy_complaints([path, *others]) == ""
    read = dcmread(path)
    assert (read.ConceptNameCodeSequence[0].CodeValue, read.Modality) == (TITLES[title][0], "KO")


def test_it_names_every_instance_once_in_the_evidence_and_once_in_the_content(sent: list[Dataset]) -> None:
    made = note(sent)

    (study,) = made.CurrentRequestedProcedureEvidenceSequence
    evidence = {
        (str(item.ReferencedSOPInstanceUID), str(series.SeriesInstanceUID))
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert evidence == {(str(each.SOPInstanceUID), str(each.SeriesInstanceUID)) for each in sent}
    items = [item for item in made.ContentSequence if item.ValueType in ("IMAGE", "COMPOSITE")]
    kinds = {str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID): item.ValueType for item in items}
    assert len(items) == len(sent)
    assert kinds == {str(each.SOPInstanceUID): "IMAGE" if "PixelData" in each else "COMPOSITE" for each in sent}


def test_it_lies_in_the_study_of_what_it_rejects_and_is_known_as_our_own(sent: list[Dataset]) -> None:
    made = note(sent)

    assert (made.PatientID, made.StudyInstanceUID) == (sent[0].PatientID, sent[0].StudyInstanceUID)
    assert volumes.instance_header(made).is_own_output


def test_the_same_rejection_has_the_same_uid_and_any_other_another(sent: list[Dataset]) -> None:
    uid = note(sent).SOPInstanceUID

    assert note(sent, created_at=datetime(2027, 1, 1, tzinfo=UTC)).SOPInstanceUID == uid
    others = [note(sent, title="retention"), note(sent, job_id="b"), note(sent[1:])]
    assert len({uid, *(each.SOPInstanceUID for each in others)}) == 4


def test_instances_of_two_studies_are_refused(sent: list[Dataset]) -> None:
    stranger = Dataset()
    stranger.StudyInstanceUID = "1.2.3"

    with pytest.raises(ValueError, match="of 2 studies"):
        note([*sent, stranger])
