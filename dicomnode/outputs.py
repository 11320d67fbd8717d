"""What a rule can ask to be made, and how a registered series may look."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

from dicomnode.document import ProblemError, Section

OUTPUTS = ("series", "sro", "dsr")
"""What a rule makes where it does not say."""
ALL_OUTPUTS = (
    *OUTPUTS,
    "series_4d",
    "dsr-inverse",
    "sr",
    "sc",
    "pmm",
    "jacobian",
    "displacement",
    "overlap",
    "uptake",
    "blending",
    "contours",
    "segmentations",
)
DESCRIPTION = "REG {moving} to {fixed}"


def each_an_output(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same, where every name is an output and stands once."""
    for index, name in enumerate(names):
        if name not in ALL_OUTPUTS or name in names[:index]:
            raise ProblemError((index,), name, f"one of {', '.join(ALL_OUTPUTS)}, each once")
    return names


def _is_series_description(pattern: str) -> str:
    """PS3.5 6.2: a Long String is one line of at most 64 characters without a backslash."""
    bare = re.sub(r"\{(moving|fixed)\}", "", pattern)
    if re.search(r"[{}\\\x00-\x1f\x7f]", bare) or not 1 <= len(pattern.strip()) <= 64:
        raise ValueError("one line of 1 to 64 characters without backslash; in braces only {moving} and {fixed}")
    return pattern


class RegisteredSeries(Section):
    """How the registered series looks."""

    resolution: Literal["fixed", "moving"] = "fixed"
    """The fixed slices; or the fixed volume's box in voxels of the moving series' size."""
    description: Annotated[str, AfterValidator(_is_series_description)] = DESCRIPTION
    """Series Description; `{moving}` and `{fixed}` stand for those of the two series."""
