"""What rules saw and made of it: the values that pairing leaves behind, for reasons and traces.

Law: pure values; words are made of them elsewhere, and only where they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from dicomnode.conditions import Check
from dicomnode.model import Ambiguity, Pair
from dicomnode.rule import Rule
from dicomnode.scopes import Key, Scope

LeftOut = tuple[str, Check]
"""Where it is written, and what was seen."""


@dataclass
class ScopeFinding:
    """What one rule made of one scope.

    Attributes
    ----------
    roles
        Volumes by the role they fill, with their score.
    by_fallback
        Roles that were filled by `fallback`.
    free
        Who may still be fixed and moving, given the pairs that stand.
    references
        What the rule's pairs of this scope were moved onto.
    undecided
        Why the choice was not made, for those it was among.
    waits
        Why nothing is decided yet; empty where something is.
    """

    scope: Scope
    roles: dict[str, dict[Key, float]]
    by_fallback: set[str]
    pairs: list[Pair] = field(default_factory=list)
    free: tuple[dict[Key, float], dict[Key, float]] = field(default_factory=lambda: ({}, {}))
    references: set[Key] = field(default_factory=set)
    undecided: dict[Key, str] = field(default_factory=dict)
    waits: str = ""
    ambiguity: Ambiguity | None = None


@dataclass
class RuleFinding:
    """What one rule made of the patient's volumes.

    Attributes
    ----------
    left_out
        Volumes that `exclude` or `require` leaves out: where it is written, and the check.
    outside
        Volumes that `when` does not hold for.
    scopeless
        Volumes that the rule looks at in no scope: why.
    look_again_at
        When a wait ends.
    """

    rule: Rule
    left_out: dict[Key, LeftOut] = field(default_factory=dict)
    outside: dict[Key, Check] = field(default_factory=dict)
    scopeless: dict[Key, str] = field(default_factory=dict)
    scopes: list[ScopeFinding] = field(default_factory=list)
    look_again_at: datetime | None = None
    lacking_priors: list[str] = field(default_factory=list)


def label(key: Key) -> str:
    """How a volume is called: its series, and which of the series' volumes where it is not the first."""
    return f"{key[0]}#{key[1]}" if key[1] else key[0]


def keys_of(pair: Pair) -> tuple[Key, Key]:
    """The fixed and the moving volume."""
    return (
        (pair.fixed_series_instance_uid, pair.fixed_volume_number),
        (pair.moving_series_instance_uid, pair.moving_volume_number),
    )
