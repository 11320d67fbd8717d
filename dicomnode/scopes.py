"""Among which volumes a rule looks: one study, close examinations, a study with its priors, the phases of one dynamic.

Law: pure; never two patients in one scope. What a PACS was asked for fills only roles `from: prior`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dicomnode.derived import Subject, acquired_s, values_of
from dicomnode.model import VolumeRef
from dicomnode.rule import Rule

Key = tuple[str, int]
"""Series Instance UID and volume number."""

Subjects = Mapping[Key, Subject]


@dataclass(frozen=True)
class Scope:
    """The volumes among which a rule looks for one fixed.

    Attributes
    ----------
    id
        The same at every look: what a work item is known by.
    subjects
        Sorted by key.
    priors
        Those that only a role `from: prior` takes; the others only a role `from: current`.
    """

    id: str
    subjects: Subjects
    priors: frozenset[Key] = frozenset()


def key_of(volume: VolumeRef) -> Key:
    """What a volume is known by."""
    return volume.series_instance_uid, volume.volume_number


def scopes_of(rule: Rule, subjects: Subjects) -> list[Scope]:
    """Every scope of the rule; a volume may be in none, and with priors in several."""
    if rule.roles.prior is not None:
        return _with_priors(rule, subjects)
    own = {key: subject for key, subject in subjects.items() if not subject.volume.is_fetched}
    groups: dict[tuple[str, ...], dict[Key, Subject]] = defaultdict(dict)
    for key in sorted(own):
        volume = own[key].volume
        groups[(*_patient(volume), volume.study_instance_uid if rule.pair.is_within_study else "")][key] = own[key]
    found = [
        Scope(f"study {group[2]}" if group[2] else f"examinations from {min(part)[0]}", part)
        for group, members in groups.items()
        for part in ([members] if group[2] else _by_day(members, rule.pair.max_days))
    ]
    return found if rule.split is None else [each for scope in found for each in _dynamics(rule, scope)]


def _patient(volume: VolumeRef) -> tuple[str, str]:
    return volume.patient_id.strip(), volume.issuer_of_patient_id.strip()


def _by_day(subjects: Subjects, max_days: int) -> list[dict[Key, Subject]]:
    """Split where more than `max_days` lie between examinations; a study without a date stands alone."""
    dated = sorted((day, key) for key, each in subjects.items() if (day := each.day) is not None)
    parts: list[dict[Key, Subject]] = []
    previous = None
    for day, key in dated:
        if previous is None or (day - previous).days > max_days:
            parts.append({})
        parts[-1][key] = subjects[key]
        previous = day
    undated: dict[str, dict[Key, Subject]] = defaultdict(dict)
    for key in sorted(subjects.keys() - {key for _, key in dated}):
        undated[subjects[key].volume.study_instance_uid][key] = subjects[key]
    return [*parts, *undated.values()]


def _with_priors(rule: Rule, subjects: Subjects) -> list[Scope]:
    """Each study that was sent to us, with the patient's earlier ones."""
    studies: dict[tuple[str, str, str], list[Key]] = defaultdict(list)
    for key in sorted(subjects):
        volume = subjects[key].volume
        studies[(*_patient(volume), volume.study_instance_uid)].append(key)
    found = []
    for study, keys in studies.items():
        current = [key for key in keys if not subjects[key].volume.is_fetched]
        if not current:
            continue
        day = subjects[current[0]].day
        earlier = [
            key
            for other, others in studies.items()
            if other[:2] == study[:2] and other != study
            for key in others
            if day is not None
            and (before := subjects[key].day) is not None
            and rule.priors.min_age_days <= (day - before).days <= rule.priors.max_age_days
        ]
        members = {key: subjects[key] for key in sorted([*current, *earlier])}
        found.append(Scope(f"study {study[2]} with its priors", members, frozenset(earlier)))
    return found


def _dynamics(rule: Rule, scope: Scope) -> list[Scope]:
    """The dynamic examinations of a scope, each a scope of its own, phases numbered in time."""
    assert rule.split is not None
    within: dict[Key, dict[Key, Subject]] = defaultdict(dict)
    between: dict[tuple[object, ...], list[Key]] = defaultdict(list)
    for key, subject in scope.subjects.items():
        volume = subject.volume
        if volume.phases >= rule.split.min_phases:
            if rule.split.by != "study":
                start = (key[0], volume.volume_number - volume.phase_index)
                within[start][key] = subject.in_phase(volume.phase_index, volume.phases)
        elif rule.split.by != "series":
            between[_alike(volume)].append(key)
    found = [
        Scope(f"dynamic series {first[0]}" + (f"#{first[1]}" if first[1] else ""), phases)
        for first, phases in within.items()
        if len(phases) >= rule.split.min_phases
    ]
    for keys in between.values():
        ordered = in_time([scope.subjects[key].volume for key in keys])
        if ordered is not None and len(ordered) >= rule.split.min_phases:
            phases = {
                key_of(volume): scope.subjects[key_of(volume)].in_phase(index, len(ordered))
                for index, volume in enumerate(ordered)
            }
            members = {key: phases[key] for key in sorted(phases)}
            found.append(Scope(f"dynamic of {scope.id} on the grid of series {min(members)[0]}", members))
    return found


def _alike(volume: VolumeRef) -> tuple[object, ...]:
    """What the phases of one dynamic have in common: grid, Frame of Reference, echo and flip angle, volume number."""
    grid = tuple(round(value, 2) for value in volume.affine)
    settings = tuple(values_of(volume, word) for word in ("EchoTime", "FlipAngle"))
    return volume.shape, grid, volume.frame_of_reference_uid, settings, volume.volume_number


def in_time(volumes: list[VolumeRef]) -> list[VolumeRef] | None:
    """In the order of acquisition, by the first clock or counter that all have and that tells them apart; else None."""
    clocks: tuple[Callable[[VolumeRef], float | None], ...] = (
        lambda v: _number(v, "TemporalPositionIdentifier"),
        acquired_s,
        lambda v: _number(v, "AcquisitionNumber"),
        lambda v: _number(v, "SeriesNumber"),
    )
    for clock in clocks:
        times = [clock(volume) for volume in volumes]
        known = [time for time in times if time is not None]
        if len(known) == len(volumes) == len(set(known)):
            return [volume for _, volume in sorted(zip(known, volumes, strict=True), key=lambda pair: pair[0])]
    return None


def _number(volume: VolumeRef, keyword: str) -> float | None:
    try:
        return next((float(value) for value in values_of(volume, keyword)), None)
    except ValueError:
        return None
