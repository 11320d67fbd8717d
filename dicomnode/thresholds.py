"""What a rule may say about which results are sent: limits on the figures of a registration, and of former ones.

Law: the defaults are measured, docs/verdict.md says how; every limit may be set to null.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dicomnode.document import ProblemError, Section

Number = Annotated[float, Field(strict=True)] | None


class Limits(Section):
    """Where a figure begins to be remarkable, and where it rules the result out; null: never."""

    warn: Number = None
    reject: Number = None


AT_LEAST = ("similarity_gain", "patch_nmi_gain", "patch_nmi_after", "overlap_fraction")
"""Figures of which more is better; of all others less is."""


class Thresholds(Section):
    """Limits by figure, `quality.Figures` says what each is; a gain is after less before."""

    similarity_gain: Limits = Limits(reject=0.0)
    patch_nmi_gain: Limits = Limits(warn=0.0)
    patch_nmi_after: Limits = Limits(warn=0.2, reject=0.1)
    patch_nmi_fell_fraction: Limits = Limits()
    overlap_fraction: Limits = Limits(warn=0.6, reject=0.25)
    folding_fraction: Limits = Limits(reject=0.0)
    sdlogj: Limits = Limits(warn=0.2, reject=0.55)
    nonlinear_p95_mm: Limits = Limits()
    nonlinear_max_mm: Limits = Limits(warn=35.0, reject=60.0)
    rotation_deg: Limits = Limits(warn=25.0, reject=90.0)
    translation_mm: Limits = Limits()
    inverse_consistency_p95_mm: Limits = Limits(warn=1.0)
    grid_error_mm: Limits = Limits(warn=0.2)
    report_rejected: Annotated[bool, Field(strict=True)] = False
    """Of a rejected result the `sr` of the rule's outputs is sent nevertheless, and nothing else."""

    @model_validator(mode="before")
    @classmethod
    def _partly(cls, given: object) -> object:
        """A limit that is not named keeps its default."""
        if not isinstance(given, dict):
            return given
        merged = dict(given)
        for name, value in given.items():
            default = cls.model_fields[name].default if name in cls.model_fields else None
            if isinstance(default, Limits) and isinstance(value, dict):
                merged[name] = {**default.model_dump(), **value}
        return merged

    @model_validator(mode="after")
    def _in_order(self) -> Thresholds:
        for name, limits in self.limits().items():
            if limits.warn is None or limits.reject is None:
                continue
            apart = limits.warn - limits.reject if name in AT_LEAST else limits.reject - limits.warn
            if apart < 0:
                expected = f"warn {'above' if name in AT_LEAST else 'below'} reject, {limits.reject:g}"
                raise ProblemError((name, "warn"), limits.warn, expected)
        return self

    def limits(self) -> dict[str, Limits]:
        """Every figure's limits, by its name."""
        return {name: value for name, value in self if isinstance(value, Limits)}


RejectionNote = Literal["none", "quality", "patient-safety", "retention"]
"""Why former results are withdrawn once others stand: the title of the Key Object Selection that says so."""
