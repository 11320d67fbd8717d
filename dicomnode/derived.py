"""Values that rules ask for and no single element carries: contrast, phase, orientation, spacing, field of view …

Law: pure, and every value comes with the evidence it rests on. An undecided vote stays undecided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property

from dicomnode.model import HeaderValue, VolumeRef
from dicomnode.vocabulary import BUILT_IN, CONTRAST_PHASES, ENHANCED, Vocabulary, tokens

Scalar = str | float | int | bool
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Observation:
    """What a volume says on one name.

    Attributes
    ----------
    values
        Every value; empty where absent, empty or undecided.
    evidence
        What a derived value rests on, for people.
    """

    values: tuple[Scalar, ...]
    evidence: str = ""


@dataclass(eq=False)
class Subject:
    """One volume as rules look at it; each value is derived once.

    Attributes
    ----------
    vocabulary
        What its descriptions are read with.
    phase
        (zero-based index, number of phases) within its dynamic series; None where it is in none.
    """

    volume: VolumeRef
    vocabulary: Vocabulary = BUILT_IN
    phase: tuple[int, int] | None = None
    _seen: dict[str, Observation] = field(default_factory=dict, repr=False)
    _frame: Frame | None = field(default=None, repr=False)

    def observe(self, name: str) -> Observation:
        """Values of a DICOM keyword or derived name."""
        seen = self._seen.get(name)
        if seen is None:
            derive = DERIVED.get(name)
            seen = Observation(values_of(self.volume, name)) if derive is None else derive(self)
            self._seen[name] = seen
        return seen

    @cached_property
    def day(self) -> date | None:
        """The day of the examination; None where no element says it."""
        return study_date(self.volume)

    @property
    def frame(self) -> Frame:
        """Where the volume lies."""
        if self._frame is None:
            self._frame = Frame.of(self.volume)
        return self._frame

    def in_phase(self, index: int, count: int) -> Subject:
        """The same volume as phase `index` of `count`."""
        return Subject(self.volume, self.vocabulary, (index, count), _frame=self._frame)


@dataclass(frozen=True)
class Frame:
    """A volume's axes in LPS.

    Attributes
    ----------
    axes
        Steps along slice, row and column index, mm.
    normal
        Unit normal of the slice plane: row direction × column direction (PS3.3 C.7.6.2.1.1).
    center
        Of the volume, mm.
    shape
        (slices, rows, columns).
    """

    axes: tuple[Vector, Vector, Vector]
    normal: Vector
    center: Vector
    shape: tuple[int, int, int]

    @staticmethod
    def of(volume: VolumeRef) -> Frame:
        """From the volume's affine."""
        a = volume.affine
        axes = tuple((a[n], a[4 + n], a[8 + n]) for n in range(3))
        k, j, i = axes
        cross = (i[1] * j[2] - i[2] * j[1], i[2] * j[0] - i[0] * j[2], i[0] * j[1] - i[1] * j[0])
        length = math.sqrt(dot(cross, cross)) or math.nan
        half = [(n - 1) / 2 for n in volume.shape]
        center = tuple(a[4 * r + 3] + half[0] * k[r] + half[1] * j[r] + half[2] * i[r] for r in range(3))
        normal = (cross[0] / length, cross[1] / length, cross[2] / length)
        return Frame((k, j, i), normal, (center[0], center[1], center[2]), volume.shape)

    def extent(self, normal: Vector) -> tuple[float, float]:
        """Lowest and highest coordinate of the volume's corners along a unit vector, mm, outer voxel edges included."""
        middle = dot(self.center, normal)
        half = sum(n * abs(dot(axis, normal)) for n, axis in zip(self.shape, self.axes, strict=True)) / 2
        return middle - half, middle + half


def dot(a: Vector, b: Vector) -> float:
    """Scalar product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def values_of(volume: VolumeRef, keyword: str) -> tuple[Scalar, ...]:
    """The non-empty values of one DICOM element, text stripped of padding."""
    attribute = _ATTRIBUTES.get(keyword)
    value: HeaderValue | None = getattr(volume, attribute) if attribute else volume.header.get(keyword)
    if value is None:
        return ()
    several = value if isinstance(value, list) else [value]
    stripped = (each.strip(" \0") if isinstance(each, str) else each for each in several)
    return tuple(each for each in stripped if each != "")


def acquired_s(volume: VolumeRef) -> float | None:
    """When the volume was acquired, seconds since an arbitrary midnight; None where no time is given.

    TriggerTime and the like order phases within one series; between series only the clock does.
    """
    for day, clock in (("AcquisitionDate", "AcquisitionTime"), ("ContentDate", "ContentTime"), ("", "SeriesTime")):
        seconds = _seconds(values_of(volume, clock))
        stamp = next((str(v) for v in values_of(volume, "AcquisitionDateTime")), "")
        if clock == "AcquisitionTime" and seconds is None and len(stamp) >= 12:
            seconds = _seconds((stamp[8:].split("+")[0].split("-")[0],))
        if seconds is not None:
            on = _day(values_of(volume, day)) or study_date(volume)
            return seconds + 86400.0 * (on.toordinal() if on else 0)
    return None


def study_date(volume: VolumeRef) -> date | None:
    """The day of the examination: StudyDate, else AcquisitionDate, else SeriesDate; None where none is a date."""
    for keyword in ("StudyDate", "AcquisitionDate", "SeriesDate"):
        if day := _day(values_of(volume, keyword)):
            return day
    return None


# ── derived values ──


def contrast(subject: Subject) -> Observation:
    """Whether contrast agent was given, by vote: True, False, or undecided at a draw.

    The element that should say so, ContrastBolusAgent, is filled for the native scan too by some scanners, and left
    out by others for the enhanced one; a description written for people weighs most.
    """
    votes = [vote for ballot in _BALLOTS if (vote := ballot(subject)) is not None]
    total = sum(weight for weight, _ in votes)
    evidence = ", ".join(f"{text} {weight:+d}" for weight, text in votes)
    return Observation((total > 0,), evidence) if total else Observation((), f"undecided: {evidence}")


def contrast_phase(subject: Subject) -> Observation:
    """`native`, `arterial`, `portal`, `delayed` or `hepatobiliary`: what a description says, else the seconds.

    A text that names two phases says nothing. Where the vote on contrast says otherwise, the phase is undecided.
    """
    given = subject.observe("contrast").values
    for keyword in _DESCRIPTIONS:
        text = _joined(subject, keyword)
        found = [name for name in CONTRAST_PHASES if name in subject.vocabulary.read(text)]
        if len(found) == 1 and (not given or given[0] == (found[0] != "native")):
            return Observation((found[0],), f"{keyword} {text[:60]!r}")
    if given == (False,):
        return Observation(("native",), "no contrast agent")
    since = subject.observe("time_since_contrast_s").values
    for name, low, high in (("arterial", 12, 48), ("portal", 55, 100), ("delayed", 120, 900)):
        if since and low <= float(since[0]) <= high:
            return Observation((name,), f"{since[0]:g} s since contrast")
    return Observation((), "no description tells it")


def weighting(subject: Subject) -> Observation:
    """`t1`, `t2`, `flair` or `other` of an MR series: what its description says, else echo, repetition, inversion time.

    Diffusion, susceptibility, maps and the parts of a Dixon series are `other`, whatever else is said of them.
    """
    if subject.volume.modality != "MR":
        return Observation((), "not MR")
    for keyword in ("SeriesDescription", "ProtocolName"):
        text = _joined(subject, keyword)
        said = subject.vocabulary.read(text)
        found = next((name for name in said if name in _OTHER_MR), None)
        if found is not None:
            return Observation(("other",), f"{keyword} {text[:60]!r} means {found}")
        named = {name.removesuffix("_flair") for name in said if name in ("t1", "t2", "flair", "t1_flair")}
        if "flair" in named and len(named) == 2:  # by words apart: T2 dark fluid is FLAIR, T1 dark fluid is T1
            named.remove("t2" if "t2" in named else "flair")
        if len(named) == 1:
            return Observation((named.pop(),), f"{keyword} {text[:60]!r}")
    echo, repetition, inversion = (
        _number(values_of(subject.volume, word)) for word in ("EchoTime", "RepetitionTime", "InversionTime")
    )
    if echo is None or repetition is None:
        return Observation((), "no description tells it, and EchoTime or RepetitionTime is missing")
    evidence = f"EchoTime {echo:g}, RepetitionTime {repetition:g}" + (
        f", InversionTime {inversion:g}" if inversion else ""
    )
    if inversion is not None and 1500 <= inversion <= 3000 and echo >= 60:
        return Observation(("flair",), evidence)
    if echo >= 70 and repetition >= 1500:
        return Observation(("t2",), evidence)
    return Observation(("t1",) if echo <= 30 and repetition <= 3000 else (), evidence)


_OTHER_MR = ("dwi", "swi", "map", "opposed_phase", "in_phase", "fat", "water")


def time_since_contrast_s(subject: Subject) -> Observation:
    """Seconds from ContrastBolusStartTime to the acquisition; negative before."""
    start, acquired = (
        _seconds(values_of(subject.volume, word)) for word in ("ContrastBolusStartTime", "AcquisitionTime")
    )
    if start is None or acquired is None:
        return Observation((), "ContrastBolusStartTime or AcquisitionTime is missing")
    # beyond half a day lies midnight, not an order
    return Observation((round((acquired - start + 43200) % 86400 - 43200, 3),))


def n_slices(subject: Subject) -> Observation:
    """Number of slices."""
    return Observation((subject.volume.n_slices,))


def geometry(subject: Subject) -> Observation:
    """`regular` where the affine has three finite axes at right angles (1e-3), else `sheared`."""
    k, j, i = subject.frame.axes
    axes = [[c / length for c in axis] for axis in (k, j, i) if 0 < (length := sum(c * c for c in axis) ** 0.5) < 1e6]
    if len(axes) < 3:
        return Observation(("degenerate",))
    skew = max(abs(sum(a * b for a, b in zip(axes[m], axes[n], strict=True))) for m, n in ((0, 1), (0, 2), (1, 2)))
    return Observation(("regular",) if skew < 1e-3 else ("sheared",), f"cosine between axes {skew:.4f}")


def orientation(subject: Subject) -> Observation:
    """`axial`, `coronal` or `sagittal` where the slice normal is within 35 degrees of that axis, else `oblique`."""
    normal = [abs(c) for c in subject.frame.normal]
    name, cosine = max(zip(("sagittal", "coronal", "axial"), normal, strict=True), key=lambda pair: pair[1])
    if math.isnan(cosine):
        return Observation(())
    degrees = math.degrees(math.acos(min(1.0, cosine)))
    return Observation((name if degrees <= 35 else "oblique",), f"{degrees:.0f} degrees off {name}")


def slice_spacing_mm(subject: Subject) -> Observation:
    """Distance between slice centers, mm."""
    k = subject.frame.axes[0]
    return Observation((round(math.sqrt(dot(k, k)), 4),))


def field_of_view_mm(subject: Subject) -> Observation:
    """The larger side of the slice, mm."""
    _, j, i = subject.frame.axes
    _, rows, columns = subject.frame.shape
    return Observation((round(max(rows * math.sqrt(dot(j, j)), columns * math.sqrt(dot(i, i))), 2),))


def coverage_mm(subject: Subject) -> Observation:
    """Extent along the slice normal, mm."""
    low, high = subject.frame.extent(subject.frame.normal)
    return Observation(() if math.isnan(low) else (round(high - low, 2),))


def phase(subject: Subject) -> Observation:
    """Index within the dynamic series, zero-based, with its words: first, middle (n // 2), last, others."""
    if subject.phase is None:
        return Observation((), "of no dynamic series")
    index, count = subject.phase
    words = {0: "first", count // 2: "middle", count - 1: "last"}
    word = [words[index]] if index in words else []
    return Observation((index, *word, "others"), f"{index} of {count} phases")


def n_phases(subject: Subject) -> Observation:
    """Number of phases of its dynamic series; 1 where it is in none."""
    return Observation((1 if subject.phase is None else subject.phase[1],))


def phases_in_series(subject: Subject) -> Observation:
    """Number of phases within its own series."""
    return Observation((subject.volume.phases,))


DERIVED: dict[str, Callable[[Subject], Observation]] = {
    "contrast": contrast,
    "contrast_phase": contrast_phase,
    "weighting": weighting,
    "time_since_contrast_s": time_since_contrast_s,
    "n_slices": n_slices,
    "geometry": geometry,
    "orientation": orientation,
    "slice_spacing_mm": slice_spacing_mm,
    "field_of_view_mm": field_of_view_mm,
    "coverage_mm": coverage_mm,
    "phase": phase,
    "n_phases": n_phases,
    "phases_in_series": phases_in_series,
}

WORDS: dict[str, tuple[str, ...]] = {
    "contrast_phase": CONTRAST_PHASES,
    "geometry": ("regular", "sheared", "degenerate"),
    "orientation": ("axial", "coronal", "sagittal", "oblique"),
    "weighting": ("t1", "t2", "flair", "other"),
    "phase": ("first", "middle", "last", "others"),
}
"""The words that derived values with words can have; `phase` is a number too, the others never are."""

_ATTRIBUTES = {
    "PatientID": "patient_id",
    "IssuerOfPatientID": "issuer_of_patient_id",
    "PatientBirthDate": "patient_birth_date",
    "PatientSex": "patient_sex",
    "StudyInstanceUID": "study_instance_uid",
    "SeriesInstanceUID": "series_instance_uid",
    "FrameOfReferenceUID": "frame_of_reference_uid",
    "Modality": "modality",
}
"""Elements that the volume carries under a name of its own: one truth, whatever the header holds."""

# ── the vote on contrast ──

Vote = tuple[int, str]
_DESCRIPTIONS = ("SeriesDescription", "ImageComments", "ProtocolName")
_NO_AGENT = {
    "no",
    "none",
    "n",
    "a",
    "na",
    "0",
    "without",
    "ohne",
    "sans",
    "sin",
    "senza",
    "nein",
    "non",
    "nil",
    "keine",
}


def _vote_of_agent(subject: Subject) -> Vote:
    agent = _joined(subject, "ContrastBolusAgent")
    given = bool(agent) and not set(tokens(agent)) <= _NO_AGENT
    return (1 if given else -1, f"ContrastBolusAgent {agent[:40]!r}" if agent else "ContrastBolusAgent empty")


def _vote_of_volume(subject: Subject) -> Vote | None:
    ml = _number(values_of(subject.volume, "ContrastBolusVolume"))
    return None if ml is None else (1 if ml > 0 else -1, f"ContrastBolusVolume {ml:g}")


def _vote_of_start_time(subject: Subject) -> Vote | None:
    start, acquired = (
        _seconds(values_of(subject.volume, word)) for word in ("ContrastBolusStartTime", "AcquisitionTime")
    )
    if start is None or acquired is None or abs(acquired - start) > 12 * 3600:  # beyond lies midnight, not an order
        return None
    return (
        (1, "acquired after ContrastBolusStartTime")
        if acquired > start
        else (-2, "acquired before ContrastBolusStartTime")
    )


def _vote_of_text(keyword: str, weight: int) -> Callable[[Subject], Vote | None]:
    def vote(subject: Subject) -> Vote | None:
        text = _joined(subject, keyword)
        opinion = _opinion(subject.vocabulary.read(text)) if text else 0
        return (opinion * weight, f"{keyword} {text[:60]!r}") if opinion else None

    return vote


_BALLOTS: tuple[Callable[[Subject], Vote | None], ...] = (
    _vote_of_agent,
    _vote_of_volume,
    _vote_of_start_time,
    _vote_of_text("SeriesDescription", 3),
    _vote_of_text("ImageComments", 1),
    _vote_of_text("ProtocolName", 1),  # often names the whole protocol, so the same for native and enhanced
)


def _opinion(names: Iterable[str]) -> int:
    """+1 enhanced, -1 native, 0 neither or both."""
    enhanced, native = not ENHANCED.isdisjoint(names), "native" in names
    return 0 if "mixed" in names or enhanced == native else 1 if enhanced else -1


def _joined(subject: Subject, keyword: str) -> str:
    return " ".join(str(value) for value in values_of(subject.volume, keyword))


def _number(values: Iterable[Scalar]) -> float | None:
    for value in values:
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _day(values: Iterable[Scalar]) -> date | None:
    text = next((str(value) for value in values), "").replace(".", "")
    if len(text) != 8 or not (text.isascii() and text.isdigit()):
        return None
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return None


def _seconds(values: Iterable[Scalar]) -> float | None:
    """Seconds since midnight of a TM value, PS3.5 Table 6.2-1: HHMMSS.FFFFFF, parts from the right may be absent."""
    text = next((str(value) for value in values), "").replace(":", "")
    found = re.fullmatch(r"(\d{2})(\d{2})?(\d{2}(?:\.\d{1,6})?)?", text)
    if not found:
        return None
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds
