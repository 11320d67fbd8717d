"""Values that rules ask for and no single element carries: contrast, number of slices, regular geometry.

Law: pure, and every value comes with the evidence it rests on. An undecided vote stays undecided.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dicomnode.model import HeaderValue, VolumeRef

Scalar = str | float | int | bool


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


def values_of(volume: VolumeRef, keyword: str) -> tuple[Scalar, ...]:
    """The non-empty values of one DICOM element, text stripped of padding."""
    attribute = _ATTRIBUTES.get(keyword)
    value: HeaderValue | None = getattr(volume, attribute) if attribute else volume.header.get(keyword)
    if value is None:
        return ()
    several = value if isinstance(value, list) else [value]
    stripped = (each.strip(" \0") if isinstance(each, str) else each for each in several)
    return tuple(each for each in stripped if each != "")


def contrast(volume: VolumeRef) -> Observation:
    """Whether contrast agent was given, by vote: True, False, or undecided at a draw.

    The element that should say so, ContrastBolusAgent, is filled for the native scan too by some scanners, and left
    out by others for the enhanced one; a description written for people weighs most.
    """
    votes = [vote for ballot in _BALLOTS if (vote := ballot(volume)) is not None]
    total = sum(weight for weight, _ in votes)
    evidence = ", ".join(f"{text} {weight:+d}" for weight, text in votes)
    return Observation((total > 0,), evidence) if total else Observation((), f"undecided: {evidence}")


def n_slices(volume: VolumeRef) -> Observation:
    """Number of slices."""
    return Observation((volume.n_slices,))


def geometry(volume: VolumeRef) -> Observation:
    """`regular` where the affine has three finite axes at right angles (1e-3), else `sheared`."""
    k, j, i = ([volume.affine[4 * row + column] for row in range(3)] for column in range(3))
    axes = [[c / length for c in axis] for axis in (k, j, i) if 0 < (length := sum(c * c for c in axis) ** 0.5) < 1e6]
    if len(axes) < 3:
        return Observation(("degenerate",))
    skew = max(abs(sum(a * b for a, b in zip(axes[m], axes[n], strict=True))) for m, n in ((0, 1), (0, 2), (1, 2)))
    return Observation(("regular",) if skew < 1e-3 else ("sheared",), f"cosine between axes {skew:.4f}")


DERIVED: dict[str, Callable[[VolumeRef], Observation]] = {
    "contrast": contrast,
    "n_slices": n_slices,
    "geometry": geometry,
}


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers of a description: split at anything else, and between letters and digits.

    `ABD_ART_3mm` → abd, art, 3, mm: the underscore that regular expressions take for a letter is none here.
    """
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


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

Vote = tuple[int, str]


def _vote_of_agent(volume: VolumeRef) -> Vote:
    agent = " ".join(str(value) for value in values_of(volume, "ContrastBolusAgent"))
    given = bool(agent) and not set(tokens(agent)) <= {"no", "none", "n", "a", "na", "0", "without", "ohne", "sans"}
    return (1 if given else -1, f"ContrastBolusAgent {agent[:40]!r}" if agent else "ContrastBolusAgent empty")


def _vote_of_volume(volume: VolumeRef) -> Vote | None:
    ml = _number(values_of(volume, "ContrastBolusVolume"))
    return None if ml is None else (1 if ml > 0 else -1, f"ContrastBolusVolume {ml:g}")


def _vote_of_start_time(volume: VolumeRef) -> Vote | None:
    start, acquired = (_seconds(values_of(volume, word)) for word in ("ContrastBolusStartTime", "AcquisitionTime"))
    if start is None or acquired is None or abs(acquired - start) > 12 * 3600:  # beyond lies midnight, not an order
        return None
    return (
        (1, "acquired after ContrastBolusStartTime")
        if acquired > start
        else (-2, "acquired before ContrastBolusStartTime")
    )


def _vote_of_text(keyword: str, weight: int) -> Callable[[VolumeRef], Vote | None]:
    def vote(volume: VolumeRef) -> Vote | None:
        text = " ".join(str(value) for value in values_of(volume, keyword))
        opinion = _opinion(text)
        return (opinion * weight, f"{keyword} {text[:60]!r}") if opinion else None

    return vote


_BALLOTS: tuple[Callable[[VolumeRef], Vote | None], ...] = (
    _vote_of_agent,
    _vote_of_volume,
    _vote_of_start_time,
    _vote_of_text("SeriesDescription", 3),
    _vote_of_text("ImageComments", 1),
    _vote_of_text("ProtocolName", 1),  # often names the whole protocol, so the same for native and enhanced
)


def _opinion(text: str) -> int:
    """+1 enhanced, -1 native, 0 neither or both."""
    words = tokens(re.sub(r"\+\s?c\b|\bc\+", " contrast ", text.lower()))
    found, at = set(), 0
    while at < len(words):
        length = next((n for n in range(_LONGEST, 0, -1) if tuple(words[at : at + n]) in _PHRASES), 0)
        if length:
            found.add(_PHRASES[tuple(words[at : at + length])])
        at += max(length, 1)
    return sum(found) if len(found - {0}) == 1 else 0


def _phrases(sign: int, text: str) -> dict[tuple[str, ...], int]:
    return {tuple(phrase.split()): sign for phrase in text.split(",")}


# Longest phrase first decides: `pre contrast` is one phrase and native, `contrast` alone is enhanced.
_PHRASES = {
    **_phrases(-1, """
        native, nativ, nativo, nativa, natif, nativphase, nc, ncct, nect, nce, plain, unenhanced, unenh, pre,
        precontrast, pre contrast, pre con, pre gd, pre gad, pre km, pre iv, non contrast, noncontrast, non
        con, noncon, non enhanced, nonenhanced, no contrast, no iv, no iv contrast, without, without contrast,
        without iv, without iv contrast, w o, wo, w o contrast, wo contrast, w o iv, wo iv, w o iv contrast,
        wo iv contrast, ohne km, ohne kontrast, ohne kontrastmittel, vor km, sans injection, sans inj, sans
        contraste, sans iv, sans pdc, sin contraste, sem contraste, senza contrasto, senza mdc, basale, zonder
        contrast, blanco"""),
    **_phrases(+1, """
        contrast, contraste, contrasto, enhanced, ce, cect, post, postcontrast, post contrast, post con, post
        gd, post gad, post km, post iv, with contrast, with iv, with iv contrast, w contrast, w iv, w iv
        contrast, gd, gad, gado, gadolinium, art, arterial, arteriell, arterielle, arteriel, late arterial,
        late art, early arterial, hap, portal, portal venous, portalvenous, porto venous, portovenous,
        portale, porta, pv, pvp, ven, venous, venös, venosa, veineux, portalvenös, delayed, delay, late,
        equilibrium, tardif, spät, spätphase, nephrographic, hepatobiliary, hbp, km, mit km, mit kontrast, mit
        kontrastmittel, nach km, avec injection, avec inj, injecté, con contraste, com contraste, con mdc, mdc"""),
    **_phrases(0, """
        w wo, w wo contrast, w and wo, w and w o, with and without, with and without contrast, w w o, w w o
        contrast, with without, with without contrast, pre post, pre and post, pre post contrast, mit und
        ohne, avec et sans, post op, post operative, postop, post surgery, post biopsy, post treatment, post
        rt, pre op, preop, pre treatment, pre biopsy, pre rt"""),
}  # fmt: skip
_LONGEST = max(len(phrase) for phrase in _PHRASES)


def _number(values: Iterable[Scalar]) -> float | None:
    for value in values:
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _seconds(values: Iterable[Scalar]) -> float | None:
    """Seconds since midnight of a TM value, PS3.5 Table 6.2-1: HHMMSS.FFFFFF, parts from the right may be absent."""
    text = next((str(value) for value in values), "").replace(":", "")
    found = re.fullmatch(r"(\d{2})(\d{2})?(\d{2}(?:\.\d{1,6})?)?", text)
    if not found:
        return None
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds
