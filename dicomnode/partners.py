"""What must hold between two volumes before they are registered: one patient, close in time, alike, overlapping.

Law: pure; every finding carries its figures, except those of the patient, which no log or reason may repeat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date

import numpy as np
import numpy.typing as npt

from dicomnode.derived import Scalar, values_of
from dicomnode.model import VolumeRef
from dicomnode.rules import PairConditions


def obstacles(conditions: PairConditions, fixed: VolumeRef, moving: VolumeRef) -> list[str]:
    """Why these two may not be joined, each with its figures; empty where they may.

    Patient identity comes first and alone: nothing else matters between two persons.
    """
    return list(_identity(fixed, moving)) or [
        *_days(conditions, fixed, moving),
        *_same(conditions, fixed, moving),
        *_close(conditions, fixed, moving),
        *_overlap(conditions, fixed, moving),
    ]


def likeness(conditions: PairConditions, fixed: VolumeRef, moving: VolumeRef) -> int:
    """How many elements of `same_soft` agree."""
    return sum(_agree(values_of(fixed, word), values_of(moving, word)) for word in conditions.same_soft)


def study_date(volume: VolumeRef) -> date | None:
    """The day of the examination: StudyDate, else AcquisitionDate, else SeriesDate; None where none is a date."""
    for keyword in ("StudyDate", "AcquisitionDate", "SeriesDate"):
        text = "".join(str(value) for value in values_of(volume, keyword)[:1]).replace(".", "")
        if len(text) == 8 and text.isascii() and text.isdigit():
            try:
                return date(int(text[:4]), int(text[4:6]), int(text[6:]))
            except ValueError:
                continue
    return None


def overlap_mm(fixed: VolumeRef, moving: VolumeRef) -> float:
    """Common extent along the fixed volume's slice normal, mm, outer voxel edges included; 0 where there is none."""
    normal = _normal(fixed)
    (fixed_low, fixed_high), (moving_low, moving_high) = (_extent(volume, normal) for volume in (fixed, moving))
    return max(0.0, min(fixed_high, moving_high) - max(fixed_low, moving_low))


def orientation_deg(fixed: VolumeRef, moving: VolumeRef) -> float:
    """Angle between the slice planes, 0 to 90 degrees; slices in reverse order are the same planes."""
    cosine = abs(float(_normal(fixed) @ _normal(moving)))
    return math.degrees(math.acos(min(1.0, cosine)))


def _identity(fixed: VolumeRef, moving: VolumeRef) -> Iterator[str]:
    patients = [(volume.patient_id.strip(), volume.issuer_of_patient_id.strip()) for volume in (fixed, moving)]
    if not patients[0][0] or not patients[1][0]:
        yield "PatientID is empty, so nobody can tell whether it is one patient"
    elif patients[0] != patients[1]:
        yield "PatientID or IssuerOfPatientID differs"
    for keyword in ("PatientBirthDate", "PatientSex"):
        one, other = values_of(fixed, keyword), values_of(moving, keyword)
        if one and other and one != other:
            yield f"{keyword} differs"


def _days(conditions: PairConditions, fixed: VolumeRef, moving: VolumeRef) -> Iterator[str]:
    if conditions.is_within_study or fixed.study_instance_uid == moving.study_instance_uid:
        return
    days = study_date(fixed), study_date(moving)
    if days[0] is None or days[1] is None:
        yield "no date of examination, so max_days cannot be checked"
    elif (apart := abs((days[0] - days[1]).days)) > conditions.max_days:
        yield f"{apart} days apart, max_days {conditions.max_days}"


def _same(conditions: PairConditions, fixed: VolumeRef, moving: VolumeRef) -> Iterator[str]:
    for keyword in conditions.same:
        one, other = values_of(fixed, keyword), values_of(moving, keyword)
        if not _agree(one, other):
            yield f"same {keyword}: fixed {_text(one)}, moving {_text(other)}"


def _close(conditions: PairConditions, fixed: VolumeRef, moving: VolumeRef) -> Iterator[str]:
    for keyword, limit in conditions.close.items():
        if keyword == "orientation_deg":
            angle = orientation_deg(fixed, moving)
            if not angle <= limit:
                yield f"close orientation_deg: {angle:.1f}, at most {limit:g}"
            continue
        one, other = _numbers(values_of(fixed, keyword)), _numbers(values_of(moving, keyword))
        if not one or len(one) != len(other):
            yield f"close {keyword}: fixed {_text(one)}, moving {_text(other)}"
        elif not (apart := max(abs(a - b) for a, b in zip(one, other, strict=True))) <= limit:
            yield f"close {keyword}: fixed {_text(one)}, moving {_text(other)}, {apart:g} apart, at most {limit:g}"


def _overlap(conditions: PairConditions, fixed: VolumeRef, moving: VolumeRef) -> Iterator[str]:
    if conditions.overlap_mm is None:
        return
    overlap = overlap_mm(fixed, moving)
    if not overlap >= conditions.overlap_mm.min:
        one_frame = fixed.frame_of_reference_uid == moving.frame_of_reference_uid
        yield (
            f"overlap_mm: {overlap:.1f}, at least {conditions.overlap_mm.min:g}"
            + ("" if one_frame else " (different Frames of Reference)")
        )


def _agree(one: tuple[Scalar, ...], other: tuple[Scalar, ...]) -> bool:
    """Whether both are there and equal; numbers to 1e-6, since scanners write decimal strings."""
    if not one or len(one) != len(other):
        return False
    return all(
        math.isclose(a, b, rel_tol=1e-6) if not isinstance(a, str) and not isinstance(b, str) else a == b
        for a, b in zip(one, other, strict=True)
    )


def _numbers(values: tuple[Scalar, ...]) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in values)
    except ValueError:
        return ()


def _normal(volume: VolumeRef) -> npt.NDArray[np.float64]:
    """Unit normal of the slice plane, LPS: row direction × column direction (PS3.3 C.7.6.2.1.1)."""
    affine = np.array(volume.affine).reshape(4, 4)
    normal = np.cross(affine[:3, 2], affine[:3, 1])
    return np.asarray(normal / np.linalg.norm(normal))


def _extent(volume: VolumeRef, normal: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Lowest and highest coordinate of the volume's corners along `normal`, mm."""
    affine, ends = np.array(volume.affine).reshape(4, 4), [(-0.5, n - 0.5) for n in volume.shape]
    corners = [(k, j, i, 1.0) for k in ends[0] for j in ends[1] for i in ends[2]]
    along = np.array(corners) @ affine[:3].T @ normal
    return float(along.min()), float(along.max())


def _text(values: tuple[Scalar, ...]) -> str:
    return "\\".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)[:80] or "nothing"
