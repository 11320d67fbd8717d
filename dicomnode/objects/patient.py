"""Whose object it is: the Patient, General Study and Patient Study modules, and the part of the body."""

from __future__ import annotations

import copy

from pydicom import Dataset

# PS3.3 C.7.2.1 and C.7.2.2, beside groups 0010 (patient) and 0012 (clinical trial, de-identification)
_STUDY = (
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "IssuerOfAccessionNumberSequence",
    "ReferringPhysicianName",
    "ReferringPhysicianIdentificationSequence",
    "StudyDescription",
    "PhysiciansOfRecord",
    "ProcedureCodeSequence",
    "AdmittingDiagnosesDescription",
)
_PAIRED = """
    ADRENAL ANKLE ARM AXILLA BREAST CALF CLAVICLE EAR ELBOW EXTREMITY EYE FEMUR FINGER FOOT FOREARM HAND HIP HUMERUS
    KIDNEY KNEE LEG LOWERLEG ORBIT OVARY PAROTID RADIUS SCAPULA SHOULDER TESTIS THIGH THUMB TIBIA TOE ULNA UPPERARM
    WRIST ZYGOMA
"""
_TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)


def copy_patient_and_study(source: Dataset, target: Dataset) -> None:
    """Copy the Patient, General Study and Patient Study modules; type 2 elements are always there."""
    for element in (*source.group_dataset(0x0010), *source.group_dataset(0x0012)):
        if not element.tag.is_private:
            target.add(copy.deepcopy(element))
    for keyword in _STUDY:
        if keyword in source:
            target.add(copy.deepcopy(source[keyword]))
    for keyword in _TYPE_2:
        if keyword not in target:
            setattr(target, keyword, "")


def set_body_part(target: Dataset, fixed: Dataset) -> None:
    """Body Part Examined, and Laterality where the part is unsaid or one of two (PS3.3 C.7.3.1: 2C)."""
    part = str(fixed.get("BodyPartExamined") or "")
    if part:
        target.BodyPartExamined = part
    if fixed.get("Laterality") or not part or part in _PAIRED.split():
        target.Laterality = fixed.get("Laterality") or ""


def study_time(dataset: Dataset) -> tuple[str, str]:
    """Date and time of the examination, to compare."""
    return str(dataset.get("StudyDate") or ""), str(dataset.get("StudyTime") or "")
