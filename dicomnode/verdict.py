"""Accept, warn or reject: judged on what would be delivered, not on what was hoped for. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dicomnode.model import Verdict
from dicomnode.quality import Figures
from dicomnode.thresholds import AT_LEAST, Thresholds


def judge(figures: Figures, thresholds: Thresholds) -> tuple[Verdict, str]:
    """Judge a registration by its figures.

    Returns
    -------
    tuple[Verdict, str]
        The reason names every figure beyond a limit, with the limit; it is empty where accepted. A figure that could
        not be measured is beyond every limit.
    """
    values = {
        **vars(figures),
        "similarity_gain": figures.similarity_after - figures.similarity_before,
        "patch_nmi_gain": figures.patch_nmi_after - figures.patch_nmi_before,
    }
    found: dict[Verdict, list[str]] = {Verdict.REJECT: [], Verdict.WARN: []}
    for name, limits in thresholds.limits().items():
        for verdict, limit in ((Verdict.REJECT, limits.reject), (Verdict.WARN, limits.warn)):
            if limit is not None and not _holds(name, values[name], limit):
                found[verdict].append(_told(name, values[name], limit))
                break
    for verdict, reasons in found.items():
        if reasons:
            return verdict, "; ".join(reasons)
    return Verdict.ACCEPT, ""


def of_all(judged: Sequence[tuple[Verdict, str]]) -> tuple[Verdict, str]:
    """The verdict on a job of one or several pairs: rejected only where every pair is."""
    if len(judged) == 1:
        return judged[0]
    rejected = [reason for verdict, reason in judged if verdict == Verdict.REJECT]
    if len(rejected) == len(judged):
        return Verdict.REJECT, f"every phase was rejected, the first: {rejected[0]}"
    if rejected:
        return Verdict.WARN, f"{len(rejected)} of {len(judged)} phases were rejected, the first: {rejected[0]}"
    warned = [reason for verdict, reason in judged if verdict == Verdict.WARN]
    return (Verdict.WARN, warned[0]) if warned else (Verdict.ACCEPT, "")


def _holds(name: str, value: float, limit: float) -> bool:
    return value >= limit if name in AT_LEAST else value <= limit


def _told(name: str, value: float, limit: float) -> str:
    *words, last = name.split("_")
    unit = _UNITS.get(last, "")
    said = " ".join(words if unit else [*words, last])
    got = f"{value:.4g}{unit}" if math.isfinite(value) else "not measurable"
    return f"{said} {got}, expected at {'least' if name in AT_LEAST else 'most'} {limit:.4g}{unit}"


_UNITS = {"mm": " mm", "deg": " degrees"}
