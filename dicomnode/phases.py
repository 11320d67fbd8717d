"""One series → the volumes it holds, told apart by what its headers say, or the reason why they cannot be.

Law: pure, values in and values out. A split counts only if it is complete: every volume has exactly one slice at every
place. What no element explains is named, not guessed.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import combinations, pairwise

from dicomnode.errors import IncompleteSeriesError
from dicomnode.model import HeaderValue

CONTRAST_KEYS = (
    "StackID", "ImageType", "ComplexImageComponent", "ConvolutionKernel", "KVP", "Units", "EchoTime", "EchoNumbers",
    "InversionTime", "FlipAngle", "DiffusionBValue", "DiffusionGradientOrientation", "VelocityEncodingDirection",
    "ASLContext",
)  # fmt: skip
"""What makes another kind of image, in the order in which it is tried; ImageType without its first two values."""
TIME_KEYS = (
    "TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase",
    "NominalPercentageOfRespiratoryPhase", "AcquisitionNumber", "FrameReferenceTime", "TriggerTime",
    "AcquisitionDateTime", "AcquisitionTime", "ContentTime", "SeriesTime",
)  # fmt: skip
"""What makes another moment, in the order in which it is tried."""
OFFSETS = ("TemporalPositionTimeOffset",)
"""Tells when a moment was, never what belongs to it."""

SAME_PLACE_MM = 0.01
SAME_ORIENTATION = 1e-3
SAME_SPACING = 1e-4
EVEN_MM, EVEN_FRACTION = 0.06, 0.02
MAX_KEYS = 3
_CLOCKS = ("AcquisitionDateTime", "AcquisitionTime", "ContentTime", "SeriesTime")
_ORDER = (
    "TemporalPositionIdentifier", "TemporalPositionIndex", "AcquisitionDateTime", "AcquisitionTime", "TriggerTime",
    "FrameReferenceTime", "NominalPercentageOfCardiacPhase", "NominalPercentageOfRespiratoryPhase", "ContentTime",
    "AcquisitionNumber", "SeriesTime", "InstanceNumber",
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One slice of a series, as far as splitting must know it.

    Attributes
    ----------
    position, orientation
        Image Position and Image Orientation (Patient), LPS mm and cosines.
    size, spacing
        (rows, columns); (between rows, between columns), mm.
    instance_number
        Instance Number, of a frame its number; None where absent.
    values
        What is there of CONTRAST_KEYS, TIME_KEYS and OFFSETS; clock times as DICOM writes them.
    """

    position: tuple[float, float, float]
    orientation: tuple[float, ...]
    size: tuple[int, int]
    spacing: tuple[float, float]
    instance_number: int | None = None
    values: Mapping[str, HeaderValue] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One volume of a series: which slices, what tells it apart, and where in time it stands (see VolumeRef)."""

    indices: tuple[int, ...]
    split_by: Mapping[str, HeaderValue] = field(default_factory=dict)
    phase_index: int = 0
    phases: int = 1
    phase_time_s: float | None = None


class AmbiguousSeriesError(IncompleteSeriesError):
    """Several slices lie in one place, and nothing tells them apart completely."""


def replaced(part: Part, more: Mapping[str, HeaderValue]) -> Part:
    """The same part, told apart by `more`."""
    return replace(part, split_by=more)


def by_plane(slices: Sequence[Slice], *, at_most: int) -> list[tuple[int, ...]]:
    """Indices of the slices that share orientation, size and spacing: only these can be one volume. Largest first.

    Raises
    ------
    IncompleteSeriesError
        There are more than `at_most` planes.
    """
    groups: list[list[int]] = []
    for n, each in enumerate(slices):
        for group in groups:
            if _is_same_plane(slices[group[0]], each):
                group.append(n)
                break
        else:
            if len(groups) == at_most:
                raise IncompleteSeriesError(f"Series: slices in more than {at_most} planes, expected one plane")
            groups.append([n])
    return [tuple(group) for group in sorted(groups, key=lambda group: (-len(group), group[0]))]


def split(slices: Sequence[Slice]) -> list[Part]:
    """The volumes among slices of one plane, contrast by contrast and in order of time.

    Raises
    ------
    AmbiguousSeriesError
        Slices lie in one place and nothing tells them apart completely; says which element came nearest.
    """
    places = _places(slices)
    is_doubled = len(set(places)) < len(slices)
    keys = [key for key in (*CONTRAST_KEYS, *TIME_KEYS) if len({_value(each, key) for each in slices}) > 1]
    if not is_doubled:
        for key in keys:
            if key in CONTRAST_KEYS and (groups := _stacks(slices, key)):
                return _parts(slices, groups, (key,))
        return [Part(tuple(range(len(slices))))]
    counts = Counter(places)
    times = counts[places[0]]
    if set(counts.values()) == {times}:
        told = {key: [_value(each, key) for each in slices] for key in keys}
        few = [key for key in keys if len(set(told[key])) <= times]
        for size in range(1, MAX_KEYS + 1):
            for several in combinations(few, size):
                if groups := _complete([told[key] for key in several], places, times):
                    return _parts(slices, groups, several)
        for key in ("AcquisitionDateTime", "AcquisitionTime", "TriggerTime", "ContentTime", "InstanceNumber"):
            if groups := _ranked(slices, places, key):
                return _parts(slices, groups, (key,))
    doubled = len(slices) - len(counts)
    raise AmbiguousSeriesError(
        f"{doubled} of {len(slices)} slices lie where another lies, expected one per place, and no element tells them "
        f"apart completely{_nearest(slices, places, keys)}"
    )


def seconds_since_first(slices: Sequence[Slice], ordered: Sequence[Sequence[int]]) -> list[float | None]:
    """When each phase began, from the first element that rises through all of them."""
    factors: tuple[tuple[str, float], ...] = (
        ("TemporalPositionTimeOffset", 1.0), ("AcquisitionDateTime", 1.0), ("AcquisitionTime", 1.0),
        ("TriggerTime", 1e-3), ("FrameReferenceTime", 1e-3), ("ContentTime", 1.0),
    )  # fmt: skip
    for key, factor in factors:
        starts = [[m for n in group if (m := _moment(slices[n], key)) is not None] for group in ordered]
        if all(starts):
            first = [min(each) for each in starts]
            if all(a < b for a, b in pairwise(first)):
                return [round((at - first[0]) * factor, 6) for at in first]
    return [None] * len(ordered)


def _is_same_plane(one: Slice, other: Slice) -> bool:
    return (
        one.size == other.size
        and max(abs(a - b) for a, b in zip(one.orientation, other.orientation, strict=True)) <= SAME_ORIENTATION
        and max(abs(a - b) for a, b in zip(one.spacing, other.spacing, strict=True)) <= SAME_SPACING * max(one.spacing)
    )


def _places(slices: Sequence[Slice]) -> list[int]:
    """A number per slice, the same for slices in the same place."""
    along = _along_normal(slices)
    places = [0] * len(slices)
    recent: list[int] = []  # one slice of each place that may still be near
    count = 0
    for n in sorted(range(len(slices)), key=lambda n: along[n]):
        recent = [m for m in recent if along[n] - along[m] <= SAME_PLACE_MM]
        for m in recent:
            if math.dist(slices[m].position, slices[n].position) <= SAME_PLACE_MM:
                places[n] = places[m]
                break
        else:
            places[n] = count
            count += 1
            recent.append(n)
    return places


def _along_normal(slices: Sequence[Slice]) -> list[float]:
    (a, b, c), (d, e, f) = slices[0].orientation[:3], slices[0].orientation[3:]
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    return [sum(x * y for x, y in zip(each.position, normal, strict=True)) for each in slices]


def _stacks(slices: Sequence[Slice], key: str) -> list[list[int]]:
    """Several evenly spaced stacks of one size that do not share places: two kernels' slices between each other."""
    groups = _grouped(slices, (key,))
    if len({len(group) for group in groups}) != 1 or len(groups[0]) < 2:
        return []
    along = _along_normal(slices)
    return groups if all(_is_even([along[n] for n in group]) for group in groups) else []


def _is_even(positions: Sequence[float]) -> bool:
    ordered = sorted(positions)
    step = (ordered[-1] - ordered[0]) / (len(ordered) - 1)
    allowed = 2 * max(EVEN_MM, EVEN_FRACTION * step)
    return all(abs(at - ordered[0] - n * step) <= allowed for n, at in enumerate(ordered))


def _complete(told: Sequence[Sequence[Hashable]], places: Sequence[int], times: int) -> list[list[int]]:
    """`times` groups of one size that agree in what was told, each with one slice in a place; else nothing."""
    groups: dict[Hashable, list[int]] = {}
    seen = set()
    for n, (values, place) in enumerate(zip(zip(*told, strict=True), places, strict=True)):
        groups.setdefault(values, []).append(n)
        if len(groups) > times or (values, place) in seen:
            return []
        seen.add((values, place))
    found = list(groups.values())
    return found if len(found) == times and len({len(group) for group in found}) == 1 else []


def _ranked(slices: Sequence[Slice], places: Sequence[int], key: str) -> list[list[int]]:
    """The k-th slice of every place, if the order is beyond doubt: volume after volume, or place after place."""
    order = [_moment(each, key) for each in slices]
    if None in order:
        return []
    at_place: dict[int, list[int]] = defaultdict(list)
    for n in sorted(range(len(slices)), key=lambda n: order[n] or 0.0):
        at_place[places[n]].append(n)
    volumes = [list(group) for group in zip(*at_place.values(), strict=True)]

    def follow_each_other(groups: Sequence[Sequence[int]]) -> bool:
        spans = sorted((min(order[n] or 0.0 for n in g), max(order[n] or 0.0 for n in g)) for g in groups)
        return all(before[1] < after[0] for before, after in pairwise(spans))

    one_by_one = key == "InstanceNumber" and len(set(order)) == len(order) and follow_each_other([*at_place.values()])
    return volumes if follow_each_other(volumes) or one_by_one else []


def _grouped(slices: Sequence[Slice], keys: Sequence[str]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for n, each in enumerate(slices):
        groups[tuple(_value(each, key) for key in keys)].append(n)
    return list(groups.values())


def _value(each: Slice, key: str) -> Hashable:
    value = each.values.get(key)
    if isinstance(value, list):
        return tuple(round(one, 3) if isinstance(one, float) else one for one in value)
    return round(value, 3) if isinstance(value, float) else value


def _parts(slices: Sequence[Slice], groups: Sequence[Sequence[int]], keys: Sequence[str]) -> list[Part]:
    """Groups in order: by contrast, then by time; each knows its phase."""
    contrast = [key for key in keys if key in CONTRAST_KEYS]
    by_contrast: dict[Hashable, list[Sequence[int]]] = defaultdict(list)
    for group in groups:
        by_contrast[tuple(_value(slices[group[0]], key) for key in contrast)].append(group)
    parts = []
    for _, phases in sorted(by_contrast.items(), key=lambda item: _sortable(item[0])):
        ordered = _in_time(slices, phases)
        seconds = seconds_since_first(slices, ordered)
        for index, group in enumerate(ordered):
            first = min(group, key=lambda n: (_moment(slices[n], keys[-1]) or 0.0, n))
            parts.append(
                Part(
                    indices=tuple(sorted(group)),
                    split_by={key: _shown(slices[first], key) for key in keys},
                    phase_index=index,
                    phases=len(ordered),
                    phase_time_s=seconds[index] if len(ordered) > 1 else None,
                )
            )
    return parts


def _shown(each: Slice, key: str) -> HeaderValue:
    return each.instance_number or 0 if key == "InstanceNumber" else each.values.get(key, "")


def _sortable(value: Hashable) -> tuple[tuple[bool, float, str], ...]:
    """Numbers before texts, absent ones first, nested ones flat."""
    if isinstance(value, tuple):
        return tuple(part for one in value for part in _sortable(one))
    if isinstance(value, int | float):
        return ((False, float(value), ""),)
    return ((value is not None, -math.inf if value is None else 0.0, str(value or "")),)


def _in_time(slices: Sequence[Slice], phases: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """By the first element of _ORDER that differs between all of them."""
    for key in _ORDER:
        starts = [
            min((m for n in group if (m := _moment(slices[n], key)) is not None), default=None) for group in phases
        ]
        if None not in starts and len(set(starts)) == len(starts):
            return [group for _, group in sorted(zip(starts, phases, strict=True), key=lambda pair: pair[0] or 0.0)]
    return sorted(phases, key=min)


def _moment(each: Slice, key: str) -> float | None:
    """An element as a number that grows with time; None where it tells none."""
    value = each.instance_number if key == "InstanceNumber" else each.values.get(key)
    if key in _CLOCKS:
        return seconds(str(value or ""))
    return float(value) if isinstance(value, int | float) else None


def seconds(text: str) -> float | None:
    """Seconds of a DICOM time, since midnight, or of a date and time, since 1970 (PS3.5 6.2, VR TM and DT)."""
    found = _CLOCK.fullmatch(text.strip(" \0").replace(":", ""))
    if not found:
        return None
    date, hours, minutes, rest = found.groups()
    of_day = int(hours) * 3600 + int(minutes or 0) * 60 + float(rest or 0)
    if not date:
        return of_day
    try:
        return datetime.strptime(date, "%Y%m%d").replace(tzinfo=UTC).timestamp() + of_day
    except ValueError:
        return None


_CLOCK = re.compile(r"(\d{8})?(\d{2})(?:(\d{2})(\d{2}(?:\.\d{1,6})?)?)?(?:[+-]\d{4})?")


def _nearest(slices: Sequence[Slice], places: Sequence[int], keys: Sequence[str]) -> str:
    """The element that comes nearest to a complete split, with its figure."""
    count = len(set(places))
    best: tuple[int, str] | None = None
    for key in keys:
        groups = _grouped(slices, (key,))
        whole = sum(len(group) == count and len({places[n] for n in group}) == count for group in groups)
        if whole and (best is None or whole > best[0]):
            short = ", ".join(f"{_shown(slices[g[0]], key)} has {len(g)}" for g in groups if len(g) != count)
            figure = f"{whole} of its {len(groups)} values have {count} slices; {short[:200]}"
            best = whole, f"; {key} comes nearest: {figure}"
    return best[1] if best else ""
