"""Rejection note: a Key Object Selection that withdraws instances which were sent before, PS3.3 A.35.4 and TID 2010.

As IHE RAD Imaging Object Change Management has it: a PACS that knows the profile stops showing what the note lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pydicom import Dataset
from pydicom.config import disable_value_validation
from pydicom.uid import UID, KeyObjectSelectionDocumentStorage

from dicomnode.objects.common import _uid, code, new_dataset, series_number, set_times
from dicomnode.objects.patient import copy_patient_and_study
from dicomnode.objects.references import reference
from dicomnode.objects.texts import ascii_text
from dicomnode.volumes import SOFTWARE_NAME

TITLES = {
    "quality": ("113001", "Rejected for Quality Reasons"),
    "patient-safety": ("113037", "Rejected for Patient Safety Reasons"),
    "retention": ("113039", "Data Retention Policy Expired"),
}
"""CID 7010, by what a rule calls it."""


def rejection_note(
    rejected: Sequence[Dataset], *, title: str, text: str, job_id: str, software_version: str, created_at: datetime
) -> Dataset:
    """Write the note; the same for the same instances, title and job.

    Parameters
    ----------
    rejected
        Headers of the instances, all of one study; its patient and study become the note's.
    title
        A key of `TITLES`.
    text
        Why, in our own words.
    job_id
        Of the job that withdraws them.

    Raises
    ------
    ValueError
        Nothing to reject, or of more than one study.
    """
    if len({str(each.StudyInstanceUID) for each in rejected}) != 1:
        raise ValueError(
            f"rejection note: got instances of {len({each.StudyInstanceUID for each in rejected})} studies"
        )
    first = rejected[0]
    key: list[object] = ["rejection note", title, job_id, sorted(str(each.SOPInstanceUID) for each in rejected)]
    with disable_value_validation():  # patient and study are carried over as they are
        note = new_dataset(KeyObjectSelectionDocumentStorage, UID(_uid(key)))
        copy_patient_and_study(first, note)
        if "SpecificCharacterSet" in first:
            note.SpecificCharacterSet = first.SpecificCharacterSet
        set_times(note, first, created_at)
        value, meaning = TITLES[title]
        note.Modality = "KO"
        note.SeriesInstanceUID = _uid([*key, "series"])
        note.SeriesNumber = series_number(first, 5000)
        note.SeriesDescription = meaning
        note.ReferencedPerformedProcedureStepSequence = []
        note.Manufacturer = note.ManufacturerModelName = SOFTWARE_NAME
        note.DeviceSerialNumber = note.SoftwareVersions = software_version
        note.ContributingEquipmentSequence = [_equipment(note)]
        note.InstanceNumber = 1
        note.CurrentRequestedProcedureEvidenceSequence = [_evidence(rejected)]
        note.ValueType = "CONTAINER"
        note.ConceptNameCodeSequence = [code(value, meaning)]
        note.ContinuityOfContent = "SEPARATE"
        note.ContentTemplateSequence = [_template()]
        note.ContentSequence = [
            *([_modifier()] if title == "quality" else []),
            _text(text),
            *(_item(each) for each in rejected),
        ]
    return note


def _equipment(note: Dataset) -> Dataset:
    """What the loop guard knows our objects by."""
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code("109102", "Processing Equipment")]
    item.Manufacturer = item.ManufacturerModelName = SOFTWARE_NAME
    item.SoftwareVersions = note.SoftwareVersions
    item.ContributionDateTime = f"{note.ContentDate}{note.ContentTime}"
    return item


def _evidence(rejected: Sequence[Dataset]) -> Dataset:
    """Every instance under its series and study, PS3.3 C.17.6.2."""
    series: dict[str, list[Dataset]] = {}
    for each in rejected:
        series.setdefault(str(each.SeriesInstanceUID), []).append(reference(each))
    study = Dataset()
    study.StudyInstanceUID = rejected[0].StudyInstanceUID
    study.ReferencedSeriesSequence = []
    for uid, instances in series.items():
        item = Dataset()
        item.SeriesInstanceUID = uid
        item.ReferencedSOPSequence = instances
        study.ReferencedSeriesSequence.append(item)
    return study


def _template() -> Dataset:
    item = Dataset()
    item.MappingResource = "DCMR"
    item.TemplateIdentifier = "2010"
    return item


def _modifier() -> Dataset:
    """TID 2010 wants one with 113001, of CID 7011."""
    item = Dataset()
    item.RelationshipType = "HAS CONCEPT MOD"
    item.ValueType = "CODE"
    item.ConceptNameCodeSequence = [code("113011", "Document Title Modifier")]
    item.ConceptCodeSequence = [code("111219", "Inappropriate image processing")]
    return item


def _text(text: str) -> Dataset:
    item = Dataset()
    item.RelationshipType = "CONTAINS"
    item.ValueType = "TEXT"
    item.ConceptNameCodeSequence = [code("113012", "Key Object Description")]
    item.TextValue = ascii_text(text)[:1024]
    return item


def _item(instance: Dataset) -> Dataset:
    item = Dataset()
    item.RelationshipType = "CONTAINS"
    item.ValueType = "IMAGE" if "Rows" in instance else "COMPOSITE"
    item.ReferencedSOPSequence = [reference(instance)]
    return item
