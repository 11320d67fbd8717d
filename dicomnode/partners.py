"""What must hold between two volumes before they are registered: one patient, close in time, alike, overlapping.

Law: pure; every finding carries its figures, except those of the patient, which no log or reason may repeat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dicomnode.derived import Scalar, Subject, dot, study_date, values_of
from dicomnode.model import VolumeRef
from dicomnode.rule import Rule


@dataclass(frozen=True)
class Finding:
    """One pair-wise condition: what was asked, what was seen, whether it holds."""

    text: str
    passed: bool


def obstacles(rule: Rule, fixed: Subject, moving: Subject) -> list[str]:
    """Why these two may not be joined, each with its figures; empty where they may.

    Patient identity comes first and alone: nothing else matters between two persons.
    """
    return [finding.text for finding in findings(rule, fixed, moving) if not finding.passed]


def fits(rule: Rule, fixed: Subject, moving: Subject) -> bool:
    """Whether these two may be joined: `obstacles` finds none."""
    return all(finding.passed for finding in _findings(rule, fixed, moving))


def findings(rule: Rule, fixed: Subject, moving: Subject) -> list[Finding]:
    """Every pair-wise condition of the rule on these two."""
    return list(_findings(rule, fixed, moving))


def _findings(rule: Rule, fixed: Subject, moving: Subject) -> Iterator[Finding]:
    persons = list(identity(fixed.volume, moving.volume, strict=rule.pair.strict_identity))
    yield from persons
    if not all(finding.passed for finding in persons):
        return
    yield from _days(rule, fixed.volume, moving.volume)
    yield from _same(rule, fixed, moving)
    yield from _close(rule, fixed, moving)
    yield from _overlap(rule, fixed, moving)


def likeness(rule: Rule, fixed: Subject, moving: Subject) -> int:
    """How many elements of `same_soft` agree."""
    return sum(_agree(fixed.observe(word).values, moving.observe(word).values) for word in rule.pair.same_soft)


def overlap_mm(fixed: Subject, moving: Subject) -> float:
    """Common extent along the fixed volume's slice normal, mm, outer voxel edges included; 0 where there is none."""
    normal = fixed.frame.normal
    (fixed_low, fixed_high), (moving_low, moving_high) = fixed.frame.extent(normal), moving.frame.extent(normal)
    return max(0.0, min(fixed_high, moving_high) - max(fixed_low, moving_low))


def orientation_deg(fixed: Subject, moving: Subject) -> float:
    """Angle between the slice planes, 0 to 90 degrees; slices in reverse order are the same planes."""
    cosine = abs(dot(fixed.frame.normal, moving.frame.normal))
    return math.degrees(math.acos(min(1.0, cosine)))


def identity(one: VolumeRef, other: VolumeRef, *, strict: bool = False) -> Iterator[Finding]:
    """Whether these are one person, by PatientID with its issuer, birth date and sex; what agrees is not mentioned.

    PatientID must be there and equal; issuers are equal or both absent. Birth date and sex are equal, or absent on
    both sides; absent on one side agrees too, since PatientID and issuer do, and is noted.

    Parameters
    ----------
    strict
        Birth date and sex must be there and equal on both sides.
    """
    patients = [(volume.patient_id.strip(), volume.issuer_of_patient_id.strip()) for volume in (one, other)]
    if not patients[0][0] or not patients[1][0]:
        yield Finding("PatientID is empty, so nobody can tell whether it is one patient", False)
    elif patients[0] != patients[1]:
        yield Finding("PatientID or IssuerOfPatientID differs", False)
    for keyword in ("PatientBirthDate", "PatientSex"):
        a, b = values_of(one, keyword), values_of(other, keyword)
        if a and b and a != b:
            yield Finding(f"{keyword} differs", False)
        elif strict and not (a and b):
            yield Finding(f"{keyword} is empty, and strict_identity asks for it", False)
        elif bool(a) != bool(b):
            yield Finding(f"{keyword} is empty on one side", True)


def days_before(earlier: VolumeRef, later: VolumeRef) -> int | None:
    """Days from one examination to the other; None where a date is missing."""
    one, other = study_date(earlier), study_date(later)
    return None if one is None or other is None else (other - one).days


def _days(rule: Rule, fixed: VolumeRef, moving: VolumeRef) -> Iterator[Finding]:
    if rule.pair.is_within_study or fixed.study_instance_uid == moving.study_instance_uid:
        return
    apart = days_before(fixed, moving)
    if rule.roles.prior:
        least, most = rule.priors.min_age_days, rule.priors.max_age_days
        asked = f"min_age_days {least}, max_age_days {most}" if least else f"max_age_days {most}"
    else:
        least, most = 0, rule.pair.max_days
        asked = f"max_days {most}"
    if apart is None:
        yield Finding(f"no date of examination, so {asked} cannot be checked", False)
    else:
        yield Finding(f"{abs(apart)} days apart, {asked}", least <= abs(apart) <= most)


def _same(rule: Rule, fixed: Subject, moving: Subject) -> Iterator[Finding]:
    for name, wanted in (("same", True), ("different", False)):
        for keyword in getattr(rule.pair, name):
            one, other = fixed.observe(keyword).values, moving.observe(keyword).values
            yield Finding(f"{name} {keyword}: fixed {_text(one)}, moving {_text(other)}", _agree(one, other) is wanted)


def _close(rule: Rule, fixed: Subject, moving: Subject) -> Iterator[Finding]:
    for keyword, limit in rule.pair.close.items():
        if keyword == "orientation_deg":
            angle = orientation_deg(fixed, moving)
            yield Finding(f"close orientation_deg: {angle:.1f}, at most {limit:g}", angle <= limit)
            continue
        values = fixed.observe(keyword).values, moving.observe(keyword).values
        one, other = (_numbers(each) for each in values)
        said = f"close {keyword}: fixed {_text(values[0])}, moving {_text(values[1])}"
        if not one or len(one) != len(other):
            yield Finding(said, False)
        else:
            apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
            yield Finding(f"{said}, {apart:g} apart, at most {limit:g}", apart <= limit)


def _overlap(rule: Rule, fixed: Subject, moving: Subject) -> Iterator[Finding]:
    if rule.pair.overlap_mm is None:
        return
    overlap, least = overlap_mm(fixed, moving), rule.pair.overlap_mm.min
    one_frame = fixed.volume.frame_of_reference_uid == moving.volume.frame_of_reference_uid
    where = "" if one_frame else " (different Frames of Reference)"
    yield Finding(f"overlap_mm: {overlap:.1f}, at least {least:g}{where}", overlap >= least)


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


def _text(values: tuple[Scalar, ...]) -> str:
    return "\\".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)[:80] or "nothing"
